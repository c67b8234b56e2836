"""The train command, as a user runs it: what it writes, how it goes on, and what it says to bad input.

The model has a few thousand parameters; what costs time is compiling it. So one finished run serves most tests, all run
in this process on one of its devices where they can, and compiled programs are cached.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image
from safetensors.numpy import load_file

from vlm_jax import sharding
from vlm_jax.data.digits import save_tokenizer
from vlm_jax.errors import run_command
from vlm_jax.train import Run, main
from vlm_jax.training.metrics import read_metrics

CONFIG = '''
"""Two stages on DATA: a connector on captions, then everything on conversations."""

from vlm_jax.config import variants
from vlm_jax.models.presets import llama, llava, lora, vit
from vlm_jax.recipe import experiment, stage

DATA = {data!r}


def get_config(args=""):
    v = variants(args, "adapter")
    c = experiment(seed=0)
    c.model = llava(
        vision=vit(image_size=16, patch_size=8, hidden_size=16, num_layers=1, num_heads=2),
        connector="linear",
        decoder=llama(
            vocab_size=72, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, tie_embeddings=True
        ),
    )
    c.tokenizer = DATA + "/tokenizer"
    c.dtype = "float32"
    c.frozen_dtype = "bfloat16"
    only_connector = (("connector/.*", 1.0), (".*", None))
    c.stages = (
        stage("align", train=DATA + "/align.json", template="plain", samples=8, lr=0.1, steps=4, groups=only_connector),
        stage("finetune", train=DATA + "/train.json", eval=DATA + "/eval.json", template="vicuna_v1", samples=8,
              lr=0.01, steps=6, groups=(("vision/.*", 0.1), (".*", 1.0))),
    )
    c.data.max_bad_fraction = 0.1
    c.optimizer.clip_norm = 1.0
    c.ema = 0.5
    c.buckets.lengths, c.buckets.tiles = (48,), (1, 2)
    c.log.every, c.checkpoint.every = 1, 2
    c.eval.every, c.eval.max_samples, c.eval.batch, c.eval.max_new_tokens, c.eval.by = 3, 4, 4, 4, ("kind",)
    if v.adapter:
        c.model.lora = lora(rank=2, alpha=4)
        c.stages = (
            stage("adapt", train=DATA + "/align.json", template="plain", samples=8, lr=0.01, steps=2,
                  groups=((".*/lora_.*", 1.0), (".*", None))),
        )
    return c
'''

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

STEP_KEYS = (
    "step samples loss learning_rate grad_norm tokens_per_second samples_per_second mfu real_token_fraction "
    "data_wait_fraction device_memory_peak eta_seconds"
).split()


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def make_data(folder: Path) -> Path:
    """Captions; conversations about no, one or two images (a text alone, seldom two); held-out questions. One caption
    and one conversation have no image file."""
    (folder / "shots").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(folder / "shots" / f"{i}.png")

    def save(name: str, records: list[dict[str, Any]]) -> None:
        numbered = [{"id": f"{name}-{i}", **record} for i, record in enumerate(records)]
        (folder / f"{name}.json").write_text(json.dumps(numbered))

    digit = [str(i % 10) for i in range(24)]
    shot = [f"shots/{i % 12}.png" for i in range(24)]
    captions = [{"image": shot[i], "conversations": turns("<image>", digit[i])} for i in range(24)]
    talks: list[dict[str, Any]] = [
        {"image": shot[i], "conversations": turns("<image>\nWhich digit is this?", digit[i])} for i in range(18)
    ]
    talks += [{"conversations": turns("What is the sum?", digit[i])} for i in range(4)]
    talks += [
        {"image": shot[i : i + 2], "conversations": turns("<image><image>\nWhat is the sum?", "7")} for i in (0, 5)
    ]
    captions[3]["image"] = talks[4]["image"] = "shots/lost.png"
    save("align", captions)
    save("train", talks)
    asked = [
        {"kind": "which", "image": shot[i], "conversations": turns("<image>\nWhich digit is this?", "1")}
        for i in range(6)
    ]
    asked += [{"kind": "sum", "conversations": turns("What is the sum?", "12")}]
    save("eval", asked)
    save_tokenizer(folder / "tokenizer")
    return folder


def train(*words: str | Path, config: str, workdir: Path, devices: int = 1) -> SimpleNamespace:
    """Runs the command in this process on the first `devices`: its exit status, stdout and stderr."""
    out, error, make_mesh = io.StringIO(), io.StringIO(), sharding.make_mesh
    argv = ["train", f"--config={config}", f"--workdir={workdir}", *map(str, words)]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        patch.setattr(sys, "argv", argv)
        patch.setattr(sharding, "make_mesh", lambda **sizes: make_mesh(**sizes, devices=jax.devices()[:devices]))
        status = 0
        try:
            run_command(main)
        except SystemExit as exit:
            status = int(exit.code or 0)
    return SimpleNamespace(status=status, out=out.getvalue(), err=error.getvalue())


def refused(done: SimpleNamespace, *says: str) -> None:
    """It ended with status 2 and one message that says all of `says`."""
    assert done.status == 2, done.out + done.err
    assert done.err.startswith("error: ") and "Traceback" not in done.err
    for part in says:
        assert part in done.err, done.err


def weights(workdir: Path) -> bytes:
    (file,) = (workdir / "model").glob("*.safetensors")
    return file.read_bytes()


def tensors(workdir: Path) -> dict[str, np.ndarray]:
    (file,) = (workdir / "model").glob("*.safetensors")
    return load_file(file)


def steps(workdir: Path, stage: str) -> dict[int, dict[str, Any]]:
    records = [r for r in read_metrics(workdir / "metrics.jsonl") if r["stage"] == stage and "loss" in r]
    assert len({record["step"] for record in records}) == len(records)
    return {record["step"]: record for record in records}


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module", autouse=True)
def _compile_fast(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps compiled programs, for the other processes too, and compiles in a hurry. Traces, which we count, stay."""
    settings = {  # with what they were before
        "jax_compilation_cache_dir": (str(tmp_path_factory.mktemp("programs")), jax.config.jax_compilation_cache_dir),
        "jax_persistent_cache_min_compile_time_secs": (0, jax.config.jax_persistent_cache_min_compile_time_secs),
        "jax_persistent_cache_min_entry_size_bytes": (-1, jax.config.jax_persistent_cache_min_entry_size_bytes),
        "jax_disable_most_optimizations": (True, False),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, (value, _) in settings.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        compilation_cache.reset_cache()
        yield
        for name, (_, value) in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A config file beside its data."""
    folder = tmp_path_factory.mktemp("experiment")
    file = folder / "small.py"
    file.write_text(CONFIG.replace("{data!r}", repr(str(make_data(folder / "data")))))
    return str(file)


@pytest.fixture(scope="module")
def data(config: str) -> Path:
    return Path(config).parent / "data"


@pytest.fixture(scope="module")
def finished(config: str, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """An unbroken run of both stages on one device. Copy its workdir to change it."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    done = train(config=config, workdir=workdir)
    assert done.status == 0, done.err
    return SimpleNamespace(workdir=workdir, **vars(done))


@pytest.fixture
def copied(finished: SimpleNamespace, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.workdir, tmp_path / "copied"))


# ------------------------------------------------------------------------------------------------------ a whole run


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


# ---------------------------------------------------------------------------------------------------------- going on


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


def test_a_packed_run_goes_on_with_the_rows_it_began_with(
    config: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if a record has been mended since, which would be packed elsewhere."""
    monkeypatch.setenv("VLM_JAX_CACHE", str(tmp_path / "cache"))
    words = ["--config.packing.fit=best_fit", "--config.steps=4"]
    unbroken = train(*words, config=f"{config}:adapter", workdir=tmp_path / "unbroken")
    assert unbroken.status == 0, unbroken.err
    assert "packed by best_fit: 12 rows of 48 tokens" in unbroken.out and "4 rows a step" in unbroken.out
    logged = steps(tmp_path / "unbroken", "adapt")
    assert logged[3]["samples"] == 24 and logged[4]["records/missing_image"] in (1, 2)
    broken = Path(shutil.copytree(tmp_path / "unbroken", tmp_path / "broken"))
    (broken / "summary.json").unlink()
    shutil.rmtree(broken / "checkpoints" / "0-adapt" / "4")
    lost = data / "shots" / "lost.png"
    shutil.copy(data / "shots" / "0.png", lost)
    try:
        done = train(*words, config=f"{config}:adapter", workdir=broken)
        anew = train(*words, "--config.steps=1", config=f"{config}:adapter", workdir=tmp_path / "anew")
    finally:
        lost.unlink()
    assert done.status == 0 and "going on from step 2" in done.out, done.err
    for step in (3, 4):
        assert steps(broken, "adapt")[step]["loss"] == logged[step]["loss"]
    assert weights(broken) == weights(tmp_path / "unbroken")
    assert anew.status == 0 and "records/missing_image" not in steps(tmp_path / "anew", "adapt")[1]
    # What cannot be told apart is refused.
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


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "words, says",
    [
        (["--config.stages.finetune.lrr=1"], ["config.stages.finetune.lrr does not exist", "finetune.lr'"]),
        (["--confg.steps=1"], ["unknown flag --confg.steps"]),
        (["--config.steps=2.5"], ["config.steps is 2.5; give a whole number"]),
        (["--config.log.every=often"], ["config.log.every expects a whole number, got 'often'"]),
        (["--config.steps=2", "quickly"], ["left-over word 'quickly'"]),
        (["--config.mesh.data=3"], ["mesh data=3", "does not divide the 1 device(s)"]),
        (["--config.data.train=none.json"], ["none.json cannot be read (No such file"]),
        (["--config.data.train={data}/empty.json"], ["empty.json has no records"]),
        (["--config.data.train={data}/torn.json"], ["torn.json is not valid JSON"]),
        (["--config.data.images={data}/nowhere"], ["nowhere does not exist", "--config.data.images"]),
        (["--config.data.images={data}/shots"], ["missing_image", "check the images folder"]),
        (["--config.stages.finetune.template=vicuna"], ["unknown template 'vicuna'", "did you mean 'vicuna_v1'"]),
        (["--config.stages.finetune.schedule=cosin"], ["schedule 'cosin'", "did you mean 'cosine'"]),
        (["--config.stages.align.groups=[('conector/.*', 1.0), ('.*', None)]"], ["'conector/.*'", "'connector'"]),
        (
            ["--config.tokenizer={data}/no_tokenizer"],
            ["no_tokenizer: the folder does not exist; correct --config.tokenizer"],
        ),
        (["--config.init_from={data}/no_model"], ["no model at", "no_model: the folder does not exist"]),
        (["--config.images.mode=crop"], ["unknown image mode 'crop'; known: square"]),
        (["--config.dtype=float16"], ["'float16' is not one of float32, bfloat16"]),
        (["--config.remat=half"], ["remat 'half' is not one of none, full"]),
        (["--config.packing.fit=bestfit"], ["config.packing.fit is 'bestfit' (did you mean 'best_fit'?)"]),
        (["--config.loss_norm=mean"], ["loss_norm 'mean'"]),
        (["--config.loss_norm=rank_mean", "--config.loss_ranks=3"], ["loss_ranks 3 does not divide"]),
        (["--config.optimizer.first_moment=half"], ["first_moment 'half'"]),
        (["--config.model.decoder.vocab_size=50"], ["the tokenizer has", "vocab_size is 50"]),
        (["--config.model.decoder.num_heads=3"], ["num_heads 3 is not a multiple of num_kv_heads 2"]),
        (["--config.batch.samples=0"], ["config.batch.samples is 0"]),
        (["--config.log.every=0"], ["config.log.every is 0"]),
        (["--config.checkpoint.every=0"], ["config.checkpoint.every is 0"]),
        (["--config.eval.batch=0"], ["config.eval.batch is 0"]),
        (["--config.buckets.lengths=4"], ["too_long", "--config.buckets.lengths"]),
        (["--workdir={data}/align.json"], ["cannot write to --workdir"]),
    ],
    ids=lambda value: value[0].removeprefix("--config.")[:24] if value[0].startswith("--") else "",
)
def test_bad_input_is_one_line_and_writes_nothing(
    config: str, data: Path, tmp_path: Path, words: Sequence[str], says: Sequence[str]
) -> None:
    (data / "empty.json").write_text("[]")
    (data / "torn.json").write_text((data / "train.json").read_text()[:-9])
    done = train(*(word.replace("{data}", str(data)) for word in words), config=config, workdir=tmp_path / "run")
    refused(done, *says)
    assert done.err.count("\n") == 1 and "compiled" not in done.out
    assert not (tmp_path / "run").exists()


def test_the_words_of_the_command_are_what_the_config_holds(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "train", lambda self, stop, began: None)
    words = ("--config.log.tensorboard", "false", "--config.stages.align.steps=1e3", "--config.data.workers", "2")
    assert train(*words, config=config, workdir=tmp_path).status == 0
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["log"]["tensorboard"] is False and written["stages"][0]["steps"] == 1000
    assert written["data"]["workers"] == 2 and written["stages"][1]["steps"] == 6
    # Without a step taken (an error, no memory) there is nothing to protect: the next command may be another one.
    assert train("--config.batch.per_device=2", config=config, workdir=tmp_path).status == 0
    assert json.loads((tmp_path / "config.json").read_text())["batch"]["per_device"] == 2


@pytest.mark.parametrize("name", ["state/manifest.ocdbt", "state/_METADATA", "meta/metadata", "state/**/d/*"])
def test_a_truncated_checkpoint_is_named_and_left_alone(config: str, copied: Path, name: str) -> None:
    newest = copied / "checkpoints" / "1-finetune" / "6"
    for file in newest.glob(name):  # all of the data: one file may hold nothing but what a later one supersedes
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    before = files(copied / "checkpoints")
    done = train("--config.steps=7", config=config, workdir=copied)
    refused(done, f"cannot read the checkpoint {newest}", "delete that folder to go on from the one before it")
    assert done.err.count("\n") == 1
    assert files(copied / "checkpoints") == before and (copied / "model").is_dir()


def test_another_folder_is_no_workdir(config: str, finished: SimpleNamespace) -> None:
    before = files(finished.workdir / "model")
    done = train(config=config, workdir=finished.workdir / "model")
    refused(done, "holds something else, not a run")
    assert files(finished.workdir / "model") == before
