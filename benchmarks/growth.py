"""How time grows with the number of questions: the same parts on an eighth, a quarter, a half and all of the data set."""
from tempfile import TemporaryDirectory

from benchmarks.training import make_step
from benchmarks.workbench import FAIR_BATCH, STAGES
from evaluation.generation import answer_rows
from train import generator
from training.optimizer import set_rates

SHARES = (1 / 8, 1 / 4, 1 / 2, 1)


def measure_growth(bench, epochs, plain, plain_answers):
    """A list of dicts, one for each size: questions, pictures, the seconds of each part, total_s and plain_s.

    `plain`: {"stage 1": {batch size: samples/s}, ...} and `plain_answers`: questions/s of the plain loop, from which
    plain_s says what it takes for the same.
    """
    names = sorted(bench.rows["image_path"].unique())
    models = {stage.name: bench.model(stage) for stage in STAGES}
    points = []
    for share in (SHARES[0], *SHARES):  # the first one warms up
        rows = bench.rows[bench.rows["image_path"].isin(names[:round(share * len(names))])].reset_index(drop=True)
        seconds = time_size(bench, models, rows, epochs)
        plain_s = len(rows) * (sum(epochs / plain[stage.name][FAIR_BATCH[bench.device]] for stage in STAGES)
                               + 1 / plain_answers)
        points.append({"questions": len(rows), "pictures": rows["image_path"].nunique(), **seconds,
                       "total_s": sum(seconds.values()), "plain_s": plain_s})
    return points[1:]


def time_size(bench, models, rows, epochs):
    """Seconds of each part for `rows`, from an empty cache: {"decode_s", "encode_s", "stage 1_s", "stage 2_s",
    "answer_s"}. Training is `epochs` times one timed epoch, the rest is timed as it is."""
    seconds = {"encode_s": 0.0}
    with TemporaryDirectory(dir=bench.work) as cache_dir:
        seconds["decode_s"], _ = bench.clock.once(lambda: bench.decode(rows, cache_dir))
        for stage in STAGES:
            model = models[stage.name]
            encode_s, dataset = bench.clock.once(lambda model=model: bench.dataset(model, rows, cache_dir))
            seconds["encode_s"] += encode_s
            seconds[f"{stage.name}_s"] = epochs * bench.clock.once(one_epoch(bench, stage, model, dataset))[0]
        seconds["answer_s"], _ = bench.clock.once(
            lambda: answer_rows(model, bench.vocab, dataset, bench.sizes["answer_max_len"], bench.precision))
    return {name.replace(" ", "_"): value for name, value in seconds.items()}


def one_epoch(bench, stage, model, dataset):
    """A function that trains one epoch from the cache."""
    batch_size = FAIR_BATCH[bench.device]
    take_step = make_step(bench, stage, model, dataset, batch_size)

    def train_epoch():
        order = dataset.epoch_order(generator(bench.seed, 1), by_picture=stage.clip_layers > 0)
        for rows in order.split(batch_size):
            set_rates(take_step.optimizer, 1.0)
            take_step(rows)
    return train_epoch
