"""Outputs of the frozen blocks for every distinct image and question: computed once, stored, memory-mapped.

One file in `cache_dir` per encoder, freeze boundary and input. The file's name holds a hash of everything its
content depends on, so an outdated file is never read.
"""
import hashlib
from pathlib import Path

import torch
from tqdm import tqdm

from common import distributed
from common.device import compute_in_slices, slices_of
from features.arrays import STORED, as_numpy, hash_of, new_array, open_tensor, require_length, require_whole, still_writing
from vocab import nfc

# images or questions per batch; on a CPU larger batches make every layer allocate its memory anew
ENCODE_BATCH = {"cpu": 16, "mps": 64, "cuda": 1024}
STATES_VERSION = 3  # part of every hash: raise it if an encode_*_frozen computes something else
DEVICE_SHARE = 0.4  # of the free device memory that one store may fill; a larger store stays in host memory


class FeatureStore:
    """States of all distinct images and questions, on the device if they fit, else memory-mapped.

    `image_states` (images, ...) and `question_states` (questions, ...) are outputs of the model's `encode_*_frozen`.
    `question_lengths` (questions,) counts real tokens. `row_of_image` and `row_of_question` map an image path or a
    question to its row. `pixels_key` is the hash of the images' bytes and transform, `image_digests` {path: hash of the bytes}.
    """

    def __init__(self, image_paths, image_states, questions, question_states, question_lengths, device, pixels_key="",
                 image_digests=None):
        self.row_of_image = {path: row for row, path in enumerate(image_paths)}
        self.row_of_question = {question: row for row, question in enumerate(questions)}
        self.image_states, self.question_states = to_device(image_states, device), to_device(question_states, device)
        self.question_lengths, self.device, self.pixels_key = question_lengths, device, pixels_key
        self.image_digests = image_digests or {}

    def select(self, states, index):
        """Rows `index` (B,), a CPU tensor, of one of the two stores, on the device."""
        if hasattr(states, "array"):
            require_length(states.array)
        if states.device == self.device:
            return states[to_device_soon(index, self.device)]
        rows = states[index]
        # from pinned memory the copy is asynchronous
        return to_device_soon(rows.pin_memory() if self.device.type == "cuda" else rows, self.device)


def to_device(states, device):
    """`states` on the device if they take little of its free memory; else unchanged, in host memory."""
    if device.type != "cuda" or states.nbytes > DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
        return states
    try:
        return states.to(device)
    except torch.cuda.OutOfMemoryError:  # another process took the memory meanwhile
        return states


def to_device_soon(tensor, device):
    """A tensor of the host on the device, on CUDA without waiting for the copy. On mps that could give wrong numbers."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def build_store(model, encoders, pixels, questions, cache_dir, precision):
    """The FeatureStore of `pixels` (a PixelStore) and all distinct `questions` at the model's freeze boundary."""
    questions = sorted(set(questions))
    input_ids, lengths = tokenize_questions(encoders.question.tokenizer, questions, model.config.question_max_len)
    image_states = encode_images(model, encoders.image, pixels, cache_dir, precision)
    question_states = encode_questions(model, encoders.question, input_ids, lengths, cache_dir, precision)
    return FeatureStore(pixels.paths, image_states, questions, question_states, lengths, precision.device, pixels.key,
                        pixels.image_digests)


def tokenize_questions(tokenizer, questions, question_max_len, warn=True):
    """Token ids (N, Q), padded on the right, and lengths (N,). `warn`: print how many questions are truncated, if any."""
    encoded = [ids or [tokenizer.eos_token_id] for ids in tokenizer(list(map(nfc, questions)))["input_ids"]]
    truncated = sum(len(ids) > question_max_len for ids in encoded)
    lengths = torch.tensor([min(len(ids), question_max_len) for ids in encoded])
    input_ids = torch.full((len(encoded), int(lengths.max())), tokenizer.pad_token_id)
    for row, ids in enumerate(encoded):
        input_ids[row, :lengths[row]] = torch.tensor(ids[:question_max_len])
    if warn and truncated:
        print(f"questions: {len(encoded)} distinct, {truncated} truncated to {question_max_len} tokens (the longest has "
              f"{max(map(len, encoded))}: see train.py --question-max-len)")
    return input_ids, lengths


def encode_images(model, image_encoder, pixels, cache_dir, precision):
    """States of all images at the freeze boundary: a memory-mapped tensor (N, D_i) or (N, T, W)."""
    def encode(rows):
        if rows.start == 0:  # not earlier: a run that finds the states does not read the pixels
            require_whole(pixels.pixels)
        require_length(pixels.pixels)
        batch = torch.from_numpy(pixels.pixels[rows]).to(precision.device)
        return model.encode_image_frozen(image_encoder.normalize(batch))

    key = [pixels.key, image_encoder.fingerprint, image_encoder.mean, image_encoder.std, model.clip_layers,
           model.config.image_pooling]
    return stored_states("image_states", key, len(pixels.paths), encode, cache_dir, precision, "images", model.image_dtype)


def encode_questions(model, question_encoder, input_ids, lengths, cache_dir, precision):
    """States of all questions at the freeze boundary: a memory-mapped tensor (N, D_q) or (N, Q, W)."""
    mask = torch.arange(input_ids.shape[1]) < lengths.unsqueeze(1)       # (N, Q)

    def encode(rows):
        return model.encode_question_frozen(input_ids[rows].to(precision.device), mask[rows].to(precision.device))

    ids_hash = hashlib.blake2b(input_ids.numpy().tobytes() + lengths.numpy().tobytes(), digest_size=16).hexdigest()
    key = [ids_hash, question_encoder.fingerprint, model.gpt2_layers]
    return stored_states("question_states", key, len(input_ids), encode, cache_dir, precision, "questions",
                         model.question_dtype)


def stored_states(name, key, count, encode, cache_dir, precision, unit, frozen_dtype=None):
    """The states from `cache_dir`. If they are not there yet, `encode(slice)` computes them batch by batch."""
    dtype = frozen_dtype or precision.dtype or torch.float32
    target = Path(cache_dir) / f"{name}-{hash_of([name, STATES_VERSION, key, str(dtype)])}.npy"
    if not distributed.broadcast(target.is_file()):
        def states_of(rows):
            return torch.cat(compute_in_slices(encode, rows, precision))

        slices = slices_of(count, ENCODE_BATCH[precision.device.type])
        own_slices = distributed.shard(torch.arange(len(slices))).tolist()
        with tqdm(total=count, desc=f"encoding {unit}", unit=f" {unit}", mininterval=0.5,
                  disable=distributed.get_rank() > 0) as bar:
            first = states_of(slices[0])
            stored = torch.float32 if first.dim() == 2 else dtype  # features are small: they are not rounded
            with new_array(target, (count, *first.shape[1:]), STORED[stored]) as array:
                for number in own_slices:
                    rows = slices[number]
                    states = first if number == 0 else states_of(rows)
                    array[rows] = as_numpy(states.to(stored).cpu())
                    still_writing(array)
                    bar.update(rows.stop - rows.start)
                del array  # see new_array
    return open_tensor(target, count)
