"""Finds CLIP's weights file and reads the image tower from it. No code in the file runs, not even TorchScript."""
import difflib
import math
import pickle
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

STORAGES = {"HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "FloatStorage": torch.float32,
            "DoubleStorage": torch.float64}
# errors that a damaged or foreign weights file raises
BROKEN_WEIGHTS = (RuntimeError, LookupError, ValueError, TypeError, AttributeError, EOFError, pickle.UnpicklingError,
                  SafetensorError, zipfile.BadZipFile)
# a vision transformer as others spell it, such as ViT-L/14@336px and openai/clip-vit-large-patch14-336: size, patch, resolution
VIT = re.compile(r"vit[^a-z0-9]?([blhg])[a-z]*[^a-z0-9]?(?:patch)?(\d+)(?:[^a-z0-9](\d{3}))?", re.IGNORECASE)


def local_folder(clip_model):
    """The folder of local-dir:FOLDER; None for a name of open_clip."""
    return Path(clip_model.removeprefix("local-dir:")) if clip_model.startswith("local-dir:") else None


def similar_model(clip_model, clip_pretrained):
    """The name of open_clip's vision transformer that is most like `clip_model`, with the activation of the weights."""
    import open_clip
    models = [model for model in open_clip.list_models() if re.match("ViT-(?!.*SigLIP)", model)]
    match = VIT.search(clip_model)
    name = "-".join(["ViT", match[1].upper(), *filter(None, match.groups()[1:])]) if match else clip_model
    name = next(iter(difflib.get_close_matches(name, models)), "ViT-B-32")
    needs_quick_gelu = (open_clip.get_pretrained_cfg(name, clip_pretrained) or {}).get("quick_gelu")
    return f"{name}-quickgelu" if needs_quick_gelu and f"{name}-quickgelu" in models else name


def find_weights_file(clip_model, clip_pretrained):
    """The weights file of local-dir:FOLDER, or the one that `clip_pretrained` names. Raises FileNotFoundError."""
    import open_clip
    folder = local_folder(clip_model)
    if folder is None:
        if Path(clip_pretrained).is_file():
            return clip_pretrained
        raise FileNotFoundError(f"--clip-pretrained {clip_pretrained} is neither a weights file nor a tag of {clip_model}; "
                                f"tags: {', '.join(open_clip.list_pretrained_tags_by_model(clip_model))}")
    found = [path for suffix in ("safetensors", "bin", "pth", "pt") for path in sorted(folder.glob(f"*.{suffix}"))]
    if not found:
        raise FileNotFoundError(f"--clip-model {clip_model}: no weights file in {folder} (open_clip_model.safetensors)")
    return found[0]


def read_visual_weights(path):
    """{name: float32 tensor} of the image tower in a weights file. Raises one of BROKEN_WEIGHTS."""
    if str(path).endswith(".safetensors"):
        with safe_open(path, "pt") as stream:
            weights = {name: stream.get_tensor(name) for name in stream.keys() if name.startswith("visual.")}  # noqa: SIM118
    elif is_torchscript(path):
        weights = read_torchscript(path, "visual.")
    else:
        from open_clip.factory import load_state_dict
        weights = load_state_dict(str(path), weights_only=True)
    found = {name.removeprefix("visual."): tensor.float() for name, tensor in weights.items() if name.startswith("visual.")}
    if not found:
        raise KeyError("it holds no image tower of open_clip")
    return found


def is_torchscript(path):
    """Whether `path` is an archive of torch.jit.save. OpenAI published CLIP as such archives."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def read_torchscript(path, prefix):
    """{name: tensor} of the parameters whose name begins with `prefix`. Raises one of BROKEN_WEIGHTS."""
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).removesuffix("constants.pkl")
        with archive.open(f"{root}data.pkl") as stream:
            module = ModuleUnpickler(stream).load()
        return {name: read_tensor(archive, root, stored) for name, stored in stored_tensors(module) if name.startswith(prefix)}


class Inert:
    """Stands for every class and function that the pickle names: none of them is imported or called."""

    def __init__(self, *arguments):
        self.state = {}

    def __setstate__(self, state):
        self.state = state


class StoredTensor(NamedTuple):
    """The arguments of torch._utils._rebuild_tensor_v2."""

    storage: tuple  # "storage", dtype, file name, device, number of elements
    offset: int
    size: tuple
    stride: tuple
    requires_grad: bool
    hooks: object


class ModuleUnpickler(pickle.Unpickler):
    """Reads a pickled TorchScript module as a tree of Inert objects with StoredTensor leaves."""

    def find_class(self, module, name):
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return StoredTensor
        return STORAGES.get(name, Inert) if module == "torch" else Inert

    def persistent_load(self, key):
        return key


def stored_tensors(module, prefix=""):
    """(name, StoredTensor) of all parameters, as a state dict names them."""
    for name, value in module.state.items():
        if isinstance(value, StoredTensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Inert):
            yield from stored_tensors(value, f"{prefix}{name}.")


def read_tensor(archive, root, stored):
    """The tensor from its file in the archive. Raises RuntimeError or TypeError if it does not fit the file."""
    _, dtype, name, _, count = stored.storage
    member = archive.getinfo(f"{root}data/{name}")
    # torch stores without compression, which could unpack to any size
    if member.compress_type or member.file_size != count * dtype.itemsize or math.prod(stored.size) > count:
        raise RuntimeError(f"{member.filename} is damaged")
    return torch.frombuffer(bytearray(archive.read(member)), dtype=dtype).as_strided(stored.size, stored.stride, stored.offset)
