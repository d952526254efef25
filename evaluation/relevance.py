"""Why this answer: how much the answer's log probability falls if a part of the image or a word of the question is hidden.

Occlusion (Zeiler and Fergus 2014). The unit is nats: at 0.7 the answer becomes half as probable, at 2.3 a tenth as probable.
"""
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from common.device import slices_of
from evaluation.generation import BATCH, Answer
from vocab import START

# side of a window and number of windows per side of the image, as `demo/check_relevance.py` chose them (docs/scores.md)
WINDOW_SHARE, WINDOWS_PER_SIDE = 1 / 4, 7


@dataclass
class Explanation:
    """An answer and what it depends on. All zeros if the model does not read the image, or the question."""

    answer: Answer
    view: Image.Image            # what the model sees: the image after CLIP's resizing and cropping
    image_relevance: np.ndarray  # (height, width) of the view, nats: weighted mean over the windows that hide a pixel
    question_words: list         # [(word, nats)]: the question without this word; words are separated by white space


def explain(answerer, image, question, beam_size=1):
    """The Explanation of an Answerer's answer to `question` about `image`, a path or a Pillow image.

    The answer is kept, word by word, while parts are hidden. A negative number says that hiding makes it more probable.
    Raises what `answerer` raises.
    """
    answer = answerer(image, question, beam_size)
    pixels, words = answerer.decode([image]), question.split()
    inputs, max_words = (getattr(answerer.trained.model.config, name) for name in ("inputs", "question_max_len"))
    log_probability = log_probabilities(answerer, answer, pixels, [question])

    relevance, total_weight = np.zeros((2, *pixels.shape[2:]))
    windows = windows_of(*pixels.shape[2:]) if inputs != "question" else []
    for part in slices_of(len(windows), BATCH):
        falls = log_probability - log_probabilities(answerer, answer, hide(pixels, windows[part]), [question])
        for (_, _, weights), fall in zip(windows[part], falls.tolist(), strict=True):
            relevance += fall * weights
            total_weight += weights

    falls = [0.0] * len(words)
    # each word has a token or more: the words from max_words on are truncated
    shorter = [" ".join(words[:index] + words[index + 1:]) for index in range(min(len(words), max_words))]
    if inputs != "image":
        falls[:len(shorter)] = (log_probability - log_probabilities(answerer, answer, pixels, shorter)).tolist()
    return Explanation(answer, Image.fromarray(pixels[0].permute(1, 2, 0).numpy()), relevance / np.maximum(total_weight, 1e-9),
                       list(zip(words, falls, strict=True)))


def windows_of(height, width):
    """[(rows, columns, weights)]: two slices, and how much each pixel (height, width) counts as hidden by this window.

    Windows overlap and reach over the border, so that all pixels are hidden equally often. The weights fall smoothly from the
    middle of a window to its border.
    """
    def along(length):
        side, middles = length * WINDOW_SHARE, (np.arange(WINDOWS_PER_SIDE) + 0.5) * length / WINDOWS_PER_SIDE
        for middle in middles:
            distance = (np.arange(length) + 0.5 - middle) / side
            covered = np.flatnonzero(abs(distance) < 0.5)
            yield slice(covered[0], covered[-1] + 1), np.where(abs(distance) < 0.5, np.cos(np.pi * distance) ** 2, 0)

    return [(rows, columns, np.outer(weights, others)) for rows, weights in along(height) for columns, others in along(width)]


def hide(pixels, windows):
    """One copy of pixels (1, 3, H, W) per window, in which the image's mean colour fills the window: (N, 3, H, W)."""
    copies, mean_colour = pixels.repeat(len(windows), 1, 1, 1), pixels[0].float().mean((1, 2), keepdim=True).round().byte()
    for copy, (rows, columns, _) in zip(copies, windows, strict=True):
        copy[:, rows, columns] = mean_colour
    return copies


@torch.no_grad()
def log_probabilities(answerer, answer, pixels, questions):
    """The log probability (nats) of the whole answer for each row: (N,) on the CPU. See `Answerer.encode`."""
    with answerer.precision.autocast():
        batch = answerer.encode(pixels, questions)
        words = torch.tensor(answer.word_ids, device=batch["image_row"].device).expand(len(batch["image_row"]), -1)  # (N, A)
        previous = torch.cat([torch.full_like(words[:, :1], START), words[:, :-1]], dim=1)
        log_probs = answerer.trained.model(batch, previous).log_softmax(-1)                                       # (N, A, V)
    return log_probs.gather(-1, words.unsqueeze(-1)).squeeze(-1).sum(-1).cpu()
