"""docs/walkthrough.ipynb: what is stored in it, how `make walkthrough` writes it, and a run of all cells (slow)."""
import ast
import importlib
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

nbformat = pytest.importorskip("nbformat")

NOTEBOOK = ROOT / "docs" / "walkthrough.ipynb"
SET_UP = 2  # cells at the start that show nothing
MAX_LINES, MAX_BYTES = 14, 1_000_000
PICTURES = ("image/png", "image/jpeg")
# paths of a machine or its user, warnings, errors, progress bars, control characters of a terminal
GARBAGE = re.compile(r"/home/|/root/|/tmp/|/Users/|[A-Z]:\\|site-packages|\.venv|Warning|Traceback|Error|%\||\r|\x1b")
CLAIMS = ("splits of one image, at most: 1", "a red bird    confidence", "bit for bit: True", "equal to five digits: True")
NOT_COPIED = (".*", "__pycache__", "output", "results", "cache", "vqa_v2", "mini_vqa_v2")


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def texts(output):
    """All texts of an output: printed, plain and HTML. Not the base64 of pictures."""
    return [output.get("text", ""), *("".join(text) for kind, text in output.get("data", {}).items() if kind not in PICTURES)]


def parse(cell):
    """The syntax tree of a cell; a command becomes an expression."""
    return ast.parse(re.sub(r"^!.*", "'command'", cell.source))


def shows_something(cell):
    return isinstance(parse(cell).body[-1], ast.Expr)


def check_outputs(path):
    """Each cell ran once and in order, shows what it should show, and nothing of the machine that it ran on."""
    cells, shown = code_cells(path), ""
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(cell.outputs for cell in cells[:SET_UP])
    for cell in cells[SET_UP:]:
        assert bool(cell.outputs) == shows_something(cell), cell.source
    for output in (output for cell in cells for output in cell.outputs):
        assert output.output_type != "error" and output.get("name") != "stderr", output
        text = "\n".join(texts(output))
        assert not (found := GARBAGE.search(text)), f"{found}\n{text}"
        shown += text
    assert [claim for claim in CLAIMS if claim not in shown] == []
    assert path.stat().st_size < MAX_BYTES


def test_the_stored_outputs_are_whole_and_clean():
    check_outputs(NOTEBOOK)


def test_cells_are_short_and_define_nothing():
    """The logic is in the modules: a cell calls it."""
    for cell in code_cells(NOTEBOOK):
        assert len(cell.source.splitlines()) <= MAX_LINES, cell.source
        assert not re.search(r"^\s*(def|class|lambda)\b", cell.source, re.MULTILINE), cell.source


def test_cells_import_what_exists():
    """A name that moved is found without running the notebook."""
    nodes = [node for cell in code_cells(NOTEBOOK) for node in ast.walk(parse(cell))]
    named = [(node.module, alias.name) for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert len(named) > 20
    assert [(module, name) for module, name in named if not hasattr(importlib.import_module(module), name)] == []


def test_links_lead_to_files():
    text = "\n".join(cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    assert links and [link for link in links if not (NOTEBOOK.parent / link).is_file()] == []


def test_run_walkthrough_writes_the_same_file_twice_and_keeps_it_if_a_cell_fails(tmp_path, run_script):
    pytest.importorskip("nbclient")
    path = tmp_path / "notebook.ipynb"
    bar = "import sys; print('answer'); print('encoding:  50%|###   | 1/2', file=sys.stderr); print('end')"

    def run(*sources, expect=0):
        cells = [nbformat.v4.new_code_cell(source, id=f"cell-{number}") for number, source in enumerate(sources)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        run_script("demo/run_walkthrough.py", "--notebook", path, "--folder", tmp_path, expect=expect)
        return path.read_bytes()

    assert run(bar, "6 * 7") == run(bar, "6 * 7")
    first, second = code_cells(path)
    assert [output.text for output in first.outputs] == ["answer\nend\n"]
    assert second.outputs[0].data["text/plain"] == "42" and second.metadata == {}
    run("1 / 0", expect=1)
    assert not code_cells(path)[0].outputs and list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_cells_run_in_a_fresh_copy(tmp_path):
    """As after `git clone`, without `make demo`. The cells show the same kinds of output as those that are stored."""
    pytest.importorskip("nbclient")
    copy = shutil.copytree(ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns(*NOT_COPIED))
    path = copy / "docs" / NOTEBOOK.name
    subprocess.run([sys.executable, "demo/run_walkthrough.py", "--folder", "docs"], cwd=copy, check=True, timeout=1000)
    check_outputs(path)
    new, old = ([[sorted(output.get("data", {"text": 0})) for output in cell.outputs] for cell in code_cells(version)]
                for version in (path, NOTEBOOK))
    assert new == old
