"""python -m vlm_jax.data.prepare --from=KIND SOURCE --output=DIR [--images=DIR] [--validation=0.02] [--seed=0] ...

Makes shards of a data set of any kind: DIR/train and DIR/validation, each for --config.data.train or .eval. Records
that share an image go to one side. What cannot be used is listed in DIR/bad_records.jsonl; above 1 % of the records,
nothing is made. Stopped at any time, the same command goes on, and its result is that of an unbroken run.
docs/guides/prepare_your_data.md shows it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vlm_jax.config import REQUIRED, parse_command
from vlm_jax.data.preparing import Outcome, prepare
from vlm_jax.data.sources import Source, Unconfined, open_source
from vlm_jax.data.sources.shards import INDEX
from vlm_jax.data.sources.webdataset import open_tars
from vlm_jax.data.tables import TABLES, Table, open_table
from vlm_jax.data.tasks import Run, beam, local, locked, same_settings, stamp
from vlm_jax.errors import Interrupted, UsageError, run_command

# What the training reads as well, and here only becomes shards.
READ_ALREADY = ("json", "parquet", "tfds")
KINDS = (*READ_ALREADY, *TABLES, "webdataset")
MEGABYTE = 1_000_000
COLUMN_FLAGS = ("image_column", "question_column", "answer_column", "caption_column")
# Flags that belong to some kinds alone.
OWN = {
    "images": (*READ_ALREADY, "csv", "coco", "vqa"),
    "question": (*TABLES, "webdataset"),
    "annotations": ("vqa",),
    **dict.fromkeys(COLUMN_FLAGS, ("csv",)),
}
# What the records, and their order and sides, do not depend on.
FREE = ("output", "workers", "max_bad_fraction", "runner", "runner_options")

WORDS = {"source": "the file or folder to read; of webdataset also a pattern, '{00..41}.tar' in quotes; of tfds a name"}
FLAGS = {
    "from": (KINDS, REQUIRED, "json: any file or folder of records that training reads; the others are what they say"),
    "output": (str, REQUIRED, "a folder that does not exist"),
    "images": (str, None, "the folder that image paths are relative to, if not the source's own"),
    "confined": (bool, True, "false: images may lie outside of that folder"),
    "validation": (float, 0.02, "the fraction of the records that is held out, whole groups that share images; or 0"),
    "seed": (int, 0, "of the division"),
    "question": (str, None, "what the user asks; {question} in it is the question of the data"),
    "annotations": (str, None, "of vqa: the file of the answers"),
    "image_column": (str, None, "of csv, if its name does not tell"),
    "question_column": (str, None, "of csv, if its name does not tell"),
    "answer_column": (str, None, "of csv, if its name does not tell"),
    "caption_column": (str, None, "of csv, if its name does not tell"),
    "shard_mb": (int, 256, "size of a shard in megabytes, about"),
    "max_bad_fraction": (float, 0.01, "how many of the records may be unusable"),
    "workers": (int, None, "processes, as many as there are cores if not given"),
    "runner": (str, None, "an Apache Beam runner instead of processes: DirectRunner, DataflowRunner, SparkRunner, ..."),
    "runner_options": (str, "", "of Beam's pipeline, in quotes: '--project=mine --region=europe-west4'"),
}


def main(argv: Sequence[str]) -> None:
    given = parse_command(argv, FLAGS, words=WORDS, usage=__doc__ or "")
    kind = vars(given)["from"]
    _check(given, kind)
    output = Path(given.output).expanduser()
    work = output.with_name(f"{output.name}.preparing")
    files, size = stamp(given.source, given.annotations)
    made_from = {name: value for name, value in vars(given).items() if name not in FREE} | {"source_bytes": size}
    if output.exists():
        _leave(output, made_from)
        shutil.rmtree(work, ignore_errors=True)
        return
    workers = given.workers or os.cpu_count() or 1
    run = beam(given.runner, given.runner_options, work) if given.runner else local(workers)
    began = time.monotonic()
    with locked(work):
        same_settings(work, {**made_from, "files": files})
        try:
            source, bad = _open(kind, given, work, run)
            outcome = prepare(
                source,
                work,
                run,
                validation=given.validation,
                seed=given.seed,
                shard_bytes=given.shard_mb * MEGABYTE,
                max_bad_fraction=given.max_bad_fraction,
                already_bad=bad,
                made_from=made_from,
            )
        except KeyboardInterrupt:
            raise Interrupted(f"{work} holds what is done; the same command goes on from there") from None
        (work / "result").rename(output)
        shutil.rmtree(work)
    _tell(output, outcome, time.monotonic() - began)


def _check(given: SimpleNamespace, kind: str) -> None:
    """Everything that the words of the command alone can tell."""
    for name, kinds in OWN.items():
        if kind not in kinds and vars(given)[name] is not None:
            raise UsageError(f"--{name} belongs to --from={' or '.join(kinds)}, not to {kind}")
    if not 0 <= given.validation < 1:
        raise UsageError(f"--validation is {given.validation}; give a fraction below 1, or 0 to hold nothing out")
    if not 0 <= given.max_bad_fraction <= 1:
        raise UsageError(f"--max_bad_fraction is {given.max_bad_fraction}; give a fraction of the records, 0 to 1")
    if given.seed < 0 or given.shard_mb < 1 or (given.workers is not None and given.workers < 1):
        raise UsageError("--seed must be 0 or more, --shard_mb and --workers at least 1")
    if given.runner_options and given.runner is None:
        raise UsageError("--runner_options belong to --runner, which is missing")
    source, output = (Path(path).expanduser().resolve() for path in (given.source, given.output))
    if source.is_dir() and output.is_relative_to(source):
        raise UsageError(f"--output={given.output} lies in the source, and would be read as part of it; choose another")
    if given.images is not None and not Path(given.images).expanduser().is_dir():
        raise UsageError(f"the images folder {given.images} does not exist; correct --images")


# ----------------------------------------------------------------------------------------------------- opening a source


def _open(kind: str, given: SimpleNamespace, work: Path, run: Run) -> tuple[Source, list[str]]:
    """The source, and JSON lines of what never became a record of it. Leaves no folder behind when there is none."""
    try:
        if kind in READ_ALREADY:
            name = given.source if kind != "tfds" or given.source.startswith("tfds:") else f"tfds:{given.source}"
            return open_source(name, given.images, confined=given.confined), []
        if kind == "webdataset":
            return open_tars(given.source, given.question, work, run, _note), []
        path = Path(given.source).expanduser()
        folder = Path(given.images).expanduser() if given.images else path if path.is_dir() else path.parent
        columns = {flag.removesuffix("_column"): vars(given)[flag] for flag in COLUMN_FLAGS}
        table = Table(
            path,
            folder,
            given.question,
            {ours: theirs for ours, theirs in columns.items() if theirs is not None},
            Path(given.annotations).expanduser() if given.annotations else None,
            _note,
        )
        source, bad = open_table(kind, table, work)
        return source if given.confined else Unconfined(source), bad
    except OSError as error:
        shutil.rmtree(work)
        raise UsageError(f"{error.filename} cannot be read ({error.strerror}); correct the path") from None
    except UsageError:
        shutil.rmtree(work)
        raise


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _leave(output: Path, made_from: dict[str, Any]) -> None:
    """What to do with an output that exists: nothing if it is what was asked for."""
    try:
        before = json.loads((output / "train" / INDEX).read_text("utf-8"))["made_from"]
    except (OSError, ValueError, KeyError):
        raise UsageError(f"{output} exists and was not made by this command; choose another --output") from None
    changed = [name for name in made_from if before.get(name) != made_from[name]]
    if changed:
        what = ", ".join(f"--{name}" for name in changed)
        raise UsageError(f"{output} exists and was made with other settings ({what}); delete it, or choose another")
    print(f"{output} is made already; delete it to make it anew", file=sys.stderr)


def _tell(output: Path, outcome: Outcome, seconds: float) -> None:
    sides = [
        f"{output / side}: {count:,} records in {outcome.shards[side]:,} shards"
        for side, count in outcome.records.items()
        if count
    ]
    print("\n".join(sides))
    bad = ", ".join(f"{count:,} {kind}" for kind, count in outcome.bad.items())
    listed = f"; not used, and listed in {output / 'bad_records.jsonl'}: {bad}" if bad else ""
    print(f"{seconds:.0f} s{listed}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
