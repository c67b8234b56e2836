"""Large contrastive batches on a small device: the towers run over a part of the batch at a time, the loss sees all.

GradCache (Gao et al. 2021, arXiv 2101.06983): keep the embeddings of all samples, take the loss and its gradient with
respect to them, then run each part once more to carry that gradient into the parameters. In JAX this is a loop over the
parts with a checkpointed body, and is exact: a contrastive loss over parts would be another loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


def in_parts(encode: Callable[[Any, Any], Any], params: Any, batch: Any) -> Any:
    """`encode(params, part)` of every part of the batch, as one array, so that memory holds one part's activations.

    Args:
        encode: (params, part) -> a tree of [R, ...], such as {"image": [R, D], "text": [R, D]}; a function of its
            arguments alone. Random keys belong into the batch, one per part, so that the second run draws the same.
        params: a tree; its gradient is summed over the parts in the parameters' own type, so let them be float32.
        batch: a tree of [A, R, ...], A parts of R samples; R may be sharded over an explicit mesh.

    Returns:
        the tree of [R·A, ...], of which sample (a, r) is row r·A + a, not a·R + r: so each device keeps the samples
        that it had. An array [A, R, ...] of the caller's that goes with them is brought into this order by
        `array.swapaxes(0, 1).reshape(R * A, ...)`.

    Raises:
        ValueError: `encode` returns something without an axis of samples.
    """

    def part(_: None, part: Any) -> tuple[None, Any]:
        return None, jax.checkpoint(encode)(params, part)

    def flat(array: jax.Array) -> jax.Array:  # [A, R, ...] -> [R·A, ...]
        if array.ndim < 2:
            raise ValueError("in_parts: encode must return arrays [R, ...], a row per sample; it returned a scalar")
        array = jnp.swapaxes(array, 0, 1)
        shape = (array.shape[0] * array.shape[1], *array.shape[2:])
        sharding = jax.typeof(array).sharding
        if not sharding.mesh.explicit_axes:
            return array.reshape(shape)
        rows, _, *rest = (*sharding.spec, None, None)[: max(2, len(sharding.spec))]
        return jax.lax.reshape(array, shape, out_sharding=NamedSharding(sharding.mesh, PartitionSpec(rows, *rest)))

    return jax.tree.map(flat, jax.lax.scan(part, None, batch)[1])
