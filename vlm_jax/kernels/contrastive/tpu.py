"""The pairs of a block of images and a block of texts on a TPU: the operations of `xla.py` as Pallas kernels.

The grid walks over tiles, row by row. A row's logsumexp and its images' gradients stay in VMEM until the row is done.
A column's logsumexp leaves once per row and is merged outside. The texts' gradients are one float32 array in HBM, to
which each tile adds its part by copies of its own, beside the products; they are kept transposed, so that nothing of
the size of a tile is transposed. `interpret` may be `pltpu.InterpretParams(detect_races=True)`.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vlm_jax.kernels import placement
from vlm_jax.kernels.contrastive.xla import NOTHING, softplus_and_sigmoid
from vlm_jax.kernels.placement import FAST_MEMORY
from vlm_jax.kernels.tiles import tile_size

_LANES = 128
_MEGABYTE = 2**20


def refusal(mesh: jax.sharding.AbstractMesh, features: int, dtype: jnp.dtype) -> str | None:
    """Why the kernels cannot serve `features` features of `dtype` on the TPUs of `mesh`, or None.

    Where no mesh tells the chip, they must fit into the smallest.
    """
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 and float32 features, not {dtype}"
    kind = placement.device_kind(mesh)
    needed, memory = _needed(_most(mesh, features, dtype), features, dtype, kind), _memory(kind)
    if needed <= memory:
        return None
    chip = kind or "a TPU v4, which it may be where no mesh is in use,"
    return (
        f"its tiles of {features} {dtype} features take {needed / _MEGABYTE:.0f} MB of VMEM, of which {chip} has "
        f"{memory // _MEGABYTE}"
    )


def _most(mesh: jax.sharding.AbstractMesh, features: int, dtype: jnp.dtype) -> int:
    """The most images, and texts, of a tile."""
    kind, device = placement.device_kind(mesh), placement.device_of(mesh)
    if _whole(features) <= 1024:
        tile = tile_size("contrastive.tpu.tile", device)
        if _needed(tile, features, dtype, kind) <= _memory(kind):
            return tile
    return tile_size("contrastive.tpu.wide_tile", device)


def _memory(device_kind: str | None) -> int:
    """Bytes of VMEM; of the smallest chip where none is known."""
    return FAST_MEMORY.get(device_kind or "TPU v4", 64) * _MEGABYTE


def _needed(tile: int, features: int, dtype: jnp.dtype, device_kind: str | None) -> int:
    """Bytes of VMEM that the gradients' kernel takes with tiles of `tile` x `tile`, by what libtpu's compiler reports.

    Per number of a tile's texts: three inputs, a row's gradients and the texts' part, each twice since one is on its
    way, and a product; in float32 the parts into which factors are split too, for which chips after v4 take more. And
    up to three arrays of all pairs of the tile.
    """
    per_number = 32 if dtype == jnp.bfloat16 else 52 if _memory(device_kind) == 16 * _MEGABYTE else 64
    return tile * (per_number * _whole(features) + 3 * 4 * tile)


def softmax_sums(
    image: jax.Array, text: jax.Array, scale: jax.Array, offset: jax.Array | int, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """As `xla.softmax_sums`."""
    call = _Call(image, text, scale, None, offset, interpret)
    column = (call.rows, 1), jnp.float32
    rows, columns = call.run(
        _sums_kernel,
        name="contrastive_softmax_sums",
        out_specs=[call.per_row, pl.BlockSpec((None, 1, call.columns), lambda i, j: (i, 0, j))],
        out_shape=[call.row_shape, (call.grid[0], 1, call.texts)],
        scratch=[pltpu.VMEM(*column), pltpu.VMEM(*column)],
        products=1,
        exponentials=2,
        semantics=("parallel", "arbitrary"),
    )
    return call.of_images(rows), jax.nn.logsumexp(columns[:, 0], axis=0)[: text.shape[0]]


def softmax_gradients(
    image: jax.Array,
    text: jax.Array,
    scale: jax.Array,
    offset: jax.Array | int,
    row_logsumexp: jax.Array,
    column_logsumexp: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """As `xla.softmax_gradients`."""
    call = _Call(image, text, scale, None, offset, interpret)
    totals = [
        _pad(row_logsumexp, 0, call.rows).reshape(call.row_shape),
        _pad(column_logsumexp, 0, call.columns).reshape(call.grid[1], 1, call.columns),
    ]
    per_column = pl.BlockSpec((None, 1, call.columns), lambda i, j: (j, 0, 0))
    return call.gradients("softmax", totals, [call.per_row, per_column])[0]


def sigmoid_gradients(
    image: jax.Array,
    text: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    offset: jax.Array | int,
    *,
    interpret: bool = False,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """As `xla.sigmoid_gradients`."""
    return _Call(image, text, scale, bias, offset, interpret).gradients("sigmoid", [], [])


def sigmoid_sums(
    image: jax.Array,
    text: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    offset: jax.Array | int,
    *,
    interpret: bool = False,
) -> jax.Array:
    """As `xla.sigmoid_sums`."""
    call = _Call(image, text, scale, bias, offset, interpret)
    (values,) = call.run(
        _values_kernel,
        name="contrastive_sigmoid_sums",
        out_specs=[call.per_row],
        out_shape=[call.row_shape],
        scratch=[pltpu.VMEM((call.rows, 1), jnp.float32)],
        products=1,
        exponentials=2,
        semantics=("parallel", "arbitrary"),
    )
    return call.of_images(values)


class _Call:
    """One call: its tiles, its padded arrays, and what all kernels are given."""

    def __init__(self, image, text, scale, bias, offset, interpret: bool):
        self.interpret = interpret
        self.counts = image.shape[0], text.shape[0]
        mesh = placement.mesh_of(image)
        most = _most(mesh, image.shape[1], image.dtype)
        self.rows, images = tile(image.shape[0], most)
        self.columns, self.texts = tile(text.shape[0], most)
        self.grid = images // self.rows, self.texts // self.columns
        self.image, self.text = (
            _pad(_pad(x, 1, _LANES), 0, size) for x, size in zip((image, text), (self.rows, self.columns), strict=True)
        )
        self.features, self.width = image.shape[1], _whole(image.shape[1])
        largest = max(self.rows, self.columns)
        self.memory = _needed(largest, self.features, image.dtype, placement.device_kind(mesh))
        numbers = jnp.stack([scale, jnp.zeros_like(scale) if bias is None else bias]).astype(jnp.float32)
        self.scalars = [jnp.reshape(jnp.asarray(offset, jnp.int32), (1,)), numbers]
        self.per_row = pl.BlockSpec((None, 1, self.rows), lambda i, j: (i, 0, 0))
        self.row_shape = (self.grid[0], 1, self.rows)

    def of_images(self, rows: jax.Array) -> jax.Array:
        """[row tiles, 1, rows] -> [n]."""
        return rows.reshape(-1)[: self.counts[0]]

    def gradients(self, loss: str, totals: list, specs: list):
        rows, columns, width = self.rows, self.columns, self.width
        sums = 2 if loss == "sigmoid" else 0
        d_image, d_text, *rest = self.run(
            functools.partial(_gradients_kernel, loss=loss),
            name=f"contrastive_{loss}_gradients",
            inputs=[self.image.T, *totals],
            in_specs=[pl.BlockSpec((width, rows), lambda i, j: (0, i)), *specs],
            out_specs=[pl.BlockSpec((rows, width), lambda i, j: (i, 0)), pl.BlockSpec(memory_space=pl.ANY)]
            + [self.per_row] * sums,
            out_shape=[(self.image.shape[0], width), (self.grid[1], width, columns)] + [self.row_shape] * sums,
            scratch=[pltpu.VMEM((rows, 1), jnp.float32)] * 2
            + [pltpu.VMEM((2, width, columns), jnp.float32), pltpu.SemaphoreType.DMA, pltpu.SemaphoreType.DMA((2,))],
            products=3,
            exponentials=2,
            semantics=("arbitrary", "arbitrary"),  # two cores would add to the same texts
        )
        d_text = d_text.swapaxes(1, 2).reshape(-1, width)
        d_image, d_text = d_image[: self.counts[0], : self.features], d_text[: self.counts[1], : self.features]
        return (d_image, d_text), tuple(self.of_images(x) for x in rest)

    def run(
        self, kernel, *, name, out_specs, out_shape, scratch, products, exponentials, semantics, inputs=(), in_specs=()
    ) -> list[jax.Array]:
        """Runs `kernel(offset, numbers, image, text, *inputs, *outputs, *scratch)` over the tiles."""
        pairs = self.image.shape[0] * self.texts
        vary = jax.typeof(self.image).manual_axis_type
        return pl.pallas_call(
            functools.partial(kernel, counts=self.counts),
            name=name,
            grid=self.grid,
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.SMEM),
                pl.BlockSpec(memory_space=pltpu.SMEM),
                pl.BlockSpec((self.rows, self.width), lambda i, j: (i, 0)),
                pl.BlockSpec((self.columns, self.width), lambda i, j: (j, 0)),
                *in_specs,
            ],
            out_specs=out_specs,
            out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=vary) for shape in out_shape],
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=semantics, vmem_limit_bytes=max(16 * _MEGABYTE, self.memory)
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * products * pairs * self.width,
                transcendentals=exponentials * pairs,
                bytes_accessed=self.grid[0] * self.texts * self.width * self.image.dtype.itemsize,
            ),
            interpret=self.interpret,
        )(*self.scalars, self.image, self.text, *inputs)


# -------------------------------------------------------------------------------------------------------------- kernels


def _logits(offset, numbers, image, text, counts):
    """A tile, [rows, columns] in float32; `NOTHING` for partners and beyond the ends."""
    rows, columns = image.shape[0], text.shape[0]
    logits = numbers[0] * _dot(image[...], text[...], 1) + numbers[1]
    row = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    first_row, first_column = pl.program_id(0) * rows, pl.program_id(1) * columns
    out = column - row == offset[0] + first_row - first_column
    if counts[0] % rows:
        out |= row >= counts[0] - first_row
    if counts[1] % columns:
        out |= column >= counts[1] - first_column
    return jnp.where(out, NOTHING, logits)


def _sums_kernel(offset, numbers, image, text, row_out, column_out, top, total, *, counts):
    @pl.when(pl.program_id(1) == 0)
    def _():
        top[...] = jnp.full_like(top, NOTHING)
        total[...] = jnp.zeros_like(total)

    logits = _logits(offset, numbers, image, text, counts)
    old = top[...]
    new = jnp.maximum(old, logits.max(1, keepdims=True))
    total[...] = total[...] * jnp.exp(old - new) + jnp.exp(logits - new).sum(1, keepdims=True)
    top[...] = new
    down = logits.max(0, keepdims=True)
    column_out[...] = down + jnp.log(jnp.exp(logits - down).sum(0, keepdims=True))

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        row_out[...] = _as_row(top[...] + jnp.log(total[...]))


def _values_kernel(offset, numbers, image, text, out, total, *, counts):
    @pl.when(pl.program_id(1) == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    logits = _logits(offset, numbers, image, text, counts)
    total[...] += softplus_and_sigmoid(logits)[0].sum(1, keepdims=True)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        out[...] = _as_row(total[...])


def _gradients_kernel(offset, numbers, image, text, turned, *refs, counts, loss):
    """`turned` is the images' tile transposed, [D, rows]; `first` and `second` are columns [rows, 1]: the softmax's
    logsumexp (and nothing), or the sigmoid's sums of values and slopes."""
    *refs, first, second, part, arrived, gone = refs
    if loss == "softmax":
        row_total, column_total, d_image, d_text = refs
    else:
        d_image, d_text, value_out, slope_out = refs
    i, j = pl.program_id(0), pl.program_id(1)
    columns = pl.num_programs(1)
    step = i * columns + j
    slot = step % 2

    def to_text(slot, j):
        return pltpu.make_async_copy(part.at[slot], d_text.at[j], gone.at[slot])

    # The copy that last left this slot must be through. With two columns of tiles or more, so are then all earlier ones
    # to the same texts; with one, the step before wrote them, from the other slot.
    behind = jnp.where(columns == 1, 1, 2)

    @pl.when(step >= behind)
    def _():
        to_text((step - behind) % 2, j).wait()

    from_text = pltpu.make_async_copy(d_text.at[j], part.at[slot], arrived)

    @pl.when(i > 0)
    def _():
        from_text.start()

    @pl.when(j == 0)
    def _():
        d_image[...] = jnp.zeros_like(d_image)
        if loss == "softmax":
            first[...] = _as_column(row_total[...])
        else:
            first[...] = jnp.zeros_like(first)
            second[...] = jnp.zeros_like(second)

    logits = _logits(offset, numbers, image, text, counts)
    if loss == "softmax":
        slopes = jnp.exp(logits - first[...]) + jnp.exp(logits - column_total[...])
    else:
        values, slopes = softplus_and_sigmoid(logits)
        first[...] += values.sum(1, keepdims=True)
        second[...] += slopes.sum(1, keepdims=True)
    slopes = slopes.astype(text.dtype)
    d_image[...] += _dot(slopes, text[...], 0)
    product = _dot(turned[...], slopes, 0)

    @pl.when(i == 0)
    def _():
        part[slot] = product

    @pl.when(i > 0)
    def _():
        from_text.wait()
        part[slot] += product

    to_text(slot, j).start()
    last = j == columns - 1

    if loss == "sigmoid":

        @pl.when(last)
        def _():
            value_out[...] = _as_row(first[...])
            slope_out[...] = _as_row(second[...])

    @pl.when(last & (i == pl.num_programs(0) - 1))
    def _():
        to_text(slot, j).wait()

        @pl.when((step >= 1) & (columns > 1))
        def _():
            to_text(1 - slot, j).wait()


def _dot(a, b, contracted: int):
    """a [m, k] times b [n, k] (contracted 1) or b [k, n] (0), in float32; float32 factors are not rounded."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((1,), (contracted,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _as_row(column):
    """[rows, 1] -> [1, rows]."""
    return jnp.broadcast_to(column, (column.shape[0], _LANES)).T[:1]


def _as_column(row):
    return jnp.broadcast_to(row, (_LANES, row.shape[1])).T[:, :1]


def tile(length: int, most: int) -> tuple[int, int]:
    """The tile and the padded length: the fewest equal tiles of at most `most`, in whole lanes."""
    tiles = math.ceil(length / most)
    size = _whole(math.ceil(length / tiles))
    return size, size * tiles


def _whole(length: int) -> int:
    return math.ceil(length / _LANES) * _LANES


def _pad(array, axis: int, multiple: int):
    pads = [(0, 0)] * array.ndim
    pads[axis] = (0, -array.shape[axis] % multiple)
    return jnp.pad(array, pads) if pads[axis][1] else array
