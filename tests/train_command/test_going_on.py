"""The train command again in the same workdir: after an end, a kill, a signal, with more steps or another mesh."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.train_command.command import files, make_experiment, refused, steps, tensors, train, weights

# Runs the command on one device, and sends itself a signal when a step has been logged.
SIGNALLED = """
import functools, os, signal, sys
import jax
from vlm_jax import sharding, train
from vlm_jax.errors import run_command
from vlm_jax.training.metrics import MetricWriter

stage, step, name = sys.argv[1:4]
del sys.argv[1:4]
sharding.make_mesh = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
start_stage, log, current = MetricWriter.start_stage, MetricWriter.step, []

def remember(self, stage, *args, **keywords):
    current.append(stage)
    start_stage(self, stage, *args, **keywords)

def log_and_signal(self, number, metrics):
    log(self, number, metrics)
    if (current[-1], number) == (stage, int(step)):
        os.kill(os.getpid(), signal.Signals[name])

MetricWriter.start_stage, MetricWriter.step = remember, log_and_signal
run_command(train.main)
"""


def test_a_finished_run_does_nothing_when_repeated(config: str, copied: Path) -> None:
    before = files(copied)
    done = train(config=config, workdir=copied)
    assert done.status == 0 and "is done" in done.out and "held-out accuracy" in done.out
    assert "step " not in done.out
    assert files(copied) == before


def test_more_steps_go_on_and_redraw_the_schedule(config: str, copied: Path) -> None:
    done = train("--config.steps=7", "--config.stages.finetune.data.eval=None", config=config, workdir=copied)
    assert done.status == 0, done.err
    assert "steps: None -> 7" in done.out and "going on from step 6" in done.out
    assert "the schedule is redrawn from 6 to 7 steps" in done.out and "stage align is done, with 4 steps" in done.out
    after = steps(copied, "finetune")
    assert list(after) == [1, 2, 3, 4, 5, 6, 7]
    assert after[7]["learning_rate"] == pytest.approx(0.01 * (1 + np.cos(np.pi * 5 / 6)) / 2)  # one step of warm-up
    assert json.loads((copied / "summary.json").read_text())["stages"] == {"align": 4, "finetune": 7}


def test_a_killed_and_a_terminated_run_end_as_the_unbroken_one(
    config: str, finished: SimpleNamespace, run_python: Callable[..., Any], tmp_path: Path
) -> None:
    """Byte for byte, killed in the first stage while a checkpoint is being written, and asked to stop in the second."""
    workdir, script = tmp_path / "run", tmp_path / "signalled.py"
    script.write_text(SIGNALLED)
    command = (f"--config={config}", f"--workdir={workdir}")
    killed = run_python(script, "align", "3", "SIGKILL", *command, devices=8)
    assert killed.returncode == -signal.SIGKILL
    stopped = run_python(script, "finetune", "5", "SIGTERM", *command, devices=8)
    assert stopped.returncode == 42, stopped.stderr
    assert stopped.stderr.strip().endswith(
        "error: SIGTERM: stage 'finetune' is saved at step 5 of 6; the same command goes on from there"
    )
    assert "Traceback" not in stopped.stderr and "stage finetune step 5/6" in stopped.stdout
    assert not (workdir / "summary.json").exists()
    done = train(config=config, workdir=workdir)
    assert done.status == 0 and "going on from step 5" in done.out, done.err
    assert weights(workdir) == weights(finished.workdir)
    for stage in ("align", "finetune"):
        ours, theirs = steps(workdir, stage), steps(finished.workdir, stage)
        assert {n: r["loss"] for n, r in ours.items()} == {n: r["loss"] for n, r in theirs.items()}
    for name in ("bad_records-0.jsonl", "predictions.jsonl"):
        assert (workdir / name).read_bytes() == (finished.workdir / name).read_bytes()
    assert not list((workdir / "checkpoints").rglob("*tmp*"))


def test_killed_between_two_stages_a_run_ends_as_the_unbroken_one(
    config: str, finished: SimpleNamespace, copied: Path
) -> None:
    # What a kill leaves after the first stage's last save: no later checkpoint, half a folder, no model.
    for name in ("model", "checkpoints/1-finetune", "tensorboard/finetune"):
        shutil.rmtree(copied / name)
    (copied / "checkpoints" / "1-finetune").mkdir()
    (copied / "summary.json").unlink()
    done = train("--config.eval.every=0", config=config, workdir=copied)
    assert done.status == 0, done.err
    assert "stage align step" not in done.out and "stage finetune step 1/6" in done.out
    assert weights(copied) == weights(finished.workdir)


def test_a_stop_in_the_final_evaluation_is_taken_up_there(
    config: str, copied: Path, finished: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_jax.inference.vlm import VLM

    (copied / "summary.json").unlink()
    answer = VLM.answer

    def interrupted(self: VLM, *args: Any, **keywords: Any) -> list[str]:
        os.kill(os.getpid(), signal.SIGINT)
        return answer(self, *args, **keywords)

    monkeypatch.setattr(VLM, "answer", interrupted)
    done = train(config=config, workdir=copied)
    assert done.status == 42 and "SIGINT: everything trained so far is saved" in done.err
    assert not (copied / "summary.json").exists()
    monkeypatch.undo()
    assert train(config=config, workdir=copied).status == 0
    ours, theirs = (json.loads((w / "summary.json").read_text()) for w in (copied, finished.workdir))
    assert ours["eval"] == theirs["eval"]


@pytest.mark.parametrize(
    "word, says",
    [
        ("--config.batch.samples=4", "batch.samples: None -> 4"),
        ("--config.stages.align.lr=0.2", "stages.align.lr: 0.1 -> 0.2"),
        ("--config.model.decoder.num_layers=2", "model.decoder.num_layers: 1 -> 2"),
    ],
)
def test_another_experiment_in_the_workdir_is_refused(
    config: str, finished: SimpleNamespace, word: str, says: str
) -> None:
    before = files(finished.workdir)
    done = train(word, config=config, workdir=finished.workdir)
    refused(done, "holds a run of another configuration", says)
    way_out = f"python -m vlm_jax.train --config={config} {word} --workdir={finished.workdir}-2"
    assert f"{way_out} --config.init_from={finished.workdir}" in done.err
    assert files(finished.workdir) == before


def test_an_adapter_on_a_base_begins_at_its_weights_and_leaves_them(
    config: str, finished: SimpleNamespace, tmp_path: Path
) -> None:
    words = (f"--config.init_from={finished.workdir}", "--config.frozen_dtype=float32")
    done = train(*words, config=f"{config}:adapter", workdir=tmp_path / "run")
    assert done.status == 0, done.err
    base, adapted = tensors(finished.workdir), tensors(tmp_path / "run")
    adapters = adapted.keys() - base.keys()
    assert adapters and all("lora_" in name for name in adapters)
    assert all(np.array_equal(base[name], adapted[name]) for name in base)
    assert all(adapted[name].any() for name in adapters)  # lora_b begins at zero
    assert "summary.json" in files(tmp_path / "run")


def test_a_packed_run_goes_on_with_the_rows_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if a record has been mended since, which would be packed elsewhere."""
    config = make_experiment(tmp_path / "experiment")
    monkeypatch.setenv("VLM_JAX_CACHE", str(tmp_path / "cache"))
    words = ["--config.packing.fit=auto", "--config.steps=4"]
    unbroken = train(*words, config=f"{config}:adapter", workdir=tmp_path / "unbroken")
    assert unbroken.status == 0, unbroken.err
    assert "packing.fit=auto chose best_fit" in unbroken.out and "rows take 1." in unbroken.out
    assert "packed by best_fit: 12 rows of 48 tokens" in unbroken.out and "4 rows a step" in unbroken.out
    logged = steps(tmp_path / "unbroken", "adapt")
    assert logged[3]["samples"] == 24 and logged[4]["records/missing_image"] in (1, 2)
    broken = Path(shutil.copytree(tmp_path / "unbroken", tmp_path / "broken"))
    (broken / "summary.json").unlink()
    shutil.rmtree(broken / "checkpoints" / "0-adapt" / "4")
    shots = tmp_path / "experiment" / "data" / "shots"
    shutil.copy(shots / "0.png", shots / "lost.png")
    done = train(*words, config=f"{config}:adapter", workdir=broken)
    anew = train(*words, "--config.steps=1", config=f"{config}:adapter", workdir=tmp_path / "anew")
    assert done.status == 0 and "going on from step 2" in done.out, done.err
    for step in (3, 4):
        assert steps(broken, "adapt")[step]["loss"] == logged[step]["loss"]
    assert weights(broken) == weights(tmp_path / "unbroken")
    assert anew.status == 0 and "records/missing_image" not in steps(tmp_path / "anew", "adapt")[1]
    # What was chosen stays, and what cannot be told apart is refused.
    assert json.loads((broken / "config.json").read_text())["packing"]["fit"] == "best_fit"
    refused(train("--config.steps=4", config=f"{config}:adapter", workdir=broken), "packing.fit")
    (broken / "index-0-adapt.npz").unlink()
    (broken / "summary.json").unlink()
    refused(train(*words, config=f"{config}:adapter", workdir=broken), "index-0-adapt.npz is missing or damaged")


def test_eight_devices_go_on_where_one_stopped_with_equal_losses(
    config: str, finished: SimpleNamespace, copied: Path
) -> None:
    """The mesh may change on resume. Sums are ordered otherwise, hence 1e-5."""
    shutil.rmtree(copied / "checkpoints" / "1-finetune")
    (copied / "summary.json").unlink()
    words = ("--config.mesh.fsdp=8", "--config.stages.finetune.data.eval=None")
    done = train(*words, config=config, workdir=copied, devices=8)
    assert done.status == 0, done.err
    assert "stage finetune done: the train step was compiled 2 time(s)" in done.out
    ours, theirs = steps(copied, "finetune"), steps(finished.workdir, "finetune")
    for number in theirs:
        assert ours[number]["loss"] == pytest.approx(theirs[number]["loss"], abs=1e-5)


def test_auto_keeps_the_rows_of_a_run_that_has_begun(config: str, finished: SimpleNamespace, copied: Path) -> None:
    assert json.loads((finished.workdir / "config.json").read_text())["packing"]["fit"] is None
    done = train("--config.packing.fit=auto", config=config, workdir=copied)
    assert done.status == 0 and "is done" in done.out, done.err
