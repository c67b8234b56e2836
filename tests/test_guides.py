"""The guide to fine-tuning does what it says: its blocks are run one after another, as they stand, in one process
(`python tests/test_guides.py PAGE SIZES...` is that process), and what they lead to is the same model everywhere."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs/guides/finetune_on_your_data.md"
FRUITS = {"banana": (230, 210, 60), "apple": (60, 160, 40), "plum": (90, 40, 90)}


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, code) of the blocks of a page; commands have no language."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


# ----------------------------------------------------------------------------------------- in the process of the guide


def walk(page: Path, sizes: list[str]) -> tuple[list[str], dict[str, Any]]:
    """What each block prints, and the names that the Python ones leave behind. Training is given `sizes`."""
    printed, names = list[str](), {"__name__": "__main__"}
    for language, code in blocks(page):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            if language == "python":
                exec(compile(code, page.name, "exec"), names)
            elif language == "":
                run(shlex.split(code.replace("\\\n", " ")), sizes)
            else:
                assert language == "text", f"{page.name} has a block of {language!r}, which nothing runs"
        printed.append(out.getvalue())
    return printed, names


def run(words: list[str], sizes: list[str]) -> None:
    from vlm_jax import convert, generate, train

    mains = {"vlm_jax.train": train.main, "vlm_jax.generate": generate.main, "vlm_jax.convert": convert.main}
    assert words[:2] == ["python", "-m"], words
    mains[words[2]]([*words[3:], *(sizes if words[2] == "vlm_jax.train" else [])])


def logits(names: dict[str, Any]) -> dict[str, Any]:
    """Of the question of the page, by the workdir, and by what transformers and PEFT have loaded."""
    import torch

    import vlm_jax

    inputs = dict(names["inputs"])
    with torch.no_grad():
        found = {name: names[name](**inputs).logits.numpy() for name in ("model", "adapted")}
        with names["adapted"].disable_adapter():
            found["base"] = names["adapted"](**inputs).logits.numpy()
    given = {name: value.numpy() for name, value in inputs.items()}
    return found | {"ours": vlm_jax.load("runs/mine").apply_hf(**given)}


def main(page: str, *sizes: str) -> None:
    printed, names = walk(Path(page), list(sizes))
    found = logits(names)
    apart = {name: float(abs(value - found["ours"]).max() / abs(found["ours"]).max()) for name, value in found.items()}
    Path("result.json").write_text(json.dumps({"printed": printed, "apart": apart}))


# ----------------------------------------------------------------------------------------------------------- the tests


def make_photos(folder: Path) -> None:
    from PIL import Image

    (folder / "photos").mkdir()
    lines = ["image,question,answer"]
    for number in range(1, 21):
        fruit = sorted(FRUITS)[number % len(FRUITS)]
        Image.new("RGB", (40 + number, 30), FRUITS[fruit]).save(folder / f"photos/{number:04}.jpg")
        lines.append(f'{number:04}.jpg,"Which fruit is this, and is it ripe?",A ripe {fruit}.')
    (folder / "photos.csv").write_text("\n".join(lines) + "\n")


def test_every_block_runs_and_the_model_is_the_same_wherever_it_goes(
    made_llava: Path,
    made_sizes: list[str],
    tmp_path: Path,
    repository: Path,
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    pytest.importorskip("peft")
    make_photos(tmp_path)
    (tmp_path / "configs").symlink_to(repository / "configs")
    shutil.copytree(made_llava, tmp_path / "llava-hf/llava-interleave-qwen-0.5b-hf")  # a folder wins over the hub
    sizes = [*made_sizes, "--config.frozen_dtype=float32", "--config.stages.finetune.lr=0.02"]
    done = run_python(__file__, PAGE, *sizes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    _, _, look, before, train, after, _, by_transformers, _, _ = result["printed"]

    counts = look.splitlines()[:2]
    assert counts == ["train.json: 18 records, 0 of them bad", "held_out.json: 2 records, 0 of them bad"]
    assert "Which fruit is this, and is it ripe? -> A ripe" in look
    assert before.strip() and after != before, "training changed nothing"
    assert by_transformers == after, "transformers answers otherwise than we do"
    assert "2 questions, exact match" in train and "stage finetune done" in train
    for file in ("curves.png", "samples.png", "summary.json"):
        assert (tmp_path / "runs/mine" / file).exists()
    moved = json.loads((tmp_path / "runs/mine/summary.json").read_text())["moved"]["finetune"]
    assert {name.split("/")[0] for name in moved} == {"connector", "decoder"}

    apart = result["apart"]
    assert apart["model"] <= 1e-4 and apart["adapted"] <= 1e-4
    assert apart["base"] > 0.1, "the adapter changes nothing"


def test_the_memory_of_the_page_is_that_of_the_configs(repository: Path) -> None:
    import jax

    from vlm_jax.config import load_config
    from vlm_jax.requirements import stage_needs
    from vlm_jax.sharding import make_mesh

    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| ([\d.]+) GB \| ([\d.]+) GB \|$", PAGE.read_text(), flags=re.MULTILINE)
    assert len(rows) == 5
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        for name, start, lora, full in rows:
            for args, stated in (("task,lora", lora), ("task", full)):
                config = load_config(f"{repository}/configs/{name}.py:{args}")[0]
                (needs,) = stage_needs(config)
                assert (config.init_from, f"{needs.bytes / 1e9:.1f}") == (start, stated), f"{name}:{args}"


if __name__ == "__main__":
    main(*sys.argv[1:])
