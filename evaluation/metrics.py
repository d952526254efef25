"""Scores of answers as strings, with their intervals; every score is 0 to 100. No torch here.

`score_rows` gives the seven scores of each question, `summarise` and `by_type` their means with bootstrap
95 % intervals resampled by picture, `verdict` the line that compares a model with its floors and one human.
References are always the answers as humans wrote them, never passed through a vocabulary.
"""
import re
from collections import Counter
from functools import lru_cache

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

NAMES = ("mean_sentence_bleu", "multi_reference_bleu", "bleu_1", "bleu_2", "chrf", "exact_match", "vqa_accuracy")

BLEU_METRIC = BLEU(lowercase=True, effective_order=True)
CHRF_METRIC = CHRF(lowercase=True)

# Tables of the official VQA evaluator (VQAEval in GT-Vision-Lab/VQA).
VQA_MARKS = ";/[]\"{}()=+\\_-><@`,?!"
VQA_ARTICLES = ("a", "an", "the")
VQA_NUMBERS = {word: str(number) for number, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
# Each word is what its spellings with exactly one apostrophe missing become. The official table leaves words
# out ("lets" and "shes" stay) and has one entry the wrong way round; the capital I is never reached, since
# answers are in lower case by then.
VQA_CONTRACTED = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
    shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've
    'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've
    who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
    you'd've you'll you're you've""".split()
VQA_CONTRACTIONS = {word[:at] + word[at + 1:]: word for word in VQA_CONTRACTED
                    for at, letter in enumerate(word) if letter == "'"} | {"somebody'd": "somebodyd"}


def sentence_bleu(prediction, references, max_order=4):
    """Sentence BLEU, 0 to 100, exactly sacrebleu's (13a tokens, lower case, effective order, exponential smoothing).

    `references` is a list of strings (or one string); with several, n-grams may match any of them. A perfect
    answer of one word scores 100. `<unk>` counts as three tokens, so a reference must never contain it.
    """
    correct, total, length, reference_length = _ngram_matches(prediction, _as_tuple(references))
    return _bleu_of_counts(correct[:max_order], total[:max_order], length, reference_length)


def bleu_1(prediction, references):
    """Sentence BLEU of single words with brevity penalty, 0 to 100; arguments as `sentence_bleu`."""
    return sentence_bleu(prediction, references, max_order=1)


def bleu_2(prediction, references):
    """Sentence BLEU of words and pairs of words, 0 to 100; arguments as `sentence_bleu`."""
    return sentence_bleu(prediction, references, max_order=2)


def chrf(prediction, references):
    """Sentence chrF2 (character 1- to 6-grams, recall counted twice), sacrebleu's, lower case, 0 to 100; arguments
    as `sentence_bleu`, with several references the best one counts."""
    return _chrf(prediction, _as_tuple(references))


@lru_cache(maxsize=1 << 16)
def _chrf(prediction, references):
    return min(CHRF_METRIC.sentence_score(prediction, references).score, 100.0)


def _as_tuple(references):
    """One reference or several as a tuple without repeats, so that the scores can be remembered."""
    references = (references,) if isinstance(references, str) else tuple(dict.fromkeys(references))
    if not references:
        raise ValueError("a score needs at least one reference")
    return references


@lru_cache(maxsize=1 << 14)
def _ngrams(text):
    """Counts of the 1- to 4-grams of sacrebleu's tokens, and the number of tokens."""
    tokens = BLEU_METRIC.tokenizer(text.lower().rstrip()).split()
    ngrams = []
    for order in range(1, 5):
        ngrams += zip(*(tokens[shift:] for shift in range(order)), strict=False)
    return Counter(ngrams), len(tokens)


@lru_cache(maxsize=1 << 16)
def _ngram_matches(prediction, references):
    """What BLEU is made of: n-grams that match and n-grams in all (4 counts each), length, closest reference length.

    sacrebleu counts each pair anew for each order; counting once and keeping answers that come back makes the
    scores of priors and of ten humans per question several times faster. Its formula is used for the rest.
    """
    counts, length = _ngrams(prediction)
    known = [_ngrams(reference) for reference in references]
    correct, total = [0] * 4, [0] * 4
    for ngram, count in counts.items():
        most = max([reference_counts.get(ngram, 0) for reference_counts, _ in known])
        total[len(ngram) - 1] += count
        correct[len(ngram) - 1] += min(count, most)
    closest = min([other for _, other in known], key=lambda other: (abs(other - length), other))
    return tuple(correct), tuple(total), length, closest


@lru_cache(maxsize=1 << 14)  # short answers have few distinct counts
def _bleu_of_counts(correct, total, length, reference_length):
    """sacrebleu's formula on what `_ngram_matches` gives, up to the order of the counts."""
    score = BLEU.compute_bleu(list(correct), list(total), length, reference_length, smooth_method="exp",
                              effective_order=True, max_ngram_order=len(correct)).score
    return min(score, 100.0)  # a perfect score would be 100.00000000000004


def signature():
    """sacrebleu's signature of the headline: everything needed to compute the same number elsewhere."""
    BLEU_METRIC.sentence_score("a", ["a"])  # the signature holds the number of references of the last call
    return str(BLEU_METRIC.get_signature())


def exact_match(prediction, answer):
    """100 if both are equal in lower case with white space collapsed, else 0."""
    return 100.0 * (prediction.lower().split() == answer.lower().split())


def vqa_accuracy(prediction, answers):
    """Official VQA accuracy of one answer against the human answers of its question (list of str), 0 to 100.

    Mean over the humans of min(1, matches among the other humans / 3). Two or three humans: min(1, matches /
    (n - 1)); one: equality of the normalised answers. With two or more humans, answers are normalised only where
    the humans disagree, so "NO" scores 0 where all wrote "no": the official evaluator's rule, kept with its
    other quirks. Raises ValueError without answers.
    """
    if not answers:
        raise ValueError("VQA accuracy needs at least one human answer")
    num_humans = len(answers)
    prediction, answers = _one_line(prediction), [_one_line(answer) for answer in answers]
    if num_humans == 1 or len(set(answers)) > 1:
        prediction, answers = normalise_answer(prediction), [normalise_answer(answer) for answer in answers]
    matches = answers.count(prediction)
    if num_humans <= 3:
        return 100.0 * min(1, matches / max(1, num_humans - 1))
    for_a_giver, for_the_others = min(1, (matches - 1) / 3), min(1, matches / 3)
    return 100.0 * (matches * for_a_giver + (num_humans - matches) * for_the_others) / num_humans


def _one_line(text):
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 16)
def normalise_answer(text):
    """The official VQA evaluator's normal form of an answer: punctuation, then digits and articles, then contractions.

    A mark is deleted where the text has it beside a space or has a comma between digits anywhere, else it becomes
    a space. Periods not before a digit go, 32 at most: the evaluator passes re.UNICODE (32) as the count, and the
    look-behind meant to spare decimals never holds.
    """
    delete = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in VQA_MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if delete or beside_space else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned, count=32)
    words = (VQA_NUMBERS.get(word, word) for word in cleaned.lower().split())
    return " ".join(VQA_CONTRACTIONS.get(word, word) for word in words if word not in VQA_ARTICLES)


def score_row(prediction, answer, human_answers):
    """{NAME: score} of one prediction: multi-reference BLEU and VQA accuracy against `human_answers` (list of str,
    empty where unknown: then the label stands in), the others against the label `answer`."""
    humans = human_answers or [answer]
    values = (sentence_bleu(prediction, answer), sentence_bleu(prediction, humans), bleu_1(prediction, answer),
              bleu_2(prediction, answer), chrf(prediction, answer), exact_match(prediction, answer),
              vqa_accuracy(prediction, humans))
    return dict(zip(NAMES, values, strict=True))


def score_rows(predictions, answers, human_answers):
    """{NAME: (n,) float64}, the scores of `score_row` for n rows. Raises ValueError where the lengths differ."""
    if not len(predictions) == len(answers) == len(human_answers):
        raise ValueError(f"{len(predictions)} predictions, {len(answers)} answers and {len(human_answers)} lists of "
                         "human answers do not belong to the same rows")
    rows = [score_row(*row) for row in zip(predictions, answers, human_answers, strict=True)]
    return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in NAMES}
