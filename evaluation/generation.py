"""From a trained model to answers: of a whole dataset, or of one question about one image file."""
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from common.device import compute_in_slices, slices_of
from common.images import UNREADABLE
from features.pixels import decode_image, similar_path
from features.store import tokenize_questions


@dataclass
class Answer:
    text: str
    confidence: float   # probability of the whole answer, 0 to 1: the product over its words and its end
    gate: float | None  # mean weight of the image in the mix of the fusion, 0 to 1; None without a gate


def make_answers(vocab, answer_ids, confidences, gates):
    """[Answer] of what `model.generate` returned: answer_ids (B, A), confidences (B,), gates (B,)."""
    columns = (answer_ids.tolist(), confidences.tolist(), gates.tolist())
    return [Answer(vocab.decode(ids), confidence, None if math.isnan(gate) else gate)
            for ids, confidence, gate in zip(*columns, strict=True)]


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


@torch.no_grad()
def answer_image(trained, image, question, precision, beam_size=1):
    """Answer of one question about one image file; nothing is cached. trained: from `features.trained_model.load_model`.

    Raises FileNotFoundError or ValueError if the image cannot be read.
    """
    model, encoders = trained.model, trained.encoders
    try:
        pixels = torch.tensor(decode_image(image, encoders.image.resize)).unsqueeze(0)  # (1, 3, S, S)
    except FileNotFoundError as error:
        similar = similar_path(Path(), str(image))
        raise FileNotFoundError(f"--image {image}: no such file{f'; {similar} exists' if similar else ''}") from error
    except UNREADABLE as error:
        raise ValueError(f"--image {image} cannot be read as an image: {error}") from error
    input_ids, _ = tokenize_questions(encoders.question.tokenizer, [question], model.config.question_max_len)
    input_ids, row = input_ids.to(precision.device), torch.zeros(1, dtype=torch.long, device=precision.device)
    mask = torch.ones_like(input_ids, dtype=torch.bool)
    with precision.autocast():
        image_states = model.encode_image_frozen(encoders.image.normalize(pixels.to(precision.device)))
        question_states = model.encode_question_frozen(input_ids, mask)
        batch = {"image_states": image_states, "image_row": row, "question_states": question_states, "question_row": row,
                 "attention_mask": mask}
        return make_answers(trained.vocab, *model.generate(batch, beam_size))[0]
