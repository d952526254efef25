"""A training step as a CUDA graph: one launch instead of some hundred, for steps that Python cannot feed fast enough.

Everything in a graph has a fixed shape, so a captured batch holds one copy of picture and question per row, at the data
set's longest question and answer, and the states must lie on the device. The last, shorter batch of an epoch runs as ever.
"""
import torch

WARM_UP_STEPS = 3  # real steps on a side stream, before which the allocator and cuDNN have not settled


class CapturedStep:
    """Call it with the rows of a full batch: it trains on them as `step(batch)` would."""

    def __init__(self, step, dataset, batch_size, precision):
        """`step(batch)`: one training step without a look at the device. Raises ValueError where it cannot be captured."""
        store, device = dataset.store, precision.device
        if store.image_states.device != device or store.question_states.device != device:
            raise ValueError("--capture needs a CUDA device that the stored outputs fit on; use --no-capture")
        self.step, self.dataset = step, dataset
        self.rows = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.answer_index = dataset.answer_index.to(device)
        self.indices = {name: getattr(dataset, name).to(device) for name in ("image_index", "question_index")}
        self.question_lengths = store.question_lengths.to(device)
        self.positions = torch.arange(int(store.question_lengths.max()), device=device)
        self.every_row = torch.arange(batch_size, device=device)
        self.graph, self.calls, self.side = None, 0, torch.cuda.Stream(device)

    def start_epoch(self, answer_index):
        """The answers (N,) that the coming epoch teaches."""
        self.answer_index.copy_(answer_index)

    def __call__(self, rows):
        """Train on `rows` (batch_size,), a CPU tensor."""
        self.rows.copy_(rows, non_blocking=True)
        self.calls += 1
        if self.graph is None and self.calls > WARM_UP_STEPS:
            self.graph = self.record()
        if self.graph is not None:
            self.graph.replay()
            return
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            self.step(self.fixed_batch())
        torch.cuda.current_stream().wait_stream(self.side)

    def record(self):
        """The step as a graph; recording computes nothing. Raises ValueError where the device cannot."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.step(self.fixed_batch())
        except RuntimeError as error:  # also what is left of running out of memory once the recording is given up
            raise ValueError(f"the training step cannot be captured ({error!s:.150}): use --no-capture, or a smaller "
                             "--batch-size") from error
        return graph

    def fixed_batch(self):
        """The batch of `self.rows`, gathered on the device; every shape is the same at every call."""
        store, answers = self.dataset.store, self.dataset.answer_ids
        pictures, questions = (index.index_select(0, self.rows) for index in self.indices.values())
        lengths = self.question_lengths.index_select(0, questions)
        return {"image_states": store.image_states.index_select(0, pictures), "image_row": self.every_row,
                "question_states": store.question_states.index_select(0, questions), "question_row": self.every_row,
                "attention_mask": self.positions < lengths.unsqueeze(1),  # (B, Q)
                "answer_ids": answers.index_select(0, self.answer_index.index_select(0, self.rows))}
