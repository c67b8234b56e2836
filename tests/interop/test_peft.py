"""Adapters of PEFT compute here what they compute there, and ours there; what cannot be kept is refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vlm_jax
from vlm_jax.errors import UsageError
from vlm_jax.interop.checkpoint import open_checkpoint
from vlm_jax.interop.huggingface import Checkpoint
from vlm_jax.interop.native import write_model
from vlm_jax.interop.peft import open_adapter, read_lora, write_adapter
from vlm_jax.interop.weights import Lazy, held

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

LOGITS = 1e-4  # of the largest logit, as for the model without adapters
TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.[qv]_proj|mlp\.down_proj)|.*vision_tower.*\.fc1|lm_head"
PATHS = {
    *(f"decoder/layers/{name}" for name in ("attention/query", "attention/value", "mlp/down")),
    *("vision/layers/mlp/up", "decoder/lm_head"),
}


@pytest.fixture
def base(hf, tmp_path: Path, one_device) -> tuple[Any, Path]:
    """A tiny llava_next with grouped queries, and the folder that it was saved in."""
    model = hf.build("llava_next", "clip", "mistral")
    model.save_pretrained(tmp_path / "base")
    return model, tmp_path / "base"


@pytest.fixture
def adapt(hf, base: tuple[Any, Path], tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """Puts drawn adapters on the model and saves them; gives PEFT's model and the folder."""

    def make(**settings: Any) -> tuple[Any, Path]:
        config = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS} | settings
        model = peft.get_peft_model(base[0], peft.LoraConfig(**config))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.requires_grad:
                    seed = torch.Generator().manual_seed(len(name))
                    weight.copy_(torch.randn(weight.shape, generator=seed) * weight.shape[-1] ** -0.5)
        model.eval().save_pretrained(tmp_path / "adapter")
        return model, tmp_path / "adapter"

    return make


def logits_of(found: Checkpoint, folder: Path, given: dict[str, np.ndarray]) -> np.ndarray:
    """Of the model as `convert import` writes it."""
    write_model(folder, found.entries, found.config, extra=found.extra, files=found.files)
    return vlm_jax.load(folder).apply_hf(**given)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "modules_to_save": ["multi_modal_projector"]}])
def test_an_adapter_of_peft_computes_the_same_here(hf, base, adapt, tmp_path: Path, settings: dict[str, Any]) -> None:
    given = hf.inputs("llava_next", base[0])
    real = given["attention_mask"].astype(bool)
    before = base[0](**hf.torch(given)).logits.detach().numpy()[real]
    model, folder = adapt(lora_dropout=0.1, **settings)
    expected = model(**hf.torch(given)).logits.detach().numpy()[real]
    assert np.abs(expected - before).max() > 0.1 * np.abs(before).max(), "the adapter changes nothing"

    found = open_adapter(folder, open_checkpoint(base[1]))
    lora = found.config["model"]["lora"]
    assert set(lora["targets"].split("|")) == PATHS
    assert lora["rank"] == 3 and lora["dropout"] == 0.1
    ours = logits_of(found, tmp_path / "ours", given)[real]
    assert np.abs(ours - expected).max() <= LOGITS * np.abs(expected).max()


def trained(found: Checkpoint, *changed: str) -> Checkpoint:
    """As after a training: adapters on two projections, and these entries changed."""
    draw = np.random.default_rng(0)
    model = found.config["model"]
    sizes = {"attention/key": (40, 12), "mlp/gate": (40, 52)}
    entries = dict(found.entries)
    for layer in range(2):
        for path, (width, height) in sizes.items():
            name = f"decoder.layers.{layer}.{path.replace('/', '.')}"
            assert found.entries[f"{name}.kernel"].shape == (width, height)
            entries[f"{name}.lora_a"] = held(draw.normal(size=(width, 4)).astype(np.float32) * width**-0.5)
            entries[f"{name}.lora_b"] = held(draw.normal(size=(4, height)).astype(np.float32) * 0.5)
    for name in changed:
        old = found.entries[name]
        entries[name] = held(old.read() + draw.normal(size=old.shape).astype(np.float32) * 0.3)
    lora = {"rank": 4, "alpha": 6.0, "dropout": 0.05, "targets": "decoder/layers/(attention/key|mlp/gate)"}
    return dataclasses.replace(found, config={**found.config, "model": {**model, "lora": lora}}, entries=entries)


BESIDES = ("connector.second.bias", "newline", "decoder.embed.embedding", "decoder.lm_head.kernel")


@pytest.mark.parametrize("changed", [(), BESIDES], ids=["alone", "with what was trained besides"])
def test_peft_loads_our_adapter_onto_the_model_of_transformers(
    hf, base, tmp_path: Path, changed: tuple[str, ...]
) -> None:
    given = hf.inputs("llava_next", base[0])
    real = given["attention_mask"].astype(bool)
    before = base[0](**hf.torch(given)).logits.detach().numpy()[real]
    start = open_checkpoint(base[1])
    model = trained(start, *changed)
    write_adapter(tmp_path / "adapter", model, start, base_name=str(base[1]))
    assert sorted(f.name for f in (tmp_path / "adapter").iterdir()) == [
        *("adapter_config.json", "adapter_model.safetensors", "adapter_origin.json")
    ]
    ours = logits_of(model, tmp_path / "ours", given)[real]
    assert np.abs(ours - before).max() > 0.1 * np.abs(before).max(), "the adapter changes nothing"

    theirs = peft.PeftModel.from_pretrained(base[0], tmp_path / "adapter").eval()
    assert theirs.peft_config["default"].base_model_name_or_path == str(base[1])
    found = theirs(**hf.torch(given)).logits.detach().numpy()[real]
    assert np.abs(found - ours).max() <= LOGITS * np.abs(ours).max()

    again = open_adapter(tmp_path / "adapter", start)
    assert {n: e.read().tobytes() for n, e in again.entries.items()} == {
        n: e.read().tobytes() for n, e in model.entries.items()
    }


def test_an_adapter_holds_no_more_than_it_can(base, tmp_path: Path) -> None:
    start = open_checkpoint(base[1])
    with pytest.raises(UsageError, match=r"decoder/layers/attention/out/kernel.*changed too; use --format=hf"):
        changed = trained(start, "decoder.layers.1.attention.out.kernel")
        write_adapter(tmp_path / "adapter", changed, start, base_name="x")
    with pytest.raises(UsageError, match="has no LoRA to write"):
        write_adapter(tmp_path / "adapter", start, start, base_name="x")
    assert not (tmp_path / "adapter").exists()


def test_the_wrong_base_is_refused(hf, base, tmp_path: Path) -> None:
    start = open_checkpoint(base[1])
    write_adapter(tmp_path / "adapter", trained(start), start, base_name="someone/base")
    hf.enlarge(base[0], seed=1).save_pretrained(tmp_path / "other")
    other = open_checkpoint(tmp_path / "other")
    with pytest.raises(UsageError, match=r"trained on other weights .* it names, 'someone/base'"):
        open_adapter(tmp_path / "adapter", other)
    (tmp_path / "adapter/adapter_origin.json").unlink()
    open_adapter(tmp_path / "adapter", other)  # the shapes are the same, and nothing else tells
    hf.build("llava_next", "clip", "llama").save_pretrained(tmp_path / "larger")
    with pytest.raises(UsageError, match=r"lora_B of .*layers\.1\.self_attn\.k_proj.* is \[12, 4\], expected \[40, "):
        open_adapter(tmp_path / "adapter", open_checkpoint(tmp_path / "larger"))


REFUSED: list[dict[str, Any]] = [
    *({"use_dora": True}, {"bias": "all"}, {"lora_bias": True}, {"rank_pattern": {"q_proj": 8}}),
    *({"peft_type": "LOHA"}, {"init_lora_weights": "pissa_niter_4"}, {"something_new": 1}, {"fan_in_fan_out": True}),
    *({"alpha_pattern": {"q_proj": 8}}, {"trainable_token_indices": [1]}, {"layer_replication": [[0, 1]]}),
]


@pytest.mark.parametrize("changes", REFUSED, ids=lambda changes: next(iter(changes)))
def test_what_a_lora_of_ours_cannot_be_is_refused_by_name(tmp_path: Path, changes: dict[str, Any]) -> None:
    peft.LoraConfig(r=3, lora_alpha=5, target_modules="x").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    assert read_lora(file) == {"rank": 3, "alpha": 5.0, "dropout": 0.0}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UsageError, match=next(iter(changes))):
        read_lora(file)
    file.write_text(json.dumps({"peft_type": "LORA", "r": "many"}))
    with pytest.raises(UsageError, match="is damaged"):
        read_lora(file)


def test_tensors_that_do_not_fit_are_listed_together(base, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    start = open_checkpoint(base[1])
    write_adapter(tmp_path, trained(start), start, base_name="x")
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    root = "base_model.model.model."
    stem = f"{root}language_model.layers."
    del tensors[f"{stem}0.self_attn.k_proj.lora_A.weight"]
    del tensors[f"{stem}1.mlp.gate_proj.lora_A.weight"], tensors[f"{stem}1.mlp.gate_proj.lora_B.weight"]
    tensors[f"{stem}1.self_attn.k_proj.lora_B.weight"] = np.zeros((12, 5), np.float32)
    tensors[f"{root}vision_tower.embeddings.patch_embedding.lora_A.weight"] = np.zeros((1, 1), np.float32)
    tensors[f"{root}talker.weight"] = np.zeros(1, np.float32)
    tensors[f"{root}image_newline"] = np.zeros(1, np.float32)
    save_file(tensors, file)
    with pytest.raises(UsageError) as error:
        open_adapter(tmp_path, start)
    for part in (
        *("missing lora_A of language_model.model.layers.0.self_attn.k_proj", f"left over {root}talker"),
        *("missing an adapter of language_model.model.layers.1.mlp.gate_proj", "[12, 5], expected [12, 4]"),
        *("adapts what is no linear layer here", "image_newline is [1], expected [40]"),
    ):
        assert part in str(error.value), part
    file.unlink()
    with pytest.raises(UsageError, match="no weights of an adapter"):
        open_adapter(tmp_path, start)


def test_lazily(base, tmp_path: Path) -> None:
    """Opening and describing an adapter reads no tensor of the base."""
    start = open_checkpoint(base[1])
    write_adapter(tmp_path, trained(start), start, base_name="x")
    (tmp_path / "adapter_origin.json").unlink()

    def fail(index: Any) -> np.ndarray:
        raise AssertionError("read")

    blind = {name: Lazy(lazy.shape, lazy.dtype, fail) for name, lazy in start.entries.items()}
    open_adapter(tmp_path, dataclasses.replace(start, entries=blind))
