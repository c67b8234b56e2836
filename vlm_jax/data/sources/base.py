"""What a source of records is, whatever kind of file lies under it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from vlm_jax.data.records import Record


class Source(Protocol):
    """Random access to the records of a file or a folder: `source[i]` reads one of them.

    It is sent to worker processes, so it holds places and no data, and opens what it needs where it is used.

    path: the file or folder, for messages. images: the folder that image paths are relative to, and confined to.
    """

    @property
    def path(self) -> Path: ...

    @property
    def images(self) -> Path: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Raises BadRecord for a record that is not one; UsageError if the file has changed since it was opened."""
        ...


# (path, folder of its images) -> source. Raises UsageError: unreadable, damaged, without a record.
Opener = Callable[[Path, Path], Source]
