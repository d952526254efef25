"""Contrastive training of the demo's small CLIP on drawn scenes.

A batch consists of families: a scene and copies that differ in one fact. To tell them apart, the model must see the
right color on the right thing in the right place. Captions are single statements and joined ones. A caption may be true
of several images of a batch, and the loss knows of which.
"""
import copy
import signal
import time

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from demo.drawing import draw_scene
from demo.pretraining import captions
from demo.world import FAMILY, family_of

IMAGE_SIZE = 96
PATCH_SIZE = 16
STATEMENTS = 4                # statements drawn per image and step
COLUMN_STATEMENTS = 2         # statements drawn per column and step
JOINED = 3                    # statements of a joined caption; one such caption per family
SHIFT = 3                     # augmentation: largest shift in pixels
GAIN = 0.12                   # augmentation: largest relative change of a color channel
MAX_SCALE = 4.6052            # ln 100: CLIP's limit for the logarithm of the scale
MEAN, STD = 0.5, 0.25         # of pixels in 0..1, the same for all channels
JOINED_WEIGHT = 0.25
LOG_EVERY, RETRIEVAL_EVERY = 50, 250

MODEL = {"embed_dim": 256,
         "vision_cfg": {"image_size": IMAGE_SIZE, "layers": 4, "width": 160, "head_width": 32, "mlp_ratio": 3.0,
                        "patch_size": PATCH_SIZE, "pool_type": "avg"},
         "text_cfg": {"context_length": captions.CONTEXT_LENGTH, "vocab_size": len(captions.vocabulary()),
                      "width": 96, "heads": 3, "layers": 2, "hf_tokenizer_name": "word-level", "pool_type": "argmax"}}
PREPROCESS = {"size": [IMAGE_SIZE, IMAGE_SIZE], "mode": "RGB", "mean": [MEAN] * 3, "std": [STD] * 3,
              "interpolation": "bicubic", "resize_mode": "squash", "fill_color": 0}


def render_family(number, seed):
    """Pixels uint8 (FAMILY, 3, S, S), and for each image its true statements: (of the image, of each column)."""
    scenes = family_of(seed, number)
    images = [draw_scene(scene).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC) for scene in scenes]
    pixels = np.stack([np.asarray(image).transpose(2, 0, 1) for image in images])
    return pixels, [(captions.statements(scene), captions.column_statements(scene)) for scene in scenes]


class Scenes:
    """All pretraining images in memory, and all their statements by number."""

    def __init__(self, rendered):
        self.pixels = np.concatenate([pixels for pixels, _ in rendered])          # (N, 3, S, S) uint8
        self.index = {}
        self.true, self.columns = [], []
        for _, family in rendered:
            for texts, by_column in family:
                self.true.append(self._numbers(texts))
                self.columns.append([self._numbers(column) for column in by_column])
        words = {word: number for number, word in enumerate(captions.vocabulary())}
        for text in list(self.index):
            self.index.setdefault(captions.mirrored(text), len(self.index))
        self.mirrored = np.array([self.index[captions.mirrored(text)] for text in self.index])  # number -> number
        self.words = [[words[word] for word in text.split()] for text in self.index]
        self.start, self.joint, self.end = words["<start>"], words["and"], words["<end>"]

    def __len__(self):
        return len(self.true)

    def _numbers(self, texts):
        return np.array([self.index.setdefault(text, len(self.index)) for text in texts], dtype=int)

    def batch(self, rows, rng):
        """The augmented images `rows` (B, 3, S, S), and the captions of three contrasts, each as (ids (C, L), truth).

        The contrasts are statements with images, truth (B, C); joined statements with images (B, C); statements with
        columns (3B, C). `rows` must be whole families. Half of the families are mirrored, and their captions too.
        """
        flipped = np.repeat(rng.random(len(rows) // FAMILY) < 0.5, FAMILY)
        pixels = self.pixels[rows]
        pixels[flipped] = pixels[flipped, ..., ::-1]
        images = [self.mirrored[self.true[row]] if flip else self.true[row]
                    for row, flip in zip(rows, flipped, strict=True)]
        columns = [self.mirrored[column] for row, flip in zip(rows, flipped, strict=True)
                   for column in (self.columns[row][::-1] if flip else self.columns[row])]
        statements = np.unique(np.concatenate([rng.choice(true, STATEMENTS) for true in images]))
        joined = [rng.choice(true, JOINED, replace=False) for true in images[::FAMILY]]
        of_columns = np.unique(np.concatenate([rng.choice(column, min(COLUMN_STATEMENTS, len(column)), replace=False)
                                               for column in columns]))
        parts = np.unique(np.concatenate(joined))
        holds = self._holds(images, parts)
        joined_truth = np.stack([holds[:, np.searchsorted(parts, members)].all(1) for members in joined], axis=1)
        return (self._augment(pixels, rng) - MEAN) / STD, (
            (self.encode(statements[:, None]), torch.from_numpy(self._holds(images, statements))),
            (self.encode(joined), torch.from_numpy(joined_truth)),
            (self.encode(of_columns[:, None]), torch.from_numpy(self._holds(columns, of_columns))))

    def _holds(self, owners, wanted):
        """Bool (owners, wanted): is the wanted statement among the true ones of the owner? `wanted` is sorted."""
        position = np.full(len(self.index), -1)
        position[wanted] = np.arange(len(wanted))
        truth = np.zeros((len(owners), len(wanted)), dtype=bool)
        for number, true in enumerate(owners):
            found = position[true]
            truth[number, found[found >= 0]] = True
        return truth

    def _augment(self, pixels, rng):
        """Shift by a few pixels (edges repeated) and change the color channels; float32 in 0..1."""
        padded = np.pad(pixels, ((0, 0), (0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)), mode="edge")
        corners = rng.integers(0, 2 * SHIFT + 1, (len(pixels), 2))
        moved = np.stack([image[:, y:y + IMAGE_SIZE, x:x + IMAGE_SIZE]
                          for image, (y, x) in zip(padded, corners, strict=True)])
        gain = torch.from_numpy(rng.uniform(1 - GAIN, 1 + GAIN, (len(pixels), 3, 1, 1)).astype(np.float32))
        return (torch.from_numpy(moved).float() / 255 * gain).clamp(0, 1)

    def encode(self, wanted):
        """Ids (C, L), padded with 0, of captions that are given as lists of statement numbers."""
        rows = []
        for members in wanted:
            words = [self.start]
            for number, member in enumerate(members):
                words += ([self.joint] if number else []) + self.words[member]
            rows.append([*words, self.end])
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, :len(row)] = torch.tensor(row)
        return ids


def build_clip():
    """An untrained CLIP with the sizes in MODEL."""
    import open_clip
    sizes = copy.deepcopy(MODEL)
    del sizes["text_cfg"]["hf_tokenizer_name"]
    return open_clip.model.CLIP(**sizes)


def encode_captions(model, ids):
    """Unit features (C, D) of ids (C, L). Equals open_clip's `encode_text`, without padding to the whole context."""
    length = ids.shape[1]
    states = model.token_embedding(ids) + model.positional_embedding[:length]      # (C, L, W)
    states = model.ln_final(model.transformer(states, attn_mask=model.attn_mask[:length, :length]))
    ends = states[torch.arange(len(ids)), ids.argmax(-1)]
    return torch.nn.functional.normalize(ends @ model.text_projection, dim=-1)


def encode_images(model, pixels):
    """Unit features of the images (B, D), pooled as in open_clip, and of their three columns (3B, D)."""
    visual = model.visual
    pooled, tokens = visual._pool(visual.transformer(visual._embeds(pixels)))      # (B, W), (B, T, W)
    side = IMAGE_SIZE // PATCH_SIZE
    columns = tokens.unflatten(1, (side, 3, side // 3)).mean((1, 3))               # (B, 3, W)
    return tuple(torch.nn.functional.normalize(part @ visual.proj, dim=-1) for part in (pooled, columns.flatten(0, 1)))


def contrast(model, image, ids, truth):
    """CLIP's symmetric loss with several correct partners, and the share of captions whose best image is correct."""
    logits = model.logit_scale.exp() * image @ encode_captions(model, ids).T       # (B, C)
    target = truth.float()
    by_caption = -(logits.log_softmax(0) * target).sum(0) / target.sum(0)
    # an empty column has no true caption: it is only a wrong partner for the captions
    by_image = -(logits.log_softmax(1) * target).sum(1) / target.sum(1).clamp(min=1)
    right = truth.gather(0, logits.argmax(0, keepdim=True)).float().mean()
    return (by_caption.mean() + by_image.sum() / truth.any(1).sum()) / 2, right


def total_loss(model, batch):
    """Weighted sum of the three contrasts, and the accuracy of the first one."""
    pixels, (statements, joined, of_columns) = batch
    images, columns = encode_images(model, pixels)
    loss, right = contrast(model, images, *statements)
    return loss + JOINED_WEIGHT * contrast(model, images, *joined)[0] + contrast(model, columns, *of_columns)[0], right


@torch.no_grad()
def retrieval_accuracy(model, held_out, batch_size=64):
    """Share (0 to 1) of images that fit their own statements better than those of the rest of their family.

    Chance is 1 / FAMILY.
    """
    texts = encode_captions(model, held_out.encode([[number] for number in range(len(held_out.index))]))
    right = 0
    for start in range(0, len(held_out), batch_size):
        pixels = torch.from_numpy(held_out.pixels[start:start + batch_size]).float() / 255
        image, _ = encode_images(model, (pixels - MEAN) / STD)
        for first in range(0, len(image), FAMILY):
            scores = torch.stack([(image[first:first + FAMILY] @ texts[held_out.true[start + first + n]].T).mean(1)
                                  for n in range(FAMILY)])                         # (captions of, images)
            right += (scores.argmax(0) == torch.arange(FAMILY)).sum().item()
    return right / len(held_out)


def make_optimizers(model, learning_rate, muon_learning_rate, weight_decay):
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for everything else.

    With Muon, 102,000 images gave the retrieval accuracy that AdamW reached after 410,000 (docs/experiments.md).
    """
    matrices = [parameter for name, parameter in model.named_parameters() if "resblocks" in name and parameter.dim() == 2]
    chosen = set(map(id, matrices))
    rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    return (torch.optim.Muon(matrices, lr=muon_learning_rate, weight_decay=weight_decay),
            torch.optim.AdamW([{"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay},
                               {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}],
                              lr=learning_rate, betas=(0.9, 0.98)))


def train_clip(rank, cfg, address, scenes, held_out, log, save):
    """Train in one of `cfg.workers` processes. Each draws its own batches; gradients are averaged.

    `cfg`: the Config of pretrain_encoders.py. `address`: a file name for the rendezvous of the processes. Rank 0 calls
    `log(row)` every LOG_EVERY steps, and `save(model)` every `cfg.save_seconds` and at the end.
    """
    if rank:  # the parent ends the others with SIGTERM; an inherited handler would wait for all_reduce
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # one process per core is faster than one process on two cores
    torch.distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=cfg.workers)
    torch.manual_seed(cfg.seed)
    model = build_clip()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizers = make_optimizers(model, cfg.clip_learning_rate, cfg.muon_learning_rate, cfg.weight_decay)
    steps, families_per_batch = cfg.clip_steps, cfg.clip_batch_size // FAMILY
    warmup = max(1, min(150, steps // 10))
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / warmup, 0.5 * (1 + np.cos(np.pi * max(0, step - warmup) / max(1, steps - warmup))) + 1e-3))
        for optimizer in optimizers]
    rng = np.random.default_rng((cfg.seed, rank))
    order, totals, saved = np.array([], dtype=int), [], time.monotonic()
    bar = tqdm(range(1, steps + 1), desc="CLIP", unit="step", disable=rank > 0, mininterval=10)
    for step in bar:
        if len(order) < families_per_batch:
            order = np.concatenate([order, rng.permutation(len(scenes) // FAMILY)])
        picked, order = order[:families_per_batch], order[families_per_batch:]
        loss, right = total_loss(model, scenes.batch((picked[:, None] * FAMILY + np.arange(FAMILY)).ravel(), rng))
        model.zero_grad()
        loss.backward()
        average_gradients(parameters, cfg.workers)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.logit_scale.data.clamp_(0, MAX_SCALE)
        totals.append((loss.item(), right.item()))
        if rank == 0 and (step % LOG_EVERY == 0 or step == steps):
            (mean_loss, accuracy), totals = np.mean(totals, axis=0), []
            retrieval = retrieval_accuracy(model, held_out) if step % RETRIEVAL_EVERY == 0 or step == steps else None
            log({"step": step, "loss": mean_loss, "batch_accuracy": accuracy, "held_out_retrieval": retrieval,
                 "learning_rate": schedules[-1].get_last_lr()[0]})
            bar.set_postfix(loss=f"{mean_loss:.3f}", right=f"{accuracy:.3f}")
            if time.monotonic() - saved > cfg.save_seconds or step == steps:
                save(model)
                saved = time.monotonic()
    torch.distributed.destroy_process_group()


def average_gradients(parameters, world_size):
    """Replace each gradient by its mean over all processes (all_reduce)."""
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    torch.distributed.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(part.view_as(parameter) / world_size)
