"""The layout: seven scripts at the root, five folders, and imports in one direction only."""
import ast
import os
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = {"mini_vqa_v2", "vocab", "preprocess", "model", "train", "fine_tune", "test"}
FOLDERS = {"download", "features", "training", "evaluation", "common"}
# what the files of each folder, and each script, may import of the repository
ALLOWED = {
    "common": {"common"},
    "vocab": {"common"},
    "download": {"download", "common"},
    "mini_vqa_v2": {"download", "common"},
    "features": {"features", "model", "vocab", "common"},
    "preprocess": {"features", "vocab", "common"},
    "model": {"vocab", "common"},
    "training": {"training", "model", "preprocess", "features", "vocab", "common"},
    "evaluation": {"evaluation", "model", "preprocess", "features", "vocab", "common"},
    "train": {"training", "evaluation", "model", "preprocess", "features", "vocab", "common"},
    "fine_tune": {"train", "training", "evaluation", "model", "preprocess", "features", "vocab", "common"},
    "test": {"training", "evaluation", "model", "preprocess", "features", "vocab", "common"},
}
FILES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("**/*.py"))])


def imported_modules(path):
    """The full names of all modules that a file imports, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def owner(path):
    """The folder, or the script, that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_the_root_has_exactly_the_seven_scripts():
    assert {path.stem for path in ROOT.glob("*.py")} == SCRIPTS


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    """scripts -> training, evaluation -> model, preprocess, features -> vocab, common; mini_vqa_v2 -> download -> common."""
    own = {name.split(".")[0] for name in imported_modules(path)} & (SCRIPTS | FOLDERS)
    assert own <= ALLOWED[owner(path)]


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_each_folder_says_in_one_line_what_it_is_for(folder):
    module = ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8"))
    assert len(module.body) == 1 and "\n" not in ast.get_docstring(module)


def test_building_the_data_set_needs_no_torch():
    """mini_vqa_v2.py, and every file of the repository that it imports, directly or not."""
    files, reached, names = {str(path.relative_to(ROOT))[:-3].replace("/", "."): path for path in FILES}, set(), {"mini_vqa_v2"}
    while names:
        reached |= names
        names = {name for known in names & set(files) for name in imported_modules(files[known])} - reached
    assert "common.settings" in reached, "the walk follows imports"
    assert not {name for name in reached if name.split(".")[0] in ("torch", "open_clip", "transformers", "pandas")}


TORCH_IS_IMPORTED = """
import os, sys
class Finder:
    def find_spec(name, *args):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder)
"""


@pytest.mark.parametrize("module", ["train", "fine_tune", "test", "benchmarks.throughput", "benchmarks.full_size",
                                    "benchmarks.shared_machine", "demo.pretraining.pretrain_encoders"])
def test_openmp_is_told_to_share_the_machine_before_torch_is_imported(module):
    """Beside one other busy process on two cores, stage 2 trained at a tenth of its rate."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    for chosen, expected in (({}, "1000"), ({"OMP_WAIT_POLICY": "active"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        result = subprocess.run([sys.executable, "-c", f"{TORCH_IS_IMPORTED}import {module}"], cwd=ROOT, text=True,
                                env=environment | chosen, capture_output=True, check=True)
        assert result.stdout == f"{expected}\n"


def test_importing_a_script_runs_nothing(tmp_path):
    """In one process: no output, no file. `main` runs only under the guard in the last two lines."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport {', '.join(sorted(SCRIPTS))}"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True, check=True)
    assert result.stdout == "" and not list(tmp_path.iterdir())
