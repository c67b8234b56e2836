"""`linear_cross_entropy`: checks a call, and places it on the mesh of its arguments."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from vlm_jax.errors import UsageError
from vlm_jax.kernels import placement
from vlm_jax.kernels.cross_entropy import reference, xla
from vlm_jax.kernels.cross_entropy.reference import Settings
from vlm_jax.kernels.placement import partition


def linear_cross_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    weights: jax.Array | None = None,
    *,
    bias: jax.Array | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of cross-entropies of softmax(softcap(hidden · kernel + bias)), without an array of all logits.

    loss = logsumexp - (1 - label_smoothing) * target - label_smoothing * mean(logits) + z_loss * logsumexp², and
    total = Σ weight * loss over the tokens whose label is not -100.

    Outside `jax.shard_map` the call follows the explicit sharding of its arguments: T as hidden has it, V as the kernel
    has it (over axes that T does not use; a sharded D is gathered). Do not put it under `jax.checkpoint`: the forward
    pass makes the gradients and keeps [T, D] and float32 [D, V], no logits.

    Args:
        hidden: [T, D].
        kernel: [D, V]. Products are of hidden's type, to which the kernel is rounded; all sums are float32.
        labels: int32 [T] in 0 .. V - 1, or -100: loss and gradient 0, and no work. Others are not checked.
        weights: [T], default 1. They scale `total`; no gradient flows to them.
        bias: [V].
        softcap: softcap * tanh(logits / softcap) replaces the logits; above 0.
        z_loss: factor of logsumexp².
        label_smoothing: share of the target that is spread evenly over the vocabulary, in [0, 1).
        axis_name: inside shard_map (with its check_vma, which is the default), the axis over which V is sharded:
            kernel [D, V / n] and bias [V / n] are local, everything else is the same on each of its devices. `total` is
            then the same on each, and the gradient of `hidden` is summed over the axis.
        implementation: "reference" (the definition, with float32 [T, V]), "xla" (in chunks), or None: "xla".

    Returns:
        total: float32 scalar, differentiable in hidden, kernel and bias; not normalised.
        per_token: float32 [T], the loss without its weight; carries no gradient.

    Raises:
        ValueError: shapes, types or options that do not fit.
        UsageError: an implementation that is unknown or not there; arrays that do not vary over `axis_name` as said.
    """
    hidden, kernel, labels = jnp.asarray(hidden), jnp.asarray(kernel), jnp.asarray(labels)
    bias = None if bias is None else jnp.asarray(bias)
    _check(hidden, kernel, labels, weights, bias)
    _check_options(softcap, label_smoothing)
    placement.check_implementation(implementation)
    if implementation in ("pallas", "pallas_interpret"):
        raise UsageError(
            f"linear_cross_entropy has no Pallas kernel ({implementation!r}); use implementation='xla' or None"
        )
    settings = Settings(
        softcap=None if softcap is None else float(softcap),
        z_loss=float(z_loss),
        label_smoothing=float(label_smoothing),
        axis_name=axis_name,
    )
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    weights = jnp.ones_like(labels, dtype) if weights is None else jnp.asarray(weights).astype(dtype)
    weights = jax.lax.stop_gradient(weights)
    if axis_name is not None:
        _check_varying(hidden, kernel, labels, weights, bias, axis_name)
    mesh = placement.mesh_of(hidden, kernel, labels)
    call = _wrapped if mesh.explicit_axes else _local
    total, per_token = call(mesh, settings, implementation, hidden, kernel, bias, labels, weights)
    return total, jax.lax.stop_gradient(per_token)


def _local(mesh, settings: Settings, implementation, hidden, kernel, bias, labels, weights):
    """One device's part."""
    if implementation == "reference":
        return reference.linear_cross_entropy(hidden, kernel, bias, labels, weights, settings=settings)
    device = placement.device_of(mesh)
    return xla.linear_cross_entropy(hidden, kernel, bias, labels, weights, settings=settings, device=device)


def _wrapped(mesh, settings: Settings, implementation, hidden, kernel, bias, labels, weights):
    """The call under shard_map, over the explicit axes of the arguments' mesh."""
    (token_axes, features), (_, entry_axes) = placement.spec_of(hidden), placement.spec_of(kernel)
    if features:
        raise ValueError(f"linear_cross_entropy: hidden's feature axis is sharded over {features}; reshard it to None")
    entry_axes = tuple(name for name in entry_axes if name not in token_axes)
    if entry_axes:
        if settings.axis_name is not None:
            raise ValueError(f"linear_cross_entropy: V is sharded over {entry_axes} already; leave axis_name out")
        settings = dataclasses.replace(settings, axis_name=entry_axes)

    def body(*arrays):
        total, per_token = _local(mesh, settings, implementation, *arrays)
        return jax.lax.psum(total, token_axes) if token_axes else total, per_token

    by_token, by_entry = partition(token_axes), partition(entry_axes)
    specs = (partition(token_axes, ()), partition((), entry_axes), by_entry, by_token, by_token)
    arrays = (hidden, kernel, bias, labels, weights)
    arrays = tuple(
        None if x is None else jax.reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)
    )
    specs = tuple(None if x is None else spec for x, spec in zip(arrays, specs, strict=True))
    call = jax.shard_map(
        body, mesh=mesh, in_specs=specs, out_specs=(partition(), by_token), axis_names=set(mesh.explicit_axes)
    )
    return call(*arrays)


def _check(hidden, kernel, labels, weights, bias) -> None:
    if hidden.ndim != 2 or kernel.ndim != 2 or hidden.shape[1] != kernel.shape[0]:
        raise ValueError(
            f"linear_cross_entropy: expected hidden [T, D] and kernel [D, V], found {hidden.shape} and {kernel.shape}"
        )
    if not (hidden.shape[0] and kernel.shape[1]):
        raise ValueError(
            f"linear_cross_entropy: expected at least one token and one entry, found hidden {hidden.shape} and kernel "
            f"{kernel.shape}"
        )
    for name, array in (("hidden", hidden), ("kernel", kernel)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"linear_cross_entropy: expected a floating-point {name}, found {array.dtype}")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"linear_cross_entropy: labels must be integers, found {labels.dtype}")
    tokens, entries = hidden.shape[0], kernel.shape[1]
    for name, array, length in (("labels", labels, tokens), ("weights", weights, tokens), ("bias", bias, entries)):
        if array is not None and jnp.shape(array) != (length,):
            raise ValueError(f"linear_cross_entropy: expected {name} [{length}], found {jnp.shape(array)}")


def _check_options(softcap: float | None, label_smoothing: float) -> None:
    if softcap is not None and not softcap > 0:
        raise ValueError(f"linear_cross_entropy: softcap must be above 0 (or None), found {softcap}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"linear_cross_entropy: label_smoothing must be in [0, 1), found {label_smoothing}")


def _check_varying(hidden, kernel, labels, weights, bias, axis_name) -> None:
    """Raises unless V, and nothing else, is sharded over `axis_name`."""
    names = {axis_name} if isinstance(axis_name, str) else set(axis_name)
    if not names <= set(jax.sharding.get_abstract_mesh().manual_axes):
        raise UsageError(
            f"linear_cross_entropy: axis_name={axis_name!r} is for the inside of a jax.shard_map over it; outside, "
            "shard the kernel over an explicit mesh axis, and leave axis_name out"
        )
    for name, array in (("kernel", kernel), ("bias", bias)):
        if array is not None and not names <= placement.varying_axes(array):
            raise UsageError(
                f"linear_cross_entropy: {name} does not vary over axis_name={axis_name!r}: give each device its own "
                "entries of V, and leave shard_map's check_vma on (without it gradients cannot be told apart)"
            )
    for name, array in (("hidden", hidden), ("labels", labels), ("weights", weights)):
        if array is not None and names & placement.varying_axes(array):
            raise UsageError(
                f"linear_cross_entropy: {name} varies over axis_name={axis_name!r}, over which V is sharded: give all "
                "its devices the same tokens"
            )
