"""From a trained model to answers: of a whole dataset, or of one question about one image file."""
import math
from dataclasses import dataclass

import torch
from tqdm import tqdm

from common.device import compute_in_slices, slices_of
from common.images import UNREADABLE, open_image
from features.store import tokenize_questions
from vocab import UNK


@dataclass
class Answer:
    text: str
    confidence: float   # geometric mean of the probabilities of its words and its end, 0 to 1
    gate: float | None  # mean share of the image in the fusion, 0 to 1; None without a gate


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
    """Answer of one question about one image file; nothing is cached. trained: from `training.checkpoint.load_model`.

    Raises FileNotFoundError or ValueError if the image cannot be read.
    """
    model, encoders = trained.model, trained.encoders
    try:
        resized = encoders.image.resize(open_image(image))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--image {image}: no such file") from error
    except UNREADABLE as error:
        raise ValueError(f"--image {image} cannot be read as an image: {error}") from error
    pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(1, resized.height, resized.width, 3)
    input_ids, _ = tokenize_questions(encoders.question.tokenizer, [question], model.config.question_max_len)
    input_ids, pixels = input_ids.to(precision.device), pixels.permute(0, 3, 1, 2).to(precision.device)
    mask = torch.ones_like(input_ids, dtype=torch.bool)
    row = torch.zeros(1, dtype=torch.long, device=precision.device)
    with precision.autocast():
        batch = {"image_states": model.encode_image_frozen(encoders.image.normalize(pixels)), "image_row": row,
                 "question_states": model.encode_question_frozen(input_ids, mask), "question_row": row,
                 "attention_mask": mask}
        return make_answers(trained.vocab, *model.generate(batch, beam_size))[0]


def validation_scores(texts, labels):
    """Mean sentence BLEU and exact match (0 to 100) of the validation answers, as columns of the training log."""
    from evaluation.metrics import exact_match, sentence_bleu
    pairs = list(zip(texts, labels, strict=True))
    return {"val_bleu": round(sum(sentence_bleu(*pair) for pair in pairs) / len(pairs), 3),
            "val_exact_match": round(sum(exact_match(*pair) for pair in pairs) / len(pairs), 3)}


def exchanged_images(dataset, seed):
    """(N,) image index that shows every row a wrong image; None if there is only one image.

    The distinct images are put in a random circle, and each row gets the image that follows its own.
    """
    images = dataset.image_index.unique()                                # (distinct images,), sorted
    if len(images) < 2:
        return None
    circle = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))]
    following = torch.empty(int(images.max()) + 1, dtype=torch.long)
    following[circle] = circle.roll(-1)
    return following[dataset.image_index]


def spelled_labels(labels, vocab, answer_max_len):
    """The labels as the model could write them at best: known words only, truncated to the answer length."""
    encoded = (vocab.encode(label, answer_max_len) for label in labels)
    return [vocab.decode(index for index in ids if index != UNK) for ids in encoded]
