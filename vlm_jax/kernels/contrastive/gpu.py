"""The pairs of a block of images and a block of texts on a Hopper GPU: the operations of `xla.py`, their logits in
Pallas kernels for Mosaic GPU.

The pairs are cut into panels, of 4,096 x 8,192 unless `tiles.py` says otherwise, and a panel into tiles of 128 x 256.
A kernel multiplies the images and texts of a tile, and of the logits only this leaves the chip: per row and column of
the tile a logsumexp or a sum, which XLA merges in a fixed order; for gradients also the slopes, in bfloat16, 67 MB at a
time, which XLA's own products (cuBLAS) multiply with the texts and the images. So no logit is made twice in a pass, and
no sum depends on which tile was first. A gradient summed on the chip would not fit there: 128 rows of 768 float32
numbers are 393 KB, an SM has 262 KB of registers.

A block of threads stays on its SM and takes one tile after another. One of its three warpgroups loads parts of 64
features into four slots of shared memory; the other two multiply (wgmma), 128 columns each, in 128 registers per
thread. `interpret` is None, or jax's parameters of Mosaic GPU's interpreter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from vlm_jax.kernels import placement
from vlm_jax.kernels.contrastive.xla import NOTHING, cut_into, loop
from vlm_jax.kernels.tiles import tile_size

ROWS, COLUMNS = 128, 256  # of a tile
SMS = 132  # of an H100 or H200, where no mesh says it
_DEPTH, _SLOTS = 64, 4  # of a part of the features; 48 KB each
_CHUNK = 64  # columns whose logits a warpgroup treats at a time: 64 registers per thread


def refusal(mesh: jax.sharding.AbstractMesh, dtype: jnp.dtype) -> str | None:
    """Why the kernels cannot serve features of `dtype` on the GPUs of `mesh`, or None."""
    kind = placement.device_kind(mesh)
    if placement.compute_capability(kind) != 9.0:
        return f"it is written for Hopper GPUs (H100, H200), not {kind}"
    if dtype != jnp.bfloat16:
        return f"it takes bfloat16 features, not {dtype} (the GPU's matrix units would round float32)"
    return None


def softmax_sums(
    image: jax.Array, text: jax.Array, scale: jax.Array, offset: jax.Array | int, *, interpret: Any = None
) -> tuple[jax.Array, jax.Array]:
    """As `xla.softmax_sums`."""
    call = _Call(image, text, scale, None, offset, interpret)

    def row(i, carry):
        def column(j, carry):
            rows, columns = carry
            of_rows, of_columns = call.panel("softmax_sums", i, j)
            rows = jnp.logaddexp(rows, jax.nn.logsumexp(of_rows, axis=0))
            merged = jnp.logaddexp(columns[j], jax.nn.logsumexp(of_columns, axis=0))
            return rows, columns.at[j].set(merged)

        out, columns = carry
        rows, columns = loop(call.shape[1], column, (call.full(NOTHING, call.rows), columns))
        return out.at[i].set(rows), columns

    init = call.full(0, call.shape[0], call.rows), call.full(NOTHING, call.shape[1], call.columns)
    rows, columns = loop(call.shape[0], row, init)
    return rows.reshape(-1)[: call.counts[0]], columns.reshape(-1)[: call.counts[1]]


def softmax_gradients(
    image: jax.Array,
    text: jax.Array,
    scale: jax.Array,
    offset: jax.Array | int,
    row_logsumexp: jax.Array,
    column_logsumexp: jax.Array,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """As `xla.softmax_gradients`."""
    call = _Call(image, text, scale, None, offset, interpret)
    rows, columns = (
        cut_into(row_logsumexp, call.shape[0], call.rows),
        cut_into(column_logsumexp, call.shape[1], call.columns),
    )
    return call.gradients("softmax_slopes", 0, lambda i, j: (rows[i], columns[j]))[0]


def sigmoid_gradients(
    image: jax.Array,
    text: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    offset: jax.Array | int,
    *,
    interpret: Any = None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """As `xla.sigmoid_gradients`."""
    return _Call(image, text, scale, bias, offset, interpret).gradients("sigmoid_slopes", 2, lambda i, j: ())


def sigmoid_sums(
    image: jax.Array,
    text: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    offset: jax.Array | int,
    *,
    interpret: Any = None,
) -> jax.Array:
    """As `xla.sigmoid_sums`."""
    call = _Call(image, text, scale, bias, offset, interpret)

    def row(i, out):
        def column(j, total):
            return total + call.panel("sigmoid_sums", i, j)[0].sum(0)

        return out.at[i].set(loop(call.shape[1], column, call.full(0, call.rows)))

    return loop(call.shape[0], row, call.full(0, call.shape[0], call.rows)).reshape(-1)[: call.counts[0]]


class _Call:
    """One call's arrays, cut into panels: panel (i, j) pairs images i * rows .. with texts j * columns .."""

    def __init__(self, image, text, scale, bias, offset, interpret):
        self.counts, self.features = (image.shape[0], text.shape[0]), image.shape[1]
        mesh = placement.mesh_of(image)
        device = placement.device_of(mesh)
        self.rows = _even(self.counts[0], tile_size("contrastive.gpu.panel_rows", device), ROWS)
        self.columns = _even(self.counts[1], tile_size("contrastive.gpu.panel_columns", device), COLUMNS)
        self.shape = math.ceil(self.counts[0] / self.rows), math.ceil(self.counts[1] / self.columns)
        wide = ((0, 0), (0, -self.features % _DEPTH))
        self.images = cut_into(jnp.pad(image, wide), self.shape[0], self.rows)
        self.texts = cut_into(jnp.pad(text, wide), self.shape[1], self.columns)
        self.turned = self.texts.mT  # [.., D, columns]
        self.numbers = jnp.stack([scale, jnp.zeros_like(scale) if bias is None else bias]).astype(jnp.float32)
        self.offset = jnp.asarray(offset, jnp.int32)
        self.blocks = getattr(mesh.abstract_device, "num_cores", None) or SMS
        self.interpret = interpret

    def full(self, value: float, *shape: int) -> jax.Array:
        """A start for a loop; it varies over the mesh as the images do."""
        return jnp.full_like(self.images, value, dtype=jnp.float32, shape=shape)

    def panel(self, kind: str, i, j, *totals: jax.Array) -> list[jax.Array]:
        """What the kernel `kind` (of `_ENDS`) gives for panel (i, j)."""
        row, column = i * self.rows, j * self.columns
        places = [i, j, self.offset + row - column, self.counts[0] - row, self.counts[1] - column]
        places = jnp.stack([jnp.asarray(x, jnp.int32) for x in places])
        kernel = _kernel(kind, self.images, self.turned, self.blocks, self.interpret)
        return kernel(places, self.numbers, self.images, self.turned, *totals)

    def gradients(self, kind: str, sums: int, totals: Callable):
        """((slope · text [n, D], slopeᵀ · image [m, D]), `sums` sums per image [n])."""

        def row(i, carry):
            image = self.images[i]

            def column(j, carry):
                d_row, d_texts, outs = carry
                slopes, *found = self.panel(kind, i, j, *totals(i, j))
                d_row = d_row + _product(slopes, self.texts[j], 1)
                d_texts = d_texts.at[j].set(d_texts[j] + _product(slopes, image, 0))
                return d_row, d_texts, tuple(out + part.sum(0) for out, part in zip(outs, found, strict=True))

            d_images, d_texts, outs = carry
            init = self.full(0, self.rows, width), d_texts, (self.full(0, self.rows),) * sums
            d_row, d_texts, found = loop(self.shape[1], column, init)
            outs = tuple(out.at[i].set(part) for out, part in zip(outs, found, strict=True))
            return d_images.at[i].set(d_row), d_texts, outs

        width = self.images.shape[-1]
        init = self.full(0, *self.images.shape), self.full(0, *self.texts.shape)
        init = (*init, (self.full(0, self.shape[0], self.rows),) * sums)
        d_images, d_texts, outs = loop(self.shape[0], row, init)
        d_image, d_text = (
            x.reshape(-1, width)[:count, : self.features]
            for x, count in zip((d_images, d_texts), self.counts, strict=True)
        )
        return (d_image, d_text), tuple(x.reshape(-1)[: self.counts[0]] for x in outs)


def _product(slopes, other, contracted: int):
    numbers = (((contracted,), (0,)), ((), ()))
    return lax.dot_general(slopes, other, numbers, preferred_element_type=jnp.float32)


def _even(length: int, limit: int, unit: int) -> int:
    """The size, in whole units, of the fewest equal panels of at most `limit` that cover `length`."""
    panels = math.ceil(length / limit)
    return math.ceil(length / panels / unit) * unit


# -------------------------------------------------------------------------------------------------------------- kernels


def _kernel(kind: str, images: jax.Array, turned: jax.Array, blocks: int, interpret: Any) -> Callable:
    """`kernel(places, numbers, images [.., R, D], turned [.., D, C], *totals)`, over the tiles of a panel.

    places: which images and texts, the column that is the partner of row 0, how many rows and columns count. numbers:
    scale and bias. totals: the logsumexps of "softmax_slopes", [R] and [C]. Sums leave as [C / 128, R] or [R / 128, C].
    """
    (_, rows, width), columns, dtype = images.shape, turned.shape[-1], images.dtype
    vary = jax.typeof(images).manual_axis_type
    down, across, steps = rows // ROWS, columns // COLUMNS, width // _DEPTH
    tiles = down * across
    blocks = min(blocks, tiles)
    of_rows = (2 * across, rows), jnp.float32
    slopes = (rows, columns), jnp.bfloat16
    outputs = {
        "softmax_sums": [of_rows, ((down, columns), jnp.float32)],
        "softmax_slopes": [slopes],
        "sigmoid_slopes": [slopes, of_rows, of_rows],
        "sigmoid_sums": [of_rows],
    }[kind]
    swizzled = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    scratch = {
        "a": plgpu.SMEM((_SLOTS, ROWS, _DEPTH), dtype, transforms=swizzled),
        "b": plgpu.SMEM((_SLOTS, _DEPTH, COLUMNS), dtype, transforms=swizzled),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=_SLOTS),  # both copies
        "empty": plgpu.Barrier(num_arrivals=2, num_barriers=_SLOTS),  # both warpgroups
    }
    if kind == "softmax_sums":
        scratch["turn"] = plgpu.Barrier(num_barriers=2)
    if kind == "softmax_slopes":
        scratch["row_total"] = plgpu.SMEM((ROWS,), jnp.float32)
        scratch["column_total"] = plgpu.SMEM((COLUMNS,), jnp.float32)
        scratch["totals_full"] = plgpu.Barrier(num_arrivals=2)
        scratch["totals_empty"] = plgpu.Barrier(num_arrivals=2)
    if slopes in outputs:
        scratch["leaving"] = plgpu.SMEM((2, ROWS, _CHUNK), jnp.bfloat16, transforms=swizzled)

    def body(places, numbers, images, turned, *refs, a, b, full, empty, **scratch):
        totals, outs = refs[: -len(outputs)], refs[-len(outputs) :]
        group, first = lax.axis_index("group"), lax.axis_index("block")
        mine = lax.div(tiles - first + blocks - 1, jnp.int32(blocks))

        def place(t):
            """Of this block's tile t, the row and column of tiles."""
            tile = first + t * blocks
            return lax.rem(tile, jnp.int32(down)), lax.div(tile, jnp.int32(down))

        @pl.when(group == 2)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            image, text = images.at[places[0]], turned.at[places[1]]

            @pl.loop(0, mine)
            def _(t):
                i, j = place(t)

                @pl.loop(0, steps)
                def _(k):
                    n = t * steps + k
                    slot = lax.rem(n, jnp.int32(_SLOTS))
                    pl.when(n >= _SLOTS)(lambda: plgpu.barrier_wait(empty.at[slot]))
                    deep = pl.ds(k * _DEPTH, _DEPTH)
                    plgpu.copy_gmem_to_smem(image.at[pl.ds(i * ROWS, ROWS), deep], a.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(text.at[deep, pl.ds(j * COLUMNS, COLUMNS)], b.at[slot], full.at[slot])

                if totals:
                    arrived = scratch["totals_full"]
                    pl.when(t > 0)(lambda: plgpu.barrier_wait(scratch["totals_empty"]))
                    plgpu.copy_gmem_to_smem(totals[0].at[pl.ds(i * ROWS, ROWS)], scratch["row_total"], arrived)
                    plgpu.copy_gmem_to_smem(totals[1].at[pl.ds(j * COLUMNS, COLUMNS)], scratch["column_total"], arrived)

            # A barrier must have been waited for as often as it was reached.
            every = mine * steps
            pl.loop(jnp.maximum(every - _SLOTS, 0), every)(
                lambda n: plgpu.barrier_wait(empty.at[lax.rem(n, jnp.int32(_SLOTS))])
            )
            if totals:
                plgpu.barrier_wait(scratch["totals_empty"])

        @pl.when(group < 2)
        def _():
            plgpu.set_max_registers(232, action="increase")
            if "turn" in scratch:  # the first turn is the first warpgroup's
                pl.when(group == 1)(lambda: plgpu.barrier_arrive(scratch["turn"].at[0]))

            @pl.loop(0, mine)
            def _(t):
                def multiply(acc):
                    @pl.loop(0, steps)
                    def _(k):
                        n = t * steps + k
                        slot = lax.rem(n, jnp.int32(_SLOTS))
                        plgpu.barrier_wait(full.at[slot])
                        plgpu.wgmma(acc, a.at[slot], b.at[slot, :, pl.ds(group * (COLUMNS // 2), COLUMNS // 2)])
                        plgpu.wgmma_wait(1)  # all but this one are done, so the slot before is free
                        pl.when(k > 0)(lambda: plgpu.barrier_arrive(empty.at[lax.rem(n - 1, jnp.int32(_SLOTS))]))

                    products = acc[...]
                    plgpu.barrier_arrive(empty.at[lax.rem((t + 1) * steps - 1, jnp.int32(_SLOTS))])
                    return products

                i, j = place(t)
                products = pl.run_scoped(multiply, plgpu.ACC((ROWS, COLUMNS // 2), jnp.float32))
                tile = _Tile(products, i, 2 * j + group, group, places, numbers)
                _ENDS[kind](tile, *outs, **scratch)

            plgpu.wait_smem_to_gmem(0)
            if "turn" in scratch:
                pl.when(group == 0)(lambda: plgpu.barrier_wait(scratch["turn"].at[0]))

    body.__name__ = f"contrastive_{kind}"
    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=vary) for shape, dtype in outputs],
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            reduction_scratch_bytes=6144 if kind == "softmax_sums" else 1024,  # of sums over rows; others need none
        ),
        interpret=interpret,
    )


class _Tile:
    """A warpgroup's half of a tile, [128, 128]: its logits, and where it is."""

    def __init__(self, products, i, j, group, places, numbers):
        self.products, self.i, self.j, self.group = products, i, j, group
        self.scale, self.bias = numbers[0], numbers[1]
        self.partner, self.row_count, self.column_count = places[2], places[3], places[4]
        self.rows, self.starts = pl.ds(i * ROWS, ROWS), range(0, COLUMNS // 2, _CHUNK)

    def columns(self, start: int):
        """Where a chunk of columns is in the panel."""
        return pl.ds(self.j * (COLUMNS // 2) + start, _CHUNK)

    def logits(self, start: int):
        """Of a chunk of columns; `NOTHING` for partners and beyond the ends."""
        products = self.products[:, start : start + _CHUNK]
        logits = self.scale * products + self.bias
        row = lax.broadcasted_iota(jnp.int32, logits.shape, 0)
        column = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        first_row, first_column = self.i * ROWS, self.j * (COLUMNS // 2) + start
        out = column - row == self.partner + first_row - first_column
        out |= row >= self.row_count - first_row
        out |= column >= self.column_count - first_column
        return jnp.where(out, NOTHING, logits)


def _softmax_sums(tile: _Tile, row_out, column_out, *, turn):
    chunks = [tile.logits(start) for start in tile.starts]
    top = functools.reduce(jnp.maximum, [logits.max(1) for logits in chunks])
    total = sum(jnp.exp(logits - _spread(top, logits, 0)).sum(1) for logits in chunks)
    row_out[tile.j, tile.rows] = top + jnp.log(total)
    # A sum over rows goes through shared memory that jax reserves once for all warpgroups: they take turns.
    plgpu.barrier_wait(turn.at[tile.group])
    for start, logits in zip(tile.starts, chunks, strict=True):
        top = logits.max(0)
        total = jnp.exp(logits - _spread(top, logits, 1)).sum(0)
        column_out[tile.i, tile.columns(start)] = top + jnp.log(total)
    plgpu.barrier_arrive(turn.at[1 - tile.group])


def _softmax_slopes(tile: _Tile, slopes_out, *, leaving, row_total, column_total, totals_full, totals_empty):
    plgpu.barrier_wait(totals_full)
    rows = row_total[...]
    for start in tile.starts:
        columns = column_total[pl.ds(tile.group * (COLUMNS // 2) + start, _CHUNK)]
        logits = tile.logits(start)
        slopes = jnp.exp(logits - _spread(rows, logits, 0)) + jnp.exp(logits - _spread(columns, logits, 1))
        _send(slopes, tile, start, leaving, slopes_out)
    plgpu.barrier_arrive(totals_empty)


def _sigmoid_slopes(tile: _Tile, slopes_out, value_out, slope_out, *, leaving):
    value_sum = slope_sum = 0.0
    for start in tile.starts:
        values, slopes = softplus_and_sigmoid(tile.logits(start))
        value_sum, slope_sum = value_sum + values.sum(1), slope_sum + slopes.sum(1)
        _send(slopes, tile, start, leaving, slopes_out)
    value_out[tile.j, tile.rows], slope_out[tile.j, tile.rows] = value_sum, slope_sum


def _sigmoid_sums(tile: _Tile, value_out):
    value_out[tile.j, tile.rows] = sum(softplus_and_sigmoid(tile.logits(start))[0].sum(1) for start in tile.starts)


_ENDS: dict[str, Callable[..., None]] = {
    "softmax_sums": _softmax_sums,
    "softmax_slopes": _softmax_slopes,
    "sigmoid_slopes": _sigmoid_slopes,
    "sigmoid_sums": _sigmoid_sums,
}


def _spread(vector, like, axis: int):
    return lax.broadcast_in_dim(vector, like.shape, [axis])


def _send(slopes, tile: _Tile, start: int, leaving, out):
    """From registers through shared memory, beside what follows."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    leaving[tile.group] = slopes.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(leaving.at[tile.group], out.at[tile.rows, tile.columns(start)])


def softplus_and_sigmoid(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `xla.softplus_and_sigmoid`. Mosaic has no log1p, so here log(1 + x) = 2 artanh(z), z = x / (2 + x) <= 1/3, by
    its series up to z¹³ (2e-8 relative); one division serves z and the sigmoid."""
    small = jnp.exp(-jnp.abs(logits))
    over = 1 / ((1 + small) * (2 + small))
    z = small * (1 + small) * over
    square = z * z
    series = 1 / 13
    for odd in (11, 9, 7, 5, 3, 1):
        series = series * square + 1 / odd
    value = jnp.maximum(logits, 0) + 2 * z * series
    return value, jnp.where(logits >= 0, 1, small) * (2 + small) * over
