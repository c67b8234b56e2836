"""What stage 1 is worth: the tiny pair of a recipe, with it and without it, at the same number of steps in stage 2.

    python benchmarks/no_align.py                                  # some minutes on two CPU cores
    python benchmarks/no_align.py --seeds 0 1 2 --recipe=llava16_mistral --finetune=1000

Prints held-out accuracy and loss of both and the gap, and writes one JSON. The weights of the tiny size start at
random, in the tower and the language model too: the gap is that of this pair and not of the published models.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import cpu_model, versions

ROOT = Path(__file__).resolve().parents[1]


def run(recipe: str, variant: str, seed: int, pretrain: int, finetune: int) -> dict[str, float]:
    """Accuracy and loss on all held-out questions after the last stage."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-m", "vlm_jax.train", f"--config={ROOT}/configs/{recipe}.py:{variant}"]
        command += [f"--workdir={workdir}", f"--config.seed={seed}", f"--config.stages.finetune.steps={finetune}"]
        if "no_align" not in variant:
            command.append(f"--config.stages.pretrain.steps={pretrain}")
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        result = json.loads((Path(workdir) / "summary.json").read_text())["eval"]
        return {"accuracy": result["exact_match"], "loss": result["loss"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="llava15_vicuna7b")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--pretrain", type=int, default=300, help="steps of stage 1")
    parser.add_argument("--finetune", type=int, default=600, help="steps of stage 2, in both")
    parser.add_argument("--output", type=Path, default=Path("no_align.json"))
    given = parser.parse_args()
    pairs = {
        name: [run(given.recipe, variant, seed, given.pretrain, given.finetune) for seed in given.seeds]
        for name, variant in (("with stage 1", "tiny"), ("without", "tiny,no_align"))
    }
    print(f"{given.recipe}:tiny, stage 2 of {given.finetune} steps, {len(given.seeds)} seed(s)")
    print(f"{'':<14}{'accuracy':>10}{'loss':>8}")
    mean = {}
    for name, results in pairs.items():
        mean[name] = {key: statistics.mean(one[key] for one in results) for key in ("accuracy", "loss")}
        print(f"{name:<14}{mean[name]['accuracy']:>10.1%}{mean[name]['loss']:>8.3f}")
    gap = mean["with stage 1"]["accuracy"] - mean["without"]["accuracy"]
    print(f"{'gap':<14}{100 * gap:>+9.1f}p")
    settings = {key: value for key, value in vars(given).items() if key != "output"}
    machine = {"cpu": cpu_model(), **versions("jax", "flax", "numpy")}
    report = {"machine": machine, "settings": settings, "runs": pairs, "mean": mean, "gap": gap}
    given.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
