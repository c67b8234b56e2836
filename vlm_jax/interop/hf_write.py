"""Writes our configuration as that of a Hugging Face or original LLaVA checkpoint.

A model that was imported gives back the file that it came with, unless its settings are others by now; then, and for a
model that began here, the file is made from the settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import UsageError
from vlm_jax.interop.hf_config import KNOWN_TOWERS, ROPE_KEYS, Json

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}

# What our settings do not hold, of the decoder's part of an imported file.
KEPT = (
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "attention_dropout",
    "torch_dtype",
    "dtype",
    "_name_or_path",
)


def hf_config(
    model: Mapping[str, Any], images: Mapping[str, Any], base: Json, *, image_token: int, dtype: str, head: bool
) -> Json:
    """config.json of a `llava` or `llava_next`. `base` is the file that was imported, or {}; `head` whether the tower
    has its pooling head among the tensors that are carried along.

    Raises UsageError for a model that neither class computes.
    """
    vision = model["vision"]
    siglip = _tower_kind(vision) == "siglip_vision_model"
    kind = hf_kind(model, images)
    config: Json = {
        "architectures": [{"llava": "Llava", "llava_next": "LlavaNext"}[kind] + "ForConditionalGeneration"],
        "model_type": kind,
        "ignore_index": -100,
        "image_token_index": image_token,
        "image_seq_length": features(vision),
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": vision["feature_layer"],
        "vision_feature_select_strategy": "full" if siglip or vision.get("keep_class_token") else "default",
        "tie_word_embeddings": bool(model["decoder"].get("tie_embeddings")),
        "torch_dtype": dtype,
        "text_config": decoder_config(model["decoder"], base.get("text_config") or base),
        "vision_config": tower_config(vision, base.get("vision_config") or {}, head=head),
    }
    if kind == "llava_next":
        config["image_grid_pinpoints"] = pinpoints(images, "hw")
    return config


def hf_kind(model: Mapping[str, Any], images: Mapping[str, Any]) -> str:
    """`llava` or `llava_next`. Raises UsageError that says what neither of them has."""
    anyres = images["mode"] == "anyres"
    problems = []
    if model["connector"] != "mlp2x_gelu":
        problems.append(f"the connector {model['connector']!r} (they have mlp2x_gelu)")
    if anyres and images.get("merge") != "spatial_unpad":
        problems.append(f"images.merge {images.get('merge')!r} (llava_next has spatial_unpad)")
    if anyres and images.get("max_tiles"):
        problems.append("images.max_tiles")
    if model.get("newline") and not anyres:
        problems.append(f"a newline with images.mode {images['mode']!r}")
    if model["vision"].get("post_norm"):
        problems.append("the last norm of the tower (vision.post_norm)")
    if problems:
        raise UsageError(
            f"transformers' llava and llava_next do not have {', '.join(problems)}: export is not possible"
        )
    return "llava_next" if anyres else "llava"


def features(vision: Mapping[str, Any]) -> int:
    return (vision["image_size"] // vision["patch_size"]) ** 2 + bool(
        vision.get("class_token") and vision.get("keep_class_token")
    )


def pinpoints(images: Mapping[str, Any], order: str) -> list[list[int]]:
    """The canvases in this order of width and height."""
    flip = images.get("pinpoint_order", "wh") != order
    return [list(point)[::-1] if flip else list(point) for point in images["pinpoints"]]


def _tower_kind(vision: Mapping[str, Any]) -> str:
    clip = (bool(vision.get("class_token")), bool(vision.get("pre_norm")), not vision.get("patch_bias", True))
    if all(clip):
        return "clip_vision_model"
    if not any(clip):
        return "siglip_vision_model"
    raise UsageError(
        "the vision tower is neither CLIP's (class token, first norm, patches without bias) nor SigLIP's (none of "
        "these): there is no class for it in transformers"
    )


def tower_config(vision: Mapping[str, Any], base: Json, *, head: bool = False) -> Json:
    kind = _tower_kind(vision)
    activation = vision.get("activation", "gelu")
    if activation not in ACTIVATIONS:
        raise UsageError(f"the activation {activation!r} of the vision tower has no counterpart in Hugging Face's")
    more = {"vision_use_head": head} if kind == "siglip_vision_model" else {}
    more |= {"projection_dim": base.get("projection_dim", 768)} if kind == "clip_vision_model" else {}
    return {
        "model_type": kind,
        "hidden_act": ACTIVATIONS[activation],
        "hidden_size": vision["hidden_size"],
        "image_size": vision["image_size"],
        "intermediate_size": vision["intermediate_size"],
        "layer_norm_eps": vision.get("norm_eps", 1e-6),
        "num_attention_heads": vision["num_heads"],
        "num_channels": 3,
        "num_hidden_layers": vision["num_layers"],
        "patch_size": vision["patch_size"],
        **more,
    }


def decoder_kind(decoder: Mapping[str, Any], base: Json) -> str:
    if decoder.get("qk_norm"):
        return "qwen3"
    if decoder.get("qkv_bias"):
        return "qwen2"
    words = " ".join([str(base.get("model_type")), *map(str, base.get("architectures") or ())]).lower()
    return "mistral" if decoder.get("sliding_window") is not None or "mistral" in words else "llama"


def decoder_config(decoder: Mapping[str, Any], base: Json) -> Json:
    """The decoder's part of config.json, as transformers 4 wrote it and 5 reads it."""
    kind = decoder_kind(decoder, base)
    window = decoder.get("sliding_window")
    more: Json = {}
    if kind == "mistral":
        more = {"sliding_window": window}
    elif kind.startswith("qwen"):
        more = {"sliding_window": window, "use_sliding_window": window is not None}
        more |= {"max_window_layers": 0 if window is not None else decoder["num_layers"]}
    scaling = decoder.get("rope_scaling")
    if scaling is not None:
        theirs = {ours: key for key, ours in ROPE_KEYS[scaling["kind"]].items()}
        values = {theirs[key]: value for key, value in scaling.items() if key in theirs and value is not None}
        if scaling["kind"] != "linear":
            values.setdefault("original_max_position_embeddings", 8192)
        if scaling["kind"] == "llama3":
            values = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, **values}
        scaling = {"rope_type": scaling["kind"], "type": scaling["kind"], **values}
    names = {"qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral", "llama": "Llama"}
    return {
        **{key: base[key] for key in KEPT if key in base},
        "architectures": [names[kind] + "ForCausalLM"],
        "model_type": kind,
        "vocab_size": decoder["vocab_size"],
        "hidden_act": "silu",
        "hidden_size": decoder["hidden_size"],
        "intermediate_size": decoder["intermediate_size"],
        "num_hidden_layers": decoder["num_layers"],
        "num_attention_heads": decoder["num_heads"],
        "num_key_value_heads": decoder["num_kv_heads"],
        "head_dim": decoder["head_dim"],
        "rms_norm_eps": decoder.get("norm_eps", 1e-5),
        "rope_theta": decoder.get("rope_theta", 1e4),
        "rope_scaling": scaling,
        "max_position_embeddings": base.get("max_position_embeddings", 4096),
        "tie_word_embeddings": bool(decoder.get("tie_embeddings")),
        **more,
    }


def llava_config(model: Mapping[str, Any], images: Mapping[str, Any], base: Json, *, dtype: str) -> Json:
    """config.json of an original LLaVA: that of its decoder, with `mm_` keys. The tower is named where it is one that
    LLaVA names, and described under `vision_config` where it is not."""
    vision, decoder = model["vision"], decoder_config(model["decoder"], base.get("text_config") or base)
    if vision.get("post_norm"):
        raise UsageError("LLaVA does not apply the last norm of a tower (vision.post_norm): export is not possible")
    kind = {"mistral": "mistral", "qwen2": "qwen", "qwen3": "qwen3"}.get(decoder["model_type"], "llama")
    described = llava_tower(vision, base.get("vision_config") or {})
    name = next((name for name, known in KNOWN_TOWERS.items() if _is_tower(known, described)), None)
    tower: Json = {"mm_vision_tower": name} if name else {"mm_vision_tower": None, "vision_config": described}
    anyres = images["mode"] == "anyres"
    aspect = f"anyres_max_{images['max_tiles']}" if anyres and images.get("max_tiles") else images["mode"]
    return {
        **decoder,
        "architectures": [f"Llava{kind.capitalize()}ForCausalLM"],
        "model_type": f"llava_{kind}",
        "torch_dtype": dtype,
        **tower,
        "mm_hidden_size": vision["hidden_size"],
        "mm_projector_type": model["connector"],
        "mm_vision_select_layer": -2 if described["model_type"] == "siglip_vision_model" else vision["feature_layer"],
        "mm_vision_select_feature": "cls_patch" if vision.get("keep_class_token") else "patch",
        "mm_patch_merge_type": images.get("merge") or "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": aspect,
        **({"image_grid_pinpoints": pinpoints(images, "wh")} if anyres else {}),
        "use_mm_proj": True,
    }


def llava_tower(vision: Mapping[str, Any], base: Json) -> Json:
    """The tower as LLaVA is told of it. Of a SigLIP tower LLaVA-NeXT deletes the last layer and takes what is then
    last, so that there is one layer more than we have where ours ends with it."""
    described = tower_config(vision, base)
    if described["model_type"] == "siglip_vision_model":
        if vision["feature_layer"] not in (-1, -2):
            raise UsageError(f"LLaVA takes the features of a SigLIP tower at layer -2, not {vision['feature_layer']}")
        described["num_hidden_layers"] += vision["feature_layer"] == -1
    return described


def _is_tower(known: Json, described: Json) -> bool:
    """Whether these are the sizes of a tower that LLaVA names."""
    return all(described[key] == value for key, value in known.items() if key != "projection_dim")


# ---------------------------------------------------------------------------------------------------------- processors


def preprocessor_config(model: Mapping[str, Any], images: Mapping[str, Any]) -> Json:
    """preprocessor_config.json of a `llava` or `llava_next`."""
    vision = model["vision"]
    size, mode = vision["image_size"], images["mode"]
    anyres, square = mode == "anyres", {"height": size, "width": size}
    kind = "LlavaNextImageProcessor" if anyres else "LlavaImageProcessor"
    return {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if mode == "resize" else {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": mode != "resize",
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.get("mean", (0.5,) * 3)),
        "image_std": list(vision.get("std", (0.5,) * 3)),
        "do_pad": mode in ("pad", "anyres"),
        **({"image_grid_pinpoints": pinpoints(images, "hw")} if anyres else {}),
    }


def processor_config(model: Mapping[str, Any], images: Mapping[str, Any]) -> Json:
    """processor_config.json, from which a processor knows how many image tokens an image has."""
    vision = model["vision"]
    clip = bool(vision.get("class_token"))
    return {
        "processor_class": "LlavaNextProcessor" if images["mode"] == "anyres" else "LlavaProcessor",
        "image_token": "<image>",
        "num_additional_image_tokens": int(clip),
        "patch_size": vision["patch_size"],
        "vision_feature_select_strategy": "default" if clip and not vision.get("keep_class_token") else "full",
    }
