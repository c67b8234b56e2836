# ruff: noqa: E402 (threads, cores and large pages are set before jax and torch are imported)
"""The contrastive losses beside open_clip's (torch) and beside naive JAX: value and all gradients, on the CPU.

    python benchmarks/contrastive.py [--pairs=4096] [--rounds=5] [--large] [--huge[=512]] [--output=contrastive.json]

One process, two cores, float32, the same features. The sides take turns; a figure is the median over the rounds, a
ratio the median of the rounds' ratios. Before that, values must agree to 1e-4.

- torch: the arithmetic of open_clip's ClipLoss and SigLipLoss on one process (mlfoundations/open_clip,
  src/open_clip/loss.py), restated here, because the package draws in torchvision and timm. ClipLoss multiplies twice,
  once per direction.
- naive: our definition with its N x N arrays (`implementation="reference"`), differentiated by JAX.
- memory: temporary bytes of the compiled program at N = 16,384, by the compiler, with nothing run.
- --large: value and gradient at batch 32,768 from towers that run in parts (`vlm_jax.objectives.parts`).
- --huge=D: value and gradient at N = 131,072 and width D, once (70 and 53 TFLOP at the width of 512).

Exit status 1 where a target is missed: 3 times torch, 1.5 times naive, 1/16 of its memory.
"""

from __future__ import annotations

from machine import THREADS, cpu_model, on_two_cores, versions

on_two_cores()

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from beside import bare_products, in_turns, ratio, seconds
from torch.nn import functional as F

from vlm_jax.kernels import sigmoid_contrastive_loss, softmax_contrastive_loss
from vlm_jax.kernels.contrastive.shapes import SHAPES, ContrastiveShape
from vlm_jax.objectives.parts import in_parts

TARGETS = {"torch": 3.0, "naive": 1.5, "memory": 16.0}
LOSSES = {"softmax": softmax_contrastive_loss, "sigmoid": sigmoid_contrastive_loss}
OPERATIONS = {"softmax": 8, "sigmoid": 6}  # of ours, times N² D


def clip_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    labels = torch.arange(len(image))
    per_image, per_text = scale * image @ text.T, scale * text @ image.T
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def siglip_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    logits = scale * image @ text.T + bias
    labels = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / len(image)


def ours(kind: str, implementation: str | None) -> Callable:
    numbers = (0, 1, 2) if kind == "softmax" else (0, 1, 2, 3)
    return jax.jit(jax.value_and_grad(functools.partial(LOSSES[kind], implementation=implementation), argnums=numbers))


def of_torch(kind: str, arrays: tuple[np.ndarray, ...]) -> Callable:
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]

    def run():
        loss = (clip_loss if kind == "softmax" else siglip_loss)(*tensors)
        return loss.item(), torch.autograd.grad(loss, tensors)

    return run


def arguments(kind: str, shape: ContrastiveShape) -> tuple[np.ndarray, ...]:
    arrays = shape.arguments()
    return tuple(arrays[name] for name in ("image", "text", "scale", "bias")[: 3 if kind == "softmax" else 4])


def beside(kind: str, pairs: int, rounds: int) -> dict:
    """Milliseconds of a value and its gradients, and how many times faster than the others."""
    arrays = arguments(kind, ContrastiveShape(pairs, SHAPES["open_clip_benchmark"].width))
    placed = tuple(map(jnp.asarray, arrays))
    sides = {
        "ours": functools.partial(ours(kind, None), *placed),
        "naive": functools.partial(ours(kind, "reference"), *placed),
        "torch": of_torch(kind, arrays),
    }
    values = {name: float(call()[0]) for name, call in sides.items()}
    assert max(values.values()) - min(values.values()) < 1e-4 * max(1, *values.values()), values
    times = in_turns(sides, rounds)
    work = OPERATIONS[kind] * pairs**2 * arrays[0].shape[1]
    row = {f"{name}_ms": 1e3 * statistics.median(x) for name, x in times.items()}
    row["gflops"] = work / statistics.median(times["ours"]) / 1e9
    for name in ("torch", "naive"):
        row[f"times_{name}"] = ratio(times, name, "ours")
    return row


def memory(kind: str, pairs: int) -> dict:
    """Temporary MB of the compiled programs, the naive one's by ours."""
    shapes = [jax.ShapeDtypeStruct(np.shape(x), np.float32) for x in arguments(kind, SHAPES["tiles"])]
    shapes[:2] = [jax.ShapeDtypeStruct((pairs, SHAPES["large"].width), np.float32)] * 2
    sizes = [
        ours(kind, implementation).lower(*shapes).compile().memory_analysis().temp_size_in_bytes / 1e6
        for implementation in (None, "reference")
    ]
    return {"ours_mb": sizes[0], "naive_mb": sizes[1], "times_memory": sizes[1] / sizes[0]}


def large(pairs: int = 32768, parts: int = 128) -> dict:
    """A batch of 32,768 through two small towers (256 wide inputs, 2,048 hidden, 128 out), in parts of 256."""
    rng = np.random.default_rng(0)
    batch = {name: rng.standard_normal((parts, pairs // parts, 256), np.float32) for name in ("image", "text")}
    shapes = {"in": (256, 2048), "out": (2048, 128)}
    params = {
        tower: {name: rng.standard_normal(shape, np.float32) * shape[0] ** -0.5 for name, shape in shapes.items()}
        for tower in ("image", "text")
    }

    def encode(params, part):
        def tower(weights, x):
            x = jax.nn.gelu(x @ weights["in"]) @ weights["out"]
            return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

        return {name: tower(params[name], part[name]) for name in part}

    def gradient(embed):
        return jax.jit(jax.value_and_grad(lambda p, b: softmax_contrastive_loss(**embed(p, b), scale=10.0)))

    def whole(params, batch):
        return encode(params, {name: x.reshape(-1, x.shape[-1]) for name, x in batch.items()})

    in_few = gradient(functools.partial(in_parts, encode)).lower(params, batch).compile()
    at_once = gradient(whole).lower(params, batch).compile().memory_analysis().temp_size_in_bytes
    used = in_few.memory_analysis().temp_size_in_bytes
    start = time.perf_counter()
    loss = float(in_few(params, batch)[0])
    took = time.perf_counter() - start
    return {"loss": loss, "seconds": took, "temporary_mb": used / 1e6, "temporary_mb_at_once": at_once / 1e6}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=SHAPES["open_clip_benchmark"].pairs)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--huge", type=int, nargs="?", const=512)
    parser.add_argument("--output", type=Path, default=Path("contrastive.json"))
    options = parser.parse_args()
    torch.set_num_threads(THREADS)

    result = {
        "cpu": cpu_model(),
        "versions": versions("jax", "torch"),
        "pairs": options.pairs,
        "products": bare_products(2),
    }
    print(result["cpu"], result["versions"], {name: f"{x:.0f} GFLOP/s" for name, x in result["products"].items()})
    missed = []
    for kind in LOSSES:
        row = result[kind] = beside(kind, options.pairs, options.rounds) | memory(kind, SHAPES["large"].pairs)
        print(f"{kind:8}", "  ".join(f"{name} {x:.4g}" for name, x in row.items()), flush=True)
        missed += [f"{kind} {name}" for name, least in TARGETS.items() if row[f"times_{name}"] < least]
    if options.large:
        result["large"] = large()
        print("large   ", "  ".join(f"{name} {x:.4g}" for name, x in result["large"].items()), flush=True)
    if options.huge:
        for kind in LOSSES:
            arrays = arguments(kind, dataclasses.replace(SHAPES["huge"], width=options.huge))
            took = seconds(functools.partial(ours(kind, None), *arrays))
            result[f"huge_{kind}_seconds"] = took
            print(
                f"N = {SHAPES['huge'].pairs:,}, D = {options.huge}, {kind}: {took:.0f} s, compilation included",
                flush=True,
            )
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    if missed:
        print("missed:", ", ".join(missed))
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
