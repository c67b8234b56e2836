"""Where arrays live is decided in one place, and a mistake there is said at once."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import PartitionSpec as P

from vlm_jax.errors import UsageError
from vlm_jax.sharding import RULES, ShardingRules, batch_shards, current_mesh_shape, make_mesh

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def test_rules_place_dimensions_that_divide() -> None:
    assert RULES.stored(("embed", "mlp"), (16, 32), MESH) == P("fsdp", "tensor")
    assert RULES.stored(("embed", "mlp"), (16, 31), MESH) == P("fsdp", None)
    assert RULES.stored((None, "embed"), (3, 15), MESH) == P(None, None)
    assert RULES.stored(("batch", None), (8, 3), MESH) == P(("data", "fsdp"), None)
    assert RULES.stored(("batch", None), (2, 3), MESH) == P(None, None)


@pytest.mark.parametrize("name", ["embde", "stored", "axis"])
def test_a_name_without_a_rule_raises(name: str) -> None:
    with pytest.raises(ValueError, match=f"no logical axis '{name}'; the rules have .*'embed'"):
        RULES.stored((name,), (8,), MESH)


@pytest.mark.parametrize(
    ("rules", "axes", "shape"),
    [
        (RULES, ("heads", "mlp"), (8, 8)),
        (RULES, ("heads", "mlp"), (8, 7)),  # whatever divides
        (RULES, ("batch", "embed"), (8, 8)),
        (ShardingRules(mlp="fsdp"), ("embed", "mlp"), (8, 8)),
    ],
)
def test_two_dimensions_on_one_mesh_axis_raise(rules: ShardingRules, axes: tuple, shape: tuple) -> None:
    with pytest.raises(ValueError, match="two dimensions on one mesh axis"):
        rules.stored(axes, shape, MESH)


def test_a_mesh_takes_what_is_left() -> None:
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(make_mesh(data=-1, fsdp=2, tensor=2).shape) == MESH
    assert dict(make_mesh(devices=jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    with jax.set_mesh(make_mesh(data=2, tensor=2)):
        assert batch_shards() == 4


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"tensor": 3}, "data=1 x fsdp=-1 x tensor=3 does not divide the 8 device.* product is 8"),
        ({"data": 2, "fsdp": 2, "tensor": 1}, "does not divide the 8 device"),
        ({"data": 16, "fsdp": 1}, "does not divide the 8 device"),
        ({"data": 0}, "sizes are positive"),
        ({"data": -1, "fsdp": -1}, "at most one is -1"),
        ({"data": -2}, "sizes are positive"),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_sentence(sizes: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make_mesh(**sizes)


def test_without_a_mesh_it_says_what_to_call() -> None:
    with pytest.raises(RuntimeError, match=r"call jax\.set_mesh"):
        current_mesh_shape()
