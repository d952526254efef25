"""The dataset whose batches feed the model: rows of one split as index selections into stored states.

What stands in the rows is read in rows.py, what the frozen blocks say of them in features.py.
"""
import hashlib

import torch

from vocab import PAD, tokenize


def report_answers(rows, vocab, answer_max_len):
    """Print how many answers of `rows` the length cuts and how many of their words the vocabulary lacks."""
    tokens = [tokenize(answer) for answer in rows["answer"]]
    cut = sum(len(words) > answer_max_len - 1 for words in tokens)
    unknown = sum(word not in vocab.ids for words in tokens for word in words)
    total = sum(map(len, tokens))
    print(f"answers ({rows['split'].iloc[0]}): {len(tokens)} rows, {cut} cut to {answer_max_len - 1} words, "
          f"{unknown} of {total} words unknown ({unknown / total:.1%})")


def human_choices(rows):
    """For each row the human answers that training may draw: those with as many words as the shortest label has.

    Rows whose humans all wrote less, or are unknown, keep their label. Lists of str, repeats kept: an answer that
    many gave is drawn often.
    """
    fewest = min(len(label.split()) for label in rows["answer"])
    long_enough = ([text for text in humans if len(text.split()) >= fewest] for humans in rows["answers"])
    return [texts or [label] for texts, label in zip(long_enough, rows["answer"], strict=True)]


def training_answers(rows, answer_sampling):
    """All texts that training may show (list of str), from which the vocabulary is built."""
    return [text for texts in human_choices(rows) for text in texts] if answer_sampling == "humans" else list(rows["answer"])


class VQADataset:
    """Rows of one split as tensors; a batch is an index selection, with no work per row.

    Each distinct answer is encoded once: `answer_ids` (answers, A + 1) start with <start> and end with <end>, then
    <pad>; `answer_index` (N,) says which one is the label of a row, as `image_index` and `question_index` say which
    picture and question it has.
    """

    def __init__(self, rows, vocab, answer_max_len, store, answer_sampling="majority"):
        """`store`: the FeatureStore with the states of all pictures and questions of `rows`. `answer_sampling`:
        "humans" lets `drawn_answers` draw from all human answers, "majority" gives the labels."""
        self.rows, self.store = rows, store
        self.image_index = torch.tensor([store.image_row[path] for path in rows["image_path"]])
        self.question_index = torch.tensor([store.question_row[question] for question in rows["question"]])
        choices = human_choices(rows) if answer_sampling == "humans" else None
        texts = sorted(set(rows["answer"]).union(*(choices or [])))
        number = {text: index for index, text in enumerate(texts)}
        self.answer_index = torch.tensor([number[text] for text in rows["answer"]])
        self.choices = None
        if choices:
            counts = torch.tensor([len(own) for own in choices])
            self.choices = (torch.tensor([number[text] for own in choices for text in own]), counts.cumsum(0) - counts, counts)
        encoded = [vocab.encode(text, answer_max_len) for text in texts]
        self.answer_lengths = torch.tensor([len(ids) for ids in encoded])
        answer_ids = torch.full((len(encoded), int(self.answer_lengths.max())), PAD)
        for row, ids in enumerate(encoded):
            answer_ids[row, :len(ids)] = torch.tensor(ids)
        self.answer_ids = answer_ids.to(store.device)

    def __len__(self):
        return len(self.rows)

    def epoch_order(self, generator, by_picture):
        """A random order of the rows (N,). `by_picture`: the pictures are shuffled and a picture's rows stay together,
        so that trainable picture blocks run once for all its questions."""
        if not by_picture:
            return torch.randperm(len(self), generator=generator)
        place = torch.randperm(int(self.image_index.max()) + 1, generator=generator)
        return (place[self.image_index] + torch.rand(len(self), generator=generator, dtype=torch.float64)).argsort()

    def drawn_answers(self, generator):
        """For each row (N,) which answer an epoch teaches: its label, or one of its humans' answers at random."""
        if self.choices is None:
            return self.answer_index
        flat, start, counts = self.choices
        draw = torch.rand(len(self), generator=generator, dtype=torch.float64)
        return flat[start + (draw * counts).long()]

    def batch(self, index, image_index=None, answer_index=None):
        """The rows `index` (B,) as a dict of tensors on the store's device, lengths trimmed to the longest of them.

        Each distinct picture and question of the batch is there once; `image_row` and `question_row` (B,)
        say which one a row has. `image_index` (N,) gives the rows other pictures, `answer_index` (N,) other answers.
        """
        store = self.store
        pictures = (self.image_index if image_index is None else image_index)[index]
        answers = (self.answer_index if answer_index is None else answer_index)[index]
        pictures, image_row = pictures.unique(return_inverse=True)
        questions, question_row = self.question_index[index].unique(return_inverse=True)
        lengths = store.question_lengths[questions]
        question_length, answer_length = int(lengths.max()), int(self.answer_lengths[answers].max())
        states = store.select(store.question_states, questions)
        mask = torch.arange(question_length) < lengths.unsqueeze(1)      # (distinct questions, Q)
        # small tensors from the host: no look at the device, so nothing waits
        image_row, question_row, mask, answers = (
            tensor.to(store.device, non_blocking=True) for tensor in (image_row, question_row, mask, answers))
        return {"image_states": store.select(store.image_states, pictures), "image_row": image_row,
                "question_states": states[:, :question_length] if states.dim() == 3 else states,
                "question_row": question_row, "attention_mask": mask,
                "answer_ids": self.answer_ids[answers, :answer_length]}

    def batches(self, batch_size, order=None, answer_index=None):
        """Yield the batches of `order` (all rows in their order by default), the last one as long as it is."""
        order = torch.arange(len(self)) if order is None else order
        for index in order.split(batch_size):
            yield self.batch(index, answer_index=answer_index)


def data_hashes(train_set, val_set, pixels):
    """{"training rows", "validation rows", "pictures": hash}, to know the data again.

    Rows are questions, pictures' names, labels and, where training draws from them, all human answers; `pixels`: the
    PixelStore, whose key holds the bytes of all pictures and how they are decoded.
    """
    columns = ["question_id", "image_path", "question", "answer", *(["answers"] if train_set.choices else [])]
    return {name: hashlib.sha256(dataset.rows[columns].to_csv(index=False).encode()).hexdigest()[:16]
            for name, dataset in (("training rows", train_set), ("validation rows", val_set))} | {"pictures": pixels.key}
