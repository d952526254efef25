"""From a trained model to answers: of a whole dataset, or of questions about single images.

From Python:
    answerer = evaluation.generation.load("output/fine_tuning/vqa_checkpoint.pt")
    answer = answerer("photo.jpg", "What is on the table?")
"""
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from common.device import Precision, compute_in_slices, slices_of
from common.files import is_text
from common.images import UNREADABLE
from features.pixels import decode_image, similar_path
from features.store import tokenize_questions
from features.trained_model import load_model
from vocab import GLUE, PAD, START

BATCH = 16  # images that an Answerer takes at once
MAX_BEAM_SIZE = 256
NUM_BEAMS = 5  # of the search for the alternatives to an answer


@dataclass
class Answer:
    text: str
    confidence: float   # probability of the whole answer, 0 to 1: the product over its words and its end
    gate: float | None  # mean weight of the image in the mix of the fusion, 0 to 1; None without a gate
    # of an Answerer only, empty in the answers of a whole dataset
    word_probabilities: list = field(default_factory=list)  # [(word, probability), ..., ("<end>", probability)]
    alternatives: list = field(default_factory=list)  # [(text, confidence), ...]: the beam's other answers, best first
    word_ids: list = field(default_factory=list)  # ids in the vocabulary of the words and <end>


def make_answers(vocab, answer_ids, confidences, gates):
    """[Answer] of what `model.generate` returned: answer_ids (B, A), confidences (B,), gates (B,)."""
    columns = (answer_ids.tolist(), confidences.tolist(), gates.tolist())
    return [Answer(vocab.decode(ids), confidence, None if math.isnan(gate) else gate)
            for ids, confidence, gate in zip(*columns, strict=True)]


def word_log_probabilities(model, context, answer_ids):
    """Log probability (nats) of each word of given answers: context (B, H), answer_ids (B, A) to <end> -> (B, A)."""
    previous = F.pad(answer_ids[:, :-1], (1, 0), value=START)
    log_probs = model.decoder(context, previous)[0].log_softmax(-1)                                 # (B, A, V)
    return log_probs.gather(-1, answer_ids.unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def answer_dataset(model, dataset, precision, batch_size=2048, beam_size=1, image_index=None):
    """[Answer] of all rows of a dataset, in order.

    image_index: (N,) replaces the images of the rows, for the wrong-image floor. A batch that does not fit the memory
    of the device is halved.
    """
    model.eval()

    def generate(rows):
        return model.generate(dataset.batch(torch.arange(rows.start, rows.stop), image_index), beam_size)

    parts = []
    for rows in tqdm(slices_of(len(dataset), batch_size), "answering", unit=" batches", leave=False, delay=1):
        parts += compute_in_slices(generate, rows, precision)
    # copied to the host once, at the end: a copy after every batch would make the GPU wait
    return make_answers(dataset.vocab, *(torch.cat(column) for column in zip(*parts, strict=True)))


def load(checkpoint, device="auto", cfg=None):
    """The Answerer of a checkpoint, a path or hf:USER/REPO. Raises FileNotFoundError or ValueError of one line.

    `cfg`: a `features.trained_model.CheckpointConfig` with other names of the encoders, if they have moved.
    """
    return Answerer(load_model(checkpoint, cfg), Precision(device))


class Answerer:
    """Answers questions about images, always in eval mode. `trained`: a TrainedModel, which moves to the device."""

    def __init__(self, trained, precision):
        self.trained, self.precision = trained, precision
        trained.model.place(precision)

    def __call__(self, image, question, beam_size=1):
        """The Answer to `question` about `image`, with its word probabilities and alternatives. Nothing is cached.

        image: a path or a Pillow image. A list of them gives a list of Answers; then `question` is one text for all, or a
        list as long. beam_size: as in test.py. Raises FileNotFoundError or ValueError of one line.
        """
        images = list(image) if isinstance(image, list | tuple) else [image]
        several = isinstance(question, Iterable) and not isinstance(question, str | bytes)
        questions = list(question) if several else [question] * len(images)
        if len(images) != len(questions):
            raise ValueError(f"{len(images)} images and {len(questions)} questions: give one question, or one for each image")
        for text in questions:
            if not (isinstance(text, str) and text.strip() and is_text(text)):
                raise ValueError(f"the question {text!a:.60} is empty or no valid UTF-8 text")
        if not (isinstance(beam_size, int) and 1 <= beam_size <= MAX_BEAM_SIZE):
            raise ValueError(f"beam_size is {beam_size!r:.60}, not an integer from 1 to {MAX_BEAM_SIZE}")
        self.trained.model.eval()
        answers = []
        for rows in slices_of(len(images), BATCH):
            pixels = self.decode(images[rows])
            with self.precision.autocast():
                answers += self.answer_batch(self.encode(pixels, questions[rows]), beam_size)
        return answers if isinstance(image, list | tuple) else answers[0]

    def decode(self, images):
        """Paths or Pillow images -> what the model sees of them: uint8 pixels (N, 3, S, S) on the CPU."""
        pixels = []
        for image in images:
            if not isinstance(image, str | Path | Image.Image):
                raise ValueError(f"an image is a {type(image).__name__}: give a path or a Pillow image (Image.fromarray)")
            try:
                pixels.append(torch.tensor(decode_image(image, self.trained.encoders.image.resize)))
            except FileNotFoundError as error:
                similar = similar_path(Path(), str(image))
                raise FileNotFoundError(f"image {image}: no such file{f'; {similar} exists' if similar else ''}") from error
            except (*UNREADABLE, TypeError) as error:  # TypeError: info of a Pillow image that no file can have
                raise ValueError(f"image {image} cannot be read as an image: {error}") from error
        return torch.stack(pixels)

    @torch.no_grad()
    def encode(self, pixels, questions, warn=True):
        """The batch of states for `model.encode`: pixels (N, 3, S, S) of `decode` and a list of N texts.

        Either may have one element, which is then computed once and stands for all rows. Call it under autocast. With `warn` it
        prints how many questions are truncated.
        """
        model, encoders, device = self.trained.model, self.trained.encoders, self.precision.device
        input_ids, lengths = tokenize_questions(encoders.question.tokenizer, questions, model.config.question_max_len, warn)
        mask = (torch.arange(input_ids.shape[1]) < lengths.unsqueeze(1)).to(device)                 # (N, Q)
        row = torch.arange(max(len(pixels), len(questions)), device=device)
        return {"image_states": model.encode_image_frozen(encoders.image.normalize(pixels.to(device))),
                "image_row": row % len(pixels), "attention_mask": mask, "question_row": row % len(questions),
                "question_states": model.encode_question_frozen(input_ids.to(device), mask)}

    @torch.no_grad()
    def answer_batch(self, batch, beam_size):
        """[Answer] of a batch of states, with word probabilities and alternatives."""
        model, vocab = self.trained.model, self.trained.vocab
        context, gate = model.encode(batch)
        found_ids, found_confidences = model.search(context, beam_size)                             # (B, K, A), (B, K)
        answer_ids = found_ids[:, 0]
        answers = make_answers(vocab, answer_ids, found_confidences[:, 0], gate.float().mean(-1))
        probabilities = word_log_probabilities(model, context, answer_ids).exp()                    # (B, A)
        beams, beam_confidences = model.search(context, max(beam_size, NUM_BEAMS))
        columns = (answer_ids.tolist(), probabilities.tolist(), beams.tolist(), beam_confidences.tolist())
        for answer, ids, word_probabilities, others, confidences in zip(answers, *columns, strict=True):
            answer.word_ids = [word for word in ids if word != PAD]
            answer.word_probabilities = [(vocab.words[word].removeprefix(GLUE), probability)
                                         for word, probability in zip(ids, word_probabilities, strict=True) if word != PAD]
            others = [(vocab.decode(other), confidence) for other, confidence in zip(others, confidences, strict=True)
                      if confidence > 0 and other != ids]
            answer.alternatives = sorted(others, key=lambda other: -other[1])
        return answers
