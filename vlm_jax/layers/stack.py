"""Runs a module whose parameters are stacked over layers as one scanned body; rematerialisation by named policy.

For the decoding of single tokens on a CPU the layers can stand apart instead (`layers_apart`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from vlm_jax.errors import UsageError, suggest
from vlm_jax.kernels.placement import platform_of

BLOCK_INPUT = "block_input"
FEW = 8  # layers


def _offload() -> Callable[..., Any]:
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    )


# What the backward pass finds in memory: everything; each layer's input; the results of matrix products with weights;
# each layer's input, moved to the host.
REMAT = {
    "none": None,
    "full": lambda: jax.checkpoint_policies.nothing_saveable,
    "dots": lambda: jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": _offload,
}


def check_remat(name: str) -> None:
    if name not in REMAT:
        raise UsageError(f"remat {name!r} is not one of {', '.join(REMAT)}{suggest(name, REMAT)}")


def scan_layers(
    layers: nnx.Module,
    x: Any,
    apply: Callable[[nnx.Module, Any, jax.Array, Any], tuple[Any, Any]],
    *,
    first: int | None = None,
    remat: str = "none",
    xs: Any = None,
) -> tuple[Any, Any]:
    """Applies `apply(layer, carry, layer_index, xs_of_layer) -> (carry, y)` layer by layer.

    `layers` holds parameters [L, ...]; `first` runs only the first so many of them; `xs` is scanned along. Returns the
    last carry and the stacked ys.

    On one CPU a few layers run without a loop: around one, XLA clears, copies and rewrites the stacks of all that the
    backward pass needs, which a small model notices.
    """
    graph, state = nnx.split(layers)
    if first is not None:
        state = jax.tree.map(lambda a: a[:first], state)
    count = jax.tree.leaves(state)[0].shape[0]

    def body(carry: Any, inputs: Any) -> tuple[Any, Any]:
        layer_state, index, xs_of_layer = inputs
        carry = jax.tree.map(lambda a: checkpoint_name(a, BLOCK_INPUT), carry)
        return apply(nnx.merge(graph, layer_state), carry, index, xs_of_layer)

    check_remat(remat)
    if REMAT[remat] is not None:
        body = jax.checkpoint(body, policy=REMAT[remat](), prevent_cse=False)
    unroll = count <= FEW and REMAT[remat] is None and apart()  # without the loop, XLA undoes rematerialisation
    return jax.lax.scan(body, x, (state, jnp.arange(count), xs), unroll=unroll)


def apart() -> bool:
    """Whether programs on the mesh in use read each layer's weights fastest where they stand apart.

    On a CPU, XLA copies a layer out of the stacked weights before it multiplies. Beside the product with many tokens
    that is little; beside one token's it is most of the work. Elsewhere the slice is part of the product.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size == 1 and platform_of(mesh) == "cpu"


def layers_apart(params: Mapping[str, jax.Array], prefix: str) -> dict[str, Any]:
    """The parameters, with a tuple of L arrays for each stacked one [L, ...] under `prefix`, on the one CPU in use.

    They are views of the same memory, where XLA can take them for aligned; small ones may be copies.
    """

    def split(array: jax.Array) -> tuple[jax.Array, ...]:
        sharding = jax.NamedSharding(jax.sharding.get_mesh(), P(*(None,) * (array.ndim - 1)))
        return tuple(jax.device_put(layer, sharding) for layer in np.asarray(array))

    return {path: split(value) if path.startswith(prefix) else value for path, value in params.items()}


def each_layer(layers: nnx.Module) -> Sequence[nnx.Module]:
    """The layers of a module whose parameters are what `layers_apart` makes."""
    graph, state = nnx.split(layers)
    flat = [(path, variable, variable.get_value()) for path, variable in nnx.to_flat_state(state)]
    count = len(flat[0][2])
    states = [[(path, variable.replace(values[i])) for path, variable, values in flat] for i in range(count)]
    return [nnx.merge(graph, nnx.from_flat_state(one)) for one in states]
