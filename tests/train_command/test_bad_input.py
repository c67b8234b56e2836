"""What the train command says to bad input, and that it then writes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.train_command.command import files, refused, train
from vlm_jax.train import Run


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
