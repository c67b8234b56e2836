"""The train command on a tiny experiment: its config, its data, a way to run it and to read what it wrote."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from vlm_jax import sharding
from vlm_jax.data.digits import save_tokenizer
from vlm_jax.errors import run_command
from vlm_jax.train import main
from vlm_jax.training.metrics import read_metrics

CONFIG = '''
"""Two stages on DATA: a connector on captions, then everything on conversations."""

from vlm_jax.config import variants
from vlm_jax.models.presets import llama, llava, lora, vit
from vlm_jax.recipe import experiment, stage

DATA = {data!r}


def get_config(args=""):
    v = variants(args, "adapter")
    c = experiment(seed=0)
    c.model = llava(
        vision=vit(image_size=16, patch_size=8, hidden_size=16, num_layers=1, num_heads=2),
        connector="linear",
        decoder=llama(
            vocab_size=72, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, tie_embeddings=True
        ),
    )
    c.tokenizer = DATA + "/tokenizer"
    c.dtype = "float32"
    c.frozen_dtype = "bfloat16"
    only_connector = (("connector/.*", 1.0), (".*", None))
    c.stages = (
        stage("align", train=DATA + "/align.json", template="plain", samples=8, lr=0.1, steps=4, groups=only_connector),
        stage("finetune", train=DATA + "/train.json", eval=DATA + "/eval.json", template="vicuna_v1", samples=8,
              lr=0.01, steps=6, groups=(("vision/.*", 0.1), (".*", 1.0))),
    )
    c.data.max_bad_fraction = 0.1
    c.optimizer.clip_norm = 1.0
    c.ema = 0.5
    c.buckets.lengths, c.buckets.tiles = (48,), (1, 2)
    c.log.every, c.checkpoint.every = 1, 2
    c.eval.every, c.eval.max_samples, c.eval.batch, c.eval.max_new_tokens, c.eval.by = 3, 4, 4, 4, ("kind",)
    if v.adapter:
        c.model.lora = lora(rank=2, alpha=4)
        c.stages = (
            stage("adapt", train=DATA + "/align.json", template="plain", samples=8, lr=0.01, steps=2,
                  groups=((".*/lora_.*", 1.0), (".*", None))),
        )
    return c
'''


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def make_data(folder: Path) -> Path:
    """Captions; conversations about no, one or two images (a text alone, seldom two); held-out questions. One caption
    and one conversation have no image file."""
    (folder / "shots").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(folder / "shots" / f"{i}.png")

    def save(name: str, records: list[dict[str, Any]]) -> None:
        numbered = [{"id": f"{name}-{i}", **record} for i, record in enumerate(records)]
        (folder / f"{name}.json").write_text(json.dumps(numbered))

    digit = [str(i % 10) for i in range(24)]
    shot = [f"shots/{i % 12}.png" for i in range(24)]
    captions = [{"image": shot[i], "conversations": turns("<image>", digit[i])} for i in range(24)]
    talks: list[dict[str, Any]] = [
        {"image": shot[i], "conversations": turns("<image>\nWhich digit is this?", digit[i])} for i in range(18)
    ]
    talks += [{"conversations": turns("What is the sum?", digit[i])} for i in range(4)]
    talks += [
        {"image": shot[i : i + 2], "conversations": turns("<image><image>\nWhat is the sum?", "7")} for i in (0, 5)
    ]
    captions[3]["image"] = talks[4]["image"] = "shots/lost.png"
    save("align", captions)
    save("train", talks)
    asked = [
        {"kind": "which", "image": shot[i], "conversations": turns("<image>\nWhich digit is this?", "1")}
        for i in range(6)
    ]
    asked += [{"kind": "sum", "conversations": turns("What is the sum?", "12")}]
    save("eval", asked)
    (folder / "empty.json").write_text("[]")
    (folder / "torn.json").write_text((folder / "train.json").read_text()[:-9])
    save_tokenizer(folder / "tokenizer")
    return folder


def make_experiment(folder: Path) -> str:
    """The config file of the experiment, in `folder`, beside its data."""
    data = make_data(folder / "data")
    file = folder / "small.py"
    file.write_text(CONFIG.replace("{data!r}", repr(str(data))))
    return str(file)


def train(*words: str | Path, config: str, workdir: Path, devices: int = 1) -> SimpleNamespace:
    """Runs the command in this process on the first `devices`: its exit status, stdout and stderr."""
    out, error, make_mesh = io.StringIO(), io.StringIO(), sharding.make_mesh
    argv = ["train", f"--config={config}", f"--workdir={workdir}", *map(str, words)]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        patch.setattr(sys, "argv", argv)
        patch.setattr(sharding, "make_mesh", lambda **sizes: make_mesh(**sizes, devices=jax.devices()[:devices]))
        status = 0
        try:
            run_command(main)
        except SystemExit as exit:
            status = int(exit.code or 0)
    return SimpleNamespace(status=status, out=out.getvalue(), err=error.getvalue())


def refused(done: SimpleNamespace, *says: str) -> None:
    """It ended with status 2 and one message that says all of `says`."""
    assert done.status == 2, done.out + done.err
    assert done.err.startswith("error: ") and "Traceback" not in done.err
    for part in says:
        assert part in done.err, done.err


def weights(workdir: Path) -> bytes:
    (file,) = (workdir / "model").glob("*.safetensors")
    return file.read_bytes()


def tensors(workdir: Path) -> dict[str, np.ndarray]:
    (file,) = (workdir / "model").glob("*.safetensors")
    return load_file(file)


def steps(workdir: Path, stage: str) -> dict[int, dict[str, Any]]:
    records = [r for r in read_metrics(workdir / "metrics.jsonl") if r["stage"] == stage and "loss" in r]
    assert len({record["step"] for record in records}) == len(records)
    return {record["step"]: record for record in records}


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
