"""Why this answer: how far the answer's log probability falls if a part of the image is hidden or a word is left out.

Occlusion, as in Zeiler and Fergus 2014. The unit is nats: a fall of 0.7 halves the probability of the answer, one of 2.3
leaves a tenth of it.
"""
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from PIL import Image, ImageFilter

from common.device import slices_of
from evaluation.generation import BATCH, Answer, word_log_probabilities

# Both were chosen on the demo's validation split, see docs/scores.md
STRIPS = 8       # of equal height and of equal width; a window is two of them high and wide
BLUR_SHARE = 6   # what is hidden is blurred with a standard deviation of a sixth of the image's side


@dataclass
class Explanation:
    """An answer and what it depends on."""

    answer: Answer
    view: Image.Image            # what the model sees: the image after CLIP's resizing and cropping
    image_relevance: np.ndarray  # (height, width) of the view, nats: mean over the windows that hide the pixel
    question_words: list         # [(word, nats)]: the fall if the question lacks this word; words are split at white space


def explain(answerer, image, question, beam_size=1):
    """The Explanation of the Answerer's answer to `question` about `image`, a path or a Pillow image.

    The answer is not searched again when a part is hidden: it is the probability of the same words that falls. A negative
    number says that it rises. All zeros: the model does not see the image, or the question. Raises what `answerer` raises.
    """
    answer = answerer(image, question, beam_size)
    pixels, words, config = answerer.decode([image]), question.split(), answerer.trained.model.config
    view = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    log_probability = log_probabilities(answerer, answer, pixels, [question])

    relevance = np.zeros(pixels.shape[2:])
    windows = windows_of(*pixels.shape[2:]) if config.inputs != "question" else []
    for part in slices_of(len(windows), BATCH):
        falls = log_probability - log_probabilities(answerer, answer, hide(pixels, view, windows[part]), [question])
        for window, fall in zip(windows[part], falls.tolist(), strict=True):
            relevance[window] += fall / 4  # each pixel is in two rows and two columns of windows

    falls = [0.0] * len(words)
    # a word has one token or more, so only these words can be among the tokens that are not truncated
    shorter = [" ".join(words[:index] + words[index + 1:]) for index in range(min(len(words), config.question_max_len))]
    if config.inputs != "image":
        falls[:len(shorter)] = (log_probability - log_probabilities(answerer, answer, pixels, shorter)).tolist()
    return Explanation(answer, view, relevance, list(zip(words, falls, strict=True)))


def windows_of(height, width):
    """[(rows, columns)] as slices: overlapping windows that reach over the border, so that each pixel is in four of them."""
    def along(length):
        edges = [round(strip * length / STRIPS) for strip in range(STRIPS + 1)]
        return [slice(edges[max(middle - 1, 0)], edges[min(middle + 1, STRIPS)]) for middle in range(STRIPS + 1)]

    return list(product(along(height), along(width)))


def hide(pixels, view, windows):
    """A copy of pixels (1, 3, H, W) for each window, blurred in the window: (N, 3, H, W). view: the same as an image."""
    blurred = view.filter(ImageFilter.GaussianBlur([side / BLUR_SHARE for side in view.size]))
    blurred = torch.tensor(np.asarray(blurred)).permute(2, 0, 1)
    copies = pixels.repeat(len(windows), 1, 1, 1)
    for copy, window in zip(copies, windows, strict=True):
        copy[:, *window] = blurred[:, *window]
    return copies


@torch.no_grad()
def log_probabilities(answerer, answer, pixels, questions):
    """Log probability (nats) of the whole answer for each row: (N,) on the CPU. pixels, questions: see `Answerer.encode`."""
    with answerer.precision.autocast():
        batch = answerer.encode(pixels, questions, warn=False)
        context, _ = answerer.trained.model.encode(batch)
        words = torch.tensor(answer.word_ids, device=context.device).expand(len(context), -1)       # (N, A)
        return word_log_probabilities(answerer.trained.model, context, words).sum(-1).cpu()
