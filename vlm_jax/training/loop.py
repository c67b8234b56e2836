"""The loop over the steps of one stage. It knows arrays, not what is in them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from vlm_jax.errors import Interrupted, NumericsError
from vlm_jax.training.checkpoint import Checkpoints
from vlm_jax.training.metrics import MetricWriter, Throughput
from vlm_jax.training.state import TrainState


class HostBatch(Protocol):
    """What the loop reads of a batch of the data pipeline."""

    @property
    def arrays(self) -> Mapping[str, np.ndarray]: ...
    @property
    def bucket(self) -> tuple[int, ...]: ...
    @property
    def samples(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def real_tokens(self) -> int: ...
    @property
    def bad(self) -> Mapping[str, int]: ...


class StopSignal:
    """Remembers that the run was asked to stop: SIGTERM, or the first Ctrl-C. A second Ctrl-C stops at once."""

    NOTICE = b"\nstopping after this step; Ctrl-C again stops at once, without saving\n"

    def __init__(self) -> None:
        self.requested: str | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopSignal]:
        """Listens while the block runs. Outside of the main thread there are no signals to listen to."""

        def ask(number: int, frame: Any) -> None:
            if number == signal.SIGINT:
                if self.requested is not None:
                    raise KeyboardInterrupt
                os.write(2, self.NOTICE)  # print is not safe in a signal handler
            self.requested = signal.Signals(number).name

        try:
            before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:
            before = {}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Raises Interrupted when asked to stop, for what holds nothing that must be saved first."""
        if self.requested:
            raise Interrupted(
                f"{self.requested}: everything trained so far is saved; the same command goes on from there"
            )


@dataclasses.dataclass(frozen=True)
class StageRun:
    """Everything the loop of a stage needs.

    batches: `start_step -> HostBatch, ...` up to the last step.
    place: host arrays -> device arrays.
    step: the train step. learning_rates: step -> metrics of the schedule.
    samples: step -> samples delivered by then, those that could not be used included.
    flops: host arrays -> model FLOPs of this process's rows.
    evaluate: `(state, step) -> results`, called every `eval_every` steps (0: never), not after the last. May raise
      Interrupted when asked to stop; the loop then saves.
    """

    name: str
    steps: int
    batches: Callable[[int], Generator[Any, None, None]]
    place: Callable[[Mapping[str, np.ndarray]], dict[str, jax.Array]]
    step: Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]
    learning_rates: Callable[[int], Mapping[str, float]]
    samples: Callable[[int], int]
    flops: Callable[[Mapping[str, np.ndarray]], float]
    evaluate: Callable[[TrainState, int], Mapping[str, Any]]
    log_every: int
    eval_every: int
    save_every: int


def run_stage(
    run: StageRun, state: TrainState, checkpoints: Checkpoints, writer: MetricWriter, stop: StopSignal
) -> TrainState:
    """Runs from the step of `state` to the last, and saves the result.

    Raises Interrupted when asked to stop, after saving; NumericsError when the loss is not finite.
    """
    step = int(state.step)
    start = step
    device = jax.devices()[0]
    throughput = Throughput(device_kind=device.device_kind, devices=jax.device_count())
    writer.start_stage(run.name, run.steps, step=step)
    bad: Mapping[str, int] = {}
    with contextlib.closing(run.batches(step)) as batches:
        while step < run.steps and not stop.requested:
            with throughput.waiting():
                batch: HostBatch = next(batches)
                bad = {f"records/{kind}": count for kind, count in batch.bad.items() if count}
                arrays = run.place(batch.arrays)
            state, metrics = run.step(state, arrays)
            step += 1
            throughput.add(
                tokens=batch.real_tokens,
                positions=batch.tokens,
                samples=batch.samples,
                flops=run.flops(batch.arrays) * jax.process_count(),
            )
            if step % run.log_every == 0 or step == run.steps or step == start + 1:
                values = {name: float(value) for name, value in metrics.items()}
                _check(values, run.name, step)
                rates = throughput.rates(steps_left=run.steps - step)
                writer.step(
                    step, {"samples": run.samples(step), **values, **run.learning_rates(step - 1), **rates, **bad}
                )
            with throughput.paused():
                if run.eval_every and step % run.eval_every == 0 and step < run.steps:
                    with contextlib.suppress(Interrupted):
                        writer.evaluation(step, run.evaluate(state, step))
                if step % run.save_every == 0 and step < run.steps:
                    checkpoints.save(state, {"stage": run.name, "steps": run.steps})
    if step > start or checkpoints.latest() is None:
        checkpoints.save(state, {"stage": run.name, "steps": run.steps})
    checkpoints.wait()
    if bad:
        counts = ", ".join(f"{count:,} {name.removeprefix('records/')}" for name, count in bad.items())
        writer.say(f"stage {run.name}: records with something wrong, listed in bad_records-*.jsonl: {counts}")
    if stop.requested and step < run.steps:
        raise Interrupted(
            f"{stop.requested}: stage {run.name!r} is saved at step {step} of {run.steps}; "
            "the same command goes on from there"
        )
    return state


def _check(values: Mapping[str, float], stage: str, step: int) -> None:
    if not math.isfinite(values["loss"]):
        raise NumericsError(
            f"the loss of stage {stage!r} is {values['loss']} at step {step}; lower the learning rate, set "
            "--config.optimizer.clip_norm=1.0, or look at the data around that step"
        )
