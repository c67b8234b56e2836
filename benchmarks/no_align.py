"""What stage 1 is worth: a tiny LLaVA trained with it and without it, with the same steps of stage 2.

    make quickstart && python benchmarks/no_align.py               # some minutes on two CPU cores
    python benchmarks/no_align.py --recipe=bakllava --seeds 1 2 3

Stage 1 joins a tower that sees to a language model that talks, so both must be able to before it. Here they are those
of the quickstart; the connector between them is drawn anew, and the recipe's two stages, or its variant `no_align`,
train on the same data with what they freeze. The seed must not be the quickstart's: from that comes the connector which
the quickstart began with, and its own ended not far from it. As in the recipes, the learning rate of stage 2 is a
fraction of stage 1's. The language model has met images before, unlike that of a published pair: the gap is that of
this pair alone. Prints held-out accuracy and loss of both and the gap, and writes one JSON.
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

from vlm_jax.config import load_config, plain
from vlm_jax.interop.huggingface import normal

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {"with stage 1": "tiny", "without": "tiny,no_align"}
PARTS = ("vision", "decoder")


def quickstart_sizes(spec: str) -> dict[str, object]:
    """The settings that give a recipe the tower, the decoder, the tokenizer and the lengths of the quickstart."""
    quickstart, recipe = load_config(f"{ROOT}/configs/quickstart.py")[0], load_config(spec)[0]
    model = normal(plain(quickstart.model))
    settings = {f"model.{part}.{key}": model[part][key] for part in PARTS for key in recipe.model[part]}
    return {**settings, "tokenizer": quickstart.tokenizer, "buckets.lengths": tuple(quickstart.buckets.lengths)}


def train(spec: str, workdir: Path, settings: dict[str, object]) -> dict[str, float]:
    """Accuracy and loss on all held-out questions after the last stage."""
    command = [sys.executable, "-m", "vlm_jax.train", f"--config={spec}", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    result = json.loads((workdir / "summary.json").read_text())["eval"]
    return {"accuracy": result["exact_match"], "loss": result["loss"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="llava15_vicuna7b", help="one whose images are one tile")
    parser.add_argument(
        "--quickstart", type=Path, default=ROOT / "runs" / "quickstart", help="workdir of the quickstart"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="none of them the quickstart's")
    parser.add_argument("--pretrain", type=int, default=150, help="steps of stage 1")
    parser.add_argument("--finetune", type=int, default=300, help="steps of stage 2, in both")
    parser.add_argument("--lr", type=float, nargs=2, default=(2e-3, 1e-4), help="learning rates of the two stages")
    parser.add_argument("--runs", type=Path, help="keeps the runs in this folder, and goes on with what is there")
    parser.add_argument("--output", type=Path, default=Path("no_align.json"))
    given = parser.parse_args()
    if not (given.quickstart / "summary.json").exists():
        sys.exit(
            f"{given.quickstart} is no finished run of the quickstart: make quickstart, or give --quickstart=WORKDIR"
        )
    begun = json.loads((given.quickstart / "config.json").read_text())["seed"]
    if begun in given.seeds:
        sys.exit(f"--seeds has {begun}, the quickstart's own: its new connector would be the one that it began with")
    stages = {"pretrain": (given.pretrain, given.lr[0]), "finetune": (given.finetune, given.lr[1])}
    pairs: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as temporary:
        runs = (given.runs or Path(temporary)).resolve()
        for seed in given.seeds:
            for name, variant in VARIANTS.items():
                spec = f"{ROOT}/configs/{given.recipe}.py:{variant}"
                settings = {**quickstart_sizes(spec), "seed": seed}
                settings |= {f"parts.{part}": given.quickstart.resolve() for part in PARTS}
                for stage in ("finetune",) if "no_align" in variant else stages:
                    steps, rate = stages[stage]
                    settings |= {f"stages.{stage}.steps": steps, f"stages.{stage}.lr": rate}
                workdir = runs / f"{name.replace(' ', '_')}-{seed}"
                pairs[name].append(train(spec, workdir, settings))
    stated = ", ".join(f"{name} {steps} steps at {rate:.0e}" for name, (steps, rate) in stages.items())
    print(f"{given.recipe}:tiny with the quickstart's parts: {stated}; {len(given.seeds)} seed(s)")
    print(f"{'':<14}{'accuracy':>10}{'loss':>8}")
    mean = {}
    for name, results in pairs.items():
        mean[name] = {key: statistics.mean(one[key] for one in results) for key in ("accuracy", "loss")}
        print(f"{name:<14}{mean[name]['accuracy']:>10.1%}{mean[name]['loss']:>8.3f}")
    gap = mean["with stage 1"]["accuracy"] - mean["without"]["accuracy"]
    print(f"{'gap':<14}{100 * gap:>+9.1f}p")
    machine = {"cpu": cpu_model(), **versions("jax", "flax", "numpy")}
    settings = {"recipe": given.recipe, "seeds": given.seeds, "stages": stages}
    report = {"machine": machine, "settings": settings, "runs": pairs, "mean": mean, "gap": gap}
    given.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
