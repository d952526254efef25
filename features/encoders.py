"""The two pretrained encoders: found by name or folder, loaded completely or refused, and fingerprinted.

Missing weights are an error with one line: no "pretrained" encoder is ever randomly initialised.
"""
import contextlib
import logging
import string
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import requests
import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import logging as hub_logging
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from torchvision import transforms

from common.files import refuse_device
from features.arrays import fingerprint
from features.weights import BROKEN_WEIGHTS, find_weights_file, is_torchscript, local_folder, read_visual_weights, similar_model

# errors of a missing file in the hub's cache, of a damaged one, and of the network
NOT_FOUND = (OSError, ValueError, SafetensorError)
# values of the configs that change what an encoder computes and that its weights do not show
TRANSFORM_SETTINGS = ("interpolation", "resize_mode", "fill_color")
GPT2_SETTINGS = ("n_head", "activation_function", "layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx")
# the tokenizer's ids of these texts are part of the fingerprint
TEXTS = ("What color is the man's shirt?", "how many dogs are in the picture", " Is  this a 3-way intersection?\n",
         string.printable, "Où est le café, s'il vous plaît?", "这是什么? 🐶")


@dataclass
class ImageEncoder:
    visual: nn.Module  # open_clip's VisionTransformer, in eval mode
    resize: object  # CLIP's transform up to the pixels: PIL image -> RGB PIL image of the encoder's size
    mean: tuple  # of the three colours, in 0..1: the rest of CLIP's transform
    std: tuple
    transform: dict  # what `resize` does, as plain values
    fingerprint: str

    def normalize(self, pixels):
        """uint8 pixels (B, 3, S, S) -> the encoder's input, float32."""
        mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std


@dataclass
class QuestionEncoder:
    gpt2: nn.Module  # transformers' GPT2Model, in eval mode
    tokenizer: object  # pads on the right with the end-of-text token
    fingerprint: str


@dataclass
class Encoders:
    image: ImageEncoder
    question: QuestionEncoder
    names: dict  # clip_model, clip_pretrained, gpt2_model, as given

    def describe(self):
        """The names and fingerprints that a checkpoint stores."""
        return {**self.names, "fingerprints": {"clip": self.image.fingerprint, "gpt2": self.question.fingerprint}}

    def print_sizes(self):
        visual, gpt2 = self.image.visual, self.question.gpt2
        for name, module, blocks in ((self.names["clip_model"], visual, visual.transformer.resblocks),
                                     (self.names["gpt2_model"], gpt2, gpt2.h)):
            millions = sum(parameter.numel() for parameter in module.parameters()) / 1e6
            print(f"{name}: {millions:.1f} M parameters, {len(blocks)} blocks")


def load_encoders(clip_model, clip_pretrained, gpt2_model):
    """Both encoders by name or folder. Raises ValueError or FileNotFoundError of one line."""
    names = {"clip_model": clip_model, "clip_pretrained": clip_pretrained, "gpt2_model": gpt2_model}
    return Encoders(load_image_encoder(clip_model, clip_pretrained), load_question_encoder(gpt2_model), names)


def load_image_encoder(clip_model, clip_pretrained):
    """CLIP's image tower by open_clip's name and tag (or weights file), or by `local-dir:FOLDER`.

    The text tower is not loaded. Raises ValueError or FileNotFoundError if weights are missing or do not fit.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
    visual = build_image_tower(clip_model, clip_pretrained)
    with refuse_config(clip_model):
        block = visual.transformer.resblocks[0]
        quick_gelu = isinstance(block.mlp.gelu, open_clip.transformer.QuickGELU)
    weights, preprocess = find_clip_weights(clip_model, clip_pretrained, quick_gelu)
    try:
        # strict: a missing weight or another shape is an error; assign: no copy
        visual.load_state_dict(read_visual_weights(weights), strict=True, assign=True)
    except BROKEN_WEIGHTS as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"--clip-model {clip_model} with weights {weights} cannot be loaded: {reason}") from error
    with refuse_config(clip_model):
        settings = PreprocessCfg(**merge_preprocess_dict(visual.preprocess_cfg, preprocess))
        resize, mean, std = split_transform(image_transform_v2(settings, is_train=False))
    transform = {"size": list(visual.image_size), **{name: getattr(settings, name) for name in TRANSFORM_SETTINGS}}
    config = {"heads": block.attn.num_heads, "quick_gelu": quick_gelu,
              "approximate": getattr(block.mlp.gelu, "approximate", "none"),
              "epsilon": [module.eps for module in visual.modules() if isinstance(module, nn.LayerNorm)],
              "pool_type": visual.pool_type, "final_ln_after_pool": visual.final_ln_after_pool}
    return ImageEncoder(visual, resize, mean, std, transform, fingerprint(visual.state_dict(), config, transform, mean, std))


def split_transform(transform):
    """CLIP's transform as (its steps up to the pixels, mean, std). Raises an error if it does not work."""
    transform(Image.new("RGB", (9, 7)))  # some wrong values fail only now
    *resize, _, normalize = transform.transforms
    mean, std = tuple(normalize.mean), tuple(normalize.std)
    if not (len(mean) == len(std) == 3 and torch.tensor(mean + std).isfinite().all()):
        raise ValueError(f"mean {mean} and std {std} are not three numbers each")
    return transforms.Compose(resize), mean, std


@contextlib.contextmanager
def refuse_config(clip_model):
    """Turn any error that the values of a damaged open_clip_config.json cause into a ValueError of one line."""
    try:
        yield
    except Exception as error:  # open_clip raises AssertionError, ZeroDivisionError and more
        folder = local_folder(clip_model)
        config = folder / "open_clip_config.json" if folder else clip_model
        raise ValueError(f"--clip-model {clip_model} cannot be built from the values in {config} ({type(error).__name__}: "
                         f"{error!s:.200})") from error


def build_image_tower(clip_model, clip_pretrained):
    """open_clip's image tower without weights, in eval mode. Raises ValueError or FileNotFoundError."""
    import open_clip
    if folder := local_folder(clip_model):
        if not (folder / "open_clip_config.json").is_file():
            raise FileNotFoundError(f"--clip-model {clip_model}: no open_clip_config.json in {folder}")
        for path in folder.iterdir():
            refuse_device(path)
    elif clip_model not in open_clip.list_models():
        raise ValueError(f"--clip-model {clip_model} is not a model of open_clip; a similar one is "
                         f"{similar_model(clip_model, clip_pretrained)}, a local folder is local-dir:FOLDER")
    logging.getLogger().setLevel(logging.ERROR)  # open_clip logs its steps on the root logger
    with refuse_config(clip_model), torch.device("meta"):  # shapes only: random weights would cost time and memory
        # text_cfg: the smallest text tower, as it is not used; that of a folder could load any model of transformers
        visual = open_clip.create_model(clip_model, load_weights=False, device="meta", text_cfg={"layers": 1}).visual
    if not isinstance(visual, open_clip.transformer.VisionTransformer) or visual.attn_pool is not None:
        raise ValueError(f"--clip-model {clip_model} is not a plain vision transformer; use one such as ViT-B-32-quickgelu")
    return visual.eval()


def find_clip_weights(clip_model, clip_pretrained, quick_gelu):
    """The weights file, and the preprocessing settings of its tag ({} for a file or folder).

    `quick_gelu`: whether the model has this activation. Raises ValueError if it lacks QuickGELU and the weights need it:
    open_clip only warns, and every feature would be slightly wrong.
    """
    import open_clip
    folder = local_folder(clip_model)
    tag = None if folder else open_clip.get_pretrained_cfg(clip_model, clip_pretrained)
    path = None if tag else find_weights_file(clip_model, clip_pretrained)
    if not quick_gelu and (is_torchscript(path) if path else tag.get("quick_gelu")):
        remedy = '"quick_gelu": true in open_clip_config.json' if folder else f"--clip-model {clip_model}-quickgelu"
        raise ValueError(f"--clip-model {clip_model} lacks QuickGELU, the activation of its weights {path or clip_pretrained}: "
                         f"use {remedy}")
    if path:
        return path, {}
    preprocess = {key: tag[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in tag}
    repository, _, filename = tag.get("hf_hub", "").rpartition("/")
    if not repository:
        return open_clip.download_pretrained(tag), preprocess
    download = partial(hf_hub_download, repository, filename or "open_clip_model.safetensors")
    return from_cache_or_hub(download, f"{clip_model} ({clip_pretrained})", "--clip-model local-dir:FOLDER"), preprocess


def from_cache_or_hub(load, model, local_flag):
    """`load(local_files_only=True)`, or over the network if the cache lacks files.

    Raises FileNotFoundError, at once if the hub cannot be reached: the hub's own client would retry for a minute.
    """
    try:
        return load(local_files_only=True)
    except NOT_FOUND:
        pass
    try:
        if constants.HF_HUB_OFFLINE:
            raise FileNotFoundError("HF_HUB_OFFLINE is set")
        if requests.head(constants.ENDPOINT, timeout=5).status_code >= 500:
            raise FileNotFoundError("the hub is down")
        hub_logging.set_verbosity_error()  # it prints HF_ENDPOINT, with a password that it may hold, at every retry
        return load(local_files_only=False)
    except (*NOT_FOUND, HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"the weights of {model} are not in the hub cache {constants.HF_HUB_CACHE} and cannot be fetched; to work offline "
            "fill the hub cache on a machine with network and copy it here (HF_HOME names the folder), or pass a local folder "
            f"({local_flag})") from error


def load_question_encoder(gpt2_model):
    """GPT-2 and its tokenizer by hub name or local folder, in float32, padding on the right.

    Raises ValueError or FileNotFoundError if files are missing or do not fit.
    """
    load = partial(read_gpt2, gpt2_model)
    if Path(gpt2_model).is_dir():
        for path in Path(gpt2_model).iterdir():
            refuse_device(path)
        try:
            tokenizer, gpt2, report = load(local_files_only=True)
        except Exception as error:  # tokenizers raises a plain Exception for unreadable files
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise FileNotFoundError(f"--gpt2-model {gpt2_model}: the folder needs config.json, model.safetensors and the "
                                    f"tokenizer's files, undamaged and of one model: {reason}") from error
    elif gpt2_model.startswith((".", "/", "~")) or gpt2_model.count("/") > 1:
        raise FileNotFoundError(f"--gpt2-model {gpt2_model}: no such folder")
    else:
        tokenizer, gpt2, report = from_cache_or_hub(load, gpt2_model, "--gpt2-model FOLDER")
    if gpt2.config.model_type != "gpt2":
        raise ValueError(f"--gpt2-model {gpt2_model} is a {gpt2.config.model_type}, no GPT-2; use one such as distilgpt2")
    if report["missing_keys"] or report["mismatched_keys"]:
        names = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise ValueError(f"--gpt2-model {gpt2_model} lacks weights: {', '.join(names[:3])} ({len(names)} in all)")
    if tokenizer.eos_token is None:
        raise ValueError(f"--gpt2-model {gpt2_model}: its tokenizer has no end-of-text token")
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    config = {name: getattr(gpt2.config, name) for name in GPT2_SETTINGS}
    behaviour = (tokenizer(list(TEXTS))["input_ids"], tokenizer.eos_token_id, sorted(tokenizer.get_vocab().items()))
    return QuestionEncoder(gpt2.eval(), tokenizer, fingerprint(gpt2.state_dict(), config, *behaviour))


def read_gpt2(gpt2_model, local_files_only):
    """(tokenizer, GPT-2, report of its missing weights), read by transformers."""
    from transformers import AutoTokenizer, GPT2Model
    from transformers.utils import logging as transformers_logging
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # False: code that comes with a model never runs, and nobody is asked whether it may
    options = {"local_files_only": local_files_only, "trust_remote_code": False}
    # sdpa: the model runs the blocks without a mask, which is causal under sdpa but not under eager attention
    gpt2, report = GPT2Model.from_pretrained(gpt2_model, dtype=torch.float32, attn_implementation="sdpa",
                                             output_loading_info=True, **options)
    return AutoTokenizer.from_pretrained(gpt2_model, **options), gpt2, report
