"""Attention on an NVIDIA GPU: our kernel beside blocks of XLA and beside cuDNN. Needs a Hopper GPU (H100, H200).

    pip install -e ".[cuda]"
    python benchmarks/attention_gpu.py [--rounds=20] [--output=attention_gpu.json]

First every small shape of `shapes.py` and every row below is checked, forward and backward, in bfloat16: our kernel,
and cuDNN where it serves the call, against the blocks in float32. Then value and gradients are timed in turns: a figure
is the median of the rounds, a ratio the median of the rounds' ratios. What cuDNN does not serve it is given with an
array of all that is seen, [B, H, T, S], as jax.nn takes it; above 8,192 tokens that is too large. TFLOP/s count what
queries see: 4 operations forward and 10 backward for each pair, head and feature.

Exit status 1 where a check fails, or there is no such GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from vlm_jax.kernels import attention
from vlm_jax.kernels.attention import gpu
from vlm_jax.kernels.attention.reference import Mask, Rule, visible
from vlm_jax.kernels.attention.shapes import SHAPES, SMALL, AttentionShape
from vlm_jax.kernels.placement import compute_capability

ROWS = ("mistral_7b", "vicuna_7b", "mistral_7b_long", "flamingo_cross", "clip_l14_336", "siglip_so400m_384")
TOLERANCE = 2e-2  # of the largest number: bfloat16 has 8 bits, and weights, results and gradients are rounded to it


def parts(shape: AttentionShape, options: dict[str, Any]) -> tuple[Rule, Mask]:
    rule = Rule(shape.causal, shape.sliding_window, shape.softcap, shape.features**-0.5)
    return rule, Mask(*(options.get(name) for name in Mask._fields))


def seen_by(shape: AttentionShape, options: dict[str, Any]) -> jax.Array:
    """bool [B, T, S]."""
    rule, mask = parts(shape, options)
    seen = visible(rule, mask.with_positions(rule, shape.queries, shape.keys))
    whole = (shape.batch, shape.queries, shape.keys)
    return jnp.ones(whole, bool) if seen is None else jnp.broadcast_to(seen, whole)


def step(call: Callable) -> Callable:
    """Value and gradients of q, k and v, compiled together."""

    def run(q, k, v, d_out):
        out, pull = jax.vjp(call, q, k, v)
        return out, *pull(d_out.astype(out.dtype))

    return jax.jit(run)


def sides(shape: AttentionShape, options: dict[str, Any], seen: jax.Array) -> dict[str, Callable]:
    """What can serve a row, by name; each takes q, k, v and the cotangent."""

    def ours(implementation):
        return step(lambda q, k, v: attention(q, k, v, implementation=implementation, **options))

    found = {"kernel": ours("pallas"), "xla": ours("xla")}
    rule, mask = parts(shape, options)
    q, k = (
        jax.ShapeDtypeStruct((1, 2, heads, shape.features), jnp.bfloat16) for heads in (shape.heads, shape.kv_heads)
    )
    if gpu.cudnn_refusal(rule, q, k, mask, None, jax.devices()[0].device_kind) is None:
        found["cudnn"] = ours("cudnn")
    elif shape.queries <= 8192:
        hidden = (shape.batch, shape.heads, shape.queries, shape.keys)

        def masked(q, k, v):
            mask = jnp.broadcast_to(seen[:, None], hidden)
            return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")

        found["cudnn, masked"] = step(masked)
    return found


def arguments(shape: AttentionShape) -> tuple[list[jax.Array], dict[str, Any]]:
    """q, k, v and a cotangent, rounded to bfloat16 and in float32; and the call's other arguments."""
    arrays, options = shape.arguments()
    d_out = np.random.default_rng(1).standard_normal(arrays["q"].shape, np.float32)
    given = [jnp.asarray(x, jnp.bfloat16) for x in (arrays["q"], arrays["k"], arrays["v"], d_out)]
    return given, {key: jnp.asarray(x) if isinstance(x, np.ndarray) else x for key, x in options.items()}


def errors(got: tuple, want: tuple, sees: jax.Array) -> list[float]:
    """Largest error of out, dq, dk and dv over the largest number; out and dq of what sees something."""
    found = []
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        if index < 2:
            a, b = a[np.asarray(sees)], b[np.asarray(sees)]
        found.append(float(np.abs(a - b).max() / np.abs(b).max()) if np.isfinite(a).all() else float("inf"))
    return found


def check(name: str, shape: AttentionShape, wanted: tuple[str, ...]) -> dict[str, list[float]]:
    given, options = arguments(shape)
    seen = seen_by(shape, options)
    calls = {key: call for key, call in sides(shape, options, seen).items() if key in wanted}
    truth = step(lambda q, k, v: attention(q, k, v, implementation="xla", **options))
    want = truth(*(x.astype(jnp.float32) for x in given))
    found = {}
    for key, call in calls.items():
        got = call(*given)
        found[key] = errors(got, want, seen.any(-1))
        if key == "kernel" and (np.asarray(got[0], np.float32)[~np.asarray(seen.any(-1))] != 0).any():
            found[key] = [float("inf")]  # what sees nothing must give 0
    print(name, {key: [f"{x:.1e}" for x in row] for key, row in found.items()}, flush=True)
    return found


def timed(shape: AttentionShape, rounds: int) -> dict[str, Any]:
    given, options = arguments(shape)
    seen = seen_by(shape, options)
    pairs = float(seen.sum(dtype=jnp.float32))
    calls = sides(shape, options, seen)
    took: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call(*given))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(5):
                result = call(*given)
            jax.block_until_ready(result)
            took[name].append((time.perf_counter() - start) / 5)
    row: dict[str, Any] = {f"{name}_ms": 1e3 * statistics.median(times) for name, times in took.items()}
    for name in took.keys() - {"kernel"}:
        ratios = (theirs / ours for theirs, ours in zip(took[name], took["kernel"], strict=True))
        row[f"times {name}"] = statistics.median(ratios)
    operations = 14 * pairs * shape.heads * shape.features
    return row | {"kernel_tflops": operations / statistics.median(took["kernel"]) / 1e12}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    kind = jax.devices()[0].device_kind
    if compute_capability(kind) != 9.0:
        sys.exit(f"The kernel needs an H100 or H200, and jax has found {kind!r} here; nothing was checked or timed.")
    print(f"{kind}, jax {jax.__version__}: errors of out, dq, dk, dv", flush=True)
    failed, rows = [], {}
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])):
        shapes = {name: shape for name, shape in SMALL.items() if shape.bias is None}
        shapes |= {name: SHAPES[name] for name in ROWS}
        for name, shape in shapes.items():
            found = check(name, shape, ("kernel", "cudnn"))
            failed += [f"{name}, {key}" for key, row in found.items() if max(row) > TOLERANCE]
        if failed:
            print("WRONG: " + "; ".join(failed))
            return 1
        for name in ROWS:
            rows[name] = timed(SHAPES[name], options.rounds)
            print(name, {key: round(value, 2) for key, value in rows[name].items()}, flush=True)
    if options.output:
        options.output.write_text(json.dumps({"device": kind, "jax": jax.__version__, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
