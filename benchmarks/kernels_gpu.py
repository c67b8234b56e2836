"""The kernels for Hopper GPUs on one: are they right, and how fast beside XLA's tiles and beside naive JAX?

    pip install -e ".[cuda]"
    python benchmarks/kernels_gpu.py [--rounds=10] [--only=contrastive] [--output=kernels_gpu.json]

Needs one H100 or H200, and less than ten minutes: after eight, the rows that are left are skipped. Each row is a value
and all its gradients, compiled, on the same arrays. First the sides must agree, ours must hold the kernels that it
should (`vlm_jax.kernels.custom_calls`) and give the same bits twice; then they take turns. A figure is the median over
the rounds, a ratio the median of the rounds' ratios. "of a product" is the share of the speed of a bare product of two
bfloat16 matrices of 8,192, measured in the same process; operations are counted as in docs/kernels.md, whatever a side
does. "temporary" is the compiler's figure.

Exit status 1 where a side is wrong or the target is missed: 0.55 of the peak of a product for the contrastive losses
at N = 32,768 and D = 768 (peak: 989 TFLOP/s).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
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
from beside import in_turns, ratio, seconds
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from machine import versions

from vlm_jax.kernels import custom_calls, placement, sigmoid_contrastive_loss, softmax_contrastive_loss
from vlm_jax.kernels.contrastive.shapes import SHAPES, ContrastiveShape

BUDGET = 8 * 60
PEAK = 989e12  # dense bfloat16 of an H100 or H200 (SXM)
TARGET = 0.55
LOSSES = {"softmax": (softmax_contrastive_loss, 8), "sigmoid": (sigmoid_contrastive_loss, 6)}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    sides: functions of the same arrays, to be jitted: "ours", and what is beside it ("xla", "reference"). operations:
    of one call. kernels: names that "ours" must hold. arguments: makes the arrays, when the row's turn comes.
    tolerance: between the sides, of each output's largest entry. target: least share of `PEAK`.
    """

    name: str
    sides: dict[str, Callable[..., Any]]
    operations: float
    kernels: tuple[str, ...]
    arguments: Callable[[], tuple[Any, ...]]
    tolerance: float = 2e-2  # bfloat16 results, of bfloat16 products
    target: float | None = None


def contrastive(kind: str, shape: ContrastiveShape, others: tuple[str, ...], target: float | None = None) -> Row:
    """others: of "xla" and "reference" (naive JAX, with its N x N arrays)."""
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
        sides={"ours": side(None), **{name: side(name) for name in others}},
        operations=operations * shape.pairs**2 * shape.width,
        kernels=tuple(
            f"contrastive_{kind}_{part}" for part in (("sums", "slopes") if kind == "softmax" else ("slopes",))
        ),
        arguments=arguments,
        target=target,
    )


def rows() -> dict[str, list[Row]]:
    """By kernel; small and ragged first, so that what is wrong shows before anything is measured."""
    both = ("xla", "reference")
    huge = ContrastiveShape(262144, 768)
    return {
        "contrastive": [
            *(contrastive(kind, ContrastiveShape(5000, 200), both) for kind in LOSSES),
            *(contrastive(kind, SHAPES["clip_l14"], both, TARGET) for kind in LOSSES),
            contrastive("softmax", SHAPES["clip_b32"], both),
            contrastive("sigmoid", SHAPES["siglip_so400m"], both),
            *(contrastive(kind, huge, ("xla",)) for kind in LOSSES),
        ],
    }


def error(got: Any, want: Any) -> float:
    """The largest difference of any output, by its largest entry."""

    def one(a: Any, b: Any) -> Any:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-30)

    return max(float(x) for x in jax.tree.leaves(jax.tree.map(one, got, want)))


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
    if not all(jnp.isfinite(x.astype(jnp.float32)).all() for x in jax.tree.leaves(ours)):
        result["wrong"].append("not finite")
    for name, side in compiled.items():
        if name != "ours":
            result[f"error_{name}"] = error(ours, side(*given))
            if not result[f"error_{name}"] <= row.tolerance:
                result["wrong"].append(f"{result[f'error_{name}']:.1e} off {name}")
    took = in_turns({name: functools.partial(side, *given) for name, side in compiled.items()}, rounds)
    for name, side in compiled.items():
        result[f"{name}_ms"] = 1e3 * statistics.median(took[name])
        result[f"{name}_temporary_mb"] = side.memory_analysis().temp_size_in_bytes / 1e6
        if name != "ours":
            result[f"times_{name}"] = ratio(took, name, "ours")
    result["tflops"] = row.operations / statistics.median(took["ours"]) / 1e12
    if row.target and result["tflops"] * 1e12 < row.target * PEAK:
        result["wrong"].append(f"below {row.target} of the peak")
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
    def cell(key: str, form: str) -> str:
        return form.format(result[key]) if key in result else " " * len(form.format(0))

    cells = [
        cell("ours_ms", "{:>10,.2f}"),
        cell("xla_ms", "{:>10,.2f}"),
        cell("reference_ms", "{:>10,.2f}"),
        cell("times_xla", "{:>8.2f}"),
        cell("times_reference", "{:>8.2f}"),
        cell("tflops", "{:>9,.0f}"),
        f"{result['tflops'] / product:>13.2f}",
        cell("ours_temporary_mb", "{:>12,.0f}"),
        cell("reference_temporary_mb", "{:>10,.0f}"),
    ]
    return (
        f"{result['name']:<36}" + "".join(cells) + ("  WRONG: " + "; ".join(result["wrong"]) if result["wrong"] else "")
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
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:1])
    results, skipped = [], []
    with jax.set_mesh(mesh):
        product = bare_product()
        print(f"{kind}, {versions('jax')}, a bare product {product:,.0f} TFLOP/s\n")
        print(
            f"{'value and gradients':<36}{'ours ms':>10}{'xla ms':>10}{'naive ms':>10}{'x xla':>8}{'x naive':>8}"
            f"{'TFLOP/s':>9}{'of a product':>13}{'temporary MB':>13}{'naive MB':>9}"
        )
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
