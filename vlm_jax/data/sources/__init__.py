"""Where records are: `open_source` opens a file or a folder of them, of any kind, and the data sets that the project
makes. A new kind is one class that is a `Source`, and one line in a table here."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_jax.data.digits import make_digits
from vlm_jax.data.formats.columns import Columns
from vlm_jax.data.records import AnyPath, Record
from vlm_jax.data.sources import json_files, shards
from vlm_jax.data.sources.base import Opener, Source
from vlm_jax.data.sources.mixtures import open_listed, open_mixture
from vlm_jax.data.sources.parquet import PATTERN, open_parquet
from vlm_jax.data.sources.tfds import open_tfds
from vlm_jax.errors import UsageError, suggest

__all__ = ["FILES", "FOLDERS", "MADE", "Opener", "Source", "SourceSpec", "is_there", "open_source", "resolve"]

# What opens a file, by its suffix, and a folder, by a pattern that a file directly in it matches.
FILES: dict[str, Callable[[Path, Path, Columns | None], Source]] = {
    ".json": json_files.open_list,
    ".jsonl": json_files.open_lines,
    ".parquet": open_parquet,
}
FOLDERS: dict[str, Opener] = {
    shards.INDEX: shards.open_shards,
    shards.BELOW: shards.refuse_parent,
    PATTERN: open_parquet,
}
MIXTURES = (".yaml", ".yml")
TFDS = "tfds:"
PAGE = "docs/reference/formats.md"
PREPARE = "python -m vlm_jax.data.prepare makes records of CSV, COCO, VQA and WebDataset files and of folders of images"
LISTED = re.compile(r"(.*dataset_info\.json):(.+)")  # LLaMA-Factory's list of data sets, and one of them

# Paths "digits:train", "digits:eval", ... name parts of a data set that is made where it is first needed:
# (maker, its parts, the folder of its images).
MADE: dict[str, tuple[Callable[[Path], Any], dict[str, str], str]] = {
    "digits": (
        make_digits,
        {
            "align": "align.json",
            "train": "train.json",
            "eval": "eval.json",
            "tokenizer": "tokenizer",
            "tokenizer_chat": "tokenizer_chat",
        },
        "images",
    )
}


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """A file of records to train on.

    images: the folder that image paths are relative to; default the file's own.
    weight: how often each record is seen per epoch: 1.0 exactly once, 0.5 one half of them (drawn anew each epoch), 2.0
      twice.
    confined: whether images must lie in their folder. False allows absolute paths, `..` and links out of it; a URL is
      never followed.
    """

    path: str
    images: str | None = None
    weight: float = 1.0
    confined: bool = True


def cache_folder() -> Path:
    """Where things are that can be made again: `$VLM_JAX_CACHE`, default `~/.cache/vlm_jax`."""
    return Path(os.environ.get("VLM_JAX_CACHE", "~/.cache/vlm_jax")).expanduser()


def resolve(path: str | os.PathLike) -> tuple[Path, Path]:
    """A path as the user gives it -> the path on disk, and the default images folder. Makes the data sets of `MADE`,
    in `$VLM_JAX_CACHE` (default `~/.cache/vlm_jax`). Raises UsageError for a part that the set does not have."""
    name, colon, part = str(path).partition(":")
    if not colon or name not in MADE:
        found = Path(path).expanduser()
        return found, found if found.is_dir() else found.parent
    maker, parts, images = MADE[name]
    if part not in parts:
        raise UsageError(f"{path}: {name} has no part {part!r}{suggest(part, parts)}; it has {', '.join(parts)}")
    folder = cache_folder() / name
    maker(folder)
    return folder / parts[part], folder / images


def open_source(path: str | os.PathLike, images: str | os.PathLike | None = None, *, confined: bool = True) -> Source:
    """Finds the records of a file or folder; what is wrong with it as a whole shows here, before anything is compiled.

    path: a file or folder of the kinds in docs/reference/formats.md, `tfds:name/config:split`, a data set of
      LLaMA-Factory as `dataset_info.json:name`, or a part of a set that is made (`MADE`).
    images, confined: of `SourceSpec`; the files that a mixture names are confined to its folder in the same way.
    Raises UsageError: no such file or folder, no known kind, damaged, or no record.
    """
    folder = None if images is None else Path(images).expanduser()
    if folder is not None and not folder.is_dir():
        raise UsageError(f"the images folder {folder} does not exist; correct --config.data.images")
    text = os.fspath(path)
    listed = LISTED.fullmatch(text)
    try:
        if text.startswith(TFDS):
            return open_tfds(text.removeprefix(TFDS), folder)
        found, own = resolve(listed[1] if listed else path)
        if listed:
            source = open_listed(found, listed[2], folder or own, confined, _open)
        elif found.suffix in MIXTURES:
            source = open_mixture(found, folder or own, confined, _open)
        else:
            source = _open(found, folder or own, None)
    except OSError as error:
        raise UsageError(
            f"data file {error.filename or path} cannot be read ({error.strerror}); correct the path"
        ) from None
    return source if confined else Unconfined(source)


def is_there(path: str) -> bool:
    """Whether something is where a path leads; what is made here, or is not on a disk, is."""
    listed = LISTED.fullmatch(path)
    if path.partition(":")[0] in (*MADE, "tfds") or "://" in path:
        return True
    return os.path.exists(os.path.expanduser(listed[1] if listed else path))


@dataclasses.dataclass(frozen=True)
class Unconfined:
    """A `Source` whose images may lie anywhere on this machine."""

    source: Source

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def images(self) -> Path:
        return self.source.images

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        record = self.source[index]
        images = tuple(AnyPath(image) if isinstance(image, str) else image for image in record.images)
        return dataclasses.replace(record, images=images)


def _open(path: Path, images: Path, columns: Columns | None) -> Source:
    if not path.is_dir():
        opener = FILES.get(path.suffix)
        if opener is None:
            known = ", ".join((*FILES, *MIXTURES))
            raise UsageError(f"data file {path} is of no known kind ({known}; {PAGE}); {PREPARE}")
        return opener(path, images, columns)
    for pattern, folder_opener in FOLDERS.items():
        if any(path.glob(pattern)):
            return folder_opener(path, images)
    known = " and no ".join(FOLDERS)
    raise UsageError(f"data folder {path} is of no known kind: it has no {known} ({PAGE}); {PREPARE}")
