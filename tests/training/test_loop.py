"""The loop of a stage: when it logs, evaluates and saves, and how it ends when asked to stop or the loss breaks."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vlm_jax.errors import Interrupted, NumericsError
from vlm_jax.training.loop import StageRun, StopSignal, run_stage


class Recorder:
    """Stands for checkpoints, writer and data, and remembers in order what the loop does with them."""

    def __init__(self, *, saved: int | None = None):
        self.events: list[tuple[str, Any]] = []
        self.logged: dict[int, dict[str, Any]] = {}
        self._saved = saved

    def latest(self) -> int | None:
        return self._saved

    def save(self, state: Any, meta: dict[str, Any]) -> None:
        assert meta == {"stage": "align", "steps": 6}
        self._saved = int(state.step)
        self.events.append(("save", self._saved))

    def wait(self) -> None:
        self.events.append(("wait", None))

    def start_stage(self, stage: str, total: int, *, step: int) -> None:
        self.events.append(("start", (stage, total, step)))

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        self.logged[step] = metrics
        self.events.append(("log", step))

    def evaluation(self, step: int, results: dict[str, Any]) -> None:
        self.events.append(("evaluation", step))

    def batches(self, start: int) -> Generator[Any]:
        self.events.append(("read", start))
        try:
            while True:
                yield SimpleNamespace(arrays={}, bucket=(8, 1), samples=4, tokens=32, real_tokens=20, bad={})
        finally:
            self.events.append(("closed", None))


def run(
    recorder: Recorder,
    *,
    stop: StopSignal | None = None,
    start: int = 0,
    loss: Callable[[int], float] = lambda step: 1.0 / step,
    after_step: Callable[[int], None] = lambda step: None,
    evaluate: Callable[[Any, int], Any] = lambda state, step: {"loss": 0.5},
    **settings: int,
) -> Any:
    def step(state: Any, arrays: Any) -> tuple[Any, dict[str, Any]]:
        after_step(state.step + 1)
        return SimpleNamespace(step=state.step + 1), {"loss": np.float32(loss(state.step + 1)), "grad_norm": 2.0}

    stage = StageRun(
        name="align",
        steps=6,
        batches=recorder.batches,
        place=dict,
        step=step,
        learning_rates=lambda at: {"learning_rate": 0.1 * at},
        samples=lambda steps: 4 * steps,
        flops=lambda arrays: 0.0,
        evaluate=evaluate,
        **({"log_every": 4, "eval_every": 3, "save_every": 2} | settings),
    )
    return run_stage(stage, SimpleNamespace(step=start), recorder, recorder, stop or StopSignal())  # type: ignore[arg-type]


def test_it_logs_evaluates_and_saves_at_its_intervals_and_at_the_end() -> None:
    recorder = Recorder()
    assert run(recorder).step == 6
    # The last step is saved, and evaluated by the command's end; the first one shows that it runs.
    assert recorder.events == [
        ("start", ("align", 6, 0)),
        ("read", 0),
        ("log", 1),
        ("save", 2),
        ("evaluation", 3),
        ("log", 4),
        ("save", 4),
        ("log", 6),
        ("closed", None),
        ("save", 6),
        ("wait", None),
    ]
    last = recorder.logged[6]
    assert (last["samples"], last["learning_rate"], last["grad_norm"]) == (24, 0.5, 2.0)
    assert last["loss"] == pytest.approx(1 / 6) and last["eta_seconds"] == 0
    assert last["real_token_fraction"] == 20 / 32


def test_it_goes_on_after_the_step_of_its_state() -> None:
    recorder = Recorder(saved=4)
    run(recorder, start=4, eval_every=0)
    assert recorder.events[:3] == [("start", ("align", 6, 4)), ("read", 4), ("log", 5)]
    assert [event for event in recorder.events if event[0] == "save"] == [("save", 6)]


def test_a_finished_stage_is_left_alone() -> None:
    recorder = Recorder(saved=6)
    assert run(recorder, start=6).step == 6
    assert not [event for event in recorder.events if event[0] in ("log", "save", "evaluation")]


def test_asked_to_stop_it_saves_and_says_where() -> None:
    recorder, stop = Recorder(), StopSignal()

    def ask(step: int) -> None:
        stop.requested = "SIGTERM" if step == 3 else None

    with pytest.raises(
        Interrupted, match=r"SIGTERM: stage 'align' is saved at step 3 of 6; the same command"
    ) as raised:
        run(recorder, stop=stop, after_step=ask, eval_every=0)
    assert raised.value.exit_status == 42
    assert recorder.events[-3:] == [("closed", None), ("save", 3), ("wait", None)]


def test_asked_to_stop_before_the_first_step_it_saves_the_beginning() -> None:
    recorder, stop = Recorder(), StopSignal()
    stop.requested = "SIGINT"
    with pytest.raises(Interrupted, match="step 0 of 6"):
        run(recorder, stop=stop)
    assert ("save", 0) in recorder.events and not recorder.logged


def test_asked_to_stop_in_the_last_step_it_ends_as_usual() -> None:
    stop = StopSignal()

    def ask(step: int) -> None:
        stop.requested = "SIGTERM" if step == 6 else None

    assert run(Recorder(), stop=stop, after_step=ask).step == 6


def test_a_stop_cuts_an_evaluation_short_and_still_saves() -> None:
    recorder, stop = Recorder(), StopSignal()

    def evaluate(state: Any, step: int) -> dict[str, float]:
        stop.requested = "SIGTERM"
        stop.check()
        return {}

    with pytest.raises(Interrupted, match="saved at step 3 of 6"):
        run(recorder, stop=stop, evaluate=evaluate)
    assert ("evaluation", 3) not in recorder.events and recorder.events[-2:] == [("save", 3), ("wait", None)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run_with_a_way_out(value: float) -> None:
    recorder = Recorder()
    with pytest.raises(NumericsError, match=rf"stage 'align' is {value} at step 4; lower the learning rate") as raised:
        run(recorder, loss=lambda step: value if step > 2 else 1.0, eval_every=0, save_every=10)
    assert raised.value.exit_status == 3
    assert recorder.events[-1] == ("closed", None) and not [e for e in recorder.events if e[0] == "save"]


def test_the_first_ctrl_c_asks_and_the_second_stops_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignal().listening() as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "SIGINT"
        with pytest.raises(Interrupted, match="the same command goes on"):
            stop.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert capfd.readouterr().err.count("Ctrl-C again stops at once") == 1


def test_sigterm_asks_each_time() -> None:
    with StopSignal().listening() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == "SIGTERM"


def test_outside_of_the_main_thread_it_listens_to_nothing() -> None:
    found: list[str | None] = ["not run"]

    def listen() -> None:
        with StopSignal().listening() as stop:
            found[0] = stop.requested

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [None]
