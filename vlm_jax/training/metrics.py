"""What a run tells about itself (metrics.jsonl, TensorBoard, W&B if asked, the terminal), and how fast it goes.

A run never dies of its own log: a writer that fails (a full disk, a service that is away) says so once, and training
goes on.

Model FLOPs utilisation (`mfu`) is model FLOPs / (time x peak dense bf16 FLOP/s of the devices), null where PEAK_FLOPS
has no row, as on a CPU. Model FLOPs are the sum of 2mnk over the matrix products on real positions: x 3 where the
weights are trained, x 2 where they are frozen but crossed by the gradient, x 1 where not crossed; embedding look-ups,
recomputation, padding tokens and padding tiles count 0; attention counts visible pairs per segment (x 3 if a gradient
crosses it, else x 1).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath
from tqdm import tqdm

from vlm_jax.errors import UsageError

# Peak dense bf16 FLOP/s per jax device, by a pattern of `device_kind`; the first that matches counts.
# Sources: NVIDIA's data sheets of each card (the figure without sparsity); Google Cloud TPU's page of each version.
# A TPU v4 or v5p chip is one device (megacore); a tpu7x chip is two, its page's 2,307e12 halved.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    (r"TPU v4\b(?! lite)", 275e12),
    (r"TPU v5 ?(lite|e)", 197e12),
    (r"TPU v5p?\b", 459e12),
    (r"TPU v6 ?(lite|e)", 918e12),
    (r"TPU ?v?7x?\b", 1153.5e12),
    (r"A100", 312e12),
    (r"H[12]00 NVL", 835e12),
    (r"H100 PCIe", 756e12),
    (r"GH200|H100|H200", 989e12),
    (r"GB200", 2500e12),
    (r"B200", 2250e12),
    (r"\bL4\b", 121e12),
    (r"\bL40S\b", 362e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bf16 FLOP/s of one device, by its `jax.Device.device_kind`; None where we know none."""
    return next((flops for pattern, flops in PEAK_FLOPS if re.search(pattern, device_kind, re.IGNORECASE)), None)


def device_memory_peak() -> int | None:
    """The most bytes that any device of this process has held, or None where the platform does not say (CPU)."""
    import jax

    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [one["peak_bytes_in_use"] for one in stats if one and "peak_bytes_in_use" in one]
    return max(peaks, default=None)


class Throughput:
    """Tokens, samples and waiting between two logged steps.

    Counts are of the whole job, all hosts together. `device_kind` and `devices` (of all hosts) give the peak for `mfu`.
    """

    def __init__(
        self, *, device_kind: str | None = None, devices: int = 1, clock: Callable[[], float] = time.perf_counter
    ):
        peak = peak_flops(device_kind) if device_kind else None
        self._peak = peak * devices if peak else None
        self._clock = clock
        self._seconds_per_step: float | None = None
        self._windows = 0
        self._clear()

    def _clear(self) -> None:
        self._since = self._clock()
        self._paused = self._waited = 0.0
        self._steps = self._tokens = self._positions = self._samples = 0
        self._flops = 0.0

    def add(self, *, tokens: int, positions: int, samples: int, flops: float = 0.0, steps: int = 1) -> None:
        """Counts `steps` steps: `tokens` real positions of `positions` in all (padding included), model FLOPs."""
        self._steps += steps
        self._tokens += tokens
        self._positions += positions
        self._samples += samples
        self._flops += flops

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The time inside is spent waiting for data."""
        start = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside (evaluation, saving) does not count."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    def rates(self, *, steps_left: int | None = None) -> dict[str, float | int | None]:
        """The rates since the last call, under the names of metrics.jsonl, and a new start.

        `tokens_per_second` counts real tokens (text and visual), not padding. `eta_seconds` follows a moving average;
        the first window, which holds the compilation, leaves it once there is a second.
        """
        seconds = max(self._clock() - self._since - self._paused, 1e-9)
        if self._steps:
            now = seconds / self._steps
            smooth = self._windows >= 2 and self._seconds_per_step is not None
            self._seconds_per_step = 0.7 * self._seconds_per_step + 0.3 * now if smooth else now  # type: ignore[operator]
            self._windows += 1
        known = self._seconds_per_step is not None and steps_left is not None
        rates = {
            "tokens_per_second": self._tokens / seconds,
            "samples_per_second": self._samples / seconds,
            "mfu": self._flops / seconds / self._peak if self._peak and self._flops else None,
            "real_token_fraction": self._tokens / self._positions if self._positions else None,
            "data_wait_fraction": min(self._waited / seconds, 1.0),
            "device_memory_peak": device_memory_peak(),
            "eta_seconds": steps_left * self._seconds_per_step if known else None,  # type: ignore[operator]
        }
        self._clear()
        return rates


# ----------------------------------------------------------------------------------------------------------- records


def scalar(value: Any) -> Any:
    """A metric as JSON holds it: NaN and infinities are null, arrays of one element their element."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if hasattr(value, "item"):
        value = value.item() if value.size == 1 else value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a line that a kill cut short is left out. No file: no records."""
    file = epath.Path(path)
    records = []
    for line in file.read_text().splitlines() if file.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def records_before(records: Sequence[Mapping[str, Any]], stage: str, step: int) -> list[Mapping[str, Any]]:
    """What stays when `stage` is taken up after `step`: its lines up to there, and the stages before it."""
    names = list(dict.fromkeys(record.get("stage") for record in records))
    earlier = set(names[: names.index(stage)] if stage in names else names)
    return [r for r in records if r.get("stage") in earlier or (r.get("stage") == stage and r.get("step", 0) <= step)]


# ----------------------------------------------------------------------------------------------------------- writers


class _JsonLines:
    """metrics.jsonl: appended and flushed line by line. An object store cannot append: there the whole file is written
    again, at most every `every` seconds and at the end."""

    def __init__(self, path: epath.Path, every: float = 30.0):
        self._path = path
        self._remote = "://" in os.fspath(path)
        self._every = every
        self._written = -math.inf
        self._lines: list[str] = []
        self._torn = False

    def start_stage(self, stage: str, step: int) -> None:
        if not self._path.exists():
            return
        self._torn = True  # if this fails, the last line may be half a line
        kept = [json.dumps(record) + "\n" for record in records_before(read_metrics(self._path), stage, step)]
        if self._remote:
            self._lines = kept
            self.close()
        else:
            aside = self._path.parent / (self._path.name + ".tmp")
            aside.write_text("".join(kept))
            aside.replace(self._path)
        self._torn = False

    def write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record, allow_nan=False) + "\n"
        if self._remote:
            self._lines.append(line)
            if time.monotonic() - self._written > self._every:
                self.close()
            return
        # Opened for each line, so that a file moved or deleted meanwhile is not written into the void.
        torn, self._torn = self._torn, True
        with open(self._path, "a", encoding="utf-8") as file:
            file.write("\n" + line if torn else line)
        self._torn = False

    def close(self) -> None:
        if self._remote:
            self._written = time.monotonic()
            self._path.write_text("".join(self._lines))


class _TensorBoard:
    """One TensorBoard run per stage, so that each has its own steps and a resume purges only its own.

    Events are written synchronously: tensorboardX's queue blocks for ever once its thread has met a full disk.
    """

    def __init__(self, folder: epath.Path):
        self._folder = folder
        self._writer: Any = None

    def start_stage(self, stage: str, step: int) -> None:
        from tensorboardX import event_file_writer
        from tensorboardX.proto import event_pb2

        self.close()
        folder = os.fspath(self._folder / stage)
        event_file_writer.directory_check(folder)
        self._writer = event_file_writer.EventsWriter(os.path.join(folder, "events"), f".{os.getpid()}.{step}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        # A reader drops what earlier files hold at this step and after it.
        self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, record: Mapping[str, Any]) -> None:
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar as scalar_summary

        for name, value in record.items():
            if name in ("step", "stage", "time") or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            event = event_pb2.Event(wall_time=time.time(), step=record["step"], summary=scalar_summary(name, value))
            self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class _Wandb:
    """Weights & Biases; `settings` are the arguments of wandb.init, or the name of the project."""

    def __init__(self, settings: str | Mapping[str, Any], workdir: epath.Path, config: Mapping[str, Any] | None):
        try:
            import wandb
        except ImportError:
            raise UsageError("config.log.wandb is set but wandb is not installed: pip install wandb") from None
        arguments = {"project": settings} if isinstance(settings, str) else dict(settings)
        # The same folder is the same run, so that a resumed run goes on in one curve.
        name = re.sub(r"[^\w.-]+", "-", os.fspath(workdir).strip("/"))
        arguments = {"name": workdir.name, "id": name[-120:], "resume": "allow", **arguments}
        self._run = wandb.init(config=dict(config or {}), **arguments)

    def start_stage(self, stage: str, step: int) -> None:
        self._run.define_metric(f"{stage}/step")
        self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def write(self, record: Mapping[str, Any]) -> None:
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "time"}
        self._run.log({f"{record['stage']}/{name}": value for name, value in numbers.items()})

    def close(self) -> None:
        self._run.finish()


def _shows_a_bar() -> bool:
    """True where stderr is a terminal of known size: in one of 0 columns, as containers give, a bar is invisible."""
    try:
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):
        return False


class _Terminal:
    """A progress bar where stderr is a terminal, else one plain line per logged step on stdout."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._stage, self._total = "", 0

    def start_stage(self, stage: str, step: int, total: int) -> None:
        self.close()
        self._stage, self._total = stage, total
        if _shows_a_bar():
            self._bar = tqdm(total=total, initial=step, desc=stage, unit="step", dynamic_ncols=True)

    def step(self, record: Mapping[str, Any]) -> None:
        if self._bar is None:
            self.say(f"stage {self._stage} step {record['step']}/{self._total} {describe(record)}")
            return
        self._bar.set_postfix_str(describe({k: v for k, v in record.items() if k != "eta_seconds"}), refresh=False)
        self._bar.update(record["step"] - self._bar.n)

    def evaluation(self, step: int, results: Mapping[str, Any]) -> None:
        shown = " ".join(f"{name} {number(value)}" for name, value in results.items() if isinstance(value, int | float))
        self.say(f"stage {self._stage} step {step}/{self._total} held-out {shown}")

    def say(self, text: str) -> None:
        if self._bar is None:
            print(text, flush=True)
        else:
            tqdm.write(text, file=sys.stdout)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def number(value: float | int | None) -> str:
    """Four significant digits; `nan` for None."""
    if value is None:
        return "nan"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def duration(seconds: float) -> str:
    """`1m20s`, `2h05m`, `3d04h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def describe(record: Mapping[str, Any]) -> str:
    """`loss 0.512 lr 1.0e-03 1,234 tok/s eta 1m20s` of a logged step."""
    parts = [f"loss {number(record['loss'])}"] if "loss" in record else []
    if record.get("learning_rate") is not None:
        parts.append(f"lr {record['learning_rate']:.1e}")
    if record.get("tokens_per_second") is not None:
        parts.append(f"{record['tokens_per_second']:,.0f} tok/s")
    if record.get("mfu") is not None:
        parts.append(f"mfu {record['mfu']:.1%}")
    if record.get("eta_seconds") is not None:
        parts.append(f"eta {duration(record['eta_seconds'])}")
    return " ".join(parts)


class MetricWriter:
    """Everything that a run says about itself, in all places at once.

    `start_stage` comes first, also after a resume: it takes back what a killed run wrote beyond the step that was
    restored, so that no step stands twice.

    Args:
      workdir: gets metrics.jsonl and tensorboard/<stage>/. May be `gs://`.
      enabled: False on all processes but the first: nothing is written or printed.
      tensorboard: whether to write events.
      wandb: the project's name or the arguments of `wandb.init`; None: W&B is not even imported.
      config: what W&B shows as the run's settings.
      quiet: nothing on the terminal.

    Raises:
      UsageError: W&B is asked for and not installed.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        enabled: bool = True,
        tensorboard: bool = True,
        wandb: str | Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        quiet: bool = False,
    ):
        folder = epath.Path(workdir)
        self._sinks: dict[str, Any] = {}
        self._warned: set[str] = set()
        self._stage: str | None = None
        self._terminal = _Terminal() if enabled and not quiet else None
        if not enabled:
            return
        self._sinks["metrics.jsonl"] = _JsonLines(folder / "metrics.jsonl")
        if tensorboard:
            self._sinks["TensorBoard"] = _TensorBoard(folder / "tensorboard")
        if wandb:
            self._guard("W&B", lambda: self._sinks.update({"W&B": _Wandb(wandb, folder, config)}))
        self._guard("metrics.jsonl", lambda: folder.mkdir(parents=True, exist_ok=True))

    def start_stage(self, stage: str, total_steps: int, *, step: int = 0) -> None:
        """The records that follow belong to `stage`, whose step `step` (0: none yet) was the last one done."""
        self._stage = stage
        for name, sink in list(self._sinks.items()):
            self._guard(name, lambda sink=sink: sink.start_stage(stage, step))  # type: ignore[misc]
        if self._terminal:
            self._terminal.start_stage(stage, step, total_steps)

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Logs a training step: a scalar per name, NaN written as null."""
        record = self._write(step, metrics)
        if self._terminal:
            self._terminal.step(record)

    def evaluation(self, step: int, results: Mapping[str, Any]) -> None:
        """Logs held-out results; their names get the prefix `eval/`."""
        record = self._write(step, {f"eval/{name}": value for name, value in results.items()})
        if self._terminal:
            self._terminal.evaluation(
                step, {name.removeprefix("eval/"): record[name] for name in record if "/" in name}
            )

    def say(self, text: str) -> None:
        """Prints a line without breaking the progress bar."""
        if self._terminal:
            self._terminal.say(text)

    def close(self) -> None:
        """Flushes and ends all of it; safe to call twice."""
        for name, sink in list(self._sinks.items()):
            self._guard(name, sink.close)
        self._sinks.clear()
        if self._terminal:
            self._terminal.close()

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _write(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        if self._stage is None:
            raise RuntimeError("MetricWriter.start_stage must be called before anything is logged")
        record: dict[str, Any] = {"stage": self._stage, "step": int(step), "time": round(time.time(), 3)}
        record |= {name: scalar(value) for name, value in metrics.items()}
        for name, sink in list(self._sinks.items()):
            self._guard(name, lambda sink=sink: sink.write(record))  # type: ignore[misc]
        return record

    def _guard(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except UsageError:
            raise
        except Exception as error:
            if name not in self._warned:
                self._warned.add(name)
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                print(f"warning: writing {name} failed, training goes on ({reason})", file=sys.stderr, flush=True)
            # The file of metrics is tried again: a disk gets room. The others may be half-way through a record.
            if name != "metrics.jsonl":
                self._sinks.pop(name, None)
