"""What serves a call on devices that are not there, and what docs/kernels.md says of it."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from tests.kernels.devices import A100, B200, H200, T4, absent_mesh
from vlm_jax.kernels import attention
from vlm_jax.kernels.attention import api, tpu
from vlm_jax.kernels.attention.shapes import SHAPES

DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"
KINDS = {  # as jax names them, by the names of the tables
    "v4": "TPU v4",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
    "tpu7x": "TPU7x",
    "H100": "NVIDIA H100 80GB HBM3",
    "H200": H200,
    "A100": A100,
    "A10": "NVIDIA A10",
    "L4": "NVIDIA L4",
    "B200": B200,
    "T4": T4,
    "CPU": "cpu",
}


def table(section: str) -> dict[str, dict[str, str]]:
    """What serves each row, by the kind of device, from the first table of a section whose first column is "row"."""
    lines = iter(DOCS.read_text().split(f"\n## {section}\n")[1].splitlines())
    header = next(line for line in lines if line.startswith("| row |"))
    devices = [[name.strip() for name in cell.split(",")] for cell in header.strip("|").split("|")[1:]]
    next(lines)
    found: dict[str, dict[str, str]] = {}
    for line in lines:
        if not line.startswith("|"):
            break
        row, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        found[row.split()[0]] = {
            KINDS[name.removeprefix("TPU ")]: cell for names, cell in zip(devices, cells, strict=True) for name in names
        }
    return found


def signature(name: str, dtype: str, **options) -> tuple[dict, dict, dict]:
    """Arrays, masks (both without numbers) and known arguments of a row of `shapes.py`."""
    shape = SHAPES[name]
    rows = {"q": (shape.queries, shape.heads), "k": (shape.keys, shape.kv_heads), "v": (shape.keys, shape.kv_heads)}
    arrays = {key: (shape.batch, *lengths, shape.features) for key, lengths in rows.items()}
    if shape.bias is not None:
        arrays["bias"] = shape.bias
    masks = ("q_segment_ids", "kv_segment_ids") if shape.segments else ("lengths",) if shape.padded else ()
    masks += {None: (), "prefix": ("q_positions", "kv_positions"), "last": ("q_positions",)}[shape.positions]
    sizes = {"q": (shape.batch, shape.queries), "k": (shape.batch, shape.keys), "l": (shape.batch,)}
    lengths = {key: sizes[key[0]] for key in masks}
    known = {"causal": shape.causal, "sliding_window": shape.sliding_window, "softcap": shape.softcap}
    return (
        {key: jax.ShapeDtypeStruct(size, dtype, **options) for key, size in arrays.items()},
        {key: jax.ShapeDtypeStruct(size, jnp.int32, **options) for key, size in lengths.items()},
        known,
    )


def choice(monkeypatch: pytest.MonkeyPatch, kind: str, name: str, dtype: str, **changes) -> str:
    """What `attention` chooses on a device of this kind; of a TPU's kernels, which."""
    arrays, masks, known = signature(name, dtype)
    chosen = []

    def local(rule, q, k, v, mask, bias, axis_name, implementation):
        if implementation == "pallas" and kind.startswith("TPU"):
            implementation = "short" if tpu.is_short(rule, q, k, mask, kind) else "splash"
        chosen.append(implementation)
        return q

    monkeypatch.setattr(api, "_local", local)
    with jax.sharding.use_abstract_mesh(absent_mesh(kind, axis_type=AxisType.Auto)):
        jax.eval_shape(lambda arrays, masks: attention(**arrays, **masks, **{**known, **changes}), arrays, masks)
    return chosen[0]
