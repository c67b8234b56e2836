"""The notebooks run from top to bottom, in the small setting, and are stored without outputs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import vlm_jax
from vlm_jax.data.digits import make_digits

NAMES = ("quickstart", "finetune_llava")
SETTINGS = {
    "quickstart": """
VARIANT = "tiny"
OPTIONS = "--config.model.vision.num_layers=1 --config.eval.every=0 --config.eval.max_new_tokens=8"
WORKDIR = "runs/tiny"
""",
    "finetune_llava": """
TRAIN = HELD_OUT = IMAGES = ""
WORKDIR = "runs/tiny"
OPTIONS = "{sizes} --config.eval.max_new_tokens=8 --config.stages.finetune.lr=0.02 --config.buckets.lengths=(512,)"
""",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set of the quickstart with fewer records, in the place and under the name of the whole one."""
    place = tmp_path_factory.mktemp("cache")
    folder = make_digits(place / "digits", train_samples=200, eval_samples=40, align_samples=200)
    settings = json.loads((folder / "digits.json").read_text())
    defaults = make_digits.__kwdefaults__
    settings["samples"] = {part: defaults[f"{part}_samples"] for part in settings["samples"]}
    (folder / "digits.json").write_text(json.dumps(settings))
    return place


@pytest.fixture
def checkout(cache: Path, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a notebook finds what it expects in the clone, and writes."""
    (tmp_path / "configs").symlink_to(repository / "configs")
    monkeypatch.setenv("VLM_JAX_CACHE", str(cache))
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    return tmp_path


def read(repository: Path, name: str) -> Any:
    return nbformat.read(repository / "notebooks" / f"{name}.ipynb", as_version=4)


def execute(repository: Path, name: str, folder: Path, **fills: str) -> dict[str, Any]:
    """The cells of a notebook that was run with its small settings, by their ids."""
    notebook = read(repository, name)
    cells = {cell.id: cell for cell in notebook.cells}
    cells["settings"].source = SETTINGS[name].format(**fills)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=900, startup_timeout=300, kernel_name="python3", resources=resources).execute()
    return cells


def texts(cell: Any) -> str:
    outputs = [output for output in cell.outputs if output.get("name") != "stderr"]  # warnings of libraries
    parts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    return "".join(parts)


def pictures(cell: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_stored_clean_and_pinned(repository: Path, name: str) -> None:
    notebook = read(repository, name)
    badge = f"https://colab.research.google.com/github/vlm-jax/vlm_jax/blob/main/notebooks/{name}.ipynb"
    assert badge in notebook.cells[0].source
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert f'VERSION = "v{vlm_jax.__version__}"' in "".join(cell.source for cell in code)


def test_the_quickstart_runs_from_top_to_bottom(repository: Path, checkout: Path) -> None:
    cells = execute(repository, "quickstart", checkout)
    assert "configs/quickstart.py:tiny" in texts(cells["install"])
    assert "200 conversations to learn from, 40 questions held out" in texts(cells["data"])
    assert pictures(cells["data"]) == pictures(cells["curves"]) == pictures(cells["samples"]) == 1
    assert "held-out accuracy" in texts(cells["train"]) and "five of them:" in texts(cells["train"])
    assert "parameters, trained in" in texts(cells["curves"])
    assert pictures(cells["ask"]) == 1
    assert len(texts(cells["chat"]).splitlines()) == 3 and texts(cells["chat"]).count("  ->  ") == 3
    assert (checkout / "runs/tiny/summary.json").exists()


def test_a_released_model_is_tuned_from_top_to_bottom(
    repository: Path, checkout: Path, made_llava: Path, made_sizes: list[str]
) -> None:
    shutil.copytree(made_llava, checkout / "llava-hf/llava-interleave-qwen-0.5b-hf")  # a folder wins over the hub
    cells = execute(repository, "finetune_llava", checkout, sizes=" ".join(made_sizes))
    chosen = texts(cells["machine"]).splitlines()
    assert chosen[0].startswith("1 x cpu, memory ")
    assert chosen[-1] == "configs/llava_qwen05b.py:task,lora, from llava-hf/llava-interleave-qwen-0.5b-hf"
    assert "200 conversations to learn from, 8 held out" in texts(cells["data"])
    assert pictures(cells["data"]) == pictures(cells["before"]) == pictures(cells["after"]) == 1
    assert "stage finetune done" in texts(cells["train"]) and "of 8 questions, exact match" in texts(cells["train"])
    assert pictures(cells["curves"]) == 2
    assert texts(cells["after"]).count("  ->  ") == 4
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(texts(cells["export"]).splitlines())
