"""The list of records that could not be used: one JSON line each, and how many there may be before a run stops."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_jax.data.records import BAD_KINDS, TOLERATED
from vlm_jax.errors import UsageError

KINDS = tuple(BAD_KINDS)
EXAMPLES = 3


class BadRecordList:
    """`bad_records-<process>.jsonl` in a folder: {"stage", "step", "id", "source", "kind", "message"} per record.

    A record is listed when the batch it would have been in is delivered. Opened at step s of a stage, the stage's lines
    of step s and later are removed, since a resumed run delivers those batches again; so nothing is listed twice. The
    lines of other stages stay. The files of a run with more processes are divided among the processes there are now.

    counts: by kind, of this stage and this process's files. examples: the first lines of what may stop a run.
    """

    def __init__(
        self, folder: str | os.PathLike | None, step: int, process: int = 0, processes: int = 1, stage: str = ""
    ):
        self._stage = stage
        self.counts: Counter[str] = Counter()
        self.examples: list[Mapping[str, Any]] = []
        self._file = None
        if folder is None:
            return
        self._file = Path(folder) / f"bad_records-{process}.jsonl"
        for file in sorted(Path(folder).glob("bad_records-*.jsonl")):
            number = file.stem.removeprefix("bad_records-")
            if number.isdecimal() and int(number) % processes == process:
                kept = [line for line in _lines(file) if line["stage"] != stage or line["step"] < step]
                temporary = file.with_suffix(".tmp")
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
                temporary.replace(file)
                self._count([line for line in kept if line["stage"] == stage])

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        lines = [{"stage": self._stage, **line} for line in lines]
        self._count(lines)
        if self._file is not None and lines:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))

    def _count(self, lines: Iterable[Mapping[str, Any]]) -> None:
        for line in lines:
            self.counts[line["kind"]] += 1
            if len(self.examples) < EXAMPLES and line["kind"] not in TOLERATED:
                self.examples.append(line)

    def check(self, counts: Mapping[str, int], seen: int, samples: int, allowed: float) -> None:
        """Raises UsageError when too many records are bad.

        counts: by kind, of all processes. seen: samples delivered so far. samples: of an epoch. allowed: the fraction
          of those seen that may be bad; of the first thousand (or the whole set) from the start. Tolerated kinds do not
          count, unless every record is dropped.
        """
        first = max(seen, min(1000, samples))
        if counts.get("mismatch", 0) >= first:
            raise UsageError(
                f"compat_drop_mismatch drops all of the first {first} records, as LLaVA does with this template; set "
                "compat_drop_mismatch=False in the stage"
            )
        counts = {kind: count for kind, count in counts.items() if kind not in TOLERATED}
        bad = sum(counts.values())
        if bad <= allowed * first:
            return
        kinds = "; ".join(f"{count} {kind} ({BAD_KINDS[kind]})" for kind, count in counts.items() if count)
        where = f", all listed in {self._file.with_name('bad_records-*.jsonl')}" if self._file is not None else ""
        shown = "".join(f" First: {line['id']!r} of {line['source']}: {line['message']}." for line in self.examples[:1])
        shown += "".join(f" Then: {line['id']!r}: {line['message']}." for line in self.examples[1:])
        raise UsageError(
            f"{bad} of {seen} records cannot be used, more than data.max_bad_fraction={allowed:g} allows: "
            f"{kinds}{where}.{shown}"
        )


def _lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; a run that was killed may have left half a line at its end."""
    lines = []
    for line in file.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
