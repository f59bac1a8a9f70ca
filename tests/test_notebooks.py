"""The notebooks run as a reader would run them, and what is stored in them is fit to be read.

What they promise is asserted in their own cells. Those that take long run here with less work, without a kernel of
their own, which takes seconds to start; ``make slow`` runs all as they are. ``python tests/test_notebooks.py [name]``
runs them and stores the outputs.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


#: What the default tests replace in a notebook that takes long.
SHORTER = {
    "02_known_language": {
        "prompts * 30": "prompts",
        "3e-3, 250": "3e-3, 20",
        "prompts * 12": "prompts * 2",
        "assert final[": "final[",  # so short a game ends anywhere
    },
    "03_one_iteration": {"max_steps=150": "max_steps=20", "prompts * 6": "prompts", "prompts * 20": "prompts"},
    "05_reading_a_run": {
        "max_steps=250": "max_steps=20",
        "prompts * 20": "prompts",
        "prompts * 12": "prompts",
        "prompts * 4": "prompts",
        "epochs=10": "epochs=2",
        "iterations=3": "iterations=2",
        "assert min(": "min(",
    },
    "04_your_own_loss": {"iterations=8": "iterations=3", "max_steps=60": "max_steps=10", "assert ends[": "ends["},
    "06_reward_and_ppo": {"iterations = 100": "iterations = 10", "assert reached": "reached"},
}


def run(path: Path, folder: Path | str) -> Any:
    """The notebook with the outputs of a fresh kernel that works in ``folder``."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources=resources, record_timing=False
    ).execute()
    return notebook


def run_here(path: Path, replaced: dict[str, str]) -> None:
    """Run the cells of a notebook in this process and folder, with less work."""
    sources = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    for old in replaced:
        assert any(old in source for source in sources), old
    namespace = {"__name__": "__main__"}
    for number, source in enumerate(sources):
        for old, new in replaced.items():
            source = source.replace(old, new)
        exec(compile(source, f"{path.name}, code cell {number}", "exec"), namespace)


def outputs_of(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SHORTER else []) for path in NOTEBOOKS],
)
def test_notebook_runs_in_an_empty_folder(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = run(path, tmp_path)
    assert any("image/png" in output.get("data", {}) for output in outputs_of(notebook)), "no picture"


@pytest.mark.parametrize("name", SHORTER)
@pytest.mark.filterwarnings("ignore")
def test_notebook_with_less_work_runs_in_an_empty_folder(name, tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    shown = []
    monkeypatch.setattr(plt, "show", lambda: (shown.append(plt.gcf()), plt.close("all")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # as in a kernel, where a notebook writes modules
    before = set(sys.modules)
    level = logging.getLogger("lightning.pytorch").level
    try:
        run_here(ROOT / "notebooks" / f"{name}.ipynb", SHORTER[name])
    finally:
        logging.getLogger("lightning.pytorch").setLevel(level)
        for module in set(sys.modules) - before:
            if str(getattr(sys.modules[module], "__file__", None)).startswith(str(tmp_path)):
                del sys.modules[module]
    assert shown, "no picture"


@every_notebook
def test_stored_notebook_was_run_to_its_end_in_order(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.source.strip() for cell in cells)


@every_notebook
def test_stored_outputs_hold_no_errors_warnings_or_absolute_paths(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for output in outputs_of(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
        assert not re.search(r"(^|[\s'\"(=:])(/|~/|[A-Z]:\\)\w", text), text
        assert "Warning" not in text
    assert path.stat().st_size < 300_000


def test_notebooks_begin_with_the_flat_game_and_the_laboratory():
    assert [path.name for path in NOTEBOOKS[:2]] == ["01_self_play_flat.ipynb", "02_known_language.ipynb"]


def store(path: Path) -> None:
    """Run a notebook at full scale and keep what it says; progress bars and remarks on stderr are not kept."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        notebook = run(path, folder)
    for index, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{index:02d}", {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, path)
    print(f"{path.name}: {time.monotonic() - started:.0f} seconds, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(ROOT)
    for notebook_path in NOTEBOOKS:
        if not sys.argv[1:] or notebook_path.stem in sys.argv[1:]:
            store(notebook_path)
