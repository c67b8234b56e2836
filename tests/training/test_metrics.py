"""A run's record has each step once, survives what fails around it, and counts speed as it says."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_jax.errors import UsageError
from vlm_jax.training import metrics
from vlm_jax.training.metrics import (
    MetricWriter,
    Throughput,
    describe,
    duration,
    peak_flops,
    read_metrics,
    records_before,
)
from vlm_jax.training.plots import plot_curves, plot_samples


def write(workdir: Path, stage: str, steps: range, *, after: int = 0, total: int = 10, **settings) -> None:
    with MetricWriter(workdir, quiet=True, **settings) as writer:
        writer.start_stage(stage, total, step=after)
        for step in steps:
            writer.step(step, {"loss": 1.0 / step, "learning_rate": 1e-3, "tokens_per_second": 100.0})


def steps(workdir: Path) -> list[tuple[str, int]]:
    return [(record["stage"], record["step"]) for record in read_metrics(workdir / "metrics.jsonl")]


# ------------------------------------------------------------------------------------------------------ metrics.jsonl


def test_a_step_is_one_line_of_strict_json(tmp_path: Path) -> None:
    with MetricWriter(tmp_path, quiet=True) as writer:
        writer.start_stage("pretrain", 10)
        writer.step(1, {"loss": np.float32(0.5), "grad_norm": float("nan"), "mfu": None, "samples": np.int64(8)})
        writer.evaluation(1, {"loss": 0.25, "exact_match/sum": float("inf")})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert first.pop("time") > 0 and second.pop("time") > 0
    assert first == {"stage": "pretrain", "step": 1, "loss": 0.5, "grad_norm": None, "mfu": None, "samples": 8}
    assert second == {"stage": "pretrain", "step": 1, "eval/loss": 0.25, "eval/exact_match/sum": None}


def test_lines_are_on_disk_before_the_next_step(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path, quiet=True)
    writer.start_stage("a", 10)
    writer.step(1, {"loss": 1.0})
    assert steps(tmp_path) == [("a", 1)]


def test_resuming_doubles_nothing(tmp_path: Path) -> None:
    write(tmp_path, "pretrain", range(1, 4))
    write(tmp_path, "finetune", range(1, 8))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "finetune", "st')  # killed in the middle of a line
    write(tmp_path, "finetune", range(6, 9), after=5)
    assert steps(tmp_path) == [("pretrain", s) for s in (1, 2, 3)] + [("finetune", s) for s in range(1, 9)]


def test_going_back_to_an_earlier_stage_takes_the_later_one_back(tmp_path: Path) -> None:
    write(tmp_path, "pretrain", range(1, 4))
    write(tmp_path, "finetune", range(1, 3))
    write(tmp_path, "pretrain", range(3, 4), after=2)
    assert steps(tmp_path) == [("pretrain", 1), ("pretrain", 2), ("pretrain", 3)]


def test_a_stage_that_starts_anew_keeps_the_stages_before_it() -> None:
    records = [{"stage": "a", "step": 1}, {"stage": "b", "step": 1}]
    assert records_before(records, "b", 0) == records[:1]
    assert records_before(records, "c", 0) == records


def test_an_object_store_gets_the_whole_file(tmp_path: Path) -> None:
    with MetricWriter(tmp_path, quiet=True, tensorboard=False) as writer:
        writer._sinks["metrics.jsonl"]._remote = True
        writer.start_stage("a", 10)
        for step in (1, 2, 3):
            writer.step(step, {"loss": 1.0})
        assert steps(tmp_path) == [("a", 1)], "written again at most every 30 s"
    assert steps(tmp_path) == [("a", 1), ("a", 2), ("a", 3)]


def test_other_processes_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricWriter(tmp_path / "w", enabled=False) as writer:
        writer.start_stage("a", 10)
        writer.step(1, {"loss": 1.0})
        writer.evaluation(1, {"loss": 1.0})
        writer.say("hello")
    assert not (tmp_path / "w").exists()
    assert capsys.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------- the other writers


def events(folder: Path) -> list[tuple[int, str, float]]:
    """(step, tag, value) of all event files, by the same protocol buffers that TensorBoard reads."""
    from tensorboardX.proto import event_pb2

    found = []
    for file in sorted(folder.glob("events*")):
        data, position = file.read_bytes(), 0
        while position < len(data):
            length = int.from_bytes(data[position : position + 8], "little")
            event = event_pb2.Event.FromString(data[position + 12 : position + 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            if event.HasField("session_log"):
                found.append((event.step, "START", 0.0))
            position += 12 + length + 4
    return found


def test_tensorboard_has_a_run_per_stage_and_a_resume_purges_its_own(tmp_path: Path) -> None:
    write(tmp_path, "pretrain", range(1, 3))
    write(tmp_path, "finetune", range(1, 3))
    write(tmp_path, "finetune", range(2, 3), after=1)
    assert [e for e in events(tmp_path / "tensorboard/pretrain") if e[1] == "loss"] == [
        (1, "loss", 1.0),
        (2, "loss", 0.5),
    ]
    found = [(step, tag) for step, tag, _ in events(tmp_path / "tensorboard/finetune") if tag in ("loss", "START")]
    assert found == [(1, "START"), (1, "loss"), (2, "loss"), (2, "START"), (2, "loss")]


def test_wandb_is_imported_only_when_asked_and_missed_by_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what `import` of a missing package looks like
    MetricWriter(tmp_path, quiet=True).close()
    with pytest.raises(UsageError, match="pip install wandb"):
        MetricWriter(tmp_path, quiet=True, wandb="project")


def test_wandb_gets_each_stage_over_its_own_steps(tmp_path: Path, monkeypatch) -> None:
    logged: list = []
    run = types.SimpleNamespace(define_metric=lambda *a, **k: None, log=logged.append, finish=lambda: None)
    arguments: dict = {}
    fake = types.ModuleType("wandb")
    fake.init = lambda **k: arguments.update(k) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    write(tmp_path, "a", range(1, 2), wandb={"project": "p", "entity": "e"}, config={"seed": 1})
    assert logged == [{"a/step": 1, "a/loss": 1.0, "a/learning_rate": 1e-3, "a/tokens_per_second": 100.0}]
    assert (arguments["project"], arguments["entity"], arguments["config"]) == ("p", "e", {"seed": 1})
    assert arguments["resume"] == "allow"


@pytest.mark.parametrize("sink", ["metrics.jsonl", "TensorBoard"])
def test_a_failing_writer_warns_once_and_the_run_goes_on(tmp_path: Path, capsys, sink: str) -> None:
    with MetricWriter(tmp_path, quiet=True) as writer:
        writer.start_stage("a", 10)
        writer.step(1, {"loss": 1.0})
        good = writer._sinks[sink].write

        def full(record):
            raise OSError(28, "No space left on device")

        writer._sinks[sink].write = full
        writer.step(2, {"loss": 1.0})
        writer.step(3, {"loss": 1.0})
        if sink == "metrics.jsonl":
            writer._sinks[sink].write = good  # the disk has room again
        writer.step(4, {"loss": 1.0})
    assert capsys.readouterr().err.count(f"warning: writing {sink} failed, training goes on (OSError") == 1
    assert steps(tmp_path)[-1] == ("a", 4)


def test_half_a_line_costs_only_itself(tmp_path: Path, monkeypatch) -> None:
    with MetricWriter(tmp_path, quiet=True, tensorboard=False) as writer:
        writer.start_stage("a", 10)
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"stage"')
        writer._sinks["metrics.jsonl"]._torn = True  # as after an exception within a write
        writer.step(1, {"loss": 1.0})
    assert steps(tmp_path) == [("a", 1)]


def test_a_workdir_that_cannot_be_written_does_not_stop_the_run(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    write(tmp_path / "file", "a", range(1, 3))
    assert "warning: writing metrics.jsonl failed" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- the terminal


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path, capsys) -> None:
    with MetricWriter(tmp_path) as writer:
        writer.start_stage("finetune", 600)
        rates = {"learning_rate": 1e-3, "tokens_per_second": 1234.4, "eta_seconds": 80.2}
        writer.step(120, {"loss": 0.5119, **rates})
        writer.evaluation(120, {"loss": 0.41234567, "exact_match": 0.93, "samples": 256})
        writer.say("saved")
    assert capsys.readouterr().out.splitlines() == [
        "stage finetune step 120/600 loss 0.5119 lr 1.0e-03 1,234 tok/s eta 1m20s",
        "stage finetune step 120/600 held-out loss 0.4123 exact_match 0.93 samples 256",
        "saved",
    ]


def test_a_bar_where_there_is_one(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(metrics, "_shows_a_bar", lambda: True)
    with MetricWriter(tmp_path) as writer:
        writer.start_stage("finetune", 20, step=5)
        writer.step(10, {"loss": 0.5})
        writer.say("saved")
        writer.step(20, {"loss": 0.25})
    shown = capsys.readouterr()
    assert shown.out == "saved\n"
    assert "finetune: 100%" in shown.err and "20/20" in shown.err and "loss 0.25" in shown.err


def test_what_is_not_finite_reads_nan() -> None:
    assert describe({"loss": None}) == "loss nan"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59, "59s"), (80.2, "1m20s"), (7500, "2h05m"), (273600, "3d04h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# --------------------------------------------------------------------------------------------------------------- speed


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rates_are_counts_over_the_time_that_counts() -> None:
    clock = Clock()
    rate = Throughput(device_kind="TPU v4", devices=2, clock=clock)
    with rate.waiting():
        clock.now += 1.0
    clock.now += 3.0
    rate.add(tokens=600, positions=1000, samples=8, flops=275e12, steps=2)
    with rate.paused():
        clock.now += 50.0  # an evaluation
    rates = rate.rates(steps_left=10)
    assert rates == {
        "tokens_per_second": 150.0,
        "samples_per_second": 2.0,
        "mfu": pytest.approx(275e12 / 4 / (2 * 275e12)),
        "real_token_fraction": 0.6,
        "data_wait_fraction": 0.25,
        "device_memory_peak": None,
        "eta_seconds": 20.0,
    }


def test_the_first_window_with_its_compilation_leaves_the_estimate() -> None:
    clock = Clock()
    rate = Throughput(clock=clock)
    for seconds, eta in ((60.0, 600.0), (1.0, 10.0), (2.0, 13.0)):
        clock.now += seconds
        rate.add(tokens=1, positions=1, samples=1)
        assert rate.rates(steps_left=10)["eta_seconds"] == pytest.approx(eta)
    assert rate.rates()["eta_seconds"] is None


def test_a_window_without_steps_is_no_error() -> None:
    rates = Throughput(device_kind="cpu").rates(steps_left=5)
    assert (rates["mfu"], rates["real_token_fraction"], rates["eta_seconds"]) == (None, None, None)


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("cpu", None),
        ("TPU v4 lite", None),
        ("TPU v2", None),
        ("NVIDIA Tesla T4", None),
    ],
)
def test_peaks_by_the_names_that_devices_give_themselves(kind: str, tera: float | None) -> None:
    assert peak_flops(kind) == (None if tera is None else tera * 1e12)


# ------------------------------------------------------------------------------------------------------------ pictures


def test_curves_of_two_stages_are_drawn(tmp_path: Path) -> None:
    write(tmp_path, "pretrain", range(1, 30))
    with MetricWriter(tmp_path, quiet=True) as writer:
        writer.start_stage("finetune", 10)
        writer.step(1, {"loss": float("nan")})
        writer.evaluation(1, {"loss": 0.5})
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert min(picture.size) > 500


def test_curves_of_nothing_are_no_error(tmp_path: Path) -> None:
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_samples_of_any_shape_are_drawn(tmp_path: Path) -> None:
    image = np.zeros((32, 48, 3), np.uint8)
    samples = [
        {"images": [image, image[:20]], "question": "What? " * 40, "answer": "$7 \\alpha_{", "truth": "7"},
        {"images": [], "question": "Who?", "answer": "yes", "truth": "yes", "correct": True},
        {"images": [Image.fromarray(image[..., 0])], "question": "Which digit?", "answer": "4"},
    ]
    plot_samples(samples, tmp_path / "samples.png")
    with Image.open(tmp_path / "samples.png") as picture:
        assert min(picture.size) > 200
    plot_samples([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
