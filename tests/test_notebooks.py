"""The notebooks run from top to bottom, in the small setting, and are stored without outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import vlm_jax
from vlm_jax.data.digits import make_digits

TINY = """
VARIANT = "tiny"
OPTIONS = "--config.model.vision.num_layers=1 --config.eval.every=0 --config.eval.max_new_tokens=8"
WORKDIR = {workdir!r}
"""


@pytest.fixture
def notebook(repository: Path) -> Any:
    return nbformat.read(repository / "notebooks" / "quickstart.ipynb", as_version=4)


def texts(cell: Any) -> str:
    parts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "".join(parts)


def pictures(cell: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def make_small_digits(cache: Path) -> None:
    """The data set of the quickstart with fewer records, in the place and under the name of the whole one."""
    folder = make_digits(cache / "digits", train_samples=200, eval_samples=40, align_samples=200)
    settings = json.loads((folder / "digits.json").read_text())
    defaults = make_digits.__kwdefaults__
    settings["samples"] = {part: defaults[f"{part}_samples"] for part in settings["samples"]}
    (folder / "digits.json").write_text(json.dumps(settings))


def test_the_quickstart_is_stored_clean_and_pinned(notebook: Any, repository: Path) -> None:
    badge = "https://colab.research.google.com/github/vlm-jax/vlm_jax/blob/main/notebooks/quickstart.ipynb"
    assert badge in notebook.cells[0].source
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert f'VERSION = "v{vlm_jax.__version__}"' in "".join(cell.source for cell in code)


def test_the_quickstart_runs_from_top_to_bottom(
    notebook: Any, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_small_digits(tmp_path)
    monkeypatch.setenv("VLM_JAX_CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")  # one device
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # what takes time is compiling
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    cells = {cell.id: cell for cell in notebook.cells}
    cells["settings"].source = TINY.format(workdir=str(tmp_path / "run"))
    resources = {"metadata": {"path": str(repository / "notebooks")}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()

    assert "configs/quickstart.py:tiny" in texts(cells["install"])
    assert "200 conversations to learn from, 40 questions held out" in texts(cells["data"])
    assert pictures(cells["data"]) == pictures(cells["curves"]) == pictures(cells["samples"]) == 1
    assert "held-out accuracy" in texts(cells["train"]) and "five of them:" in texts(cells["train"])
    assert "parameters, trained in" in texts(cells["curves"])
    assert pictures(cells["ask"]) == 1
    assert len(texts(cells["chat"]).splitlines()) == 3 and texts(cells["chat"]).count("  ->  ") == 3
    assert (tmp_path / "run" / "summary.json").exists()
