"""What the compiler says of the Pallas kernels on a TPU. Needs no TPU; nothing is run.

    pip install -e ".[plan]"      # libtpu, the compiler
    python benchmarks/kernels_tpu.py [--output=kernels_tpu.json]

Two tables.

- Memory at its peak of the contrastive losses, value and gradients, bfloat16, arguments included: ours, and the
  definition, which has the N x N array.
- The static bound of the matrix units on one v5e, forward and backward: the cycles that the operations of a kernel
  would take with its four units full, over the bundles of instructions that the compiler scheduled. It counts every
  bundle of a program once for each step of the grid, also those that only the first or last step executes, and knows
  nothing of waiting for memory: a figure to compare versions of a kernel by, not a speed. Beside attention, jax's own
  `flash_attention` with its default tiles.

Exit status 1 where a target is missed: 8 times as many pairs as the definition on a v5e, 1/16 of its temporary memory,
a bound of 0.65 forward and 0.60 backward for the contrastive losses, and 1.5 times `flash_attention` for the shapes of
vision towers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlm_jax.topologies import TPUS, tpu_chips

OPERATIONS_PER_CYCLE = 4 * 128 * 128 * 2  # of a v5e
# loss, implementation, pairs, features, chips, ring, kinds of chip
MEMORY = [
    ("softmax", "pallas", 32768, 768, 1, False, list(TPUS)),
    ("sigmoid", "pallas", 32768, 1152, 1, False, list(TPUS)),
    ("softmax", "pallas", 32768, 768, 4, False, ["v5e"]),
    ("softmax", "pallas", 262144, 768, 4, True, ["v5e"]),
    ("sigmoid", "pallas", 262144, 768, 4, True, ["v5e"]),
    ("softmax", "pallas", 524288, 768, 1, False, ["v5e"]),
    ("softmax", "reference", 32768, 768, 1, False, ["v5e"]),
    ("softmax", "reference", 65536, 768, 1, False, ["v5e"]),
]
VISION = ("clip_l14_336", "siglip_so400m_384", "siglip_b16_224")
ATTENTION = (*VISION, "flamingo_cross", "blip2_qformer", "paligemma_prefix")
TARGETS = {"contrastive forward": 0.65, "contrastive backward": 0.60, "times flash_attention": 1.5}


# ---------------------------------------------------------------------------------------- in a process for each program


def compile_loss(
    loss: str, implementation: str, pairs: int, features: int, count: int, ring: bool, kind: str
) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from vlm_jax.kernels import sigmoid_contrastive_loss, softmax_contrastive_loss
    from vlm_jax.kernels.contrastive import api

    api.GATHER_BYTES = 0 if ring else 2**28
    mesh = Mesh(np.array(tpu_chips(TPUS[kind])[:count]), ("data",), axis_types=(AxisType.Explicit,))
    image = jax.ShapeDtypeStruct((pairs, features), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("data")))
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    call = {"softmax": softmax_contrastive_loss, "sigmoid": sigmoid_contrastive_loss}[loss]
    arguments = (image, image, number, number)[: 3 if loss == "softmax" else 4]

    def value(*arguments):
        return call(*arguments, implementation=implementation)

    gradient = jax.value_and_grad(value, argnums=tuple(range(len(arguments))))
    compiled = jax.jit(gradient).lower(*arguments).compile()
    used = compiled.memory_analysis()
    return {"peak": used.peak_memory_in_bytes / 1e6, "temporary": used.temp_size_in_bytes / 1e6}


def compile_attention(name: str, ours: bool) -> dict[str, Any]:
    """Forward and backward; the steps of a kernel's grid, and the operations of one product."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental.pallas.ops.tpu.flash_attention import SegmentIds, flash_attention
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from vlm_jax.kernels import attention
    from vlm_jax.kernels.attention.shapes import SHAPES
    from vlm_jax.kernels.attention.short import Plan

    shape = SHAPES[name]
    mesh = Mesh(np.array(tpu_chips(TPUS["v5e"])[:1]), ("data",), axis_types=(AxisType.Explicit,))

    def like(size: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    arrays, options = shape.arguments()
    if ours:
        plan = Plan.make(arrays["q"].shape, arrays["k"].shape, mesh.devices.flat[0].device_kind)
        steps = plan.batch * plan.programs * plan.blocks
        masks = {key: like(x.shape, jnp.int32) for key, x in options.items() if isinstance(x, np.ndarray)}
        known = {key: x for key, x in options.items() if not isinstance(x, np.ndarray)}
        given = {key: like(x.shape, jnp.bfloat16) for key, x in arrays.items()}

        def call(given, masks):
            return attention(**given, **masks, **known)

    else:  # its lengths are whole blocks of 128, filled up outside; [B, H, T, D]
        length = -(-shape.queries // 128) * 128
        steps = shape.batch * shape.heads * (length // 128) ** 2
        masks = {"ids": like((shape.batch, length), jnp.int32)}
        given = dict.fromkeys("qkv", like((shape.batch, shape.heads, length, shape.features), jnp.bfloat16))

        def call(given, masks):
            return flash_attention(**given, segment_ids=SegmentIds(masks["ids"], masks["ids"]))

    def step(given, masks, d_out):
        out, pull = jax.vjp(lambda given: call(given, masks), given)
        return out, pull(d_out)

    with jax.set_mesh(mesh):
        jax.jit(step).lower(given, masks, given["q"]).compile()
    return {"steps": steps, "product": 2 * shape.batch * shape.heads * shape.queries * shape.keys * shape.features}


def compile_contrastive(loss: str, pairs: int, features: int) -> dict[str, Any]:
    from vlm_jax.kernels.contrastive.tpu import tile
    from vlm_jax.kernels.tiles import tile_size

    compile_loss(loss, "pallas", pairs, features, 1, False, "v5e")
    most = tile_size("contrastive.tpu.tile", tpu_chips(TPUS["v5e"])[0].device_kind)
    return {"steps": (pairs // tile(pairs, most)[0]) ** 2, "product": 2 * pairs**2 * features}


CASES: dict[str, Callable[..., dict[str, Any]]] = {
    "loss": compile_loss,
    "attention": compile_attention,
    "contrastive": compile_contrastive,
}


# --------------------------------------------------------------------------------------------------------------- tables


def compiled(case: str, *arguments: Any, dump: Path | None = None) -> dict[str, Any] | None:
    """What `CASES[case]` gives, in a process of its own; None where the program does not fit."""
    flags = {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"} if dump else {}
    done = subprocess.run(
        [sys.executable, __file__, "--case", json.dumps([case, *arguments])],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | flags,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        if "RESOURCE_EXHAUSTED" in done.stderr:
            return None
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def bundles(dump: Path) -> dict[str, int]:
    """Of each kernel, the bundles that the compiler scheduled."""
    found = {}
    for file in dump.glob("*final_hlo-static-per-bundle-utilization.txt"):
        _, _, rest = file.name.partition("-")
        lines = file.read_text().partition("UTILIZATION:")[2].split("\n")
        found[rest.rsplit(".", 2)[0]] = sum(bool(line.strip()) for line in lines)
    return found


def memory_table() -> list[dict[str, Any]]:
    print(f"{'loss':<10}{'N':>9}{'D':>7}{'chips':>7}  {'texts':<10}{'chip':<7}{'peak MB':>10}{'temporary MB':>14}")
    rows = []
    for loss, implementation, pairs, features, count, ring, kinds in MEMORY:
        for kind in kinds:
            used = compiled("loss", loss, implementation, pairs, features, count, ring, kind)
            rows.append(
                {"loss": loss, "implementation": implementation, "pairs": pairs, "features": features, "chips": count}
                | {"ring": ring, "kind": kind, "used": used}
            )
            texts = (
                "N x N" if implementation == "reference" else "here" if count == 1 else "ring" if ring else "gathered"
            )
            sizes = f"{used['peak']:>10,.0f}{used['temporary']:>14,.0f}" if used else f"{'does not fit':>24}"
            print(f"{loss:<10}{pairs:>9,}{features:>7,}{count:>7}  {texts:<10}{kind:<7}{sizes}", flush=True)
    return rows


def bound_table() -> dict[str, dict[str, float]]:
    """Of each case: cycles (bundles times steps) and bound, forward and backward."""
    print(f"\n{'v5e, static':<34}{'forward: cycles':>16}{'bound':>8}{'backward: cycles':>18}{'bound':>8}")
    cases: dict[str, tuple[list[Any], tuple[str, ...], tuple[int, int]]] = {}
    for name in ATTENTION:
        cases[name] = ["attention", name, True], ("attention_short", "attention_short_gradients"), (2, 5)
    for name in VISION:
        kernels = ("jvp_jit_flash_attention", "flash_mha_bwd_dq", "flash_mha_bwd_dkv")
        cases[f"{name}, flash_attention"] = ["attention", name, False], kernels, (2, 5)
    for loss, first in (("softmax", "sums"), ("sigmoid", "gradients")):
        kernels = (f"contrastive_{loss}_{first}", *([f"contrastive_{loss}_gradients"] if loss == "softmax" else []))
        cases[f"contrastive {loss}, D = 768"] = ["contrastive", loss, 4096, 768], kernels, (1, 3)
    rows: dict[str, dict[str, float]] = {}
    for name, (case, kernels, products) in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            known = compiled(*case, dump=Path(folder))
            scheduled = bundles(Path(folder))
        assert known is not None, name
        cycles = {k: known["steps"] * next(n for call, n in scheduled.items() if call.startswith(k)) for k in kernels}
        if kernels[0].endswith("attention_short"):  # the name of one begins that of the other
            cycles["attention_short"] = known["steps"] * scheduled["attention_short"]
        parts = {"forward": [kernels[0]], "backward": list(kernels[1:])}
        if kernels[0].endswith("sigmoid_gradients"):  # one pass, in the forward pass
            parts, products = {"backward": [kernels[0]]}, (0, 3)
        row: dict[str, float] = {}
        for (part, names), count in zip(parts.items(), products[-len(parts) :], strict=True):
            row[f"{part}_cycles"] = sum(cycles[k] for k in names)
            row[f"{part}_bound"] = count * known["product"] / OPERATIONS_PER_CYCLE / row[f"{part}_cycles"]
        rows[name] = row
        cells = [
            f"{row[f'{part}_cycles']:>{width},.0f}{row[f'{part}_bound']:>8.2f}" if part in parts else " " * (width + 8)
            for part, width in (("forward", 16), ("backward", 18))
        ]
        print(f"{name:<34}{''.join(cells)}", flush=True)
    return rows


def missed(memory: list[dict[str, Any]], bounds: dict[str, dict[str, float]]) -> list[str]:
    dense = {row["pairs"]: row["used"] for row in memory if row["implementation"] == "reference"}
    ours = {row["pairs"]: row["used"] for row in memory if row["chips"] == 1 and row["kind"] == "v5e"}
    most = max(pairs for pairs, used in ours.items() if used) / max(pairs for pairs, used in dense.items() if used)
    first = next(row["used"] for row in memory if row["implementation"] == "pallas" and row["kind"] == "v5e")
    share = dense[32768]["temporary"] / first["temporary"]
    print(f"\n{most:.0f} times as many pairs as the definition on a v5e, whose temporary memory at N = 32,768 is")
    print(f"{share:.0f} times ours")
    wrong = [
        f"{what} {value:.1f}" for what, value, least in (("pairs", most, 8), ("memory", share, 16)) if value < least
    ]
    for name, row in bounds.items():
        for part in ("forward", "backward"):
            if name.startswith("contrastive") and row.get(f"{part}_bound", 1) < TARGETS[f"contrastive {part}"]:
                wrong.append(f"{name}, {part}: {row[f'{part}_bound']:.2f}")
            if name in VISION:
                times = bounds[f"{name}, flash_attention"][f"{part}_cycles"] / row[f"{part}_cycles"]
                print(f"{name}: {times:.1f} times flash_attention, {part}")
                if times < TARGETS["times flash_attention"]:
                    wrong.append(f"{name}, {part}: {times:.2f} times flash_attention")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("kernels_tpu.json"))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        case, *arguments = json.loads(options.case)
        print(json.dumps(CASES[case](*arguments)))
        return 0
    found = {name: version(name) for name in ("jax", "libtpu")}
    print(", ".join(f"{name} {number}" for name, number in found.items()))
    memory, bounds = memory_table(), bound_table()
    wrong = missed(memory, bounds)
    print("\n".join(f"missed: {one}" for one in wrong))
    options.output.write_text(json.dumps({"versions": found, "memory": memory, "bounds": bounds}, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
