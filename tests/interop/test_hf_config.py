"""What the published config files say becomes our settings; what would be computed otherwise is refused."""

from __future__ import annotations

from typing import Any

import pytest

from vlm_jax.errors import UsageError
from vlm_jax.interop.hf_config import Described, describe, tell_template
from vlm_jax.interop.hf_write import hf_config, llava_config, preprocessor_config, processor_config
from vlm_jax.interop.huggingface import normal
from vlm_jax.models import presets
from vlm_jax.recipe import experiment

POINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
PAIRS = tuple(map(tuple, POINTS))
# As the hub has it: the decoder is told by three keys, the others are Llama's defaults.
LLAVA15 = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}
MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 32064,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "max_position_embeddings": 32768,
}
LLAVA16 = {**LLAVA15, "model_type": "llava_next", "image_grid_pinpoints": POINTS, "text_config": MISTRAL}
ORIGINAL = {
    "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
    "architectures": ["LlavaMistralForCausalLM"],
    "hidden_size": 4096,
    "image_aspect_ratio": "anyres",
    "image_crop_resolution": 224,
    "image_grid_pinpoints": POINTS,
    "mm_hidden_size": 1024,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    **MISTRAL,
    "model_type": "llava_mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "tokenizer_model_max_length": 4096,
    "vocab_size": 32000,
}


def of(raw: dict[str, Any], **processor: Any) -> Described:
    return describe(raw, "config.json", processor=processor)


def expected(decoder: dict[str, Any], **more: Any) -> dict[str, Any]:
    return normal(presets.llava(vision=presets.clip_l14_336(), connector="mlp2x_gelu", decoder=decoder, **more))


def test_published_configs_are_our_presets() -> None:
    vicuna = presets.vicuna_7b(vocab_size=32064)
    mistral = presets.mistral_7b(rope_theta=1e6, sliding_window=None)
    anyres = {"mode": "anyres", "merge": "spatial_unpad", "pinpoints": PAIRS}
    for raw, model, images in (
        (LLAVA15, expected(vicuna), {"mode": "square"}),
        (LLAVA16, expected(mistral | {"vocab_size": 32064}, newline=True), {**anyres, "pinpoint_order": "hw"}),
        (ORIGINAL, expected(mistral, newline=True), {**anyres, "pinpoint_order": "wh", "max_tiles": None}),
    ):
        found = of(raw)
        assert (normal(found.model), found.images) == (model, images)
        assert set(images) <= set(experiment().images)
    yi = {
        "rope_theta": 5e6,
        "hidden_size": 7168,
        "num_attention_heads": 56,
        "num_hidden_layers": 60,
        "vocab_size": 64000,
    }
    yi |= {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "intermediate_size": 20480}
    assert normal(of({**ORIGINAL, **yi}).model) == expected(presets.yi_34b(), newline=True)
    old = {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "mm_projector_type": None}
    assert (
        of({**ORIGINAL, **old, "image_aspect_ratio": "pad", "mm_patch_merge_type": None}).model["connector"] == "linear"
    )


def test_image_processors_say_what_happens_to_a_picture() -> None:
    assert of(LLAVA15, do_pad=True).images == {"mode": "pad"}
    assert of(LLAVA15, size={"height": 336, "width": 336}).images == {"mode": "resize"}
    assert of(LLAVA15, image_mean=[0.1, 0.2, 0.3]).model["vision"]["mean"] == (0.1, 0.2, 0.3)
    ranged = {**ORIGINAL, "image_aspect_ratio": "anyres_max_9", "image_grid_pinpoints": "(1x1),...,(2x3)"}
    images = of(ranged).images
    assert images is not None and images["max_tiles"] == 9
    assert images["pinpoints"] == tuple((336 * i, 336 * j) for i in (1, 2) for j in (1, 2, 3))


SCALINGS = {
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "linear": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 4096, "beta_fast": 16.0},
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_rope_is_read_in_both_spellings_and_written(kind: str) -> None:
    old = {"rope_theta": 5e5, "rope_scaling": {"type": kind, "rope_type": kind, **SCALINGS[kind]}}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": kind, **SCALINGS[kind]}}
    models = [of({**LLAVA15, "text_config": {"model_type": "llama", **spelling}}).model for spelling in (old, new)]
    assert models[0] == models[1]
    decoder = models[0]["decoder"]
    assert decoder["rope_theta"] == 5e5 and decoder["rope_scaling"]["kind"] == kind
    written = hf_config(models[0], {"mode": "square"}, {}, image_token=1, dtype="float32", head=False)
    assert normal(of(written).model) == normal(models[0])


def test_what_is_written_is_read_as_the_same() -> None:
    for raw in (LLAVA15, LLAVA16, ORIGINAL):
        model, images = normal(of(raw).model), of(raw).images
        assert images is not None
        written = hf_config(model, images, {}, image_token=32000, dtype="bfloat16", head=False)
        again = of(written, **preprocessor_config(model, images))
        # Hugging Face's order is the other one of each pair, and the list keeps its own.
        flipped = tuple(point[::-1] for point in PAIRS) if raw is ORIGINAL else PAIRS
        told = {**images, "pinpoint_order": "hw", "pinpoints": flipped} if "pinpoints" in images else images
        assert normal(again.model) == model
        assert again.images == {key: value for key, value in told.items() if key != "max_tiles"}
        assert processor_config(model, images)["num_additional_image_tokens"] == 1
        original = of(llava_config(model, images, {}, dtype="bfloat16"))
        assert normal(original.model) == model and original.images is not None
        assert original.images.get("pinpoint_order", "wh") == "wh"


REFUSED = {
    "joins the features of several layers": {"vision_feature_layer": [-2, 23]},
    "only 'gelu' with bias": {"projector_hidden_act": "relu"},
    "would drop the first patch": {"vision_config": {"model_type": "siglip_vision_model"}},
    "a decoder of type 'gemma'": {"text_config": {"model_type": "gemma"}},
    "attention_bias": {"text_config": {"model_type": "llama", "attention_bias": True}},
    "rotary embeddings by 'dynamic'": {
        "text_config": {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    },
    "a window and some all": {
        "text_config": {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 3}
    },
    "not a config of llava": {"vision_feature_select_strategy": "none"},
    "model_type 'blip'": {"model_type": "blip"},
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_would_be_computed_otherwise_is_refused(says: str) -> None:
    with pytest.raises(UsageError, match=says) as error:
        of({**LLAVA15, **REFUSED[says]})
    assert "\n" not in str(error.value)


def test_originals_that_are_refused() -> None:
    for says, changes in (
        ("a resampler 'qformer'", {"mm_resampler_type": "qformer"}),
        ("mm_use_im_start_end", {"mm_use_im_start_end": True}),
        ("a projector 'mlp3x_gelu'", {"mm_projector_type": "mlp3x_gelu"}),
        ("names the vision tower 'mine'", {"mm_vision_tower": "mine"}),
    ):
        with pytest.raises(UsageError, match=says):
            of({**ORIGINAL, **changes})


def test_templates_are_told_by_chat_template_or_name() -> None:
    vicuna = "{{ 'A chat between a curious human and ...' }}{{ 'USER: ' }}{{ 'ASSISTANT: ' }}"
    assert tell_template(vicuna, LLAVA16, "x") == "llava_v1"
    assert tell_template("<<SYS>> [INST] {{ x }} [/INST]", LLAVA16, "x") == "mistral_instruct"
    assert tell_template("<|im_start|>", {"text_config": {"model_type": "llama"}}, "x") == "chatml_direct"
    assert tell_template("{{ message['role'].upper() + ': '}}", LLAVA15, "x") == "vicuna_v1_hf"
    assert tell_template("{{ x }}", LLAVA15, "llava-v1.5-7b") is None
    assert tell_template(None, {"model_type": "llava_llama"}, "models/llava-v1.6-34b") == "chatml_direct"
    assert tell_template(None, {"model_type": "llava_llama"}, "llama3-llava-next-8b-hf") == "llava_llama_3"
    assert tell_template(None, {"model_type": "llava_llama"}, "models/llava-1.5-7b") == "vicuna_v1"
    assert tell_template(None, {"model_type": "llava_llama"}, "models/mine") is None
