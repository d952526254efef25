"""The settings of an earlier run, from the config.json beside its checkpoint: --config of every script."""
import json
import sys
import types
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from common.files import is_text, refuse_device

# they say what to do with files that are there already: a repeated run does not inherit them
NOT_REPEATED = ("resume", "overwrite")


def read_config(path, config_class):
    """{name: value} of the settings in a config.json, without NOT_REPEATED. Raises ValueError or OSError of one line."""
    refuse_device(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"--config {path} is no file that exists: train.py and fine_tune.py write config.json beside "
                                "their checkpoint")
    script, kinds = Path(sys.argv[0]).name, get_type_hints(config_class)
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if not isinstance(values, dict):
            raise ValueError(f"at its top level is {values!r:.20}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--config {path} is no JSON file with settings ({error!s:.100})") from error
    if unknown := [name for name in values if name not in kinds]:
        raise ValueError(f"--config {path}: {script} has no setting {', '.join(unknown):.100}; is it the file of another "
                         "script?")
    for name, value in values.items():
        values[name] = value = tuple(value) if isinstance(value, list) else value
        if not has_type(value, kinds[name]):
            expected = kinds[name].__name__ if isinstance(kinds[name], type) else str(kinds[name]).replace("typing.", "")
            raise ValueError(f"--config {path}: {name} is {value!r:.60}, not {expected}")
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and ("\0" in text or not is_text(text)):
                raise ValueError(f"--config {path}: {name} is {text!a:.60}, no valid text")
    return {name: value for name, value in values.items() if name not in NOT_REPEATED}


def has_type(value, kind):
    """Whether a value from a JSON file is of the type `kind` of a setting."""
    choices = get_args(kind)
    if get_origin(kind) is Literal:
        return value in choices
    if isinstance(kind, types.UnionType):
        return any(has_type(value, choice) for choice in choices)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(has_type(item, choices[0]) for item in value)
    return type(value) is kind or kind is float and type(value) is int
