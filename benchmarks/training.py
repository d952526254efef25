"""How fast the two stages train and answer from the cache, beside the plain loop of the same model."""
import dataclasses

import torch

from benchmarks.operations import step_operations
from benchmarks.plain_loop import PlainRows
from benchmarks.report import Row
from evaluation.generation import answer_rows
from train import generator
from training.optimizer import make_optimizer, set_rates
from training.step import TrainingStep, evaluate

# calls before a step is timed: what the first ones do besides (allocating, compiling, capturing) is not its own time
WARM_UP_CALLS = {"eager": 1, "captured": 6, "compiled": 12}
ANSWER_BATCH = 2048  # as in test.py


def measure_training(bench, stage, matrix_rate):
    """(rows of the table, {batch size: samples/s from the cache}, {batch size: samples/s of the plain loop}, losses).

    `matrix_rate`: operations/s of a large matrix product. losses: the loss of both paths on the same rows in eval mode.
    """
    model = bench.model(stage)
    plain_rows, plain, plain_mb = PlainRows(bench.rows, bench, model), {}, {}
    for size in bench.plain_batches(stage):  # before the stored states take device memory
        plain[size], plain_mb[size], _ = measure_steps(bench, stage, model, plain_rows, size, "eager")
    dataset = bench.dataset(model)
    losses = both_losses(bench, stage, model, dataset, plain_rows)
    cached, rows = {}, []
    for size in bench.batches(stage):
        same = size if size in plain else max(plain)
        for kind in kinds(bench, stage):
            kind_model = model if kind == "eager" else bench.model(stage)
            rate, peak_mb, ready = measure_steps(bench, stage, kind_model, dataset, size, kind)
            cached.setdefault(size, rate)  # eager comes first
            rows.append(Row(f"{stage.name}, batch {size}, {kind}", rate, "samples/s", plain[same], f"batch {same}",
                            *(ready or at_matrix_rate(bench, stage, model, dataset, size, matrix_rate))))
            if peak_mb:
                rows.append(Row(f"{rows[-1].name}: device memory", peak_mb, "MB", plain_mb[same], f"batch {same}"))
    return rows, cached, plain, losses


def at_matrix_rate(bench, stage, model, dataset, batch_size, matrix_rate):
    """The ceiling of stage 2: (samples/s if the trainable blocks ran at the matrix rate, what that is)."""
    operations = step_operations(model, dataset.batch(next(endless_batches(bench, stage, dataset, batch_size)))) / batch_size
    return matrix_rate / operations, f"{matrix_rate / 1e12:.3g} TFLOP/s over {operations / 1e9:.3g} GFLOP a sample"


def kinds(bench, stage):
    """How a step may run: on CUDA also as a graph, and in stage 2 with compiled blocks."""
    captured = bench.device == "cuda" and bench.precision.amp != "fp16"
    compiled = bench.device == "cuda" and bench.compile and stage.clip_layers > 0
    return ["eager", *["captured"] * captured, *["compiled"] * compiled]


def measure_steps(bench, stage, model, dataset, batch_size, kind):
    """(samples/s, megabytes on the device at most or None on the CPU, the ceiling of stage 1 or None).

    `dataset`: a VQADataset or PlainRows. The ceiling: (samples/s of the step on a batch that lies ready, what that is).
    """
    bench.clock.forget_peak()
    if kind == "compiled":
        model.compile_blocks()
    take_step = make_step(bench, stage, model, dataset, batch_size, kind == "captured")
    batches = endless_batches(bench, stage, dataset, batch_size)

    def step():
        set_rates(take_step.optimizer, 1.0)  # as the loop does before every step
        take_step(next(batches))

    rate, peak_mb = batch_size / bench.clock.seconds(step, WARM_UP_CALLS[kind]), bench.clock.peak_mb()
    if stage.clip_layers or isinstance(dataset, PlainRows):
        return rate, peak_mb, None
    ready = dataset.batch(next(batches))
    alone = take_step.captured.graph.replay if take_step.captured else lambda: take_step.train_on(ready)
    return rate, peak_mb, (batch_size / bench.clock.seconds(alone), "the step on a batch that lies ready")


def make_step(bench, stage, model, dataset, batch_size, captured=False):
    """The TrainingStep of the stage's own settings, at the start of an epoch."""
    loop = dataclasses.replace(stage.loop, batch_size=batch_size, capture=captured, output_dir=str(bench.work))
    optimizer = make_optimizer(model, stage.learning_rates, loop.weight_decay, captured)
    take_step = TrainingStep(model, dataset, optimizer, bench.precision.scaler(), loop, bench.precision)
    take_step.start_epoch(0, dataset.answer_index)
    return take_step


def endless_batches(bench, stage, dataset, batch_size):
    """Full batches of row numbers, epoch after epoch, in the order that the stage trains in."""
    draw = generator(bench.seed, 1)
    while True:
        order = dataset.epoch_order(draw, by_picture=stage.clip_layers > 0)
        yield from (rows for rows in order.split(batch_size) if len(rows) == batch_size)


def both_losses(bench, stage, model, dataset, plain_rows):
    """{"cached", "plain"}: mean loss in nats per word on the same rows, in eval mode: both paths compute the same."""
    order = torch.arange(stage.published_batch)
    cached, plain = (evaluate(model, rows, len(order), bench.precision, order) for rows in (dataset, plain_rows))
    return {"cached": cached, "plain": plain}


def measure_answering(bench, stage):
    """The table's row of greedy answers to all questions, as texts."""
    model, longest = bench.model(stage).eval(), bench.sizes["answer_max_len"]
    dataset, few = bench.dataset(model), PlainRows(bench.rows[:stage.published_batch], bench, model)
    ready = dataset.batch(torch.arange(min(ANSWER_BATCH, len(dataset))))

    def generate():
        with torch.no_grad(), bench.precision.autocast():
            model.generate(ready, longest)

    rate, plain = (len(rows) / bench.clock.seconds(
        lambda rows=rows: answer_rows(model, bench.vocab, rows, longest, bench.precision, ANSWER_BATCH))
        for rows in (dataset, few))
    return Row(f"answer from the cache of {stage.name}", rate, "questions/s", plain, f"batch {len(few)}",
               len(ready["image_row"]) / bench.clock.seconds(generate), "words for a batch that lies ready, no texts")
