"""Makes demo/vqa_checkpoint.pt, the trained model that comes with the repository, from stage 2's checkpoint of `make demo`.

The weights are stored in half precision, so the file takes half the space. Nothing else changes.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, for imports

from common import settings
from features.trained_model import read_checkpoint
from training.checkpoint import save_checkpoint


@dataclass
class Config:
    checkpoint: str = "output/demo/fine_tuning/vqa_checkpoint.pt"
    """the checkpoint to shrink"""
    output: str = "demo/vqa_checkpoint.pt"
    """the file to write"""


def main(cfg):
    content = read_checkpoint(cfg.checkpoint)
    content["weights"] = {name: tensor.half() for name, tensor in content["weights"].items()}
    save_checkpoint(cfg.output, content)
    before, after = (Path(path).stat().st_size / 1e6 for path in (cfg.checkpoint, cfg.output))
    print(f"{cfg.output}: {after:.1f} MB instead of {before:.1f} MB")


if __name__ == "__main__":
    settings.run(main, Config)
