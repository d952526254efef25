"""The metrics: each compares an answer of the model with the label and with all annotations; every score is 0 to 100.

METRICS is the one table of them. A new metric is one function and one line there: it then has its key in the metrics
file, its column in the printed table, its row in scores.png and in the gallery.
References are always the original strings, never decoded from a vocabulary. No torch here.
"""
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from vocab import nfc, normalise

BLEU_METRICS = {}  # {order: BLEU}, filled by choose_bleu_tokenizer
CHRF_METRIC = CHRF(lowercase=True)

# Tables of the official VQA evaluator (VQAEval in GT-Vision-Lab/VQA).
VQA_MARKS = ";/[]\"{}()=+\\_-><@`,?!"
VQA_ARTICLES = ("a", "an", "the")
VQA_NUMBERS = {word: str(number) for number, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
# VQA_CONTRACTIONS repairs a missing apostrophe: "dont" becomes "don't". Its keys are all spellings of these words in
# which exactly one apostrophe is missing. As in the official table, some words are missing ("lets", "shes") and
# "somebody'd" is mapped the wrong way round. "I'd", "I'm" and "I've" never match, since the text is in lower case.
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


def choose_bleu_tokenizer(name):
    """Let all BLEU metrics of this process split text with sacrebleu's tokenizer `name`. ValueError if it is not installed."""
    try:
        BLEU_METRICS.update({order: BLEU(lowercase=True, effective_order=True, max_ngram_order=order, tokenize=name)
                             for order in (1, 2, 4)})
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"--bleu-tokenize {name} needs one more package: pip install 'sacrebleu[{name[:2]}]'") from error


choose_bleu_tokenizer("13a")


def sentence_bleu(prediction, references, max_order=4):
    """Sentence BLEU of sacrebleu, 0 to 100: lower case, NFC, effective order, exponential smoothing.

    The tokenizer is that of `choose_bleu_tokenizer`, by default 13a: words and punctuation marks.

    references: list of str, or one str. With several references an n-gram may match any of them. max_order: the longest
    n-grams, 1, 2 or 4. A reference must never contain `<unk>`: sacrebleu splits it into three tokens, which an answer
    could match. Raises ValueError without a reference.
    """
    return _sentence_score(BLEU_METRICS[max_order], prediction, _as_tuple(references))


def chrf(prediction, references):
    """Sentence chrF2 of sacrebleu, 0 to 100: character 1- to 6-grams in lower case, recall counts twice.

    With several references the best score counts. Arguments and errors as in `sentence_bleu`.
    """
    return _sentence_score(CHRF_METRIC, prediction, _as_tuple(references))


def _as_tuple(references):
    """The distinct references as a tuple, which lru_cache can hash."""
    references = (references,) if isinstance(references, str) else tuple(sorted(set(references)))
    if not references:
        raise ValueError("a score needs at least one reference")
    return references


@lru_cache(maxsize=1 << 16)  # short answers repeat: the floors give the same answer to many questions
def _sentence_score(metric, prediction, references):
    prediction, *references = map(nfc, (prediction, *references))
    return min(metric.sentence_score(prediction, references).score, 100.0)  # sacrebleu gives 100.00000000000004


def signature():
    """sacrebleu's signature of the headline metric: the settings that give the same number elsewhere."""
    BLEU_METRICS[4].sentence_score("a", ["a"])  # the signature names the number of references of the last call
    return str(BLEU_METRICS[4].get_signature())


def exact_match(prediction, label):
    """100 if both are equal after `vocab.normalise` (lower case, white space collapsed, NFC), else 0."""
    return 100.0 * (normalise(prediction) == normalise(label))


def vqa_accuracy(prediction, annotations):
    """Official VQA accuracy of one answer, 0 to 100. annotations: the answers of all annotators (list of str).

    The mean over all n annotators of min(1, matches among the other n - 1 annotators / 3). With two or three annotators
    it is min(1, matches / (n - 1)), with one the equality of the normalised answers. With two or more, answers are
    normalised only if the annotators disagree, as in the official evaluator: "NO" scores 0 if all wrote "no".
    Raises ValueError without annotations.
    """
    if not annotations:
        raise ValueError("VQA accuracy needs at least one annotation")
    prediction, *annotations = (nfc(text).replace("\n", " ").replace("\t", " ").strip() for text in (prediction, *annotations))
    if len(annotations) == 1 or len(set(annotations)) > 1:
        prediction, *annotations = map(normalise_answer, (prediction, *annotations))
    n, matches = len(annotations), annotations.count(prediction)
    if n <= 3:
        return 100.0 * min(1, matches / max(1, n - 1))
    # each of the m matching annotators leaves m - 1 matches among the others, each other annotator leaves m
    return 100.0 * (matches * min(1, (matches - 1) / 3) + (n - matches) * min(1, matches / 3)) / n


@lru_cache(maxsize=1 << 16)
def normalise_answer(text):
    """The official VQA evaluator's normal form of an answer: punctuation, then numbers and articles, then contractions.

    A mark is deleted if it has a space beside it somewhere in the text, or if the text has a comma between digits.
    Otherwise the mark becomes a space. A period is deleted unless a digit follows. At most 32 periods are deleted,
    because the official evaluator passes re.UNICODE (32) as the count.
    """
    delete = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in VQA_MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if delete or beside_space else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned, count=32)
    words = (VQA_NUMBERS.get(word, word) for word in cleaned.lower().split())
    return " ".join(VQA_CONTRACTIONS.get(word, word) for word in words if word not in VQA_ARTICLES)


@dataclass(frozen=True)
class Metric:
    name: str        # key in the metrics file
    head: str        # column head of the printed table
    label: str       # in scores.png and in the gallery
    against: str     # "label": score(prediction, label); "annotations": score(prediction, list of all annotations)
    score: Callable  # gives 0 to 100


METRICS = (  # the first one is the headline
    Metric("mean_sentence_bleu", "BLEU", "Mean sentence BLEU", "label", sentence_bleu),
    Metric("multi_reference_bleu", "multi-ref", "Multi-reference BLEU", "annotations", sentence_bleu),
    Metric("bleu_1", "BLEU-1", "BLEU-1", "label", partial(sentence_bleu, max_order=1)),
    Metric("bleu_2", "BLEU-2", "BLEU-2", "label", partial(sentence_bleu, max_order=2)),
    Metric("chrf", "chrF", "chrF", "label", chrf),
    Metric("exact_match", "exact", "Exact match", "label", exact_match),
    Metric("vqa_accuracy", "VQA acc.", "VQA accuracy", "annotations", vqa_accuracy),
)
HEADLINE = METRICS[0].name
# {column of the results CSV: metric}
SCORE_COLUMNS = {"sentence_bleu": "mean_sentence_bleu", "exact_match": "exact_match", "vqa_accuracy": "vqa_accuracy"}


def score_row(prediction, label, annotations):
    """{NAME: score} of one prediction. Without annotations the label is the only one."""
    reference = {"label": label, "annotations": annotations or [label]}
    return {metric.name: metric.score(prediction, reference[metric.against]) for metric in METRICS}


def score_rows(predictions, labels, annotations):
    """{NAME: (n,) float64}: `score_row` of n rows. Raises ValueError if the lengths differ."""
    return as_columns([score_row(*row) for row in zip(predictions, labels, annotations, strict=True)])


def as_columns(rows):
    """[{NAME: score}] of n rows -> {NAME: (n,) float64}."""
    return {metric.name: np.array([row[metric.name] for row in rows], dtype=np.float64) for metric in METRICS}


def validation_scores(texts, labels):
    """Mean sentence BLEU and exact match (0 to 100) of the validation answers, as columns of the training log."""
    return {f"val_{name}": round(sum(map(score, texts, labels)) / len(texts), 3)
            for name, score in (("bleu", sentence_bleu), ("exact_match", exact_match))}
