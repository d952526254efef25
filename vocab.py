"""The answer vocabulary: words <-> ids, built from training answers only.

An answer is cut into words and marks. A mark or word that stood without white space before it
carries the prefix "##", so joining the tokens gives the answer back exactly, but for case and runs
of white space: "don't", "man's left hand", "10:30" and "red, white and blue" survive a round trip.
"""
import re
from collections import Counter

PAD, START, END, UNK = 0, 1, 2, 3
SPECIALS = ("<pad>", "<start>", "<end>", "<unk>")
GLUE = "##"
# a word may hold apostrophes, colons, points, hyphens and slashes between its letters: don't, 10:30, 3.5, t-shirt
WORD_OR_MARK = re.compile(r"\w+(?:['’:./-]\w+)*|[^\w\s]")


def tokenize(answer):
    """Lower-cased words and marks of `answer`; `" ".join` of them with " ##" removed is the answer again."""
    tokens = []
    for chunk in answer.lower().split():
        pieces = WORD_OR_MARK.findall(chunk)
        tokens += pieces[:1] + [GLUE + piece for piece in pieces[1:]]
    return tokens


def detokenize(tokens):
    """The text that `tokenize` cut into `tokens`."""
    text = ""
    for token in tokens:
        # "##" alone cannot come from tokenize: a glued mark has at least three characters
        glued = token.startswith(GLUE) and len(token) > len(GLUE)
        text += token[len(GLUE):] if glued else f" {token}"
    return text.strip()


class Vocab:
    """Words with ids 0..len-1: the four specials, then words ordered by count (descending), then by word."""

    def __init__(self, words):
        """`words`: all words in id order, specials first. Raises ValueError if they are not that."""
        words = list(words)
        if tuple(words[:len(SPECIALS)]) != SPECIALS or len(set(words)) != len(words):
            raise ValueError(f"not a vocabulary: it must start with {SPECIALS} and hold no word twice")
        self.words = words
        self.ids = {word: index for index, word in enumerate(words)}

    @classmethod
    def build(cls, train_answers, min_word_freq=1):
        """Vocabulary of the training answers: every word seen at least `min_word_freq` times.

        Raises ValueError where there is nothing to learn: no answer, one and the same answer
        everywhere, or no word frequent enough.
        """
        train_answers = list(train_answers)
        if not train_answers:
            raise ValueError("no training answers: check the 'split' column, which needs rows with 'train'")
        if len(train_answers) > 1 and len(set(train_answers)) == 1:
            raise ValueError(f"all {len(train_answers)} training answers are {train_answers[0]!r}: nothing to learn; "
                             "check the 'answer' column")
        counts = Counter(token for answer in train_answers for token in tokenize(answer))
        kept = sorted((word for word, count in counts.items() if count >= min_word_freq),
                      key=lambda word: (-counts[word], word))
        if not kept:
            raise ValueError(f"no answer word occurs {min_word_freq} times: lower it with --min-word-freq 1")
        return cls([*SPECIALS, *kept])

    def __len__(self):
        return len(self.words)

    def encode(self, answer, max_len):
        """Ids of `<start> words <end>`, at most `max_len` of them after the start; the end is never cut off.

        Unknown words become <unk>. Returns a list of 2 to max_len + 1 ints.
        """
        ids = [self.ids.get(token, UNK) for token in tokenize(answer)]
        return [START, *ids[:max_len - 1], END]

    def decode(self, ids):
        """The text of `ids` up to the first <end>; <pad> and <start> are skipped, <unk> is shown."""
        tokens = []
        for index in ids:
            if index == END:
                break
            if index not in (PAD, START):
                tokens.append(self.words[index])
        return detokenize(tokens)
