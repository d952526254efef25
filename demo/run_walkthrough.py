"""Runs docs/walkthrough.ipynb from top to bottom and stores the new outputs in it (`make walkthrough`).

The outputs are complete but for progress bars. Nothing is stored that changes from run to run, such as the time of each cell:
a second run on the same machine writes the same bytes. If a cell fails, the file stays as it was.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbclient import NotebookClient

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, for imports

from common import settings
from common.files import atomic_write

BAR = "%|"  # in every line of a progress bar
SECONDS_PER_CELL = 900


@dataclass
class Config:
    notebook: str = "docs/walkthrough.ipynb"
    """the file that is run and replaced"""
    folder: str = "."
    """the working folder of its cells: the repository or a folder in it"""


def run_cells(notebook, folder):
    """Run all cells in a new kernel, in place. Raises nbclient's CellExecutionError if one fails."""
    NotebookClient(notebook, timeout=SECONDS_PER_CELL, kernel_name="python3", record_timing=False, coalesce_streams=True,
                   extra_arguments=["--log-level=ERROR"], resources={"metadata": {"path": folder}}).execute()
    notebook.metadata.language_info = {"name": "python"}  # without the version
    for cell in notebook.cells:
        if cell.cell_type == "code":
            remove_progress_bars(cell)


def remove_progress_bars(cell):
    """Remove the lines of progress bars from the outputs of a cell, and printed outputs without any text."""
    printed = [output for output in cell.outputs if output.output_type == "stream"]
    for output in printed:
        lines = output.text.replace("\r\n", "\n").splitlines(keepends=True)  # a command writes "\r\n", as to a terminal
        output.text = "".join(line for line in lines if BAR not in line)
    cell.outputs = [output for output in cell.outputs if output not in printed or output.text.strip()]


def main(cfg):
    notebook = nbformat.read(cfg.notebook, as_version=4)
    print(f"running the {len(notebook.cells)} cells of {cfg.notebook}; this takes one to four minutes on two cores", flush=True)
    run_cells(notebook, cfg.folder)
    with atomic_write(cfg.notebook) as temporary:
        nbformat.write(notebook, temporary)
    print(f"wrote {cfg.notebook}, {Path(cfg.notebook).stat().st_size / 2 ** 20:.2f} MiB")


if __name__ == "__main__":
    settings.run(main, Config)
