"""`softmax_contrastive_loss` and `sigmoid_contrastive_loss`: check a call, choose its implementation, place it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from vlm_jax.errors import UsageError
from vlm_jax.kernels import placement
from vlm_jax.kernels.contrastive import gpu, loss, reference, tpu
from vlm_jax.kernels.contrastive.loss import Plan
from vlm_jax.kernels.placement import partition

# Texts of all devices that are gathered rather than sent around: bytes of their features in the given type.
GATHER_BYTES = 2**28


def softmax_contrastive_loss(
    image: jax.Array,
    text: jax.Array,
    scale: jax.Array | float,
    *,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """CLIP's loss without an array of all pairs: the mean of the cross-entropies of image to text and text to image.

    The logits are scale * image · textᵀ. Outside `jax.shard_map` the call follows the explicit sharding of its
    arguments: N as image has it (or text, where image is replicated); every device works on its images' pairs.

    Args:
        image: [N, D], usually of length 1 (it is not normalised here).
        text: [N, D]; row i belongs to row i of `image`.
        scale: scalar, already exponentiated.
        axis_name: inside shard_map (with its check_vma, which is the default), the mesh axis (or axes) over which N is
            sharded: image and text are this device's [n, D]. The value is the loss of all pairs, the same on every
            device; gradients are those of it, that of the scale summed already. Texts are gathered up to
            `GATHER_BYTES`; beyond, they go around a ring.
        implementation: "reference" (the definition, [N, N] in float32), "xla" (in tiles, anywhere), "pallas" (TPU; or
            Hopper GPU, bfloat16 features), "pallas_interpret" (the TPU's on a CPU, slowly), or None: "pallas" where the
            call is lowered for one of these, else "xla". The platform is that of the mesh, if there is one; a GPU is
            known by its mesh alone, so without one "xla" serves there.

    Returns:
        float32 scalar, differentiable in image, text and scale (once); all sums are float32, products are of
        image's and text's common type.

    Raises:
        ValueError: shapes that do not fit.
        UsageError: an implementation that is unknown, or cannot serve the call; features that do not vary over
            `axis_name`.
    """
    return _call("softmax", image, text, (scale,), axis_name, implementation)


def sigmoid_contrastive_loss(
    image: jax.Array,
    text: jax.Array,
    scale: jax.Array | float,
    bias: jax.Array | float,
    *,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """SigLIP's loss without an array of all pairs: Σ softplus(∓ logit) over the N x N pairs, divided by N.

    The logits are scale * image · textᵀ + bias (scalars); partners count with -, all other pairs with +. Everything
    else as `softmax_contrastive_loss`. Asked for its gradient, the forward pass makes it and keeps it, O(N D).
    """
    return _call("sigmoid", image, text, (scale, bias), axis_name, implementation)


def _call(kind: str, image, text, scalars, axis_name, implementation: str | None) -> jax.Array:
    image, text = jnp.asarray(image), jnp.asarray(text)
    kinds = jnp.promote_types(image.dtype, text.dtype)
    dtype = jnp.promote_types(kinds, jnp.float32)
    image, text = image.astype(kinds), text.astype(kinds)
    scalars = tuple(None if x is None else jnp.asarray(x, dtype) for x in scalars)
    _check(kind, image, text, scalars)
    mesh = placement.mesh_of(image, text)
    choice = _choose(kind, mesh, image, implementation)
    if mesh.explicit_axes:
        return _wrapped(kind, mesh, image, text, scalars, axis_name, choice)
    return _local(kind, mesh, image, text, scalars, axis_name, choice)


def _choose(kind: str, mesh, image, implementation: str | None) -> str:
    """As `placement.choose`."""
    if mesh.auto_axes and mesh.size > 1:
        of_tpu = of_gpu = "the compiler does not partition it: use explicit mesh axes, or shard_map"
    else:
        of_tpu = tpu.refusal(mesh, image.shape[1], image.dtype)
        of_gpu = gpu.refusal(mesh, image.dtype)
    return placement.choose(f"{kind}_contrastive_loss", mesh, {"tpu": of_tpu, "gpu": of_gpu}, implementation)


def _local(kind: str, mesh, image, text, scalars, axis_name, choice: str) -> jax.Array:
    """The call within a shard_map of the caller's, or on one device."""
    if axis_name is not None:
        _check_varying(kind, image, text, axis_name, choice)
    return _part(kind, mesh, image, text, scalars, axis_name, choice)


def _part(kind: str, mesh, image, text, scalars, axis_name, choice: str) -> jax.Array:
    """This device's part of the loss, summed over the devices."""
    zero = placement.zero_like((image, text, *scalars))
    image, text, *scalars = (placement.vary_like(x, zero) for x in (image, text, *scalars))
    if choice == "reference":
        definition = getattr(reference, f"{kind}_contrastive_loss")
        if axis_name is None:
            return definition(image, text, *scalars)
        image, text = (jax.lax.all_gather(x, axis_name, tiled=True) for x in (image, text))
        return jax.lax.pmean(definition(image, text, *scalars), axis_name)
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    plan = Plan(
        blocks="pallas_gpu" if choice == "pallas" and placement.platform_of(mesh) == "gpu" else choice,
        device=placement.device_of(mesh),
        axis_name=axis_name,
        ring=devices * text.size * text.dtype.itemsize > GATHER_BYTES,
    )
    part = _compiled(getattr(loss, f"{kind}_loss"), plan, image, text, *scalars)
    return part if axis_name is None else jax.lax.psum(part, axis_name)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(function, plan: Plan, *arrays):
    """One trace, and none for a repeated eager call."""
    return function(plan, *arrays)


def _wrapped(kind: str, mesh, image, text, scalars, axis_name, choice: str) -> jax.Array:
    """The call under shard_map, over the explicit axes of the arguments' mesh."""
    (rows, width), (text_rows, text_width) = placement.spec_of(image), placement.spec_of(text)
    if width or text_width:
        found = width or text_width
        raise ValueError(f"{kind}_contrastive_loss: the feature axis is sharded over {found}; reshard it to None")
    rows = rows or text_rows
    if rows and axis_name is not None:
        raise ValueError(f"{kind}_contrastive_loss: N is sharded over {rows} already; leave axis_name out")

    def body(image, text, *scalars):
        if rows:
            return _part(kind, mesh, image, text, scalars, rows, choice)
        return _local(kind, mesh, image, text, scalars, axis_name, choice)

    features, scalar = partition(rows, ()), partition()
    specs = (features, features, *(scalar for _ in scalars))
    arrays = (image, text, *scalars)
    arrays = [jax.reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
    call = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=specs,
        out_specs=scalar,
        axis_names=set(mesh.explicit_axes),
        check_vma=choice != "pallas_interpret",  # the interpreter does not know what varies
    )
    return call(*arrays)


def _check_varying(kind: str, image, text, axis_name, choice: str) -> None:
    names = {axis_name} if isinstance(axis_name, str) else set(axis_name)
    if not names <= placement.varying_axes(image) & placement.varying_axes(text):
        raise UsageError(
            f"{kind}_contrastive_loss: image and text do not vary over axis_name={axis_name!r}: give each device "
            "its own rows, and leave shard_map's check_vma on (without it gradients cannot be told apart)"
        )
    if choice == "pallas_interpret":
        raise UsageError(
            f"{kind}_contrastive_loss: the interpreter does not know what varies in shard_map; give 'pallas_interpret' "
            "arrays that are sharded over explicit mesh axes instead"
        )


def _check(kind: str, image, text, scalars) -> None:
    if image.ndim != 2 or image.shape != text.shape or not image.shape[0]:
        raise ValueError(
            f"{kind}_contrastive_loss: expected image and text [N, D] of one shape, found {image.shape} and "
            f"{text.shape}"
        )
    if not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(f"{kind}_contrastive_loss: expected floating-point features, found {image.dtype}")
    for name, value in zip(("scale", "bias"), scalars, strict=False):
        if value is None or value.shape:
            found = None if value is None else value.shape
            raise ValueError(f"{kind}_contrastive_loss: {name} must be a scalar, found {found}")
