"""The answer vocabulary: tokens <-> ids, built from training answers only.

An answer is split into tokens: words and punctuation marks. A token without white space before it gets the prefix
"##". Joining the tokens therefore gives the answer back, in the spelling of `normalise`.
"don't", "man's left hand", "10:30" and "red, white and blue" stay as they are. Scripts that are written without spaces
between words are split into characters as people count them: "红色的书" has four tokens, and a Thai vowel sign stays with
its consonant.
"""
import unicodedata
from collections import Counter

import regex

PAD, START, END, UNK = 0, 1, 2, 3
SPECIALS = ("<pad>", "<start>", "<end>", "<unk>")
GLUE = "##"
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}ーｰ\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
RUN = rf"[[\w\p{{N}}]--{UNSPACED}]+"  # letters with their signs (vowels of Hindi and Arabic), numbers and "_"
WORD = regex.compile(rf"(?V1)(?={UNSPACED})\X|{RUN}")  # \X: a character with its signs
# a run may go on after an apostrophe, colon, point, hyphen or slash: don't, 10:30, 3.5, t-shirt; the rest are marks and emoji
WORD_OR_MARK = regex.compile(rf"{WORD.pattern}(?:['’:./-]{RUN})*|\X")


def nfc(text):
    """`text` with its accents in one spelling: "é" may be typed as one character or as two, which look the same."""
    return unicodedata.normalize("NFC", text)


def normalise(text):
    """`text` as answers are learned and compared: in lower case, with white space collapsed, in NFC."""
    return " ".join(nfc(text.lower()).split())


def tokenize(answer):
    """The tokens of `answer` (list of str), in the spelling of `normalise`."""
    tokens = []
    for chunk in normalise(answer).split(" "):
        pieces = WORD_OR_MARK.findall(chunk)
        tokens += pieces[:1] + [GLUE + piece for piece in pieces[1:]]
    return tokens


def detokenize(tokens):
    """The text of `tokens`, the inverse of `tokenize`."""
    return (" " + " ".join(tokens)).replace(f" {GLUE}", "").strip()


class Vocab:
    """Tokens ("words" below) with ids 0 to len - 1: the four special ones, then the others, the most frequent first.

    With `whole_answers` every answer is a single token: the classes of `model.AnswerClassifier`.
    """

    def __init__(self, words, whole_answers=False):
        """`words`: all words in the order of their ids. Raises ValueError if they are not a vocabulary."""
        words = list(words)
        if tuple(words[:len(SPECIALS)]) != SPECIALS or len(set(words)) != len(words):
            raise ValueError(f"not a vocabulary: it must start with {SPECIALS} and contain no word twice")
        self.words, self.whole_answers = words, whole_answers
        self.ids = {word: index for index, word in enumerate(words)}

    @classmethod
    def build(cls, train_answers, min_word_freq=1, whole_answers=False):
        """The vocabulary of all words that occur at least `min_word_freq` times. Equal counts are ordered by word.

        Raises ValueError if there is nothing to learn: no answer, only one distinct answer, or no word frequent enough.
        """
        train_answers = list(train_answers)
        if not train_answers:
            raise ValueError("no training answers: check the 'split' column, which needs rows with 'train'")
        if len(train_answers) > 1 and len(set(train_answers)) == 1:
            raise ValueError(f"all {len(train_answers)} training answers are {train_answers[0]!r}: nothing to learn; "
                             "check the 'answer' column")
        vocab = cls(SPECIALS, whole_answers)
        counts = Counter(token for answer in train_answers for token in vocab.tokenize(answer))
        if special := sorted(counts.keys() & set(SPECIALS)):
            raise ValueError(f"the training answer {special[0]!r} has a meaning of its own: it cannot be a whole answer of "
                             "--decoder classifier; remove its rows, or use --decoder gru")
        kept = sorted((word for word, count in counts.items() if count >= min_word_freq),
                      key=lambda word: (-counts[word], word))
        if not kept:
            raise ValueError(f"no answer word occurs {min_word_freq} times: lower it with --min-word-freq 1")
        return cls([*SPECIALS, *kept], whole_answers)

    def __len__(self):
        return len(self.words)

    def tokenize(self, answer):
        """The tokens of `answer` (list of str), in the spelling of `normalise`."""
        return [normalise(answer)] if self.whole_answers else tokenize(answer)

    def encode(self, answer, max_len):
        """The ids of <start>, the words and <end>: a list of 2 to `max_len` + 1 ints.

        A longer answer is truncated before its <end>. Unknown words become <unk>.
        """
        ids = [self.ids.get(token, UNK) for token in self.tokenize(answer)]
        return [START, *ids[:max_len - 1], END]

    def decode(self, ids):
        """The text of `ids` up to the first <end>, without <pad> and <start>. <unk> is shown."""
        tokens = []
        for index in ids:
            if index == END:
                break
            if index not in (PAD, START):
                tokens.append(self.words[index])
        return " ".join(tokens) if self.whole_answers else detokenize(tokens)
