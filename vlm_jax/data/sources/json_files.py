"""JSON files of records: .json, a list of them, and .jsonl, one on each line.

Opening reads a file once from end to end, a block at a time, checks that all of it is JSON, and keeps where each record
begins and ends: 16 bytes a record, however large the file.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vlm_jax.data.formats import parse_record
from vlm_jax.data.formats.columns import Columns
from vlm_jax.data.records import BadRecord, Record
from vlm_jax.data.sources.base import Source
from vlm_jax.errors import UsageError

BLOCK = 1 << 22
MAX_RECORD = 1 << 26  # bytes of one record in JSON; what claims more is not read
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SPACES = re.compile(r"[ \t\r\n]*")
NEAR = 16  # characters; an error so close to the end of what is read may be gone when more is read


@dataclasses.dataclass(frozen=True)
class JsonSource:
    """A `Source` of a .json or .jsonl file.

    places: int64 [N, 2], first byte and end of each record. columns: what the file calls the parts of a record.
    """

    path: Path
    images: Path
    places: np.ndarray
    columns: Columns | None = None

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Record:
        start, end = self.places[index].tolist()
        with open(self.path, "rb") as file:
            file.seek(start)
            text = file.read(end - start)
        try:
            raw = json.loads(text)
        except UnicodeDecodeError:
            raise BadRecord("malformed", "it is not UTF-8") from None
        except (ValueError, RecursionError):
            raise UsageError(f"{self.path} has changed since it was opened; start the command again") from None
        return parse_record(raw, f"{self.path.stem}-{index}", self.columns)


def open_list(path: Path, images: Path, columns: Columns | None = None) -> Source:
    """A .json file that holds a list of records."""
    return _open(path, images, _list_places, columns)


def open_lines(path: Path, images: Path, columns: Columns | None = None) -> Source:
    """A .jsonl file that holds a record on each line; empty lines are skipped."""
    return _open(path, images, _line_places, columns)


def _open(path: Path, images: Path, find: Any, columns: Columns | None) -> Source:
    with open(path, "rb") as file:
        places = np.fromiter((edge for place in find(file, path) for edge in place), np.int64).reshape(-1, 2)
    if not len(places):
        raise UsageError(f"data file {path} has no records; give one with at least one record")
    return JsonSource(path, images, places, columns)


class _Window:
    """A part of a file as text of one character per byte, so that places in it are places in the file. What stands
    inside strings is read as UTF-8 later; quotes, braces and commas are the same in both."""

    def __init__(self, file: BinaryIO):
        self._file = file
        marked = file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK
        self.text, self.first, self.at, self.ended = "", len(BYTE_ORDER_MARK) * marked, 0, False
        file.seek(self.first)
        self.more()

    def more(self) -> None:
        """Forgets what lies before `at`, and reads on, by as much as is held."""
        self.text, self.first, self.at = self.text[self.at :], self.first + self.at, 0
        block = self._file.read(max(BLOCK, len(self.text)))
        self.ended = not block
        self.text += block.decode("latin-1")

    def next(self) -> str:
        """The next character that is no space, or nothing at the end; `at` is its place."""
        while True:
            self.at = SPACES.match(self.text, self.at).end()  # type: ignore[union-attr]  # it matches anything
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()


def _list_places(file: BinaryIO, path: Path) -> Iterator[tuple[int, int]]:
    window, decoder = _Window(file), json.JSONDecoder()
    if window.next() != "[":
        raise UsageError(
            f"data file {path} does not hold a list of records; put them into [...], or name a file of one record per "
            "line .jsonl"
        )
    window.at += 1
    if window.next() == "]":
        return
    while True:
        window.next()
        start, end = _value(window, decoder, path)
        yield start, end
        mark = window.next()
        if mark not in (",", "]"):
            raise UsageError(f"data file {path} is not valid JSON: no ',' or ']' after the record at byte {start}")
        window.at += 1
        if mark == "]":
            if window.next():
                raise UsageError(f"data file {path} is not valid JSON: more follows after its list of records")
            return


def _value(window: _Window, decoder: json.JSONDecoder, path: Path) -> tuple[int, int]:
    """First byte and end of the value that begins at `window.at`, and moves there."""
    while True:
        try:
            _, end = decoder.raw_decode(window.text, window.at)
        except (ValueError, RecursionError) as error:
            held = len(window.text) - window.at
            final = window.ended or held > MAX_RECORD
            if isinstance(error, json.JSONDecodeError) and not error.msg.startswith("Unterminated"):
                final = final or error.pos < len(window.text) - NEAR
            if final or not isinstance(error, json.JSONDecodeError):
                what = f"; a record has at most {MAX_RECORD:,} bytes" if held > MAX_RECORD else ""
                begins = window.first + window.at
                raise UsageError(
                    f"data file {path} is not valid JSON: {_what(error)}, in the record at byte {begins}{what}"
                ) from None
        else:
            if end < len(window.text) or window.ended:
                start, window.at = window.at, end
                return window.first + start, window.first + end
        window.more()


def _line_places(file: BinaryIO, path: Path) -> Iterator[tuple[int, int]]:
    at, number = 0, 0
    while line := file.readline(MAX_RECORD + 1):
        number += 1
        start, at = at, at + len(line)
        if number == 1 and line.startswith(BYTE_ORDER_MARK):
            start, line = start + len(BYTE_ORDER_MARK), line[len(BYTE_ORDER_MARK) :]
        if len(line) > MAX_RECORD:
            raise UsageError(f"line {number} of data file {path} has more than {MAX_RECORD:,} bytes; is it JSON lines?")
        line = line.rstrip(b" \t\r\n")
        if line:
            try:
                json.loads(line.decode("latin-1"))
            except (ValueError, RecursionError) as error:
                raise UsageError(f"line {number} of data file {path} is not valid JSON: {_what(error)}") from None
            yield start, start + len(line)


def _what(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} ({error.doc[max(error.pos - 20, 0) : error.pos + 20]!r})"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
