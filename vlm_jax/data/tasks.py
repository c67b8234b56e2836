"""Work in pieces that may be cut short: tasks that write one file each, the folder they write to, and where they run.

A task skips what is done and gives its file its name when it is complete, so that the same command goes on where it was
stopped; which is also what Apache Beam asks of work that it may repeat on other machines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from vlm_jax.data.reading import read
from vlm_jax.errors import UsageError

WORTH_A_PROCESS = 1000  # records: to start one takes seconds


class Task(Protocol):
    """Does item `number` of a pass unless it is done: writes one file. Returns what the user must be told, or ""."""

    def __call__(self, number: int) -> str: ...


# (task, how many items, what they are called, records of each) -> what the items returned, those done at least
Run = Callable[[Task, int, str, np.ndarray], Iterable[str]]


def finish(told: Iterable[str]) -> None:
    """Runs a pass to its end, or to the first item that could not be done."""
    for message in told:
        if message:
            raise UsageError(message)


def local(workers: int) -> Run:
    """Runs tasks in this many processes, with progress shown on a terminal."""

    def run(task: Task, items: int, what: str, records: np.ndarray) -> Iterator[str]:
        busy = min(workers, items, int(records.sum()) // WORTH_A_PROCESS)
        with (
            tqdm(total=int(records.sum()), unit="record", desc=what, disable=None) as bar,
            contextlib.closing(read(task, 0, items, busy if busy > 1 else 0, ahead=2 * max(busy, 1))) as told,
        ):
            for number, message in enumerate(told):
                yield message
                bar.update(int(records[number]))

    return run


def beam(runner: str, options: str, work: Path) -> Run:
    """Runs tasks as a Beam pipeline. options: of the pipeline, as on its command line (`--project=... --region=...`).

    Raises UsageError: apache-beam is not installed, or does not know the runner.
    """
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UsageError("--runner needs Apache Beam: pip install 'vlm_jax[beam]'") from None
    settings = PipelineOptions([f"--runner={runner}", *shlex.split(options)])

    def run(task: Task, items: int, what: str, records: np.ndarray) -> Iterator[str]:
        import apache_beam

        failed = work / "failed"
        shutil.rmtree(failed, ignore_errors=True)
        failed.mkdir()
        with apache_beam.Pipeline(options=settings) as pipeline:
            (
                pipeline
                | f"items to {what}" >> apache_beam.Create(range(items))
                | "spread" >> apache_beam.Reshuffle()
                | what >> apache_beam.Map(_Telling(task, failed))
            )
        yield from (file.read_text("utf-8") for file in sorted(failed.iterdir()))

    return run


@dataclasses.dataclass(frozen=True)
class _Telling:
    """A task whose messages come back as files: the folder is what every runner's workers share with the command."""

    task: Task
    failed: Path

    def __call__(self, number: int) -> None:
        if message := self.task(number):
            (self.failed / f"{number:06}").write_text(message, "utf-8")


@contextlib.contextmanager
def locked(work: Path) -> Iterator[None]:
    """One command at a time; the lock goes with the process, however that ends."""
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"another command is writing {work}; wait for it, or choose another --output") from None
        yield


def same_settings(work: Path, settings: dict[str, Any]) -> None:
    file = work / "settings.json"
    if not file.exists():
        with write_whole(file) as out:
            out.write(json.dumps(settings).encode())
        return
    before = json.loads(file.read_text())
    changed = [name for name in settings if before.get(name) != settings[name]]
    if changed:
        what = ", ".join("the source itself" if name == "files" else f"--{name}" for name in changed)
        raise UsageError(
            f"{work} was begun with something else ({what}): delete it to start anew, or repeat that command"
        )


def stamp(*paths: str | None) -> tuple[str, int]:
    """Tells whether files have changed: a digest of names, sizes and times, of a folder those of all files in it; and
    their bytes."""
    files: list[Path] = []
    for path in (Path(path).expanduser() for path in paths if path is not None):
        inside = (Path(place, name) for place, _, names in os.walk(path) for name in names)
        files += sorted(inside) if path.is_dir() else [path] if path.exists() else []
    found, size = hashlib.blake2b(), 0
    for file in files:
        status = file.lstat()
        size += status.st_size
        found.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return found.hexdigest(), size


class write_whole(io.BytesIO):
    """A small file that takes its name when it is complete: `with write_whole(path) as out: out.write(...)`."""

    def __init__(self, path: Path):
        super().__init__()
        self._path = path

    def __exit__(self, kind: Any, *args: Any) -> None:
        if kind is None:
            temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
            temporary.write_bytes(self.getvalue())
            temporary.replace(self._path)
        super().__exit__(kind, *args)
