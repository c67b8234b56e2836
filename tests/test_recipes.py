"""The shipped configs: what they resolve to, how large they are, what they train at which rate, and what they need.

`make goldens` (this file run as a script) rewrites tests/goldens after a change of a default that is meant.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from vlm_jax import requirements
from vlm_jax.config import diff_configs, load_config, plain
from vlm_jax.data.digits import make_digits
from vlm_jax.errors import UsageError
from vlm_jax.families import make_family
from vlm_jax.models.presets import clip_l14_336, llava, lora, vicuna_7b
from vlm_jax.sharding import make_mesh
from vlm_jax.train import Run
from vlm_jax.training.loop import StopSignal
from vlm_jax.training.metrics import read_metrics
from vlm_jax.training.optimizer import learning_rates, make_schedule, multipliers

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = ROOT / "tests" / "goldens"
CONFIGS = sorted(file.stem for file in (ROOT / "configs").glob("*.py"))
RECIPES = [name for name in CONFIGS if name != "quickstart"]
VARIANTS = ("lora", "task", "task,lora", "no_align", "tiny")


@pytest.fixture(autouse=True)
def one_device() -> Iterator[None]:
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        yield


def config(name: str, args: str = "", *overrides: str) -> Any:
    return load_config(f"{ROOT}/configs/{name}.py:{args}", overrides)[0]


@functools.cache
def abstract(model: str) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Of `config.model` as JSON, so that configs with the same model share it."""
    return make_family(json.loads(model)).bound.abstract


def abstract_of(c: Any) -> Mapping[str, jax.ShapeDtypeStruct]:
    return abstract(json.dumps(plain(c.model), sort_keys=True))


# --------------------------------------------------------------------------------------------------- resolved configs


def flat(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from flat(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for index, item in enumerate(value):
            yield from flat(item, f"{path}.{item.get('name', index)}")
    else:
        yield f"{path} = {json.dumps(value)}"


def resolved(name: str) -> str:
    """All settings of a config and its parameters, then what each variant changes."""
    base = config(name)
    lines = list(flat(plain(base), ""))
    for args in ("", *(VARIANTS if name in RECIPES else ("tiny",))):
        c = config(name, args)
        if args:
            lines += ["", f":{args}", *(f"    {change}" for change in diff_configs(base, c))]
        for needs in requirements.stage_needs(c) if args in ("", "lora", "tiny") else ():
            lines.append(f"    # {needs.name} trains {needs.trained:,} of {needs.total:,} parameters")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_resolve_to_what_they_did(name: str) -> None:
    golden = (GOLDENS / f"{name}.txt").read_text()
    assert resolved(name) == golden, "if this change is meant: make goldens"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_page_shows_its_commands(name: str) -> None:
    page = (ROOT / "configs" / f"{name}.py").read_text()
    assert f"python -m vlm_jax.train --config=configs/{name}.py " in page
    assert f"--config=configs/{name}.py:tiny" in page
    assert len(page.splitlines()) < 100


def test_variants_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(UsageError, match="contradict each other: there is no stage 'pretrain' left"):
        config("llava16_mistral", "task,no_align")
    with pytest.raises(UsageError, match="its variants: tiny, task, lora, no_align"):
        config("llava16_mistral", "qlora")


# --------------------------------------------------------------------------------------------------- parameter counts


def clip_l14(patches: int) -> int:
    """CLIP ViT-L/14 without the norm after its last layer, which LLaVA never uses."""
    width, inner = 1024, 4096
    layer = 4 * (width**2 + width) + 2 * 2 * width + 2 * width * inner + inner + width
    return 3 * 14**2 * width + width + (1 + patches) * width + 2 * width + 24 * layer


def mlp2x(into: int, out: int) -> int:
    return into * out + out + out**2 + out


# As published: Llama 7B and 13B, Mistral 7B, Yi 34B, Qwen1.5 0.5B (tied).
DECODERS = {"7b": 6_738_415_616, "13b": 13_015_864_320, "mistral": 7_241_732_096, "yi": 34_388_917_248}
DECODERS["qwen"] = 463_987_712
SIGLIP = 3 * 14**2 * 1152 + 1152 + 729 * 1152 + 26 * (4 * (1152**2 + 1152) + 4 * 1152 + 2 * 1152 * 4304 + 4304 + 1152)
CLIP = clip_l14(576)

COUNTS = {  # vision, connector, newline, decoder
    "llava10_vicuna13b": (clip_l14(256), 1024 * 5120 + 5120, 0, DECODERS["13b"]),
    "llava15_vicuna7b": (CLIP, mlp2x(1024, 4096), 0, DECODERS["7b"]),
    "llava15_vicuna13b": (CLIP, mlp2x(1024, 5120), 0, DECODERS["13b"]),
    "llava16_vicuna7b": (CLIP, mlp2x(1024, 4096), 4096, DECODERS["7b"]),
    "llava16_mistral": (CLIP, mlp2x(1024, 4096), 4096, DECODERS["mistral"]),
    "llava16_yi34b": (CLIP, mlp2x(1024, 7168), 7168, DECODERS["yi"]),
    "bakllava": (CLIP, mlp2x(1024, 4096), 0, DECODERS["mistral"]),
    "llava_qwen05b": (SIGLIP, mlp2x(1152, 1024), 0, DECODERS["qwen"]),
}
WHOLLY_TRAINED = ("llava16_vicuna7b", "llava16_mistral", "llava16_yi34b", "llava_qwen05b")


@pytest.mark.parametrize("name", RECIPES)
def test_parameters_are_those_of_the_published_models(name: str) -> None:
    vision, connector, newline, decoder = COUNTS[name]
    pretrain, finetune = requirements.stage_needs(config(name))
    assert pretrain.total == finetune.total == vision + connector + newline + decoder
    assert pretrain.trained == connector
    assert finetune.trained == finetune.total - (0 if name in WHOLLY_TRAINED else vision)


def test_lora_trains_adapters_of_the_published_size_and_the_connector() -> None:
    (needs,) = requirements.stage_needs(config("llava15_vicuna7b", "task,lora"))
    per_layer = 128 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert needs.trained == 32 * per_layer + mlp2x(1024, 4096) == 319_815_680 + 20_979_712


# --------------------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("name", RECIPES)
def test_lora_lies_on_the_language_model_alone_and_nothing_else_moves_but_the_connector(name: str) -> None:
    c = config(name, "task,lora")
    paths = list(abstract_of(c))
    adapters = {path for path in paths if "/lora_" in path}
    linear = {path for path in paths if path.startswith("decoder/layers/") and path.endswith("/kernel")}
    assert adapters == {f"{p.removesuffix('kernel')}lora_{side}" for p in linear for side in "ab"}
    rates = multipliers(paths, c.stages[0].groups)
    trained = {path for path, rate in rates.items() if rate is not None}
    assert trained == adapters | {path for path in paths if path.startswith("connector/")}
    wanted = 2e-5  # the connector's own rate, mm_projector_lr
    assert c.stages[0].lr * rates[
        "connector/first/kernel" if c.model.connector != "linear" else "connector/linear/kernel"
    ] == pytest.approx(wanted)


def test_lora_with_short_names_would_reach_the_tower_and_with_whole_paths_does_not() -> None:
    """The reference's targets are names such as q_proj, which the tower has too; ours match wholly."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 2, "num_heads": 2}
    model = llava(
        vision=clip_l14_336(**sizes, image_size=28),
        connector="linear",
        decoder=vicuna_7b(**sizes, vocab_size=8, num_kv_heads=2, head_dim=8),
    )
    everywhere = abstract(json.dumps(model | {"lora": lora(2, 4, targets=".*/query")}, sort_keys=True))
    assert {path.split("/")[0] for path in everywhere if "/lora_" in path} == {"vision", "decoder"}
    with pytest.raises(UsageError, match="matches none of"):
        abstract(json.dumps(model | {"lora": lora(2, 4, targets="query")}, sort_keys=True))
    whole = abstract(json.dumps(model | {"lora": lora(2, 4)}, sort_keys=True))
    assert {path.split("/")[0] for path in whole if "/lora_" in path} == {"decoder"}


# ----------------------------------------------------------------------------------------------------- learning rates


def hugging_face(peak: float, total: int, at: list[int]) -> list[float]:
    """get_cosine_schedule_with_warmup, with warmup_ratio 0.03 as the Trainer rounds it."""
    rise = math.ceil(0.03 * total)
    below = [
        step / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / (total - rise))) for step in at
    ]
    return [peak * share for share in below]


RATES = {  # (stage of) recipe: learning rate of each trained group
    ("llava10_vicuna13b", "pretrain"): {"connector": 2e-3},
    ("llava10_vicuna13b", "finetune"): {"connector": 2e-5, "decoder": 2e-5},
    ("llava15_vicuna7b", "pretrain"): {"connector": 1e-3},
    ("llava15_vicuna7b", "finetune"): {"connector": 2e-5, "decoder": 2e-5},
    ("llava16_mistral", "pretrain"): {"connector": 1e-3},
    ("llava16_mistral", "finetune"): {"vision": 2e-6, "connector": 2e-5, "newline": 2e-5, "decoder": 2e-5},
    ("llava_qwen05b", "finetune"): {"vision": 2e-6, "connector": 1e-5, "decoder": 1e-5},
}


@pytest.mark.parametrize(("name", "stage"), RATES)
def test_each_group_has_the_rate_of_the_recipe_at_every_step(name: str, stage: str) -> None:
    c = config(name)
    (one,) = (s for s in c.stages if s.name == stage)
    total, rise = 5198, 156  # mix665k in batches of 128
    at = [0, 1, rise - 1, rise, total // 2, total - 1, total]
    schedule = make_schedule(one.schedule, peak=one.lr, total_steps=total, warmup=one.warmup)
    rates = multipliers(list(abstract_of(c)), one.groups)
    found: dict[str, set[float]] = {}
    for path, rate in rates.items():
        if rate is not None:
            found.setdefault(path.split("/")[0], set()).add(rate)
    assert set(found) == set(RATES[name, stage])
    logged = {float(v) for v in learning_rates(schedule, one.groups, rise).values()}
    for part, peak in RATES[name, stage].items():
        (rate,) = found[part]
        ours = [float(schedule(step)) * rate for step in at]
        np.testing.assert_allclose(ours, hugging_face(peak, total, at), rtol=1e-5, atol=1e-7 * peak)
        assert any(value == pytest.approx(peak) for value in logged)


# ------------------------------------------------------------------------------------------------------------- a run


def test_the_tiny_recipe_of_llava_16_trains_both_stages(tmp_path: Path) -> None:
    """Anyres, unpadding, newline, the recipe's groups and its template, at the size of a laptop."""
    data = make_digits(tmp_path / "digits", train_samples=32, align_samples=32, eval_samples=4)
    c = config("llava16_mistral", "tiny")
    c.tokenizer, c.steps, c.checkpoint.every, c.log.tensorboard = str(data / "tokenizer_chat"), 2, 2, False
    for stage, file in zip(c.stages, ("align.json", "train.json"), strict=True):
        stage.data.update(train=str(data / file), images=str(data / "images"), eval=None)
        stage.samples = 8
    workdir = tmp_path / "run"
    requirements.check(c, "llava16_mistral.py:tiny")
    Run(c, workdir, "the command").train(StopSignal(), 0.0)
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["stages"] == {"pretrain": 2, "finetune": 2}
    assert set(summary["moved"]["pretrain"]) == {"connector/first", "connector/second"}
    moved = summary["moved"]["finetune"]
    assert moved["newline"]["change"] > 0 and moved["decoder/lm_head"]["change"] > 0
    # A tenth of the rate, and the last layer of the tower is not used: its features are the second-last's.
    assert 0 < moved["vision/patch_embed"]["largest"] < 0.2 * moved["decoder/layers/mlp/up"]["largest"]
    assert (moved["vision/layers/mlp/up"]["layers"], moved["vision/layers/mlp/up"]["still"]) == (3, 1)
    saved = json.loads((workdir / "model" / "config.json").read_text())
    assert (saved["images"]["mode"], saved["images"]["merge"]) == ("anyres", "spatial_unpad")
    assert saved["template"] == "mistral_instruct" and saved["model"]["newline"]
    losses = [record["loss"] for record in read_metrics(workdir / "metrics.jsonl") if "loss" in record]
    assert all(0 < loss < 10 for loss in losses) and len(losses) >= 4


# -------------------------------------------------------------------------------------------------------- what it needs


def test_a_laptop_is_told_what_is_missing_and_what_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(requirements, "device_memory", lambda: 16 * 10**9)
    with pytest.raises(UsageError) as error:
        requirements.check(config("llava16_mistral"), "configs/llava16_mistral.py")
    says = str(error.value)
    assert "stage finetune: 7,566,221,312 of 7,566,221,312 parameters trained" in says
    assert "121.1 GB per device in stage finetune on the mesh data=1 x fsdp=1 x tensor=1: 30.3 GB of weights" in says
    assert "MISSING: there are 16.0 GB" in says
    assert "weights: openai/clip-vit-large-patch14-336 (MISSING; HF_HUB_OFFLINE" in says
    assert "playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json (MISSING)" in says
    commands = [line.strip() for line in says.splitlines() if line.startswith("  python")]
    assert commands == [
        "python -m vlm_jax.train --config=configs/llava16_mistral.py:tiny",
        f"python -m vlm_jax.train --config=configs/llava_qwen05b.py:task,lora {requirements.OWN_DATA}",
    ]
    for command in commands:  # and they do pass
        (spec,) = (word.removeprefix("--config=") for word in command.split() if word.startswith("--config="))
        monkeypatch.setattr(requirements.constants, "HF_HUB_OFFLINE", False)
        requirements.check(load_config(spec)[0], spec)


def test_what_is_not_known_is_not_held_against_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(requirements.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(requirements, "device_memory", lambda: None)
    data = tmp_path / "my.json"
    data.write_text("[]")
    c = config("llava16_yi34b", "task", f"--config.data.train={data}")
    requirements.check(c, "llava16_yi34b.py:task")
    monkeypatch.setattr(requirements, "device_memory", lambda: 10**12)
    requirements.check(c, "llava16_yi34b.py:task")
    with pytest.raises(UsageError, match=r"^data file .*none.json cannot be read"):  # a typo is one sentence
        c.data.train = str(tmp_path / "none.json")
        requirements.check(c, "llava16_yi34b.py:task")


def test_memory_counts_what_each_device_holds() -> None:
    with jax.set_mesh(make_mesh(fsdp=8)):
        (sharded,) = requirements.stage_needs(config("llava15_vicuna7b", "task"))
    (whole,) = requirements.stage_needs(config("llava15_vicuna7b", "task"))
    assert whole.weights == 4 * whole.trained + 2 * (whole.total - whole.trained)
    assert (whole.gradients, whole.optimizer) == (4 * whole.trained, 8 * whole.trained)
    assert whole.bytes / 8 <= sharded.bytes < whole.bytes / 7.9  # norms and biases stay whole


if __name__ == "__main__":
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        for config_name in CONFIGS:
            (GOLDENS / f"{config_name}.txt").write_text(resolved(config_name))
            print(f"wrote {GOLDENS / config_name}.txt", file=sys.stderr)
