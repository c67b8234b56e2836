"""Where records are: files of them, opened once and read one at a time, and the data sets that the project makes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.data.digits import make_digits
from vlm_jax.data.formats import parse_record
from vlm_jax.data.records import BadRecord, Record
from vlm_jax.errors import UsageError, suggest

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


BYTE_ORDER_MARK = "\xef\xbb\xbf"
SPACES = " \t\r\n"


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
        return found, found.parent
    maker, parts, images = MADE[name]
    if part not in parts:
        raise UsageError(f"{path}: {name} has no part {part!r}{suggest(part, parts)}; it has {', '.join(parts)}")
    cache = Path(os.environ.get("VLM_JAX_CACHE", "~/.cache/vlm_jax")).expanduser()
    folder = cache / name
    maker(folder)
    return folder / parts[part], folder / images


@dataclasses.dataclass(frozen=True)
class Source:
    """Random access to the records of a .json (a list) or .jsonl file: `source[i]` reads and parses one of them."""

    path: Path
    images: Path
    places: np.ndarray  # int64 [N, 2]: first byte and end of each record

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Record:
        """Raises BadRecord("malformed") for a record that is not one."""
        start, end = self.places[index].tolist()
        with open(self.path, "rb") as file:
            file.seek(start)
            text = file.read(end - start)
        try:
            raw = json.loads(text)
        except UnicodeDecodeError:
            raise BadRecord("malformed", "it is not UTF-8") from None
        except ValueError:
            raise UsageError(f"{self.path} has changed since it was opened; start the command again") from None
        return parse_record(raw, f"{self.path.stem}-{index}")


def open_source(path: str | os.PathLike, images: str | os.PathLike | None = None) -> Source:
    """Finds the records of a file; everything wrong with its JSON shows here, before anything is compiled.

    images: the folder that image paths are relative to; default the file's own.
    Raises UsageError: no such file or folder, not .json or .jsonl, broken JSON, or no record.
    """
    file, folder = resolve(path)
    if images is not None:
        folder = Path(images).expanduser()
        if not folder.is_dir():
            raise UsageError(f"the images folder {folder} does not exist; correct --config.data.images")
    readers = {".json": _list_places, ".jsonl": _line_places}
    if file.suffix not in readers:
        raise UsageError(f"data file {file} is neither .json (a list of records) nor .jsonl (a record per line)")
    try:
        # One byte is one character here, so that places in the text are places in the file. What stands inside strings
        # is read as UTF-8 later; quotes, braces and commas are the same in both.
        text = file.read_bytes().decode("latin-1")
    except OSError as error:
        raise UsageError(f"data file {file} cannot be read ({error.strerror}); correct the path") from None
    places = np.array(list(readers[file.suffix](text, file)), np.int64).reshape(-1, 2)
    if not len(places):
        raise UsageError(f"data file {file} has no records; give one with at least one record")
    return Source(file, folder, places)


def _list_places(text: str, file: Path) -> Iterator[tuple[int, int]]:
    decoder = json.JSONDecoder()
    at = _skip(text, len(BYTE_ORDER_MARK) if text.startswith(BYTE_ORDER_MARK) else 0)
    if text[at : at + 1] != "[":
        raise UsageError(
            f"data file {file} does not hold a list of records; put them into [...], or name a file of one record per "
            "line .jsonl"
        )
    at = _skip(text, at + 1)
    while text[at : at + 1] != "]":
        try:
            _, end = decoder.raw_decode(text, at)
            after = _skip(text, end)
            if text[after : after + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, after)
        except json.JSONDecodeError as error:
            raise UsageError(f"data file {file} is not valid JSON: {error}") from None
        yield at, end
        at = _skip(text, after + 1) if text[after] == "," else after


def _line_places(text: str, file: Path) -> Iterator[tuple[int, int]]:
    at = len(BYTE_ORDER_MARK) if text.startswith(BYTE_ORDER_MARK) else 0
    for number in itertools.count(1):
        end = text.find("\n", at)
        line = text[at:] if end < 0 else text[at:end]
        if line.strip(SPACES):
            try:
                json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(f"line {number} of data file {file} is not valid JSON: {error}") from None
            yield at, at + len(line)
        if end < 0:
            return
        at = end + 1


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in SPACES:
        at += 1
    return at
