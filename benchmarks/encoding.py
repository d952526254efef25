"""How fast pictures are decoded and encoded, and questions encoded, into an empty cache."""
import contextlib
import io
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from tempfile import TemporaryDirectory

import torch

from benchmarks.plain_loop import PlainRows
from benchmarks.report import Row
from benchmarks.workbench import STAGES
from features.pixels import FastDecoder, PillowDecoder, decode_images
from features.store import encode_images, encode_questions, tokenize_questions

DECODERS = {"pillow": PillowDecoder, "fast": FastDecoder}
WARM_UP = {"cpu": 16, "cuda": 1024}  # rows, encoded once before anything is timed
LARGE_BATCH = {"cpu": 32, "cuda": 1024}  # random inputs that the encoder alone is given


def measure_encoding(bench):
    """(rows of the table, median seconds of each part for all pictures and questions of the data set).

    The parts: "decode", and for each stage "stage 1 pictures" and "stage 1 questions".
    """
    models = {stage.name: bench.model(stage) for stage in STAGES}
    time_parts(bench, models, bench.rows[:WARM_UP[bench.device]])
    runs = [time_parts(bench, models, bench.rows) for _ in range(bench.clock.repeats)]
    parts = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    decoding = {name: decoding_row(bench, name) for name in DECODERS}
    pictures = [pictures_row(bench, stage, models[stage.name], parts) for stage in STAGES]
    together = [together_row(bench, name, decoding[name], pictures[0], parts) for name in DECODERS]
    questions = [questions_row(bench, stage, models[stage.name], parts) for stage in STAGES]
    return [*decoding.values(), *pictures, *together, *questions], parts


def time_parts(bench, models, rows):
    """Seconds of each part of filling an empty cache with `rows`."""
    with TemporaryDirectory(dir=bench.work) as cache_dir, contextlib.redirect_stdout(io.StringIO()):
        seconds, clock, encoders = {}, bench.clock, bench.encoders
        seconds["decode"], pixels = clock.once(lambda: bench.decode(rows, cache_dir))
        seconds["decode, fast"], _ = clock.once(lambda: bench.decode(rows, cache_dir, "fast"))
        questions = sorted(set(rows["question"]))
        for name, model in models.items():
            def encode_texts(model=model):
                tokens = tokenize_questions(encoders.question.tokenizer, questions, bench.sizes["question_max_len"])
                return encode_questions(model, encoders.question, *tokens, cache_dir, bench.precision)

            seconds[f"{name} pictures"], _ = clock.once(
                lambda model=model: encode_images(model, encoders.image, pixels, cache_dir, bench.precision))
            seconds[f"{name} questions"], _ = clock.once(encode_texts)
    return seconds


def decoding_row(bench, name):
    """Pictures/s of one decoder through pixels.decode_images, with worker processes and the file it writes."""
    def into_an_empty_cache():
        with TemporaryDirectory(dir=bench.work) as cache_dir:
            decode_images(bench.inputs.data_dir, paths, bench.encoders.image, cache_dir, bench.workers, name)

    paths = bench.inputs.to_decode
    few = paths[:STAGES[0].published_batch]
    plain = PlainRows(bench.rows, bench, None)
    return Row(f"decode, {name}, {bench.workers} workers", len(paths) / bench.clock.seconds(into_an_empty_cache), "pictures/s",
               len(few) / bench.clock.seconds(lambda: plain.decode(few)), "Pillow in the main process",
               decoding_ceiling(bench, DECODERS[name](bench.encoders.image), paths),
               f"the decoder alone in {bench.workers} processes")


def decoding_ceiling(bench, decoder, paths):
    """Pictures/s of the decoder in as many processes as there are workers, which keep nothing of what they decode."""
    files = [bench.inputs.data_dir / path for path in paths]
    parts = [files[number::bench.workers] for number in range(bench.workers)]
    with ProcessPoolExecutor(bench.workers, multiprocessing.get_context("fork")) as pool:
        return len(files) / bench.clock.seconds(lambda: list(pool.map(partial(decode_all, decoder), parts)))


def decode_all(decoder, files):
    torch.set_num_threads(1)  # as in a worker process of torch's DataLoader
    for path in files:
        decoder(path)


def pictures_row(bench, stage, model, parts):
    """Pictures/s of encoding to the stage's cut, decoded pictures to stored states."""
    size = bench.encoders.image.visual.image_size
    few = bench.rows["image_path"].unique()[:stage.published_batch]
    plain = PlainRows(bench.rows, bench, model)
    pixels = plain.decode(few)
    noise = torch.randn(LARGE_BATCH[bench.device], 3, *size, device=bench.precision.device)

    def encoder_alone():
        with bench.precision.autocast():
            model.encode_image_frozen(noise)

    return Row(f"encode pictures to {stage.name}'s cut", bench.rows["image_path"].nunique() / parts[f"{stage.name} pictures"],
               "pictures/s", len(few) / bench.clock.seconds(lambda: plain.encode_images(pixels)), f"batch {len(few)}",
               len(noise) / bench.clock.seconds(encoder_alone), f"encoder alone, batch {len(noise)}")


def together_row(bench, decoder, decoding, encoding, parts):
    """Pictures/s of decoding and encoding to stage 1's cut; one follows the other.

    The ceiling: on the CPU both take the same cores, so times add; a GPU could encode while the next ones are decoded.
    """
    pictures = bench.rows["image_path"].nunique()
    decode_s = parts["decode" if decoder == "pillow" else "decode, fast"]
    rates = decoding.ceiling, encoding.ceiling
    on_cpu = bench.device == "cpu"
    return Row(f"decode ({decoder}) + encode to stage 1's cut", pictures / (decode_s + parts["stage 1 pictures"]), "pictures/s",
               1 / (1 / decoding.plain + 1 / encoding.plain), "one after the other, the two rows above",
               1 / sum(1 / rate for rate in rates) if on_cpu else min(rates),
               "the two ceilings, " + ("times added" if on_cpu else "the lower one"))


def questions_row(bench, stage, model, parts):
    """Questions/s of tokenizing and encoding to the stage's cut, distinct texts to stored states."""
    texts = sorted(set(bench.rows["question"]))
    plain = PlainRows(bench.rows, bench, model)
    few = texts[:stage.published_batch]
    with contextlib.redirect_stdout(io.StringIO()):
        ids, _ = tokenize_questions(bench.encoders.question.tokenizer, texts, bench.sizes["question_max_len"])
    noise = torch.randint(int(ids.max()) + 1, (LARGE_BATCH[bench.device], ids.shape[1]), device=bench.precision.device)
    mask = torch.ones_like(noise)

    def encoder_alone():
        with bench.precision.autocast():
            model.encode_question_frozen(noise, mask)

    return Row(f"encode questions to {stage.name}'s cut", len(texts) / parts[f"{stage.name} questions"], "questions/s",
               len(few) / bench.clock.seconds(lambda: plain.encode_questions(few)), f"batch {len(few)}",
               len(noise) / bench.clock.seconds(encoder_alone), f"encoder alone, batch {len(noise)}")
