"""Parquet files of records, such as FineVision's, the_cauldron's and what `datasets` writes: one, or a folder of them.

A record is read with the row group that it stands in, since a part of a row group cannot be found; the last few row
groups are kept. Training reads in random order: for it, row groups of few rows are fast and large ones are not, and
`python -m vlm_jax.data.prepare --from=parquet` is faster than either.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_jax.data.formats import parse_record
from vlm_jax.data.formats.columns import Columns
from vlm_jax.data.formats.turns import malformed
from vlm_jax.data.records import Record
from vlm_jax.data.sources.base import Source
from vlm_jax.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

PATTERN = "*.parquet"
MAX_GROUP = 1 << 30  # bytes of a row group in memory
STEP = 16  # rows decoded between two looks at how many bytes they have become
KEPT = 2  # row groups of a process


@dataclasses.dataclass(frozen=True)
class ParquetSource:
    """A `Source` of Parquet files, one after the other.

    ends: int64 [row groups]: the records up to the end of each. groups: int32 [row groups, 2]: file, and number in it.
    """

    path: Path
    images: Path
    files: tuple[Path, ...]
    ends: np.ndarray
    groups: np.ndarray
    columns: Columns | None = None

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        at = int(np.searchsorted(self.ends, index, side="right"))
        file, group = self.groups[at].tolist()
        table = _group(self.files[file], group, os.stat(self.files[file]).st_mtime_ns)
        row = index - (int(self.ends[at - 1]) if at else 0)
        if row >= table.num_rows:
            raise UsageError(f"{self.files[file]} has changed since it was opened; start the command again")
        return parse_record(table.slice(row, 1).to_pylist()[0], f"{self.path.stem}-{index}", self.columns)


def open_parquet(path: Path, images: Path, columns: Columns | None = None) -> Source:
    """A .parquet file, or a folder of them in the order of their names."""
    import pyarrow as pa  # not at the top: most runs read no Parquet
    import pyarrow.parquet as pq

    files = tuple(sorted(path.glob(PATTERN))) if path.is_dir() else (path,)
    counts, groups = [], []
    for number, file in enumerate(files):
        try:
            with pq.ParquetFile(file) as opened:
                footer = opened.metadata
                counts += [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
                groups += [(number, group) for group in range(footer.num_row_groups)]
        except pa.ArrowException as error:
            raise UsageError(f"data file {file} is no Parquet file, or damaged: {_line(error)}") from None
    if sum(counts) < 1:
        raise UsageError(f"data file {path} has no records; give one with at least one record")
    ends = np.cumsum(np.array(counts, np.int64))
    return ParquetSource(path, images, files, ends, np.array(groups, np.int32), columns)


@functools.lru_cache(maxsize=KEPT)
def _group(file: Path, group: int, changed: int) -> pa.Table:
    """A row group; a few bytes may claim to unfold into any number, so they are counted as they do. Its records are bad
    ("malformed") where it cannot be read.

    changed: when the file was, so that another state of it is not taken for this one.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    batches: list[pa.RecordBatch] = []
    size = 0
    try:
        with pq.ParquetFile(file) as opened:
            for batch in opened.iter_batches(STEP, row_groups=[group], use_threads=False):
                size += batch.nbytes
                if size > MAX_GROUP:
                    raise malformed(
                        f"row group {group} of {file} unfolds into more than {MAX_GROUP:,} bytes; write it anew with "
                        "smaller ones (pyarrow.parquet.write_table(..., row_group_size=100))"
                    )
                batches.append(batch)
            return pa.Table.from_batches(batches, opened.schema_arrow)
    except (pa.ArrowException, OSError) as error:
        raise malformed(f"row group {group} of {file} cannot be read: {_line(error)}") from None


def _line(error: Any) -> str:
    return " ".join(str(error).split())[:300]
