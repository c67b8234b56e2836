"""Where records are: `open_source` opens a file or a folder of them, of any kind, and the data sets that the project
makes. A new kind is one class that is a `Source`, and one line in a table here."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_jax.data.digits import make_digits
from vlm_jax.data.sources import json_files
from vlm_jax.data.sources.base import Opener, Source
from vlm_jax.errors import UsageError, suggest

__all__ = ["FILES", "FOLDERS", "MADE", "Opener", "Source", "SourceSpec", "open_source", "resolve"]

# What opens a file, by its suffix, and a folder, by a pattern that a file directly in it matches.
FILES: dict[str, Opener] = {".json": json_files.open_list, ".jsonl": json_files.open_lines}
FOLDERS: dict[str, Opener] = {}

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
    """

    path: str
    images: str | None = None
    weight: float = 1.0


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
    cache = Path(os.environ.get("VLM_JAX_CACHE", "~/.cache/vlm_jax")).expanduser()
    folder = cache / name
    maker(folder)
    return folder / parts[part], folder / images


def open_source(path: str | os.PathLike, images: str | os.PathLike | None = None) -> Source:
    """Finds the records of a file or folder; what is wrong with it as a whole shows here, before anything is compiled.

    images: the folder that image paths are relative to; default the file's own.
    Raises UsageError: no such file or folder, no known kind, damaged, or no record.
    """
    found, folder = resolve(path)
    if images is not None:
        folder = Path(images).expanduser()
        if not folder.is_dir():
            raise UsageError(f"the images folder {folder} does not exist; correct --config.data.images")
    opener = _folder_opener(found) if found.is_dir() else FILES.get(found.suffix)
    if opener is None:
        what, known = ("folder", FOLDERS) if found.is_dir() else ("file", FILES)
        raise UsageError(f"data {what} {found} is of no known kind ({', '.join(known)}); docs/reference/formats.md")
    try:
        return opener(found, folder)
    except OSError as error:
        raise UsageError(f"data file {found} cannot be read ({error.strerror}); correct the path") from None


def _folder_opener(folder: Path) -> Opener | None:
    return next((opener for pattern, opener in FOLDERS.items() if any(folder.glob(pattern))), None)
