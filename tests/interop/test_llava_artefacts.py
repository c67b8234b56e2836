"""What LLaVA's training leaves becomes a whole model with what it was trained on, and computes what that computes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

import vlm_jax
from vlm_jax.errors import UsageError
from vlm_jax.interop.checkpoint import open_checkpoint
from vlm_jax.interop.llava_artefacts import open_connector
from vlm_jax.interop.native import write_model

torch = pytest.importorskip("torch")

LOGITS = 1e-4  # of the largest logit


@pytest.fixture
def parts(hf, tmp_path: Path, one_device) -> tuple[Any, dict[str, Any]]:
    """A tiny LLaVA of transformers, its decoder and its tower in folders of their own, and LLaVA's config of it."""
    model = hf.build("llava", "clip", "llama")
    text = model.config.text_config
    decoder = transformers.LlamaForCausalLM(text)
    decoder.model.load_state_dict(model.model.language_model.state_dict())
    decoder.lm_head.load_state_dict(model.lm_head.state_dict())
    decoder.save_pretrained(tmp_path / "vicuna-7b-v1.5")
    model.model.vision_tower.save_pretrained(tmp_path / "tower")
    config = {
        **text.to_dict(),
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "_name_or_path": str(tmp_path / "vicuna-7b-v1.5"),
        "mm_vision_tower": str(tmp_path / "tower"),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "image_aspect_ratio": "pad",
    }
    return model, config


def projector(model: Any, prefix: str = "model.mm_projector.") -> dict[str, Any]:
    theirs = {"linear_1": "0", "linear_2": "2"}
    state = model.model.multi_modal_projector.state_dict()
    return {prefix + name.replace(name[:8], theirs[name[:8]]): value.clone() for name, value in state.items()}


def write(folder: Path, config: dict[str, Any] | None = None, **files: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, tensors in files.items():
        torch.save(tensors, folder / f"{name}.bin")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def lora_of(model: Any, folder: Path) -> tuple[dict[str, Any], Any]:
    """Adapters by LLaVA's names for two projections of each layer, and the model with them merged."""
    adapters, merged = {}, copy.deepcopy(model)
    with torch.no_grad():
        for number, layer in enumerate(merged.model.language_model.layers):
            for path in ("self_attn.q_proj", "mlp.up_proj"):
                weight = layer.get_submodule(path).weight
                a = torch.randn(2, weight.shape[1]) * weight.shape[1] ** -0.5
                b = torch.randn(weight.shape[0], 2)
                weight += b @ a * (8 / 2)
                name = f"base_model.model.model.layers.{number}.{path}"
                adapters |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj", "up_proj"]}
    config |= {"base_model_name_or_path": str(folder.parent / "vicuna-7b-v1.5"), "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return adapters, merged


def check(hf, folder: Path, model: Any, **more: Any) -> dict[str, Any]:
    """The model at `folder`, imported and loaded, gives the logits of `model`; returns its config."""
    given = hf.inputs("llava", model)
    real = given["attention_mask"].astype(bool)
    expected = model(**hf.torch(given)).logits.detach().numpy()[real]
    found = open_checkpoint(folder, **more)
    write_model(folder / "ours", found.entries, found.config, extra=found.extra, files=found.files)
    vlm = vlm_jax.load(folder / "ours")
    ids = np.where(given["input_ids"] == hf.IMAGE_TOKEN, vlm.image_token_id, given["input_ids"])
    ours = vlm.apply_hf(**given | {"input_ids": ids})[real]
    assert np.abs(ours - expected).max() <= LOGITS * np.abs(expected).max()
    return found.config


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector.", "base_model.model.model.mm_projector."])
def test_a_connector_alone_becomes_a_model(hf, parts, tmp_path: Path, prefix: str) -> None:
    model, config = parts
    folder = write(tmp_path / "llava-v1.5-pretrain", config, mm_projector=projector(model, prefix))
    if prefix.startswith("model"):
        told = check(hf, folder, model)
        assert told["images"]["mode"] == "pad" and told["template"] == "vicuna_v1"
    settings = open_checkpoint(folder).config["model"]
    entries = open_connector(folder / "mm_projector.bin", settings)
    weight = model.model.multi_modal_projector.linear_1.weight.detach().numpy()
    assert (entries["connector.first.kernel"].read() == weight.T).all() and len(entries) == 4


def test_a_lora_folder_of_llava_on_a_decoder_alone(hf, parts, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, config = parts
    folder = tmp_path / "llava-v1.5-7b-lora"
    adapters, merged = lora_of(model, folder)
    besides = {f"base_model.model.{name}": value for name, value in projector(model).items()}
    write(folder, config, adapter_model=adapters, non_lora_trainables=besides)
    told = check(hf, folder, merged)
    assert told["model"]["lora"] == {
        "rank": 2,
        "alpha": 8.0,
        "dropout": 0.0,
        "targets": "decoder/layers/attention/query|decoder/layers/mlp/up",
    }


def test_a_lora_folder_on_a_whole_model_that_is_elsewhere(hf, parts, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, _ = parts
    model.save_pretrained(tmp_path / "whole")
    folder = tmp_path / "llava-lora"
    adapters, merged = lora_of(model, folder)
    with torch.no_grad():
        merged.model.multi_modal_projector.linear_2.bias += 1
    besides = {f"base_model.model.{name}": value for name, value in projector(merged).items()}
    write(folder, adapter_model=adapters, non_lora_trainables=besides)
    check(hf, folder, merged, base=str(tmp_path / "whole"))


def test_the_newline_of_llava_16_is_among_what_was_trained_besides(parts, tmp_path: Path) -> None:
    model, config = parts
    config |= {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"}
    config |= {"image_grid_pinpoints": [[14, 28], [28, 14]]}
    newline = torch.randn(40).bfloat16()
    tensors = projector(model)
    folder = write(tmp_path / "artefact", config, mm_projector=tensors)
    with pytest.raises(UsageError, match=r"no whole model:\n  missing image_newline$"):
        open_checkpoint(folder)
    write(folder, config, non_lora_trainables={"base_model.model.model.image_newline": newline})
    found = open_checkpoint(folder)
    assert found.entries["newline"].read().astype(np.float32).tolist() == newline.float().tolist()
    assert found.config["images"]["pinpoint_order"] == "wh" and found.config["model"]["newline"]


def test_what_does_not_fit_together_is_refused(parts, tmp_path: Path) -> None:
    model, config = parts
    tensors = projector(model)

    def fails(says: str, config: dict[str, Any] | None = config, **tensors: dict[str, Any]) -> None:
        folder = write(tmp_path / "artefact", **tensors)
        (folder / "config.json").unlink(missing_ok=True)
        write(folder, config)
        with pytest.raises(UsageError, match=says):
            open_checkpoint(folder)

    wide = {**tensors, "model.mm_projector.0.bias": torch.zeros(41), "model.vision_resampler.w": torch.zeros(1)}
    both = r"left over model\.vision_resampler\.w\n  model\.mm_projector\.0\.bias is \[41\], expected \[40\]"
    fails(both, mm_projector=wide)
    fails("does not name the rest: give --base=PATH", None, mm_projector=tensors)
    no_llava = {"_name_or_path": config["_name_or_path"], "model_type": "llama"}
    fails("which is no LLaVA", no_llava, mm_projector=tensors)
    fails("the folder does not exist", {**config, "_name_or_path": str(tmp_path / "gone")}, mm_projector=tensors)
    half = {"model.mm_projector.2.bias": torch.zeros(40)}
    fails(r"missing multi_modal_projector\.linear_1\.bias", mm_projector=half)

    settings = open_checkpoint(write(tmp_path / "fine", config, mm_projector=tensors)).config["model"]
    with pytest.raises(UsageError, match=r"lacks multi_modal_projector\.linear_1\.weight"):
        open_connector(write(tmp_path / "half", mm_projector=half), settings)


def test_what_would_run_code_is_refused(parts, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    model, config = parts
    folder = write(tmp_path / "artefact", config, mm_projector=projector(model), non_lora_trainables={"a": Payload()})
    with pytest.raises(UsageError, match=r"non_lora_trainables\.bin is refused.*'__builtin__\.exec'"):
        open_checkpoint(folder)
    assert not (tmp_path / "ran").exists()
