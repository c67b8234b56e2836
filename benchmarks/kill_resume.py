"""Kills a training run with SIGKILL at ten random moments and lets it go on: are its weights those of an unbroken run?

    python benchmarks/kill_resume.py [--seed=0] [--output=kill_resume.json]

Two stages of the quickstart's small variant, a checkpoint every three steps. Some moments lie in the start of the
command (imports, compilation, restoring), the others a random time after a random step; each is followed by the same
command. Status 1 if a byte of the final parameters, or the loss of a step, differs.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import cpu_model, versions

from vlm_jax.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
STEPS, STAGES = 40, ("align", "finetune")
IN_STEPS, IN_START = 7, 3  # kills


def start(workdir: Path, log: Path) -> subprocess.Popen:
    words = [f"--workdir={workdir}", f"--config.steps={STEPS}", "--config.checkpoint.every=3", "--config.eval.every=0"]
    words += ["--config.stages.finetune.data.eval=None"]
    command = [sys.executable, "-m", "vlm_jax.train", "--config=configs/quickstart.py:tiny", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with open(log, "a") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)


def losses(workdir: Path) -> dict[int, float]:
    """By the number of the step, counted through both stages."""
    records = read_metrics(workdir / "metrics.jsonl")
    return {STAGES.index(r["stage"]) * STEPS + r["step"]: r["loss"] for r in records if "loss" in r}


def wait_for_step(process: subprocess.Popen, workdir: Path, step: int) -> None:
    """Returns when the step is logged; fails when the run ends before it."""
    while max(losses(workdir), default=0) < step:
        if process.poll() is not None:
            raise SystemExit(f"the run ended with status {process.returncode} before step {step}")
        time.sleep(0.01)


def wait_in_start(log: Path, seconds: float) -> None:
    """Returns after so long, or when the run that has just been started takes its first step."""
    end, before = time.monotonic() + seconds, log.read_text().count(" loss ")
    while time.monotonic() < end and log.read_text().count(" loss ") == before:
        time.sleep(0.01)


def finish(process: subprocess.Popen, log: Path) -> None:
    if process.wait() != 0:
        raise SystemExit(f"the run ended with status {process.returncode}:\n{log.read_text()[-2000:]}")


def digest(workdir: Path) -> str:
    found = hashlib.sha256()
    for file in sorted((workdir / "model").glob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()


def kill(process: subprocess.Popen, workdir: Path, began: float) -> dict[str, Any]:
    """What the run had reached when it was killed."""
    process.kill()
    seconds = time.monotonic() - began
    if process.wait() == 0:
        raise SystemExit("the run had ended before it was killed")
    folders = [path for path in (workdir / "checkpoints").glob("*/*") if path.is_dir()]
    saved = [STAGES.index(f.parent.name[2:]) * STEPS + int(f.name) for f in folders if f.name.isdecimal()]
    return {
        "seconds_after_start": round(seconds, 1),
        "last_step": max(losses(workdir), default=0),
        "last_checkpoint": max(saved, default=0),
        "half_written": any("tmp" in folder.name for folder in folders),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("kill_resume.json"))
    arguments = parser.parse_args()
    draw, began = random.Random(arguments.seed), time.monotonic()
    cpu, found = cpu_model(), versions("jax", "flax", "optax", "orbax-checkpoint", "grain")
    print(f"{cpu}; " + ", ".join(f"{name} {number}" for name, number in found.items()), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        unbroken, broken, log = Path(folder, "unbroken"), Path(folder, "broken"), Path(folder, "log")
        started = time.monotonic()
        process = start(unbroken, log)
        wait_for_step(process, unbroken, 1)
        start_seconds = time.monotonic() - started
        finish(process, log)
        print(f"unbroken: {len(losses(unbroken))} steps in {time.monotonic() - started:.0f} s\n")

        # One of the kills by step lies in each part of the run. Where those in the start stand among them is drawn too.
        bounds = [round(i * (2 * STEPS - 4) / IN_STEPS) for i in range(IN_STEPS + 1)]
        steps = [draw.randint(low + 1, high) for low, high in itertools.pairwise(bounds)]
        moments: list[int | None] = list(steps)
        for _ in range(IN_START):
            moments.insert(draw.randint(1, len(moments)), None)
        kills: list[dict[str, Any]] = []
        print(f"{'kill':>4}{'s after start':>15}{'last step':>11}{'checkpoint':>12}  half-written")
        for number, step in enumerate(moments, start=1):
            started = time.monotonic()
            process = start(broken, log)
            if step is None:
                wait_in_start(log, draw.uniform(0, start_seconds))
            else:
                wait_for_step(process, broken, max(step, kills[-1]["last_step"] + 1 if kills else 0))
                time.sleep(draw.uniform(0, 0.3))
            kills.append(kill(process, broken, started))
            one = kills[-1]
            print(
                f"{number:>4}{one['seconds_after_start']:>15}{one['last_step']:>11}{one['last_checkpoint']:>12}"
                f"  {'yes' if one['half_written'] else 'no'}",
                flush=True,
            )
        finish(start(broken, log), log)
        equal = digest(unbroken) == digest(broken)
        same_losses = losses(unbroken) == losses(broken)
        sha, seconds = digest(unbroken), round(time.monotonic() - began)
    report = {"cpu": cpu, "versions": found, "seed": arguments.seed, "steps": 2 * STEPS, "kills": kills}
    report |= {"parameters_equal": equal, "losses_equal": same_losses, "sha256": sha, "seconds": seconds}
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nfinal parameters: {'equal, byte for byte' if equal else 'DIFFERENT'} (sha256 {sha[:16]})")
    print(f"losses of all {2 * STEPS} steps: {'equal' if same_losses else 'DIFFERENT'}; {seconds} s")
    sys.exit(0 if equal and same_losses else 1)


if __name__ == "__main__":
    main()
