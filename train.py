"""Stage 1: train the fusion and the decoder on frozen encoders. And THE training loop, `fit`, of both stages.

Reads metadata.csv and qa_pairs.json of `data_dir`; writes vqa_checkpoint.pt (best by validation
loss), last.pt (for --resume), config.json, train_log.csv and loss_plot.png into `output_dir`.
Each picture and question goes through its frozen encoder once; what comes out is kept in `cache_dir`.
"""
import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

import settings
from answering import answer_rows
from checkpoint import SIZES, build_model
from device import Precision
from encoders import load_encoders
from features import build_store, decode_pictures
from files import write_json
from preprocess import VQADataset, data_folder, data_hashes, read_rows, report_answers, rows_of_split
from run_folder import load_last, only_run_in, save_epoch, watched_rows, write_log, write_samples
from vocab import PAD, Vocab


@dataclass
class Config:
    data_dir: str = "mini_vqa_v2"
    """folder with metadata.csv and pictures, or a CSV with the columns image_path, question, answer"""
    output_dir: str = "output/feature_extraction"
    """where checkpoints, log and curves go"""
    clip_model: str = "ViT-B-32-quickgelu"
    """open_clip's model name, or local-dir:FOLDER"""
    clip_pretrained: str = "openai"
    """open_clip's weights tag, or a weights file; not used with local-dir:"""
    gpt2_model: str = "distilgpt2"
    """hub name or local folder of a GPT-2"""
    hidden_size: int = 256
    """width of fusion and decoder"""
    num_layers: int = 1
    """GRU layers"""
    dropout: float = 0.3
    """in fusion and decoder, 0 to below 1"""
    question_max_len: int = 32
    """GPT-2 tokens of a question; longer ones are cut and counted"""
    answer_max_len: int = 16
    """words of an answer plus its end; longer ones are cut and counted"""
    min_word_freq: int = 2
    """a word enters the answer vocabulary when training answers hold it this often"""
    inputs: Literal["both", "question", "image"] = "both"
    """what the model may see; `question` is the blind baseline"""
    fusion: Literal["gated", "concat"] = "gated"
    """how picture and question are joined"""
    image_pooling: Literal["pooled", "attention"] = "pooled"
    """CLIP's pooled feature alone, or with attention of the question over the picture's tokens"""
    epochs: int = 30
    """at most; early stopping may end sooner"""
    batch_size: int = 128
    """questions per step"""
    learning_rate: float = 1e-3
    """peak, after the warm-up; Adam's own default (Kingma and Ba 2015), usual for a head on frozen features"""
    weight_decay: float = 0.01
    """AdamW, on matrices only (Loshchilov and Hutter 2019)"""
    warmup_fraction: float = 0.05
    """share of all steps in which the learning rate rises from 0; then a cosine to 0"""
    label_smoothing: float = 0.1
    """in the training loss only; logged losses are without it"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    patience: int = 5
    """epochs without a better validation loss before training stops"""
    amp: str = "auto"
    """auto, bf16, fp16, off; auto is off on CPU"""
    cache_dir: str = "cache"
    """stored outputs of the frozen encoders"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1"""
    workers: int = 8
    """threads that decode pictures"""
    seed: int = 42
    """of weights, order and dropout"""
    resume: bool = False
    """continue the interrupted run in output_dir"""


LOSS_CHECK_STEPS = 50  # between looks at whether the loss is still finite: a look waits for the device


def check_loop_settings(cfg):
    """The ranges of the settings that both stages share."""
    for name in ("epochs", "batch_size", "patience", "workers"):
        settings.check_range(cfg, name, low=1)
    for name in ("learning_rate", "max_grad_norm"):
        settings.check_range(cfg, name, low=0, low_open=True, high=1e6)
    settings.check_range(cfg, "weight_decay", low=0, high=10)
    settings.check_range(cfg, "warmup_fraction", low=0, high=1)
    settings.check_range(cfg, "label_smoothing", low=0, high=0.99)


def check_settings(cfg):
    check_loop_settings(cfg)
    settings.check_range(cfg, "dropout", low=0, high=0.99)
    settings.check_range(cfg, "hidden_size", low=4, high=65536)
    settings.check_range(cfg, "answer_max_len", low=2, high=512)
    settings.check_range(cfg, "question_max_len", low=1, high=1024)
    for name in ("num_layers", "min_word_freq"):
        settings.check_range(cfg, name, low=1)
    if cfg.image_pooling == "attention" and cfg.hidden_size % 4:
        raise ValueError(f"--hidden-size {cfg.hidden_size} must be a multiple of 4, the heads of --image-pooling attention")


# ---- the loss, and how it is measured


def answer_loss(model, batch, label_smoothing=0.0):
    """Summed cross-entropy (nats) of the answer words, and how many were scored."""
    inputs, targets = batch["answer_ids"][:, :-1], batch["answer_ids"][:, 1:]  # (B, A-1) each
    logits = model(batch, inputs)                                              # (B, A-1, V)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(),
                           ignore_index=PAD, label_smoothing=label_smoothing, reduction="sum")
    return loss, (targets != PAD).sum()


@torch.no_grad()
def evaluate(model, dataset, batch_size, precision, order=None):
    """Mean loss in nats per answer word (the end counts as one), in eval mode, without smoothing."""
    model.eval()
    total, words = torch.zeros((), device=precision.device), torch.zeros((), device=precision.device)
    for batch in dataset.batches(batch_size, order):
        with precision.autocast():
            loss, count = answer_loss(model, batch)
        total += loss
        words += count
    return (total / words).item()


def validation_scores(texts, labels):
    """Mean sentence BLEU and exact match (0 to 100) of the validation answers."""
    from metrics import exact_match, sentence_bleu
    pairs = list(zip(texts, labels, strict=True))
    return {"val_bleu": round(sum(sentence_bleu(text, [label]) for text, label in pairs) / len(pairs), 3),
            "val_exact_match": round(sum(exact_match(text, label) for text, label in pairs) / len(pairs), 3)}


# ---- the loop


def fit(model, train_set, val_set, learning_rates, cfg, precision, identity, earlier_stages=()):
    """Train until the last epoch or until `patience` epochs brought no better validation loss.

    `learning_rates`: {"head": peak, ...}, one for each group of `model.parameter_groups()`.
    `identity`: what a checkpoint says besides weights, epoch and loss. `earlier_stages`: logs that
    the curves show on the same scale. Returns the log, a list of dicts, one per epoch, row 0 before
    training. Same seed, same machine: same weights and losses, interrupted and resumed or not (on CPU).
    """
    output_dir, model = Path(cfg.output_dir), model.to(precision.device)
    optimizer = make_optimizer(model, learning_rates, cfg.weight_decay, precision.device)
    scaler = precision.scaler()
    state = {"epoch": 0, "best": math.inf, "stale": 0, "finished": False, "log": [], "samples": {}}
    # the training loss is measured like the validation loss: on as many rows, always the same ones
    probe = torch.randperm(len(train_set), generator=generator(cfg.seed, -1))[:len(val_set)].sort().values

    vocab, watched = Vocab(identity["vocab"]), watched_rows(val_set, cfg.seed)

    def close_epoch(started, samples_per_s, rates):
        losses = {name: evaluate(model, dataset, 2 * cfg.batch_size, precision, order)
                  for name, dataset, order in (("train_loss", train_set, probe), ("val_loss", val_set, None))}
        texts, _, _ = answer_rows(model, vocab, val_set, identity["sizes"]["answer_max_len"], precision)
        scores = validation_scores(texts, val_set.rows["answer"])
        state["samples"][f"epoch {state['epoch']}"] = [texts[row] for row in watched]
        state["log"].append({"epoch": state["epoch"], **losses, **scores, **rates,
                             "seconds": round(time.time() - started, 2), "samples_per_s": round(samples_per_s, 1)})
        require_finite(losses["val_loss"], state["epoch"], rates, output_dir)
        state["stale"] = 0 if losses["val_loss"] < state["best"] else state["stale"] + 1
        state["best"] = min(state["best"], losses["val_loss"])
        state["finished"] = state["epoch"] >= cfg.epochs or state["stale"] >= cfg.patience
        save_epoch(model, optimizer, scaler, state, identity, output_dir, earlier_stages)
        write_samples(val_set.rows.iloc[watched], state["samples"], output_dir)

    if cfg.resume:
        load_last(output_dir / "last.pt", model, optimizer, scaler, state, identity)
        write_log(state["log"], identity["stage"], output_dir, earlier_stages)
        write_samples(val_set.rows.iloc[watched], state["samples"], output_dir)
    else:
        write_json(output_dir / "config.json", identity["settings"])
        close_epoch(time.time(), 0.0, group_rates(optimizer))
    try:
        while not state["finished"]:
            state["epoch"] += 1
            started = time.time()
            rates = train_epoch(model, train_set, optimizer, scaler, state["epoch"], cfg, precision)
            close_epoch(started, len(train_set) / (time.time() - started), rates)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted in epoch {state['epoch']}; the epochs before it are saved, "
                                "the same command with --resume continues") from None
    best = min(state["log"], key=lambda row: row["val_loss"])
    print(f"best epoch {best['epoch']} of {state['epoch']}: validation loss {best['val_loss']:.4f}, "
          f"checkpoint {output_dir / 'vqa_checkpoint.pt'}")
    return state["log"]


def train_epoch(model, dataset, optimizer, scaler, epoch, cfg, precision):
    """One pass over the rows in an order drawn from (seed, epoch). Returns the mean learning rates."""
    model.train()
    # every epoch starts from its own seed, so a resumed run draws the same dropout as an uninterrupted one
    torch.manual_seed(cfg.seed * 100_003 + epoch)
    order = dataset.epoch_order(generator(cfg.seed, epoch), by_picture=model.clip_layers > 0)
    steps = math.ceil(len(dataset) / cfg.batch_size)
    total_steps, warmup_steps = cfg.epochs * steps, math.ceil(cfg.warmup_fraction * cfg.epochs * steps)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    loss_sum, word_sum = (torch.zeros((), device=precision.device) for _ in range(2))
    scale_sum = 0.0
    with tqdm(total=len(dataset), desc=f"epoch {epoch}", unit=" samples", mininterval=0.5) as bar:
        for step, batch in enumerate(dataset.batches(cfg.batch_size, order)):
            scale = schedule((epoch - 1) * steps + step, total_steps, warmup_steps)
            scale_sum += scale
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * scale
            with precision.autocast():
                loss, words = answer_loss(model, batch, cfg.label_smoothing)
            scaler.scale(loss / words).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            loss_sum += loss.detach()
            word_sum += words
            if step % LOSS_CHECK_STEPS == 0 or step == steps - 1:
                mean_loss = (loss_sum / word_sum).item()
                require_finite(mean_loss, f"{epoch}, step {step}", group_rates(optimizer), Path(cfg.output_dir))
                bar.set_postfix(loss=f"{mean_loss:.3f}", refresh=False)
            bar.update(len(batch["answer_ids"]))
    return {name: peak * scale_sum / steps for name, peak in group_rates(optimizer, "peak").items()}


def schedule(step, total_steps, warmup_steps):
    """Factor 0..1 on the peak learning rate: linear warm-up, then a cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model, learning_rates, weight_decay, device):
    """AdamW with one learning rate per origin of the weights; no decay on norms, biases and embeddings."""
    groups = []
    for name, parameters in model.parameter_groups().items():
        matrices = [p for p in parameters if p.dim() >= 2 and p is not model.decoder.embedding.weight]
        chosen = set(map(id, matrices))
        rest = [p for p in parameters if id(p) not in chosen]
        for part, decay in ((matrices, weight_decay), (rest, 0.0)):
            groups.append({"params": part, "name": name, "peak": learning_rates[name], "lr": 0.0, "weight_decay": decay})
    return torch.optim.AdamW(groups, lr=0.0, fused=device.type == "cuda")


def group_rates(optimizer, key="lr"):
    return {f"learning_rate_{group['name']}": group[key] for group in optimizer.param_groups}


def require_finite(loss, where, rates, output_dir):
    if not math.isfinite(loss):
        rates = ", ".join(f"{name} {value:.3g}" for name, value in rates.items())
        raise ValueError(f"the loss became {loss} in epoch {where} ({rates}); the last good checkpoint is "
                         f"{output_dir / 'vqa_checkpoint.pt'}; try a lower --learning-rate")


def generator(seed, epoch):
    """The generator of the order of rows in one epoch."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def main(cfg):
    check_settings(cfg)
    precision = Precision(cfg.device, cfg.amp)
    print(f"computing on {precision}")
    rows = read_rows(cfg.data_dir)
    for split in ("train", "val"):
        rows_of_split(rows, split)  # an empty split should fail before minutes of encoding
    encoders = load_encoders(cfg.clip_model, cfg.clip_pretrained, cfg.gpt2_model)
    positions = encoders.question.gpt2.config.n_positions
    if cfg.question_max_len > positions:
        raise ValueError(f"--question-max-len {cfg.question_max_len} is more than the {positions} positions of "
                         f"{cfg.gpt2_model}")
    pixels = decode_pictures(data_folder(cfg.data_dir), rows["image_path"], encoders.image, cfg.cache_dir, cfg.workers)
    rows = rows[rows["image_path"].isin(pixels.paths)]
    train_rows, val_rows = rows_of_split(rows, "train"), rows_of_split(rows, "val")
    vocab = Vocab.build(train_rows["answer"], cfg.min_word_freq)
    print(f"vocabulary: {len(vocab)} words")
    for split_rows in (train_rows, val_rows):
        report_answers(split_rows, vocab, cfg.answer_max_len)

    torch.manual_seed(cfg.seed)
    sizes = {name: getattr(cfg, name) for name in SIZES}
    model = build_model(encoders, len(vocab), sizes).to(precision.device)
    store = build_store(model, encoders, pixels, rows["question"], cfg.question_max_len, cfg.cache_dir, precision)
    train_set, val_set = (VQADataset(part, vocab, cfg.answer_max_len, store) for part in (train_rows, val_rows))
    identity = {
        "stage": "feature extraction", "vocab": vocab.words, "sizes": sizes, "settings": dataclasses.asdict(cfg),
        "data": data_hashes(train_set, val_set),
        "encoders": {"clip_model": cfg.clip_model, "clip_pretrained": cfg.clip_pretrained, "gpt2_model": cfg.gpt2_model,
                     "fingerprints": {"clip": encoders.image.fingerprint, "gpt2": encoders.question.fingerprint}},
        "cut": {"clip_layers": 0, "gpt2_layers": 0}}
    with only_run_in(cfg.output_dir):
        fit(model, train_set, val_set, {"head": cfg.learning_rate}, cfg, precision, identity)


if __name__ == "__main__":
    settings.run(main, Config)
