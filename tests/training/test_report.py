"""The report of what moved: exact, by module and layer, with adapters and dead layers shown as what they are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from vlm_jax.training.report import compare, table


def params() -> dict[str, jax.Array]:
    return {
        "newline": jnp.ones(4),
        "decoder/layers/mlp/up/kernel": jnp.ones((3, 4, 5)),
        "decoder/layers/mlp/up/bias": jnp.ones((3, 5)),
        "decoder/layers/mlp/up/lora_a": jnp.ones((3, 4, 2)),
        "decoder/layers/mlp/up/lora_b": jnp.zeros((3, 2, 5)),
        "decoder/final_norm/scale": jnp.ones(4),
    }


def test_modules_and_layers_that_moved_are_told_from_those_that_did_not() -> None:
    before, after = params(), params()
    after["newline"] = after["newline"].at[0].add(0.5)
    after["decoder/layers/mlp/up/kernel"] = after["decoder/layers/mlp/up/kernel"].at[1, 0, 0].add(-3.0)
    after["decoder/layers/mlp/up/bias"] = after["decoder/layers/mlp/up/bias"].at[1, 0].add(4.0)
    after["decoder/layers/mlp/up/lora_b"] = after["decoder/layers/mlp/up/lora_b"] + 1.0
    moved = compare(before, after)
    assert list(moved) == ["newline", "decoder/layers/mlp/up", "decoder/layers/mlp/up (lora)", "decoder/final_norm"]
    up = moved["decoder/layers/mlp/up"]
    assert (up.parameters, up.change, up.largest) == (75, pytest.approx(5.0), 4.0)
    assert up.relative == pytest.approx(5 / 75**0.5) and (up.layers, up.still) == (3, 2)
    assert moved["newline"].relative == pytest.approx(0.25)
    assert moved["decoder/final_norm"].change == 0 == moved["decoder/final_norm"].largest
    lines = table(moved, {"vision/kernel": jax.ShapeDtypeStruct((10, 10), jnp.float32)}).splitlines()
    assert "2 of 3 layers did not move" in lines[2] and lines[4].endswith("did not move")
    assert "did not" not in lines[1] + lines[3] and lines[5] == "frozen: vision (100)"


def test_what_starts_at_zero_has_no_relative_change() -> None:
    before = {"decoder/layers/x/lora_b": jnp.zeros((1, 2, 2))}
    moved = compare(before, {path: a + 1 for path, a in before.items()})
    assert moved["decoder/layers/x (lora)"].relative is None and "from zero" in table(moved, {})
