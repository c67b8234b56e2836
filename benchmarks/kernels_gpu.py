"""The kernels for Hopper GPUs on one: are they right, and how fast beside XLA's tiles and beside naive JAX?

    pip install -e ".[cuda]"
    python benchmarks/kernels_gpu.py [--rounds=10] [--only=contrastive] [--output=kernels_gpu.json]

Needs one H100 or H200, and less than ten minutes: after eight, the rows that are left are skipped. Each row is a value
and all its gradients, compiled, on the same arrays. First the sides must agree, ours must hold the kernels that it
should (`vlm_jax.kernels.custom_calls`) and give the same bits twice; then they take turns. A figure is the median over
the rounds, a ratio the median of the rounds' ratios. "of a product" is the share of the speed of a bare product of two
bfloat16 matrices of 8,192, measured in the same process; operations are counted as in docs/kernels.md, whatever a side
does (attention's of what queries see, 4 forward and 10 backward). "MB" is the compiler's temporary memory.

Sides: "xla" in blocks, "naive" the definition, "cudnn" where it serves a call, "masked cudnn" where it must be told
with an array of all pairs what is seen. What rows that see nothing give there is not compared.

Exit status 1 where a side is wrong or an aim is missed: 0.55 of the peak of a product (989 TFLOP/s) for the contrastive
losses at N = 32,768 and D = 768; twice masked cuDNN for packed rows of 4,096; what is taken by default within 3 % of
the best for rows that are not packed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from beside import in_turns, ratio, seconds
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from machine import versions

from vlm_jax.kernels import attention, custom_calls, placement, sigmoid_contrastive_loss, softmax_contrastive_loss
from vlm_jax.kernels.attention.reference import Mask, Rule, visible
from vlm_jax.kernels.attention.shapes import SHAPES as ATTENTION_SHAPES
from vlm_jax.kernels.contrastive.shapes import SHAPES, ContrastiveShape
from vlm_jax.kernels.tune import apart

BUDGET = 8 * 60
PEAK = 989e12  # dense bfloat16 of an H100 or H200 (SXM)
ATTENTION_SMALL = ("odd", "odd_causal_grouped", "packed_causal", "packed_window_softcap", "window_both_sides", "prefix")
IMPLEMENTATIONS = {"naive": "reference"}  # by what a side is called, where that is another name
LOSSES = {"softmax": (softmax_contrastive_loss, 8), "sigmoid": (sigmoid_contrastive_loss, 6)}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    sides: functions of the same arrays, to be jitted: "ours", and what is beside it. kernels: names that "ours" must
    hold. arguments: makes the arrays, when the row's turn comes. operations: of a call with them. tolerance: between
    the sides, of each output's largest entry. aims: least ratio to a side, or under "peak" least share of `PEAK`.
    """

    name: str
    sides: dict[str, Callable[..., Any]]
    kernels: tuple[str, ...]
    arguments: Callable[[], tuple[Any, ...]]
    operations: Callable[..., float]
    tolerance: float = 2e-2  # bfloat16 results, of bfloat16 products
    aims: Mapping[str, float] = dataclasses.field(default_factory=dict)


def contrastive(kind: str, shape: ContrastiveShape, others: tuple[str, ...], **aims: float) -> Row:
    """others: of "xla" and "naive", which has N x N arrays."""
    call, operations = LOSSES[kind]
    count = 3 if kind == "softmax" else 4

    def side(implementation: str | None) -> Callable[..., Any]:
        return jax.value_and_grad(functools.partial(call, implementation=implementation), argnums=tuple(range(count)))

    def arguments() -> tuple[Any, ...]:
        arrays = shape.arguments()
        features = [jnp.asarray(arrays[name], jnp.bfloat16) for name in ("image", "text")]
        numbers = [jnp.float32(arrays[name]) for name in ("scale", "bias")]
        return (*features, *numbers)[:count]

    return Row(
        name=f"{kind}, N = {shape.pairs:,}, D = {shape.width:,}",
        sides={"ours": side(None), **{name: side(IMPLEMENTATIONS.get(name, name)) for name in others}},
        operations=lambda *arrays: operations * shape.pairs**2 * shape.width,
        kernels=tuple(
            f"contrastive_{kind}_{part}" for part in (("sums", "slopes") if kind == "softmax" else ("slopes",))
        ),
        arguments=arguments,
        aims=aims,
    )


def attention_row(name: str, others: tuple[str, ...], **aims: float) -> Row:
    """others: of "xla", "cudnn", "masked cudnn" and "naive"."""
    shape = ATTENTION_SHAPES[name]
    rule = Rule(shape.causal, shape.sliding_window, shape.softcap, shape.features**-0.5)
    known = {"causal": shape.causal, "sliding_window": shape.sliding_window, "softcap": shape.softcap}

    def seen_by(ids: Mapping[str, jax.Array]) -> jax.Array:
        """bool [B, T, S]."""
        mask = Mask(*(ids.get(field) for field in Mask._fields))
        if "lengths" in ids:
            real = (jnp.arange(shape.queries) < ids["lengths"][:, None]).astype(jnp.int32)
            mask = mask._replace(q_segment_ids=real, kv_segment_ids=real)
        seen = visible(rule, mask.with_positions(rule, shape.queries, shape.keys))
        return jnp.broadcast_to(True if seen is None else seen, (shape.batch, shape.queries, shape.keys))

    def side(other: str | None) -> Callable[..., Any]:
        def call(q: jax.Array, k: jax.Array, v: jax.Array, ids: Mapping[str, jax.Array]) -> jax.Array:
            if other != "masked cudnn":
                return attention(q, k, v, **known, **ids, implementation=IMPLEMENTATIONS.get(other, other))
            seen = seen_by(ids)
            heads = jnp.broadcast_to(seen[:, None], (shape.batch, shape.heads, shape.queries, shape.keys))
            out = jax.nn.dot_product_attention(q, k, v, mask=heads, implementation="cudnn")
            return jnp.where(seen.any(-1)[:, :, None, None], out, 0)

        def both(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array, ids: Mapping[str, jax.Array]) -> Any:
            out, pull = jax.vjp(lambda *qkv: call(*qkv, ids), q, k, v)
            return out, pull(d_out)

        return both

    def arguments() -> tuple[Any, ...]:
        arrays, options = shape.arguments()
        d_out = np.random.default_rng(1).standard_normal(arrays["q"].shape, np.float32)
        halves = [jnp.asarray(x, jnp.bfloat16) for x in (*(arrays[name] for name in "qkv"), d_out)]
        return *halves, {key: jnp.asarray(x) for key, x in options.items() if isinstance(x, np.ndarray)}

    packed = shape.segments or shape.positions
    return Row(
        name=name,
        sides={"ours": side(None), **{other: side(other) for other in others}},
        operations=lambda *arrays: (
            14.0 * float(seen_by(arrays[-1]).sum(dtype=jnp.float32)) * shape.heads * shape.features
        ),
        kernels=("attention_packed", "attention_packed_dq", "attention_packed_dkv") if packed else (),
        arguments=arguments,
        aims=aims,
    )


def rows() -> dict[str, list[Row]]:
    """By kernel; small and ragged first, so that what is wrong shows before anything is measured."""
    both = ("xla", "naive")
    huge = ContrastiveShape(262144, 768)
    return {
        "contrastive": [
            *(contrastive(kind, ContrastiveShape(5000, 200), both) for kind in LOSSES),
            *(contrastive(kind, SHAPES["clip_l14"], both, peak=0.55) for kind in LOSSES),
            contrastive("softmax", SHAPES["clip_b32"], both),
            contrastive("sigmoid", SHAPES["siglip_so400m"], both),
            *(contrastive(kind, huge, ("xla",)) for kind in LOSSES),
        ],
        "attention": [
            *(attention_row(name, ("xla",)) for name in ATTENTION_SMALL),
            attention_row("flamingo_cross", ("xla", "masked cudnn", "naive")),
            attention_row("mistral_7b", ("xla", "masked cudnn", "naive"), **{"masked cudnn": 2.0}),
            attention_row("vicuna_7b", ("xla", "masked cudnn", "pallas", "naive"), pallas=0.97),
            attention_row("mistral_7b_long", ("xla",)),
            attention_row("clip_l14_336", ("xla", "cudnn", "pallas"), cudnn=0.97, pallas=0.97),
            attention_row("siglip_so400m_384", ("xla", "cudnn", "pallas"), cudnn=0.97, pallas=0.97),
            attention_row("clip_text", ("xla", "cudnn", "pallas"), cudnn=0.97, pallas=0.97),
        ],
    }


def measure(row: Row, rounds: int, place: Callable[[Any], Any]) -> dict[str, Any]:
    """Figures of a row, and under "wrong" what of it is."""
    given = tuple(map(place, row.arguments()))
    compiled = {name: jax.jit(side).lower(*given).compile() for name, side in row.sides.items()}
    result: dict[str, Any] = {"name": row.name, "wrong": []}
    found = custom_calls(compiled["ours"])
    result["wrong"] += [f"{name} is not in it: {dict(found)}" for name in row.kernels if not found[name]]
    ours = compiled["ours"](*given)
    again = compiled["ours"](*given)
    if not all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(again), strict=True)):
        result["wrong"].append("not the same bits twice")
    for name, side in compiled.items():
        if name != "ours":
            result[f"error_{name}"] = apart(ours, side(*given))
            if not result[f"error_{name}"] <= row.tolerance:
                result["wrong"].append(f"{result[f'error_{name}']:.1e} off {name}")
    took = in_turns({name: functools.partial(side, *given) for name, side in compiled.items()}, rounds)
    for name, side in compiled.items():
        result[f"{name}_ms"] = 1e3 * statistics.median(took[name])
        result[f"{name}_temporary_mb"] = side.memory_analysis().temp_size_in_bytes / 1e6
        if name != "ours":
            result[f"times_{name}"] = ratio(took, name, "ours")
    result["tflops"] = row.operations(*given) / statistics.median(took["ours"]) / 1e12
    reached = {name: result[f"times_{name}"] for name in compiled if name != "ours"}
    reached["peak"] = result["tflops"] * 1e12 / PEAK
    result["wrong"] += [
        f"{reached[name]:.2f} of {name}, the aim is {aim}" for name, aim in row.aims.items() if reached[name] < aim
    ]
    return result


def bare_product(size: int = 8192) -> float:
    """TFLOP/s."""
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    product = jax.jit(jnp.matmul)
    seconds(lambda: product(a, b))
    took = [seconds(lambda: [product(a, b) for _ in range(10)]) for _ in range(5)]
    return 10 * 2 * size**3 / statistics.median(took) / 1e12


def line(result: dict[str, Any], product: float) -> str:
    beside = [
        f"{result['times_' + name]:.2f} x {name} ({result[name + '_temporary_mb']:,.0f} MB)"
        for name in (key.removeprefix("times_") for key in result if key.startswith("times_"))
    ]
    wrong = ["WRONG: " + "; ".join(result["wrong"])] if result["wrong"] else []
    return (
        f"{result['name']:<34}{result['ours_ms']:>10,.2f}{result['tflops']:>9,.0f}{result['tflops'] / product:>13.2f}"
        f"{result['ours_temporary_mb']:>9,.0f}   " + ", ".join([*beside, *wrong])
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", choices=list(rows()), help="the rows of one kernel")
    parser.add_argument("--output", type=Path, default=Path("kernels_gpu.json"))
    options = parser.parse_args()
    began = time.perf_counter()
    kind = jax.devices()[0].device_kind
    if placement.compute_capability(kind) != 9.0:
        raise SystemExit(f"This benchmark needs an H100 or H200; jax found {kind!r}.")
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    results, skipped = [], []
    with jax.set_mesh(mesh):
        product = bare_product()
        print(f"{kind}, {versions('jax')}, a bare product {product:,.0f} TFLOP/s\n")
        print(f"{'value and gradients':<34}{'ours ms':>10}{'TFLOP/s':>9}{'of a product':>13}{'MB':>9}   beside")
        place = functools.partial(jax.device_put, device=NamedSharding(mesh, P()))
        for row in [row for name, group in rows().items() for row in group if options.only in (None, name)]:
            if time.perf_counter() - began > BUDGET:
                skipped.append(row.name)
                continue
            results.append(measure(row, options.rounds, place))
            print(line(results[-1], product), flush=True)
    if skipped:
        print("skipped, for want of time:", "; ".join(skipped))
    options.output.write_text(json.dumps({"gpu": kind, "product_tflops": product, "rows": results}, indent=1) + "\n")
    return int(any(result["wrong"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
