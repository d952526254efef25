"""The plain loop: the same model and training step, but every batch is made from the image files.

For every row of every batch it decodes the image with Pillow and CLIP's transform in the main process, and runs both
encoders from the first block. No worker processes, no cache. It is a fair comparison: frozen parts get no gradients, and
precision, threads, optimizer and loss are those of the project's own step.
"""
import numpy as np
import torch

from common.images import open_image
from vocab import PAD


class PlainRows:
    """Has the methods of preprocess.VQADataset that training and answering call."""

    def __init__(self, rows, vocab, model, encoders, folder, precision):
        """`rows`: DataFrame; `folder`: what image_path is relative to."""
        self.rows, self.vocab, self.model, self.encoders = rows, vocab, model, encoders
        self.folder, self.precision = folder, precision

    def __len__(self):
        return len(self.rows)

    def epoch_order(self, generator, by_image):
        """A random order of the rows (N,)."""
        return torch.randperm(len(self), generator=generator)

    def batch(self, index, image_index=None, answer_index=None):
        """The rows `index` (B,) as a batch of the model. Other images or answers are not supported."""
        rows = self.rows.iloc[index.tolist()]
        every_row = torch.arange(len(rows), device=self.precision.device)
        question_states, mask = self.encode_questions(rows["question"])
        return {"image_states": self.encode_images(self.decode(rows["image_path"])), "image_row": every_row,
                "question_states": question_states, "question_row": every_row, "attention_mask": mask,
                "answer_ids": self.encode_answers(rows["answer"])}

    def decode(self, image_paths):
        """Image files as uint8 pixels (B, 3, S, S), on the CPU."""
        images = [np.asarray(self.encoders.image.resize(open_image(self.folder / path))) for path in image_paths]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    def encode_images(self, pixels):
        """Outputs of the frozen image blocks for pixels (B, 3, S, S)."""
        with self.precision.autocast():
            return self.model.encode_image_frozen(self.encoders.image.normalize(pixels.to(self.precision.device)))

    def encode_questions(self, questions):
        """Outputs of the frozen question blocks for B texts, and their attention mask (B, Q)."""
        tokens = self.encoders.question.tokenizer(list(questions), padding=True, truncation=True,
                                                  max_length=self.model.config.question_max_len, return_tensors="pt")
        ids, mask = (tokens[name].to(self.precision.device) for name in ("input_ids", "attention_mask"))
        with self.precision.autocast():
            return self.model.encode_question_frozen(ids, mask), mask

    def encode_answers(self, answers):
        """Ids (B, A) of B answers: <start>, words, <end>, then <pad>."""
        encoded = [torch.tensor(self.vocab.encode(text, self.model.config.answer_max_len)) for text in answers]
        return torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True, padding_value=PAD).to(self.precision.device)
