"""From a trained model to texts: answers of a whole dataset, and of one question about one picture."""
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from common.device import compute_in_slices, slices_of
from common.images import UNREADABLE, open_image
from features.store import tokenize_questions
from vocab import UNK


@dataclass
class Answer:
    text: str
    confidence: float
    gate: float | None


@torch.no_grad()
def answer_dataset(model, dataset, precision, batch_size=2048, beam_size=1, image_index=None):
    """One Answer per row. `image_index` (N,) shows the rows other images. A batch that does not fit memory is halved."""
    model.eval()

    def answers_of(rows):
        return model.generate(dataset.batch(torch.arange(rows.start, rows.stop), image_index), beam_size)

    parts = []
    for rows in tqdm(slices_of(len(dataset), batch_size), "answering", unit=" batches", leave=False, delay=1):
        parts += compute_in_slices(answers_of, rows, precision)
    # copied to the host once, at the end: a copy per batch would synchronise the device
    columns = (torch.cat(column).tolist() for column in zip(*parts, strict=True))
    return [Answer(dataset.vocab.decode(ids), confidence, None if math.isnan(gate) else gate)
            for ids, confidence, gate in zip(*columns, strict=True)]


def validation_scores(texts, labels):
    """Mean sentence BLEU and exact match (0 to 100) of the validation answers."""
    from evaluation.metrics import exact_match, sentence_bleu
    pairs = list(zip(texts, labels, strict=True))
    return {"val_bleu": round(sum(sentence_bleu(text, [label]) for text, label in pairs) / len(pairs), 3),
            "val_exact_match": round(sum(exact_match(text, label) for text, label in pairs) / len(pairs), 3)}


def exchanged_images(dataset, seed):
    """For each row another picture (N,): the distinct pictures form one random circle, each row gets its picture's next.

    None where there is only one picture.
    """
    pictures = dataset.image_index.unique()                              # (P,), sorted
    if len(pictures) < 2:
        return None
    circle = pictures[torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))]
    following = torch.empty(int(pictures.max()) + 1, dtype=torch.long)
    following[circle] = circle.roll(-1)
    return following[dataset.image_index]


def spelled_labels(labels, vocab, answer_max_len):
    """The labels as the model could write them at best: known words only, cut to the length."""
    encoded = (vocab.encode(label, answer_max_len) for label in labels)
    return [vocab.decode(index for index in ids if index != UNK) for ids in encoded]


@torch.no_grad()
def answer_image(image, question, model, encoders, vocab, sizes, precision, beam_size=1):
    """(text, confidence, gate's share of the picture) for one picture file and one question, computed live.

    Raises FileNotFoundError or ValueError where the picture cannot be read.
    """
    try:
        picture = encoders.image.resize(open_image(image))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--image {image}: no such file") from error
    except UNREADABLE as error:
        raise ValueError(f"--image {image} cannot be read as a picture: {error}") from error
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(1, picture.height, picture.width, 3)
    input_ids, _ = tokenize_questions(encoders.question.tokenizer, [question], sizes["question_max_len"])
    input_ids, pixels = input_ids.to(precision.device), pixels.permute(0, 3, 1, 2).to(precision.device)
    mask = torch.ones_like(input_ids, dtype=torch.bool)
    only = torch.zeros(1, dtype=torch.long, device=precision.device)
    with precision.autocast():
        batch = {"image_states": model.encode_image_frozen(encoders.image.normalize(pixels)), "image_row": only,
                 "question_states": model.encode_question_frozen(input_ids, mask), "question_row": only,
                 "attention_mask": mask}
        answer_ids, confidence, gate = model.generate(batch, sizes["answer_max_len"], beam_size)
    share = gate.item()
    return vocab.decode(answer_ids[0].tolist()), confidence.item(), None if math.isnan(share) else share


def picture_row(image, question, text, confidence, gate):
    """A row as the gallery draws it, of a question without known answers."""
    return {"question_id": "", "image_id": "", "image_path": str(image), "picture_file": Path(image), "question": question,
            "answer": "", "answers": [], "prediction": text, "confidence": confidence, "gate": gate, "question_type": "",
            "answer_type": "", "sentence_bleu": None, "exact_match": None, "vqa_accuracy": None}
