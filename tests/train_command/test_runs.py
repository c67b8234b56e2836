"""A whole run of the train command: what it writes and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from tests.train_command.command import refused, steps, tensors, train
from vlm_jax.training.metrics import read_metrics

STEP_KEYS = (
    "step samples loss learning_rate grad_norm tokens_per_second samples_per_second mfu real_token_fraction "
    "data_wait_fraction device_memory_peak eta_seconds"
).split()


def test_a_run_writes_everything_it_promises(finished: SimpleNamespace) -> None:
    workdir = finished.workdir
    for name in ("config.json", "metrics.jsonl", "summary.json", "curves.png", "samples.png", "predictions.jsonl"):
        assert (workdir / name).stat().st_size, name
    assert {f.name for f in (workdir / "tensorboard").iterdir()} == {"align", "finetune"}
    assert {f.name for f in (workdir / "checkpoints").iterdir()} == {"0-align", "1-finetune"}
    always = {"start", "moved.json"}
    assert {f.name for f in (workdir / "checkpoints" / "1-finetune").iterdir()} == {"4", "6"} | always  # the newest two
    assert {f.name for f in (workdir / "checkpoints" / "0-align").iterdir()} == {"frozen", "2", "4"} | always
    for picture in ("curves.png", "samples.png"):
        assert Image.open(workdir / picture).size > (300, 200)
    align, finetune = steps(workdir, "align"), steps(workdir, "finetune")
    assert list(align) == [1, 2, 3, 4] and list(finetune) == [1, 2, 3, 4, 5, 6]
    for record in (*align.values(), *finetune.values()):
        assert not set(STEP_KEYS) - set(record)
        assert record["samples"] == 8 * record["step"]
        assert record["mfu"] is None and record["device_memory_peak"] is None  # a CPU
        assert record["tokens_per_second"] > record["samples_per_second"] > 0 and record["grad_norm"] > 0
        assert 0 < record["real_token_fraction"] < 1 and 0 <= record["data_wait_fraction"] <= 1
    assert finetune[6]["eta_seconds"] == 0 and finetune[6]["loss"] < finetune[1]["loss"]
    assert finetune[2]["learning_rate/vision/.*"] == pytest.approx(finetune[2]["learning_rate"] / 10)


def test_held_out_data_is_evaluated_during_training_and_at_the_end(finished: SimpleNamespace) -> None:
    records = read_metrics(finished.workdir / "metrics.jsonl")
    during, final = [r for r in records if "eval/loss" in r]
    assert (during["stage"], during["step"], final["step"]) == ("finetune", 3, 6)
    summary = json.loads((finished.workdir / "summary.json").read_text())
    assert summary["stages"] == {"align": 4, "finetune": 6} and summary["seconds"] > 0
    assert summary["parameters"] == sum(array.size for array in tensors(finished.workdir).values())
    assert summary["eval"]["loss"] == final["eval/loss"] and summary["eval"]["stage"] == "finetune"
    assert summary["eval"]["questions"] == 7 and set(summary["eval"]["groups"]) == {"which", "sum"}
    rows = [json.loads(line) for line in (finished.workdir / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 7 and all(Path(image).is_file() for row in rows for image in row["images"])
    assert summary["eval"]["exact_match"] == pytest.approx(sum(row["correct"] for row in rows) / 7)
    assert rows[0]["question"] == "Which digit is this?" and rows[0]["truth"] == "1" and rows[0]["kind"] == "which"
    assert "held-out accuracy" in finished.out and "talk to it:  python -m vlm_jax.generate" in finished.out


def test_the_average_of_the_weights_is_what_is_kept(finished: SimpleNamespace) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(finished.workdir / "checkpoints" / "1-finetune" / "6" / "state")
    kept, name = tensors(finished.workdir), "decoder/embed/embedding"
    assert np.array_equal(kept[name.replace("/", ".")], state["ema"][name])
    assert not np.array_equal(state["trained"][name], state["ema"][name])


def test_the_groups_say_what_is_trained(finished: SimpleNamespace) -> None:
    align, _, finetune = finished.out.partition("\nstage finetune:")
    assert "connector/.*" in align and "frozen" in align and "(2.6%)" in align
    assert "1.00e-03" in finetune and "1.00e-02" in finetune and "(100.0%)" in finetune
    # What the first stage froze in bfloat16, the second trains in float32.
    assert {array.dtype for array in tensors(finished.workdir).values()} == {np.dtype(np.float32)}


def test_the_report_says_which_modules_moved_and_by_how_much(finished: SimpleNamespace) -> None:
    moved = json.loads((finished.workdir / "summary.json").read_text())["moved"]
    assert set(moved["align"]) == {"connector/linear"}
    assert moved["align"]["connector/linear"]["parameters"] == 16 * 16 + 16
    with ocp.StandardCheckpointer() as checkpointer:
        ends = [
            checkpointer.restore(finished.workdir / "checkpoints" / "1-finetune" / name)
            for name in ("start", "6/state")
        ]
    (start, end), path = (ends[0], ends[1]["trained"]), "decoder/layers/mlp/up/kernel"
    change = np.asarray(end[path]) - np.asarray(start[path])
    one = moved["finetune"]["decoder/layers/mlp/up"]
    assert one["change"] == pytest.approx(np.linalg.norm(change), rel=1e-5)
    assert one["relative"] == pytest.approx(np.linalg.norm(change) / np.linalg.norm(start[path]), rel=1e-5)
    assert one["largest"] == pytest.approx(np.abs(change).max()) and (one["layers"], one["still"]) == (1, 0)
    assert "frozen: decoder (" in finished.out and "vision/patch_embed" in finished.out


def test_mixed_batches_compile_once_per_bucket(finished: SimpleNamespace) -> None:
    # Steps of the second stage hold texts, images and pairs of images: the buckets are one tile and two.
    assert "stage align done: the train step was compiled 1 time(s)" in finished.out
    assert "stage finetune done: the train step was compiled 2 time(s)" in finished.out


def test_bad_records_of_all_stages_are_listed_in_the_workdir(finished: SimpleNamespace) -> None:
    lines = [json.loads(line) for line in (finished.workdir / "bad_records-0.jsonl").read_text().splitlines()]
    assert {(line["stage"], line["id"], line["kind"]) for line in lines} == {
        ("align", "align-3", "missing_image"),
        ("finetune", "train-4", "missing_image"),
    }
    assert all("shots/lost.png" in line["message"] for line in lines)
    assert len({(line["stage"], line["step"]) for line in lines}) == len(lines)  # at most once in each epoch


def test_too_many_bad_records_stop_the_run(config: str, tmp_path: Path) -> None:
    done = train("--config.data.max_bad_fraction=0.01", config=config, workdir=tmp_path / "run")
    refused(done, "data.max_bad_fraction=0.01", "missing_image", "'align-3'", "shots/lost.png")
