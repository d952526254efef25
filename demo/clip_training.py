"""The tiny CLIP: contrastive training on drawn scenes and captions whose truth is known for every picture.

A batch is made of families: a scene and copies that differ in one fact, so that telling the pictures
apart takes the right colour on the right thing in the right place. Each picture's captions are short
statements and joined ones; since every statement can be checked, a caption may be true of several pictures.
"""
import signal
import time

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from demo import captions
from demo.drawing import draw_scene
from demo.world import FAMILY, family_of

IMAGE_SIZE = 96
PATCH_SIZE = 16
STATEMENTS = 4                # short captions drawn per picture and step
COLUMN_STATEMENTS = 2         # short captions drawn per picture and step about what one column shows
JOINED = 3                    # statements of a long caption, one per family
SHIFT = 3                     # augmentation: pixels by which a picture is moved
GAIN = 0.12                   # augmentation: how much a colour channel is made brighter or darker
MAX_SCALE = 4.6052            # ln 100, CLIP's own limit of the temperature
MEAN, STD = 0.5, 0.25         # of pixels in 0..1, for the three colours alike
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
    """Pixels uint8 (FAMILY, 3, S, S) and per picture the statements true of it and of each of its columns."""
    scenes = family_of(seed, number)
    pictures = [draw_scene(scene).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC) for scene in scenes]
    pixels = np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in pictures])
    return pixels, [(captions.statements(scene), captions.column_statements(scene)) for scene in scenes]


class Scenes:
    """All pretraining pictures in memory, and an index of the statements."""

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
        """Pictures `rows` (B, 3, S, S), augmented, and the captions of the three contrasts, each as (ids (C, L),
        truth): statements and joined captions against pictures (B, C), looks against columns (3B, C).

        `rows` are whole families, half of which are mirrored, with left and right exchanged in their captions.
        """
        flipped = np.repeat(rng.random(len(rows) // FAMILY) < 0.5, FAMILY)
        pixels = self.pixels[rows]
        pixels[flipped] = pixels[flipped, ..., ::-1]
        pictures = [self.mirrored[self.true[row]] if flip else self.true[row]
                    for row, flip in zip(rows, flipped, strict=True)]
        columns = [self.mirrored[column] for row, flip in zip(rows, flipped, strict=True)
                   for column in (self.columns[row][::-1] if flip else self.columns[row])]
        statements = np.unique(np.concatenate([rng.choice(true, STATEMENTS) for true in pictures]))
        joined = [rng.choice(true, JOINED, replace=False) for true in pictures[::FAMILY]]
        looks = np.unique(np.concatenate([rng.choice(column, min(COLUMN_STATEMENTS, len(column)), replace=False)
                                          for column in columns]))
        parts = np.unique(np.concatenate(joined))
        holds = self._holds(pictures, parts)
        joined_truth = np.stack([holds[:, np.searchsorted(parts, members)].all(1) for members in joined], axis=1)
        return (self._augment(pixels, rng) - MEAN) / STD, (
            (self.encode(statements[:, None]), torch.from_numpy(self._holds(pictures, statements))),
            (self.encode(joined), torch.from_numpy(joined_truth)),
            (self.encode(looks[:, None]), torch.from_numpy(self._holds(columns, looks))))

    def _holds(self, owners, wanted):
        """Truth (owners, wanted) of each wanted statement for each owner of true statements; `wanted` is sorted."""
        position = np.full(len(self.index), -1)
        position[wanted] = np.arange(len(wanted))
        truth = np.zeros((len(owners), len(wanted)), dtype=bool)
        for number, true in enumerate(owners):
            found = position[true]
            truth[number, found[found >= 0]] = True
        return truth

    def _augment(self, pixels, rng):
        """Moved by a few pixels (edges repeated) and tinted."""
        padded = np.pad(pixels, ((0, 0), (0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)), mode="edge")
        corners = rng.integers(0, 2 * SHIFT + 1, (len(pixels), 2))
        moved = np.stack([picture[:, y:y + IMAGE_SIZE, x:x + IMAGE_SIZE]
                          for picture, (y, x) in zip(padded, corners, strict=True)])
        gain = torch.from_numpy(rng.uniform(1 - GAIN, 1 + GAIN, (len(pixels), 3, 1, 1)).astype(np.float32))
        return (torch.from_numpy(moved).float() / 255 * gain).clamp(0, 1)

    def encode(self, wanted):
        """Captions, each a tuple of statements' numbers, as ids (C, L) padded with 0."""
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
    """An untrained CLIP of MODEL's sizes."""
    import open_clip
    sizes = {name: dict(part) if isinstance(part, dict) else part for name, part in MODEL.items()}
    sizes["text_cfg"].pop("hf_tokenizer_name")
    return open_clip.model.CLIP(**sizes)


def encode_captions(model, ids):
    """open_clip's `encode_text` on ids (C, L) not padded to the whole context: unit features (C, D)."""
    length = ids.shape[1]
    states = model.token_embedding(ids) + model.positional_embedding[:length]      # (C, L, W)
    states = model.ln_final(model.transformer(states, attn_mask=model.attn_mask[:length, :length]))
    ends = states[torch.arange(len(ids)), ids.argmax(-1)]
    return torch.nn.functional.normalize(ends @ model.text_projection, dim=-1)


def encode_images(model, pixels):
    """Unit features of the pictures (B, D) and of their three columns (3B, D); pooled as open_clip pools."""
    visual = model.visual
    pooled, tokens = visual._pool(visual.transformer(visual._embeds(pixels)))      # (B, W), (B, T, W)
    side = IMAGE_SIZE // PATCH_SIZE
    columns = tokens.unflatten(1, (side, 3, side // 3)).mean((1, 3))               # (B, 3, W)
    return tuple(torch.nn.functional.normalize(part @ visual.proj, dim=-1) for part in (pooled, columns.flatten(0, 1)))


def contrast(model, image, ids, truth):
    """CLIP's symmetric loss with several right partners, and the share of captions whose best picture is right."""
    logits = model.logit_scale.exp() * image @ encode_captions(model, ids).T       # (B, C)
    target = truth.float()
    by_caption = -(logits.log_softmax(0) * target).sum(0) / target.sum(0)
    # a column may be empty: then no caption is its partner, and it only serves as a wrong one for the captions
    by_picture = -(logits.log_softmax(1) * target).sum(1) / target.sum(1).clamp(min=1)
    right = truth.gather(0, logits.argmax(0, keepdim=True)).float().mean()
    return (by_caption.mean() + by_picture.sum() / truth.any(1).sum()) / 2, right


def total_loss(model, batch):
    """Sum of the three contrasts, and the statements' accuracy in the batch."""
    pixels, (statements, joined, looks) = batch
    pictures, columns = encode_images(model, pixels)
    loss, right = contrast(model, pictures, *statements)
    return loss + JOINED_WEIGHT * contrast(model, pictures, *joined)[0] + contrast(model, columns, *looks)[0], right


@torch.no_grad()
def retrieval_accuracy(model, held_out, batch_size=64):
    """Share of held-out pictures found within their family by their own statements (chance: 1 / FAMILY)."""
    texts = encode_captions(model, held_out.encode([[number] for number in range(len(held_out.index))]))
    right = 0
    for start in range(0, len(held_out), batch_size):
        pixels = torch.from_numpy(held_out.pixels[start:start + batch_size]).float() / 255
        image, _ = encode_images(model, (pixels - MEAN) / STD)
        for first in range(0, len(image), FAMILY):
            scores = torch.stack([(image[first:first + FAMILY] @ texts[held_out.true[start + first + n]].T).mean(1)
                                  for n in range(FAMILY)])                         # (captions of, pictures)
            right += (scores.argmax(0) == torch.arange(FAMILY)).sum().item()
    return right / len(held_out)


def make_optimizers(model, learning_rate, muon_learning_rate, weight_decay):
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for everything else.

    In trials of 102,000 pictures Muon found as many held-out pictures as AdamW does after 410,000.
    """
    matrices = [parameter for name, parameter in model.named_parameters() if "resblocks" in name and parameter.dim() == 2]
    chosen = set(map(id, matrices))
    rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    return (torch.optim.Muon(matrices, lr=muon_learning_rate, weight_decay=weight_decay),
            torch.optim.AdamW([{"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay},
                               {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}],
                              lr=learning_rate, betas=(0.9, 0.98)))


def train_clip(rank, world_size, address, scenes, held_out, steps, batch_size, learning_rate, muon_learning_rate,
               weight_decay, seed, log, save, save_seconds):
    """One of `world_size` processes, each with its own batches of `batch_size`; gradients are averaged.

    `address` is an empty file that the processes meet in. The first process calls `log(row)` every
    LOG_EVERY steps and `save(model)` every `save_seconds` and at the end.
    """
    if rank:  # the parent ends them; its own handler would wait for the gradients' exchange
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # one process per core is faster than one process on two cores
    torch.distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=world_size)
    torch.manual_seed(seed)
    model = build_clip()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizers = make_optimizers(model, learning_rate, muon_learning_rate, weight_decay)
    warmup = max(1, min(150, steps // 10))
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / warmup, 0.5 * (1 + np.cos(np.pi * max(0, step - warmup) / max(1, steps - warmup))) + 1e-3))
        for optimizer in optimizers]
    rng = np.random.default_rng((seed, rank))
    families, order, totals, saved = len(scenes) // FAMILY, np.array([], dtype=int), [], time.monotonic()
    bar = tqdm(range(1, steps + 1), desc="CLIP", unit="step", disable=rank > 0, mininterval=10)
    for step in bar:
        if len(order) < batch_size // FAMILY:
            order = np.concatenate([order, rng.permutation(families)])
        picked, order = order[:batch_size // FAMILY], order[batch_size // FAMILY:]
        loss, right = total_loss(model, scenes.batch((picked[:, None] * FAMILY + np.arange(FAMILY)).ravel(), rng))
        model.zero_grad()
        loss.backward()
        average_gradients(parameters, world_size)
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
            if time.monotonic() - saved > save_seconds or step == steps:
                save(model)
                saved = time.monotonic()
    torch.distributed.destroy_process_group()


def average_gradients(parameters, world_size):
    """Replace each gradient by its mean over the processes."""
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    torch.distributed.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(part.view_as(parameter) / world_size)
