"""Rows of training made visible: which tokens are trained, where images stand, and what their tiles show; for a
terminal, as pictures, and as a page. What is shown is read from the row itself, nothing is computed a second time."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlm_jax.data.anyres import Layout, best_canvas
from vlm_jax.data.conversation import UNTRAINED
from vlm_jax.data.reading import Measured, Sample
from vlm_jax.data.rows import Row

TEXT, TRAINED, IMAGE = "text", "trained", "image"
WHOLE, PART, PAPER, INK = "#d9730d", "#3b6fb6", "#ffffff", "#222222"
SMALLEST, EDGE, GAP, LINE = 96, 3, 14, 22  # pixels: side of a tile, its border, between things, of a line of text

# What marks each kind of stretch, before and after: for a terminal, and where colours would be noise.
COLOURS = {TEXT: ("", ""), TRAINED: ("\x1b[1;32m", "\x1b[0m"), IMAGE: ("\x1b[36m", "\x1b[0m")}
MARKS = {TEXT: ("", ""), TRAINED: ("[[", "]]"), IMAGE: ("", "")}


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Positions of one kind. texts: of each token; of an image the one text that describes it."""

    kind: str
    start: int
    stop: int
    texts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ShownImage:
    """title: what it is. tiles: uint8 [k, side, side, 3]. grid: (columns, rows) of those after the first, which then is
    the whole image; None where tiles stand for themselves."""

    title: str
    tiles: np.ndarray
    grid: tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class Segment:
    """One record in a row: what became of it, and what the row holds of it."""

    sample: Sample
    source: str
    stretches: tuple[Stretch, ...]
    images: tuple[ShownImage, ...]

    @property
    def tokens(self) -> int:
        return self.stretches[-1].stop - self.stretches[0].start

    @property
    def trained(self) -> int:
        return sum(one.stop - one.start for one in self.stretches if one.kind == TRAINED)


def segment(
    row: Row, number: int, first_tile: int, measured: Measured, sample: Sample, source: str, tokenizer: Any
) -> Segment:
    """Segment `number` (from 1) of a row that a `Reader` made; its tiles begin at `first_tile` of the row's.

    measured, sample: of its record. source: the file it is from.
    """
    places = np.flatnonzero(row["segment_ids"] == number)
    start, stop = int(places[0]), int(places[-1]) + 1
    ids = row["tokens"][start:stop]
    trained = np.append(False, row["labels"][start : stop - 1] != UNTRAINED)  # a label is the target of the one before
    visual = np.any(row["visual_index"].reshape(len(row["tokens"]), -1)[start:stop] >= 0, axis=1, keepdims=True)[:, 0]
    stretches: list[Stretch] = []
    layouts = iter(enumerate(measured.layouts, 1))
    at = 0
    while at < len(ids):
        if not visual[at]:
            end = at + int(np.append(visual[at:], True).argmax())
            texts = token_texts(ids[at:end].tolist(), tokenizer)
            for low, high in _runs(trained[at:end]):
                kind = TRAINED if trained[at + low] else TEXT
                stretches.append(Stretch(kind, start + at + low, start + at + high, tuple(texts[low:high])))
            at = end
            continue
        count, layout = next(layouts)
        end = at + len(layout.places)
        stretches.append(Stretch(IMAGE, start + at, start + end, (f"<image {count}: {_extent(layout)}>",)))
        at = end
    return Segment(sample, source, tuple(stretches), tuple(_images(measured, row["tiles"][first_tile:])))


def _images(measured: Measured, tiles: np.ndarray) -> Iterator[ShownImage]:
    """The images of a record. tiles: of the row, from the record's first on."""
    settings, first = measured.settings, 0
    for count, (picture, layout) in enumerate(zip(measured.pictures, measured.layouts, strict=True), 1):
        title, grid = f"image {count}: {picture.size[0]} x {picture.size[1]} pixels", None
        if settings.mode == "anyres":
            canvas = best_canvas(picture.size, settings.canvases)
            grid = canvas[0] // settings.size, canvas[1] // settings.size
            title += f" on a canvas of {canvas[0]} x {canvas[1]}"
        yield ShownImage(f"{title}, {_extent(layout)}", tiles[first : first + layout.tiles], grid)
        first += layout.tiles


def _extent(layout: Layout) -> str:
    return f"{len(layout.places):,} features, {layout.tiles} tile{'s' * (layout.tiles > 1)}"


def _runs(flags: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, end) of the stretches of equal values."""
    edges = [0, *(np.flatnonzero(flags[1:] != flags[:-1]) + 1).tolist(), len(flags)]
    yield from itertools.pairwise(edges)


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """What each token adds to the text. A character that is made of several tokens stands with the last of them."""
    texts, told, begin = [], 0, 0
    for end in range(1, len(ids) + 1):
        before, text = (tokenizer.decode(ids[begin:stop], clean_up_tokenization_spaces=False) for stop in (told, end))
        whole = not text.endswith("\ufffd") or end == len(ids) or end - told > 4
        texts.append(text[len(before) :] if whole else "")
        if whole:
            begin, told = told, end
    return texts


def printable(text: str) -> str:
    """Without what a terminal would obey: data may hold escape sequences."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


# ---------------------------------------------------------------------------------------------------------- a terminal


def token_row(segment: Segment, marks: dict[str, tuple[str, str]]) -> str:
    """The tokens of a segment as text, each kind of stretch between its marks."""
    parts = []
    for one in segment.stretches:
        before, after = marks[one.kind]
        text = printable("".join(one.texts)).replace("\n", "\u21b5\n")
        parts.append(f"{before}{text}{after}")
    return "".join(parts)


# ------------------------------------------------------------------------------------------------------------ pictures


def picture(segments: Sequence[Segment]) -> Image.Image | None:
    """All images of a row, one below the other: the whole image in orange, what it is cut into in blue, where it lies.
    None where there is none."""
    shown = [(one, image) for one in segments for image in one.images]
    if not shown:
        return None
    font = ImageFont.load_default(size=14)
    several = len(segments) > 1
    titles = [f"{one.sample.id}: {image.title}" if several else image.title for one, image in shown]
    boards = [_board(image, font) for _, image in shown]
    width = max(*(board.width for board in boards), *(int(font.getlength(title)) for title in titles), 1) + 2 * GAP
    height = sum(board.height + LINE + GAP for board in boards) + GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    draw, top = ImageDraw.Draw(sheet), GAP
    for title, board in zip(titles, boards, strict=True):
        draw.text((GAP, top), printable(title), INK, font)
        sheet.paste(board, (GAP, top + LINE))
        top += board.height + LINE + GAP
    return sheet


def _board(image: ShownImage, font: Any) -> Image.Image:
    """The tiles of one image. With a grid the first stands on the left, and the others where they are in the image."""
    side = image.tiles.shape[1]
    scale = math.ceil(SMALLEST / side)
    cell = side * scale + 2 * EDGE
    columns, rows = image.grid or (len(image.tiles), 1)
    beside = cell + GAP if image.grid else 0
    board = Image.new("RGB", (beside + columns * cell, max(rows, 1) * cell), PAPER)
    for number, tile in enumerate(image.tiles):
        whole = image.grid is not None and number == 0
        row, column = divmod(number - bool(image.grid), columns)
        left, top = (0, 0) if whole else (beside + column * cell, row * cell)
        pixels = Image.fromarray(tile).resize((side * scale, side * scale), Image.Resampling.NEAREST)
        board.paste(WHOLE if whole else PART, (left, top, left + cell, top + cell))
        board.paste(pixels, (left + EDGE, top + EDGE))
    if image.grid and rows > 1:
        ImageDraw.Draw(board).text((0, cell + 2), "whole image", WHOLE, font)
    return board


# -------------------------------------------------------------------------------------------------------------- a page

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222 }
h2 { font-size: 1.1em; margin: 2.5em 0 .3em } .facts { color: #666 } .bad { color: #b3261e } img { max-width: 100% }
.row { font: 13px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .6em 0;
       border-left: 3px solid #ccc; padding-left: .8em }
.row span { border-radius: 3px; box-shadow: inset 0 0 0 1px #e4e4e4 } .row span:hover { background: #ffe9a8 }
.row .trained { background: #cfeeda } .row .image { background: #d6e4fb; padding: .1em .4em }
"""


@dataclasses.dataclass(frozen=True)
class PageRow:
    """A row on the page: its title, what is said below it, its segments, its bad records, and its picture."""

    title: str
    facts: str
    segments: tuple[Segment, ...]
    bad: tuple[str, ...]
    picture: Image.Image | None
    row: Row


def page(title: str, rows: Sequence[PageRow]) -> str:
    """One page that needs nothing from elsewhere. Pointing at a token shows its number, place and target."""
    parts = [
        '<!doctype html><meta charset="utf-8">',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">",
        f"<title>{_safe(title)}</title><style>{STYLE}</style><h1>{_safe(title)}</h1>",
        '<p class="facts">Green tokens are trained: the model learns to say them. Point at a token for its number, its '
        "place in the row and what the model has to say after it.</p>",
    ]
    for one in rows:
        parts.append(f'<h2>{_safe(one.title)}</h2><div class="facts">{_safe(one.facts)}</div>')
        parts += [f'<div class="bad">{_safe(text)}</div>' for text in one.bad]
        if one.picture is not None:
            parts.append(
                f'<p><img alt="tiles" src="data:image/png;base64,{base64.b64encode(png(one.picture)).decode()}">'
            )
        for part in one.segments:
            parts.append(f'<div class="facts">{_safe(describe(part))}</div>')
            parts.append(f'<div class="row">{"".join(_spans(part, one.row))}</div>')
    return "\n".join(parts) + "\n"


def describe(segment: Segment) -> str:
    """Which record a segment is, and how large."""
    sample = segment.sample
    note = f"; {sample.message}" if sample.kind else ""
    tiles = sum(len(image.tiles) for image in segment.images)
    size = f"{segment.tokens:,} tokens, {segment.trained:,} trained, {tiles} tile{'s' * (tiles != 1)}"
    return printable(f"record {sample.id!r}, number {sample.index} of {segment.source}: {size}{note}")


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def _spans(segment: Segment, row: Row) -> Iterator[str]:
    for one in segment.stretches:
        if one.kind == IMAGE:
            yield f'<span class="image" title="positions {one.start} to {one.stop - 1}">{_safe(one.texts[0])}</span>'
            continue
        for place, text in enumerate(one.texts, one.start):
            label = int(row["labels"][place])
            target = "untrained" if label == UNTRAINED else f"to say next: {label}"
            about = f"token {row['tokens'][place]} at {place}; {target}"
            yield f'<span class="{one.kind}" title="{about}">{_safe(text)}</span>'


def _safe(text: str) -> str:
    return html.escape(printable(text)).replace("\n", "\u21b5\n")
