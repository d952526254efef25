"""The plain loop: the same model and the same training step, fed by batches that are made from the files at every step.

It decodes the batch's pictures one after the other with Pillow and CLIP's transform in the main process, and runs both
encoders whole, for every row. No worker processes, no cache, nothing computed once. It is a fair loop: no gradient goes
through frozen parts, and precision, threads, optimizer and loss are those of the project's own step.
"""
import numpy as np
import torch

from features.pixels import PillowDecoder
from preprocess import data_folder
from vocab import PAD


class PlainRows:
    """Rows of questions about pictures, with the part of VQADataset that TrainingStep, evaluate and answer_rows use."""

    def __init__(self, rows, bench, model):
        """`rows`: DataFrame; `bench`: the Workbench; `model`: the VQAModel, whose cut says what gets gradients."""
        self.rows, self.model, self.precision = rows, model, bench.precision
        self.folder, self.vocab, self.sizes = data_folder(bench.inputs.data_dir), bench.vocab, bench.sizes
        self.image, self.tokenizer = bench.encoders.image, bench.encoders.question.tokenizer
        self.decode_one = PillowDecoder(bench.encoders.image)
        self.answer_index = torch.arange(len(rows))

    def __len__(self):
        return len(self.rows)

    def epoch_order(self, generator, by_picture):
        """A random order of the rows (N,)."""
        return torch.randperm(len(self), generator=generator)

    def batch(self, index, image_index=None, answer_index=None):
        """The rows `index` (B,) as the model takes them, one picture and one question for each row.

        The other two arguments are those of VQADataset.batch; here a row always has its own picture and its label.
        """
        rows = self.rows.iloc[index.tolist()]
        every_row = torch.arange(len(rows), device=self.precision.device)
        question_states, mask = self.encode_questions(rows["question"])
        return {"image_states": self.encode_images(self.decode(rows["image_path"])), "image_row": every_row,
                "question_states": question_states, "question_row": every_row, "attention_mask": mask,
                "answer_ids": self.encode_answers(rows["answer"])}

    def decode(self, image_paths):
        """uint8 pixels (B, 3, S, S) of picture files, on the CPU."""
        return torch.from_numpy(np.stack([self.decode_one(self.folder / path) for path in image_paths]))

    def encode_images(self, pixels):
        """What the frozen part of the picture encoder says of pixels (B, 3, S, S)."""
        with self.precision.autocast():
            return self.model.encode_image_frozen(self.image.normalize(pixels.to(self.precision.device)))

    def encode_questions(self, questions):
        """What the frozen part of the question encoder says of B texts, and their mask (B, Q)."""
        tokens = self.tokenizer(list(questions), padding=True, truncation=True, max_length=self.sizes["question_max_len"],
                                return_tensors="pt").to(self.precision.device)
        with self.precision.autocast():
            return self.model.encode_question_frozen(tokens["input_ids"], tokens["attention_mask"]), tokens["attention_mask"]

    def encode_answers(self, answers):
        """Ids (B, A + 1) of B answers, from <start> to <end>, then <pad>."""
        encoded = [torch.tensor(self.vocab.encode(text, self.sizes["answer_max_len"])) for text in answers]
        padded = torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True, padding_value=PAD)
        return padded.to(self.precision.device)
