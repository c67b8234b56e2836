"""The guide to preparing data does what it says: its blocks are run to the letter, one after another, in one process
(`python tests/test_prepare_guide.py PAGE` is that process)."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs/guides/prepare_your_data.md"


def main(page: str) -> None:
    from vlm_jax import train
    from vlm_jax.data import prepare

    mains = {"vlm_jax.data.prepare": prepare.main, "vlm_jax.train": train.main}
    names: dict[str, Any] = {"__name__": "__main__"}
    for language, code in re.findall(r"^```(\w*)\n(.*?)^```$", Path(page).read_text(), re.MULTILINE | re.DOTALL):
        if language == "python":
            exec(compile(code, page, "exec"), names)
        elif language == "":
            python, m, module, *words = shlex.split(code.replace("\\\n", " "))
            assert (python, m) == ("python", "-m")
            mains[module](words)
        else:
            assert language == "text", f"{page} has a block of {language!r}, which nothing runs"


def test_from_photos_and_from_a_tar_to_a_packed_run(
    tmp_path: Path, repository: Path, run_python: Callable[..., Any]
) -> None:
    (tmp_path / "configs").symlink_to(repository / "configs")
    done = run_python(__file__, PAGE, cwd=tmp_path, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    sides = {
        side: json.loads((tmp_path / f"shards/{side}/shards.json").read_text()) for side in ("train", "validation")
    }
    assert {side: index["records"] for side, index in sides.items()} == {"train": 216, "validation": 24}
    assert [file.name for file in (tmp_path / "shards/train").glob("*.array_record")] == re.findall(
        r"train-\S+array_record", PAGE.read_text()
    )
    assert not list(tmp_path.glob("**/*.preparing"))
    for name, steps in {"photos": 20, "captioned": 10}.items():
        lines = [json.loads(line) for line in (tmp_path / f"runs/{name}/metrics.jsonl").read_text().splitlines()]
        logged = [line for line in lines if "real_token_fraction" in line]
        assert logged[-1]["step"] == steps
        assert logged[-1]["real_token_fraction"] > 0.7, "rows are packed; with one record each it is 0.12"
    summary = json.loads((tmp_path / "runs/photos/summary.json").read_text())
    assert summary["eval"]["questions"] == 24, summary


if __name__ == "__main__":
    main(sys.argv[1])
