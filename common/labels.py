"""The label of a question is the answer that most annotators gave. Here are the rules that choose it and keep or drop it.

`cfg`: settings with min_answer_words and min_agreement, such as mini_vqa_v2.Config.
"""
from collections import Counter


def majority_answer(answers, preferred=None):
    """(most frequent answer, how many gave it). A tie goes to `preferred` if it is tied, else to the alphabetically first."""
    counts = Counter(answers)
    agreement = max(counts.values())
    tied = sorted(answer for answer, count in counts.items() if count == agreement)
    return (preferred if preferred in tied else tied[0]), agreement


def is_long(label, cfg):
    """Whether the label has enough words to be kept."""
    return len(label.split()) >= cfg.min_answer_words


def is_agreed(agreement, num_answers, cfg):
    """Whether enough of `num_answers` annotators gave the label to keep it. If there are too few, all must have given it."""
    return agreement >= min(cfg.min_agreement, num_answers)


def held_out_labels(answers, cfg):
    """For each annotator the label that the others choose by the same rules; None if the others would not keep the row.

    A tie of the others goes to the alphabetically first answer. VQA's choice does not count: the annotator who is left
    out took part in it. One annotation alone has no others.
    """
    if len(answers) < 2 or not any(is_long(text, cfg) for text in answers):
        return [None] * len(answers)
    labels = {}
    for text in dict.fromkeys(answers):  # annotators with equal answers leave equal others
        others = list(answers)
        others.remove(text)
        label, agreement = majority_answer(others)
        labels[text] = label if is_long(label, cfg) and is_agreed(agreement, len(others), cfg) else None
    return [labels[text] for text in answers]
