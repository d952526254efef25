"""Stage 1: train fusion and decoder on frozen encoders. Also `fit`, the training loop of both stages.

Reads metadata.csv and qa_pairs.json of `data_dir`. Writes into `output_dir`: vqa_checkpoint.pt (best by validation
loss), last.pt (for --resume), config.json, train_log.csv, samples.csv and loss_plot.png. Every image and question
passes its frozen encoder once; the outputs are stored in `cache_dir`.
"""
import dataclasses
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import settings  # first: before torch

# isort: split
import torch
from tqdm import tqdm

from common import distributed, terminal
from common.device import Precision, explain_out_of_memory
from common.files import RUN_FILES, require_separate
from evaluation.generation import answer_dataset
from evaluation.metrics import validation_scores
from features.arrays import fingerprint
from features.encoders import load_encoders
from features.overlap import report_leaks, trained_hashes
from model import ModelConfig, VQAModel
from preprocess import build_datasets, data_folder, data_paths, read_rows, report_answers, rows_of_split, training_answers
from training.checkpoint import describe_model
from training.optimizer import learning_rates_of, make_optimizer, schedule, set_learning_rates, steps_taken
from training.run_state import Run, is_finished, lock_output_folder
from training.step import evaluate, train_step
from vocab import Vocab


@dataclass
class LoopConfig:
    """Settings that stage 1 and stage 2 share. fine_tune.py has other defaults for some of them."""

    data_dir: str = "mini_vqa_v2"
    """folder with metadata.csv and images, or a CSV with the columns image_path, question, answer"""
    allow_outside: bool = False
    """an image_path may be absolute or contain .., and so leave the folder of the CSV"""
    epochs: int = 30
    """at most; early stopping may end sooner"""
    batch_size: int = 128
    """questions per step"""
    learning_rate: float = 1e-3
    """maximum for the head, after the warm-up; 1e-3 is Adam's own default (Kingma and Ba 2015)"""
    weight_decay: float = 0.01
    """AdamW, on matrices only (Loshchilov and Hutter 2019)"""
    warmup_fraction: float = 0.05
    """share of all steps in which the learning rate rises from 0; then it falls to 0 along a cosine"""
    label_smoothing: float = 0.1
    """in the training loss only; logged losses are without it"""
    max_grad_norm: float = 1.0
    """a larger gradient norm is scaled down to this one"""
    patience: int = 5
    """epochs without a lower validation loss before training stops"""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """mixed precision; auto is bf16 or fp16 on a CUDA GPU, else off, but bf16 for frozen blocks of large encoders on a CPU
    with AMX"""
    compile: bool = False
    """compile the encoders' blocks (torch.compile): takes a minute, pays on long runs"""
    cache_dir: str = "cache"
    """stored outputs of the frozen blocks"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""
    workers: int = 0
    """processes that decode images; 0 = one per core"""
    seed: int = 42
    """of weights, order and dropout"""
    resume: bool = False
    """continue the run in output_dir, also with more epochs"""
    overwrite: bool = False
    """replace the run in output_dir by a new one"""


@dataclass
class Config(LoopConfig, ModelConfig):
    output_dir: str = "output/feature_extraction"
    """where checkpoints, log and curves go; `inputs` question and image write to output/question_only and image_only"""
    clip_model: str = "ViT-B-32-quickgelu"
    """open_clip's model name, or local-dir:FOLDER"""
    clip_pretrained: str = "openai"
    """open_clip's weights tag, or a weights file; not used with local-dir:"""
    gpt2_model: str = "distilgpt2"
    """hub name or local folder of a GPT-2"""
    min_word_freq: int = 2
    """a word enters the answer vocabulary if the training answers hold it this often"""
    answer_sampling: Literal["majority", "humans"] = "majority"
    """teach the label, or in each epoch one of the annotators' answers with at least as many words as the shortest label"""


BLIND_OUTPUT_DIRS = {"question": "output/question_only", "image": "output/image_only"}
CHECK_EVERY = 50  # steps between two checks of the loss: a check synchronises the device
NUM_SAMPLES = 8  # in samples.csv
LONGEST_DEFAULT = 64  # answer_max_len that is chosen for long training answers
TRAINING_TEXTS = ("question", "answer", "question_type")  # columns of the training rows that a checkpoint holds


def fit(stage, model, encoders, datasets, learning_rates, cfg, precision, earlier_stages=(), stage_one=None):
    """Train until the last epoch, or until `patience` epochs brought no lower validation loss.

    `datasets`: {"train": VQADataset, "val": VQADataset}. `learning_rates`: {"head": max_lr, ...}, one for each group of
    `model.parameter_groups()`. `earlier_stages`: [(name, log)], drawn beside this stage's curves. `stage_one`: the
    checkpoint that the training starts from. Returns the log: one dict per epoch, epoch 0 is before training. Same seed,
    same machine: same weights and losses, resumed or not (on CPU).
    """
    terminal.outlive_readers()
    run = start_run(stage, model, encoders, datasets, learning_rates, cfg, precision, earlier_stages, stage_one)
    parallel_model = distributed.data_parallel(model)
    # start from last.pt, or measure the untrained model: a broken evaluation fails before the first step
    if cfg.resume:
        run.resume()
    else:
        evaluate_epoch(0, time.perf_counter(), 0, 0.0, datasets, run, cfg, precision)
    while not is_finished(run.log, cfg.epochs, cfg.patience):
        epoch, started = run.log[-1]["epoch"] + 1, time.perf_counter()
        try:
            # train one epoch, then measure and save it
            mean_factor = train_epoch(epoch, parallel_model, datasets["train"], run, cfg, precision)
            samples_per_s = len(datasets["train"]) / (time.perf_counter() - started)
            evaluate_epoch(epoch, started, samples_per_s, mean_factor, datasets, run, cfg, precision)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped in epoch {epoch}, which is lost; {run.how_to_continue()}") from None
    best = min(run.log, key=lambda row: row["val_loss"])
    print(f"best epoch {best['epoch']} of {run.log[-1]['epoch']}: validation loss {best['val_loss']:.4f}, "
          f"checkpoint {run.folder / 'vqa_checkpoint.pt'}")
    return run.log


def start_run(stage, model, encoders, datasets, learning_rates, cfg, precision, earlier_stages, stage_one):
    """A new Run: a fresh optimizer, the checkpoint entries that stay the same, and the sample questions."""
    train_set, val_set = datasets["train"], datasets["val"]
    header = {"stage": stage, **describe_model(model, encoders, train_set.vocab), "settings": dataclasses.asdict(cfg),
              "data": {"training rows": train_set.data_hash(), "validation rows": val_set.data_hash(),
                       "images": train_set.store.pixels_key},
              "trained_on": trained_hashes(train_set.rows, train_set.store.image_digests,
                                           stage_one["trained_on"] if stage_one else None),
              "stage_one": fingerprint(stage_one["weights"]) if stage_one else None,
              # test.py's blind floors learn from these texts; intern: equal texts are saved once
              "training_texts": {name: list(map(sys.intern, train_set.rows[name])) for name in TRAINING_TEXTS}}
    # the same few validation questions are answered after every epoch: one can watch the model learn
    samples = torch.randperm(len(val_set), generator=torch.Generator().manual_seed(cfg.seed))[:NUM_SAMPLES].tolist()
    return Run(cfg.output_dir, model, make_optimizer(model, learning_rates, cfg.weight_decay), precision.scaler(), header,
               earlier_stages, val_set.rows.iloc[samples])


def evaluate_epoch(epoch, started, samples_per_s, mean_factor, datasets, run, cfg, precision):
    """Measure both losses, answer the validation questions, save the epoch. `mean_factor`: mean of the schedule."""
    model, train_set, val_set = run.model, datasets["train"], datasets["val"]
    # the training loss is measured like the validation loss, on as many rows, always the same ones
    train_sample = torch.randperm(len(train_set), generator=generator(cfg.seed, -1))[:len(val_set)].sort().values
    train_loss = evaluate(model, train_set, cfg.batch_size, precision, train_sample)
    val_loss = evaluate(model, val_set, cfg.batch_size, precision)
    require_progress(val_loss, f"epoch {epoch}, after its last step", run)
    texts = [answer.text for answer in answer_dataset(model, val_set, precision)]
    # steps of this epoch that were skipped because fp16 gradients overflowed
    overflows = epoch * steps_per_epoch(train_set, cfg) - steps_taken(run.optimizer) - sum(row["overflows"] for row in run.log)
    row = {"epoch": epoch, "train_loss": train_loss, "val_loss": val_loss, **validation_scores(texts, val_set.rows["answer"]),
           **learning_rates_of(run.optimizer, mean_factor), "overflows": overflows,
           "seconds": round(time.perf_counter() - started, 2), "samples_per_s": round(samples_per_s, 1)}
    finished = is_finished([*run.log, row], cfg.epochs, cfg.patience)
    run.save_epoch(row, [texts[index] for index in run.sample_rows.index], finished)


def train_epoch(epoch, model, dataset, run, cfg, precision):
    """One pass over the rows. Order, answers and dropout follow from (seed, epoch). Returns the mean schedule factor."""
    # draw the order of the rows, and the answers that this epoch teaches
    random, steps = generator(cfg.seed, epoch), steps_per_epoch(dataset, cfg)
    order = dataset.epoch_order(random, by_image=run.model.clip_layers > 0)
    answer_index = dataset.draw_answers(random)
    # seed dropout: every process draws its own
    torch.manual_seed((cfg.seed * 100_003 + epoch) * distributed.get_world_size() + distributed.get_rank())
    # the schedule counts steps over all epochs
    total_steps = cfg.epochs * steps
    warmup_steps = math.ceil(cfg.warmup_fraction * total_steps)
    factors = [schedule((epoch - 1) * steps + step, total_steps, warmup_steps) for step in range(steps)]
    model.train()
    totals = torch.zeros(2, device=precision.device)  # nats, words
    with tqdm(total=len(dataset), desc=f"epoch {epoch}", unit=" samples", mininterval=0.5,
              disable=distributed.get_rank() > 0) as bar:
        for step in range(steps):
            # choose the rows of this step, and of them this process's own
            rows = order[step * cfg.batch_size:(step + 1) * cfg.batch_size]
            own_rows = distributed.shard(rows)
            batch = dataset.batch(own_rows if len(own_rows) else rows[:1], answer_index=answer_index)
            # train on them
            set_learning_rates(run.optimizer, factors[step])
            with explain_out_of_memory(cfg.batch_size):
                totals += train_step(model, batch, run.optimizer, run.scaler, precision, cfg, weight=min(1, len(own_rows)))
            bar.update(len(rows))
            # check the loss now and then: reading it synchronises the device
            if (step + 1) % CHECK_EVERY == 0 or step + 1 == steps:
                loss = (totals[0] / totals[1].clamp(min=1)).item()
                require_progress(loss, f"epoch {epoch}, up to step {step + 1}", run)
                bar.set_postfix_str(f"smoothed loss={loss:.3f}", refresh=False)  # with label smoothing and dropout
    return sum(factors) / steps


def steps_per_epoch(dataset, cfg):
    return math.ceil(len(dataset) / cfg.batch_size)


def generator(seed, epoch):
    """The random generator of one epoch's order of rows."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def require_progress(loss, where, run):
    """Raise ValueError, with the place and the last good checkpoint, if the loss is not finite or every fp16 step overflows."""
    last_good = f"the last good checkpoint is {run.folder / 'vqa_checkpoint.pt'}" if run.saved else "no checkpoint is saved yet"
    if not math.isfinite(loss):
        rates = ", ".join(f"learning_rate_{group['name']} {group['lr']:.3g}" for group in run.optimizer.param_groups)
        raise ValueError(f"the loss became {loss} in {where} ({rates}); {last_good}; try a lower --learning-rate")
    # the scale starts at 2**16 and halves at each overflow; below 1 the true gradients overflow
    if run.scaler.is_enabled() and run.scaler.get_scale() < 1:
        raise ValueError(f"the fp16 gradients overflow in {where}; {last_good}; use --amp bf16 or --amp off, or a lower "
                         "--learning-rate")


def check_loop_settings(cfg):
    """Raise ValueError if a setting that both stages share is out of range."""
    if cfg.resume and cfg.overwrite:
        raise ValueError("--resume continues the run in --output-dir and --overwrite replaces it: give one of them")
    settings.check_ranges(
        cfg, epochs=settings.COUNT, batch_size=settings.COUNT, patience=settings.COUNT, workers=settings.WORKERS,
        seed=settings.SEED, learning_rate=settings.POSITIVE, max_grad_norm=settings.POSITIVE, weight_decay=(0, 10),
        warmup_fraction=(0, 1), label_smoothing=(0, 0.99))


def check_output_dir(cfg, clip_model, gpt2_model):
    """Raise ValueError if the run would replace a file of its data, or write into the folder of an encoder."""
    require_separate({}, {"--output-dir": cfg.output_dir}, {
        "--clip-model": [clip_model.removeprefix("local-dir:")], "--gpt2-model": [gpt2_model]})
    for name in RUN_FILES:  # own data may have the name samples.csv
        require_separate({"--output-dir": Path(cfg.output_dir) / name}, {}, {"--data-dir": data_paths(cfg.data_dir)})


def main(cfg):
    check_loop_settings(cfg)
    settings.check_ranges(cfg, dropout=(0, 0.99), hidden_size=(4, 8192), num_layers=(1, 16), answer_max_len=(2, 512),
                          question_max_len=(1, 1024), min_word_freq=settings.COUNT)
    cfg.check_choices()
    if cfg.inputs in BLIND_OUTPUT_DIRS and cfg.output_dir == Config.output_dir:
        cfg = dataclasses.replace(cfg, output_dir=BLIND_OUTPUT_DIRS[cfg.inputs])
        print(f"--inputs {cfg.inputs}: writing to {cfg.output_dir}; {Config.output_dir} is for the model of both inputs")
    check_output_dir(cfg, cfg.clip_model, cfg.gpt2_model)
    precision = Precision(cfg.device, cfg.amp)
    print(f"computing on {precision}")
    distributed.init_process_group(precision.device)
    with lock_output_folder(cfg):
        rows = read_rows(cfg.data_dir, allow_outside=cfg.allow_outside)
        answers = training_answers(rows_of_split(rows, "train"), cfg.answer_sampling)
        vocab = Vocab.build(answers, cfg.min_word_freq, whole_answers=cfg.decoder == "classifier")
        print(f"vocabulary: {len(vocab)} words")
        if cfg.answer_max_len == ModelConfig.answer_max_len:
            cfg = dataclasses.replace(cfg, answer_max_len=default_answer_length(vocab, answers))
        encoders = load_encoders(cfg.clip_model, cfg.clip_pretrained, cfg.gpt2_model)
        encoders.print_sizes()
        torch.manual_seed(cfg.seed)
        model_config = ModelConfig(**{field.name: getattr(cfg, field.name) for field in dataclasses.fields(ModelConfig)})
        model = VQAModel(encoders.image.visual, encoders.question.gpt2, len(vocab), model_config)
        datasets = prepare(model, encoders, vocab, rows, cfg, precision, cfg.answer_sampling)
        report_leaks(rows, datasets["train"].store.image_digests)
        fit("feature extraction", model, encoders, datasets, {"head": cfg.learning_rate}, cfg, precision)


def default_answer_length(vocab, answers):
    """The default answer_max_len, or more if over 1 % of the training answers are longer: Thai has a token per character."""
    lengths = sorted(len(vocab.tokenize(answer)) + 1 for answer in answers)
    needed = min(lengths[int(0.99 * (len(lengths) - 1))], LONGEST_DEFAULT)
    if needed > ModelConfig.answer_max_len:
        print(f"the training answers are long: answers may have {needed - 1} words (--answer-max-len {needed})")
    return max(needed, ModelConfig.answer_max_len)


def prepare(model, encoders, vocab, rows, cfg, precision, answer_sampling):
    """{"train", "val": VQADataset} at the model's freeze boundary. The model is moved to the device, and compiled if asked."""
    if cfg.compile:
        model.compile_blocks()
    datasets = build_datasets(model, encoders, vocab, rows, data_folder(cfg.data_dir), cfg, precision, ("train", "val"),
                              answer_sampling)
    for dataset in datasets.values():
        report_answers(dataset.rows, vocab, model.config.answer_max_len)
    return datasets


if __name__ == "__main__":
    settings.run(main, Config)
