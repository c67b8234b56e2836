"""Both losses with gradients of their own, from blocks of pairs: on one device, gathered, or around a ring.

Every device has n images and their n texts, and is responsible for the pairs of its images with all texts. Partners
(image i, text i) are treated here, apart from the negatives, so that a small loss is no difference of large numbers:
with the logit p of the partners and the logsumexp q of the negatives, -log softmax = softplus(q - p).

softmax: one pass makes both logsumexps, the backward pass makes the logits again: 8 N² D operations over all devices.
sigmoid: the gradient does not wait for the other pairs, so one pass makes all: 6 N² D. Kept in between is O(N D).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.kernels.contrastive import gpu, tpu, xla


@dataclasses.dataclass(frozen=True)
class Plan:
    """What of a call is known before it is traced.

    `blocks` is "xla", "pallas" (the TPU's), "pallas_interpret", "pallas_gpu", or "auto": the TPU's where the program is
    lowered for one. `device` sizes the tiles of "xla". `ring`: the texts travel; else they are gathered.
    """

    blocks: str
    device: str
    axis_name: str | tuple[str, ...] | None
    ring: bool

    @property
    def devices(self) -> int:
        return 1 if self.axis_name is None else jax.lax.axis_size(self.axis_name)

    def call(self, name: str, image: jax.Array, text: jax.Array, *rest: jax.Array | int) -> Any:
        """The operation `name` of `xla.py`, `tpu.py` or `gpu.py` on a block of images and a block of texts."""
        tiles = xla.choose_tiles(image.shape[0], text.shape[0], self.device)
        in_xla = functools.partial(getattr(xla, name), tiles=tiles)
        if self.blocks == "xla":
            return in_xla(image, text, *rest)
        if self.blocks == "pallas_gpu":
            return getattr(gpu, name)(image, text, *rest)
        in_pallas = functools.partial(getattr(tpu, name), interpret=self.blocks == "pallas_interpret")
        if self.blocks == "auto":
            return jax.lax.platform_dependent(image, text, *rest, tpu=in_pallas, default=in_xla)
        return in_pallas(image, text, *rest)


# --------------------------------------------------------------------------------------------------------------- losses


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def softmax_loss(plan: Plan, image: jax.Array, text: jax.Array, scale: jax.Array) -> jax.Array:
    """This device's part of the softmax loss: the parts sum up to it. Local image and text [n, D], scale float32.

    The gradients are those of the sum over the devices (the cotangent is the same on each); that of `scale` is a part.
    """
    return _softmax_forward(plan, image, text, scale)[0]


def _softmax_forward(plan: Plan, image, text, scale):
    def sums(block, offset):
        return plan.call("softmax_sums", image, block, scale, offset)

    rows, columns = _visit(plan, text, sums, jnp.logaddexp)
    partner = scale * _partners(image, text)
    losses = jax.nn.softplus(rows - partner) + jax.nn.softplus(columns - partner)
    return losses.sum() / (2 * len(image) * plan.devices), (image, text, scale, partner, rows, columns)


def _softmax_backward(plan: Plan, residuals, factor):
    image, text, scale, partner, rows, columns = residuals

    def gradients(block, offset):
        text, column_total = block
        return plan.call("softmax_gradients", image, text, scale, offset, row_total, column_total)

    row_total, column_total = jnp.logaddexp(rows, partner), jnp.logaddexp(columns, partner)
    d_image, d_text = _visit(plan, (text, column_total), gradients, jnp.add)
    slope = -(jax.nn.sigmoid(rows - partner) + jax.nn.sigmoid(columns - partner))
    factor = factor / (2 * len(image) * plan.devices)
    return _finish(image, text, scale, d_image, d_text, slope, factor)


softmax_loss.defvjp(_softmax_forward, _softmax_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sigmoid_loss(plan: Plan, image: jax.Array, text: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """As `softmax_loss`, of the sigmoid loss; bias float32."""

    def sums(block, offset):
        return plan.call("sigmoid_sums", image, block, scale, bias, offset), ()

    values, _ = _visit(plan, text, sums, jnp.add)
    partner = scale * _partners(image, text) + bias
    return (values + jax.nn.softplus(-partner)).sum() / (len(image) * plan.devices)


def _sigmoid_forward(plan: Plan, image, text, scale, bias):
    def gradients(block, offset):
        (d_image, d_text), sums = plan.call("sigmoid_gradients", image, block, scale, bias, offset)
        return (d_image, *sums), d_text

    (d_image, values, slopes), d_text = _visit(plan, text, gradients, jnp.add)
    partner = scale * _partners(image, text) + bias
    slope = -jax.nn.sigmoid(-partner)
    count = len(image) * plan.devices
    d_image, d_text, d_scale = _finish(image, text, scale, d_image, d_text, slope, 1 / count)
    d_bias = (slopes + slope).sum() / count
    return (values + jax.nn.softplus(-partner)).sum() / count, (d_image, d_text, d_scale, d_bias)


def _sigmoid_backward(plan: Plan, gradients, factor):
    return tuple((factor * gradient).astype(gradient.dtype) for gradient in gradients)


sigmoid_loss.defvjp(_sigmoid_forward, _sigmoid_backward)


def _finish(image, text, scale, d_image, d_text, slope, factor):
    """Adds the partners, whose slopes are [n], to the products of the negatives; all gradients times `factor`."""
    d_image = d_image + slope[:, None] * text
    d_text = d_text + slope[:, None] * image
    d_scale = factor * (image * d_image).sum()
    return (factor * scale * d_image).astype(image.dtype), (factor * scale * d_text).astype(text.dtype), d_scale


def _partners(image, text):
    dtype = jnp.promote_types(image.dtype, jnp.float32)
    return (image.astype(dtype) * text.astype(dtype)).sum(1)


# -------------------------------------------------------------------------------------------------------------- devices


def _visit(plan: Plan, block, compute: Callable, merge: Callable):
    """What `compute(block, offset)` gives over the blocks of all devices, merged by jnp.add or jnp.logaddexp.

    `block` is this device's: a tree of [n, ..]. `compute` returns two trees: one of this device's images, merged here,
    and one of the block's texts, merged on the way and returned to the device that the block came from.
    """
    if plan.axis_name is None:
        return compute(block, 0)
    return (_ring if plan.ring else _gathered)(plan, block, compute, merge)


def _gathered(plan: Plan, block, compute: Callable, merge: Callable):
    axis = plan.axis_name
    count = jax.tree.leaves(block)[0].shape[0]
    first = jax.lax.axis_index(axis) * count
    whole = jax.tree.map(lambda x: jax.lax.all_gather(x, axis, tiled=True), block)
    own, back = compute(whole, first)

    def home(array):
        if merge is jnp.add:
            return jax.lax.psum_scatter(array, axis, tiled=True)
        top = jax.lax.pmax(array, axis)
        total = jax.lax.psum_scatter(jnp.exp(array - top), axis, tiled=True)
        return jax.lax.dynamic_slice_in_dim(top, first, count) + jnp.log(total)

    return own, jax.tree.map(home, back)


def _ring(plan: Plan, block, compute: Callable, merge: Callable):
    """The blocks go round both ways, half of the ring each; what is made of their texts follows one step behind.

    So both transfers of a step, the block's to the next device and the results' to this one, run beside its products.
    """
    size = plan.devices
    nobody = jax.tree.leaves(block)[0].shape[0]  # an offset at which no text of a block is a partner

    def send(tree, steps):
        to = [(device, (device + steps) % size) for device in range(size)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, plan.axis_name, to), tree)

    def merged(a, b):
        return jax.tree.map(merge, a, b)

    def hop(own, block, back, way):
        back = send(back, way)
        part, of_texts = compute(block, nobody)
        return merged(own, part), merged(back, of_texts)

    def step(_, carry):
        own, rounds = carry
        after = []
        for way, (block, back) in zip((1, -1), rounds, strict=True):
            ahead = send(block, way)
            own, back = hop(own, block, back, way)
            after.append((ahead, back))
        return own, tuple(after)

    if size == 1:
        return compute(block, 0)
    ahead = send(block, 1), send(block, -1)
    own, home = compute(block, 0)
    start = 0 if merge is jnp.add else xla.NOTHING
    none = jax.tree.map(lambda x: jnp.full_like(x, start), home)
    steps = (size - 1) // 2
    own, rounds = jax.lax.fori_loop(0, steps, step, (own, tuple((block, none) for block in ahead)))
    (block, right), (_, left) = rounds
    if size % 2 == 0:
        own, right = hop(own, block, right, 1)
    home = merged(home, send(right, -(size // 2)))
    return own, merged(home, send(left, steps)) if steps else home
