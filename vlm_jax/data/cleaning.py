"""A clean copy of a data set: its files without the records that an inspection found bad, photos turned as they ask.

What is written: the records as they stood in the file, to the byte, in a file of the same name. Where a photo has to be
turned, also a folder of all images that the records name: turned ones written anew, the others as links to the same
file (copies where the disk knows none). The original is only read.
"""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image, ImageOps

from vlm_jax.data.images import FORMATS, Picture
from vlm_jax.data.inspection import NOTES, ImageName, Inspection
from vlm_jax.data.sources import Source
from vlm_jax.data.sources.json_files import JsonSource
from vlm_jax.errors import UsageError

QUALITY = 95  # of a JPEG that is written again
TURNED = "exif_rotated"


@dataclasses.dataclass(frozen=True)
class Cleaned:
    """A copy that was written. images: its folder, the original's where no photo had to be turned."""

    file: Path
    images: Path
    kept: int
    removed: int
    turned: int


def check_cleanable(sources: Sequence[Source], folder: Path) -> None:
    """Raises UsageError for what `write_clean` cannot copy, before anything is read or written."""
    for source in sources:
        if not isinstance(source, JsonSource):
            raise UsageError(
                f"--fix writes copies of .json and .jsonl files, and {source.path} is none; leave --fix out, and make "
                "shards of it, which leave out bad records: python -m vlm_jax.data.prepare"
            )
    names = [source.path.name for source in sources]
    if len(set(names)) != len(names):
        raise UsageError(f"--fix names copies as the files, and two of these are alike: {', '.join(names)}; rename one")
    if folder.exists():
        raise UsageError(f"{folder} exists; --fix never overwrites: remove it, or choose another --output")


def write_clean(found: Inspection, folder: Path) -> list[Cleaned]:
    """Writes a copy of every source into a new folder. Raises UsageError as `check_cleanable`, and where the disk does
    not take it; then nothing of the copy stays."""
    check_cleanable(found.sources, folder)
    bad: dict[int, set[int]] = defaultdict(set)
    for fault in found.faults:
        if fault.kind not in (*NOTES, TURNED):
            bad[fault.source].add(fault.index)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        cleaned = [_copy(found, number, bad[number], temporary, folder) for number in range(len(found.sources))]
        temporary.rename(folder)
    except OSError as error:
        raise UsageError(f"the clean copy cannot be written to {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return cleaned


def _copy(found: Inspection, number: int, bad: set[int], temporary: Path, folder: Path) -> Cleaned:
    source = found.sources[number]
    assert isinstance(source, JsonSource)
    kept = [index for index in range(len(source)) if index not in bad]
    _write_records(source, kept, temporary / source.path.name)
    names = {name for index in kept for name in found.records[number, index].images}
    turned = {name for name in names if name.path and found.images[name].orientation != 1}
    images = source.images
    if turned:
        inner = f"{source.path.stem}_images"
        for name in sorted(names):
            if name.path:
                _place(source.images, name, temporary / inner, turn=name in turned)
        images = folder / inner
    return Cleaned(folder / source.path.name, images, len(kept), len(bad), len(turned))


def _write_records(source: JsonSource, kept: Iterable[int], file: Path) -> None:
    begin, between, end = ("[\n", ",\n", "\n]\n") if source.path.suffix == ".json" else ("", "\n", "\n")
    with open(source.path, "rb") as original, open(file, "wb") as out:
        out.write(begin.encode())
        for number, index in enumerate(kept):
            first, last = source.places[index].tolist()
            original.seek(first)
            out.write((between if number else "").encode() + original.read(last - first).strip())
        out.write(end.encode())


def _place(root: Path, name: ImageName, folder: Path, *, turn: bool) -> None:
    """Puts an image that the inspection could read under the same path into the new folder."""
    target = folder / name.path
    target.parent.mkdir(parents=True, exist_ok=True)
    if turn:
        target.write_bytes(upright(Picture(name.path, root).encoded or b""))
        return
    original = os.path.realpath(root / name.path)
    try:
        os.link(original, target)
    except OSError:
        shutil.copyfile(original, target)


def upright(encoded: bytes) -> bytes:
    """An image file turned as its EXIF orientation asks, in the same format, without that request."""
    image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    turned, out = ImageOps.exif_transpose(image), io.BytesIO()
    how = {"quality": QUALITY, "subsampling": 0} if image.format == "JPEG" else {}
    turned.save(out, image.format, **how)
    return out.getvalue()
