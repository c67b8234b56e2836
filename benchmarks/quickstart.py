"""How well and how fast the quickstart learns, with three seeds.

    python benchmarks/quickstart.py [--config=configs/quickstart.py] [--seeds 0 1 2] [--output=quickstart.json]

Each seed is one command, with the environment of `make quickstart`, in a folder of its own, one after the other;
seconds are the command's, from its start to its end. Accuracy is exact match on scans that training never saw: "which
digit" on canvases of a single scan, and over the stated mixture of questions (vlm_jax/data/digits.py). Data that is not
made yet is made first, by the first command.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import cpu_model, versions

ROOT = Path(__file__).resolve().parents[1]


def train(config: str, seed: int, workdir: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "vlm_jax.train", f"--config={config}", f"--config.seed={seed}"]
    began = time.monotonic()
    done = subprocess.run(
        [*command, f"--workdir={workdir}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"seed {seed} ended with status {done.returncode}:\n{done.stdout[-2000:]}")
    results = json.loads((workdir / "summary.json").read_text())["eval"]
    return {
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
        "which_digit_single_scan": results["groups"]["which/1"],
        "mixture": results["exact_match"],
        "held_out_loss": results["loss"],
        "questions": results["questions"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("quickstart.json"))
    arguments = parser.parse_args()
    report: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "versions": versions("jax", "flax", "optax", "grain", "numpy"),
        "config": arguments.config,
        "runs": [],
    }
    print(f"{report['cpu']}, {report['cores']} cores; " + ", ".join(f"{k} {v}" for k, v in report["versions"].items()))
    print(f"\n{'seed':>4}{'seconds':>10}{'which digit, 1 scan':>22}{'mixture':>10}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            one = train(arguments.config, seed, Path(folder, str(seed)))
            report["runs"].append(one)
            accuracies = f"{one['which_digit_single_scan']:>22.1%}{one['mixture']:>10.1%}"
            print(f"{seed:>4}{one['seconds']:>10.0f}{accuracies}", flush=True)
            arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
