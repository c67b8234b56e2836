"""Reads the configuration of a Hugging Face or original LLaVA checkpoint as ours.

Sizes that a sparse or old file leaves out are the defaults of transformers' own config classes, which need no torch;
what would compute something else than this code does is refused in one sentence.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlm_jax.data.chat_template import template_of
from vlm_jax.errors import UsageError
from vlm_jax.models import presets

Json = dict[str, Any]

WHOLE = ("llava", "llava_next")
DECODERS = ("llama", "mistral", "qwen2", "qwen3")
TOWERS = ("clip_vision_model", "siglip_vision_model")
PAIRS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}  # of a vision and a text tower
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
MEAN_STD = {"clip_vision_model": (presets.CLIP_MEAN, presets.CLIP_STD), "siglip_vision_model": ((0.5,) * 3, (0.5,) * 3)}

# LLaVA's configs name their tower and do not describe it.
_LARGE: Json = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096}
_LARGE |= {"num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14, "projection_dim": 768}
_SO400M: Json = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304}
_SO400M |= {"num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14, "image_size": 384}
KNOWN_TOWERS: dict[str, Json] = {
    "openai/clip-vit-large-patch14-336": {**_LARGE, "image_size": 336},
    "openai/clip-vit-large-patch14": {**_LARGE, "image_size": 224},
    "google/siglip-so400m-patch14-384": _SO400M,
}


@dataclasses.dataclass(frozen=True)
class Described:
    """What a config says. Of a part alone, `model` has its settings only, under its name, and `images` is None.

    kind: "hf", "llava" or "part".
    tied: whether the file says that the head is the embedding.
    """

    kind: str
    model: Json
    images: Json | None
    tied: bool


def describe(
    raw: Json,
    where: str,
    *,
    processor: Mapping[str, Any],
    tower: Callable[[str], Json] | None = None,
    tower_layers: int | None = None,
) -> Described:
    """Our settings of the model that `raw`, its config.json, describes.

    processor: the image processor's settings, {} where there are none.
    tower: finds the config of a tower by the name that an original LLaVA gives it.
    tower_layers: how many layers the checkpoint holds of it, if any.
    Raises UsageError for what this code would compute otherwise.
    """
    model_type = str(raw.get("model_type"))
    try:
        if is_original(raw):
            return _original(raw, where, processor, tower, tower_layers)
        if model_type in WHOLE:
            return _whole(raw, where, processor)
        if model_type in PAIRS or model_type in TOWERS:
            vision = _hf(model_type, raw, where)
            vision = vision.vision_config if model_type in PAIRS else vision
            return Described("part", {"vision": _vision(vision, -2, False, processor, where)}, None, False)
        if model_type in DECODERS:
            text = _hf(model_type, raw, where)
            tied = bool(text.tie_word_embeddings)
            return Described("part", {"decoder": _decoder(text, tied, where)}, None, tied)
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{where} is damaged: {type(error).__name__} {error}") from error
    known = ", ".join((*WHOLE, "LLaVA's own", *PAIRS, *TOWERS, *DECODERS))
    raise UsageError(f"{where} says model_type {raw.get('model_type')!r}; what can be read is {known}")


def is_original(raw: Json) -> bool:
    """LLaVA's own file: that of its decoder with more keys, `mm_...`. Files on the hub may hold such keys as well."""
    return "text_config" not in raw and any(key.startswith("mm_") for key in raw)


def _hf(model_type: str, raw: Json, where: str) -> Any:
    """transformers' config of a model, everything in it filled."""
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[model_type].from_dict({**raw, "model_type": model_type})
    except Exception as error:  # its checks raise classes of huggingface_hub's own
        told = " ".join(str(error).split())
        raise UsageError(f"{where} is not a config of {model_type}: {told}") from error


def _whole(raw: Json, where: str, processor: Mapping[str, Any]) -> Described:
    config = _hf(raw["model_type"], raw, where)
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        raise UsageError(
            f"{where} has a projector with activation {config.projector_hidden_act!r} and "
            f"bias={config.multimodal_projector_bias}; only 'gelu' with bias is supported"
        )
    layer = config.vision_feature_layer
    if isinstance(layer, (list, tuple)):
        if len(layer) != 1:
            raise UsageError(f"{where} joins the features of several layers ({list(layer)}); one is supported")
        layer = layer[0]
    keep = config.vision_feature_select_strategy == "full"
    siglip = config.vision_config.model_type == "siglip_vision_model"
    if siglip and not keep:
        raise UsageError(
            f"{where} says vision_feature_select_strategy 'default', which would drop the first patch of a SigLIP "
            "tower; set it to 'full'"
        )
    tied = bool(raw.get("tie_word_embeddings") or config.text_config.tie_word_embeddings)
    anyres = raw["model_type"] == "llava_next"
    model = presets.llava(
        vision=_vision(config.vision_config, layer, keep and not siglip, processor, where),
        connector="mlp2x_gelu",
        decoder=_decoder(config.text_config, tied, where),
        newline=anyres,
    )
    if not anyres:
        return Described("hf", model, {"mode": _mode(processor, siglip)}, tied)
    points = tuple(tuple(point) for point in processor.get("image_grid_pinpoints") or config.image_grid_pinpoints)
    images = {"mode": "anyres", "merge": "spatial_unpad", "pinpoints": points, "pinpoint_order": "hw"}
    return Described("hf", model, images, tied)


def _mode(processor: Mapping[str, Any], siglip: bool) -> str:
    """What an image processor does with a picture that is not square."""
    if processor.get("do_pad"):
        return "pad"
    if processor.get("do_center_crop", not siglip and "height" not in processor.get("size", {})):
        return "square"
    return "resize"


# --------------------------------------------------------------------------------------------------------------- parts


def _vision(config: Any, layer: int, keep: bool, processor: Mapping[str, Any], where: str) -> Json:
    kind = config.model_type
    if kind not in TOWERS:
        raise UsageError(f"{where} has a vision tower of type {kind!r}; supported are {', '.join(TOWERS)}")
    if config.hidden_act not in ACTIVATIONS:
        raise UsageError(f"{where} has a vision tower with activation {config.hidden_act!r}, which is not supported")
    if config.num_channels != 3 or not isinstance(config.image_size, int) or not isinstance(config.patch_size, int):
        raise UsageError(f"{where} has a vision tower for other than square pictures of three channels")
    clip = kind == "clip_vision_model"
    mean, std = MEAN_STD[kind]
    return {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "activation": ACTIVATIONS[config.hidden_act],
        "class_token": clip,
        "keep_class_token": keep,
        "pre_norm": clip,
        "patch_bias": not clip,
        "post_norm": False,
        "norm_eps": config.layer_norm_eps,
        "feature_layer": layer,
        "mean": tuple(processor.get("image_mean") or mean),
        "std": tuple(processor.get("image_std") or std),
    }


def _decoder(config: Any, tied: bool, where: str) -> Json:
    kind = config.model_type
    if kind not in DECODERS:
        raise UsageError(f"{where} has a decoder of type {kind!r}; supported are {', '.join(DECODERS)}")
    raw = config.to_dict()
    if raw.get("hidden_act", "silu") != "silu" or raw.get("attention_bias") or raw.get("mlp_bias"):
        found = {key: raw.get(key) for key in ("hidden_act", "attention_bias", "mlp_bias")}
        raise UsageError(f"{where} has a decoder with {found}; only 'silu' without these biases is supported")
    window, layers = raw.get("sliding_window"), set(raw.get("layer_types") or ())
    if window is not None and layers == {"full_attention"}:
        window = None
    if window is not None and len(layers) > 1:
        raise UsageError(
            f"{where} has a decoder in which some layers see a window and some all, which is not supported"
        )
    rope = dict(raw["rope_parameters"])
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": raw.get("num_key_value_heads") or config.num_attention_heads,
        "head_dim": raw.get("head_dim") or config.hidden_size // config.num_attention_heads,
        "rope_theta": float(rope.pop("rope_theta")),
        "rope_scaling": _rope_scaling(rope, config.max_position_embeddings, where),
        "norm_eps": config.rms_norm_eps,
        "sliding_window": window,
        "qkv_bias": kind == "qwen2",
        "qk_norm": kind == "qwen3",
        "tie_embeddings": tied,
    }


# rope_type: its keys in Hugging Face's files -> ours (layers/rope.py)
ROPE_KEYS: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "attention_factor": "attention_factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
    },
}


def _rope_scaling(rope: Json, longest: int, where: str) -> Json | None:
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = str(rope.pop("rope_type", rope.pop("type", "default")))
    if rope.get("partial_rotary_factor", 1) == 1:
        rope.pop("partial_rotary_factor", None)
    if kind == "default":
        if rope.get("partial_rotary_factor") is not None:
            raise UsageError(f"{where} rotates a part of each head (partial_rotary_factor), which is not supported")
        return None
    keys = ROPE_KEYS.get(kind)
    if keys is None or set(rope) - set(keys):
        known = ", ".join(("default", *ROPE_KEYS))
        raise UsageError(f"{where} scales its rotary embeddings by {kind!r} with {sorted(rope)}; supported are {known}")
    if kind == "yarn":
        rope.setdefault("original_max_position_embeddings", longest)
    return {"kind": kind, **{keys[key]: value for key, value in rope.items()}}


# ------------------------------------------------------------------------------------------------------ LLaVA's own


def _original(
    raw: Json,
    where: str,
    processor: Mapping[str, Any],
    tower: Callable[[str], Json] | None,
    tower_layers: int | None,
) -> Described:
    words = " ".join([str(raw.get("model_type")), *map(str, raw.get("architectures") or ())]).lower()
    text_type = next((kind for kind in ("mistral", "qwen3", "qwen") if kind in words), "llama")
    if "mpt" in words or "gemma" in words or "mixtral" in words:
        raise UsageError(f"{where} has a decoder of another kind ({words}); supported are {', '.join(DECODERS)}")
    text = _hf({"qwen": "qwen2"}.get(text_type, text_type), raw, where)
    tied = bool(raw.get("tie_word_embeddings", False))
    vision_raw = _tower_of(raw, where, tower)
    vision = _hf(vision_raw["model_type"], vision_raw, where)
    clip = vision.model_type == "clip_vision_model"
    layer = raw.get("mm_vision_select_layer", -2)
    select = raw.get("mm_vision_select_feature") or "patch"
    if select not in ("patch", "cls_patch"):
        raise UsageError(f"{where} says mm_vision_select_feature {select!r}; supported are 'patch' and 'cls_patch'")
    if not clip:  # LLaVA-NeXT deletes the last layer of a SigLIP tower and takes what is then last, whatever is asked
        layer = -2
        if tower_layers is not None and tower_layers < vision.num_hidden_layers:
            layer, vision.num_hidden_layers = -1, tower_layers
    projector = raw.get("mm_projector_type") or "linear"
    if projector not in ("linear", "mlp2x_gelu", "identity"):
        raise UsageError(f"{where} has a projector {projector!r}; supported are linear, mlp2x_gelu and identity")
    if raw.get("mm_resampler_type"):
        raise UsageError(f"{where} has a resampler {raw['mm_resampler_type']!r}, which is not supported")
    if raw.get("mm_use_im_start_end"):
        raise UsageError(f"{where} says mm_use_im_start_end, whose tokens around the images are not supported")
    merge = raw.get("mm_patch_merge_type") or "flat"
    images = _original_images(raw, vision.image_size, where)
    if images["mode"] == "anyres":
        images["merge"] = merge
    model = presets.llava(
        vision=_vision(vision, layer, clip and select == "cls_patch", processor, where),
        connector=projector,
        decoder=_decoder(text, tied, where),
        newline="unpad" in merge,
    )
    return Described("llava", model, images, tied)


def _tower_of(raw: Json, where: str, tower: Callable[[str], Json] | None) -> Json:
    """The config of the tower that a LLaVA names."""
    if isinstance(raw.get("vision_config"), dict):
        return {"model_type": "clip_vision_model", **raw["vision_config"]}
    name = str(raw.get("mm_vision_tower") or raw.get("vision_tower"))
    found = KNOWN_TOWERS.get(name) or (tower(name) if tower is not None else None)
    if found is None:
        raise UsageError(f"{where} names the vision tower {name!r}, which is not known: give its folder")
    model_type = str(found.get("model_type"))
    if model_type in PAIRS:
        found = {**(found.get("vision_config") or {}), "model_type": PAIRS[model_type]}
    return found


def _original_images(raw: Json, size: int, where: str) -> Json:
    """`config.images`, without the merge of anyres."""
    aspect = raw.get("image_aspect_ratio") or "square"
    if aspect in ("square", "pad"):
        return {"mode": aspect}
    match = re.fullmatch(r"anyres(_max_(\d+))?", str(aspect))
    if not match:
        raise UsageError(f"{where} says image_aspect_ratio {aspect!r}; supported are square, pad, anyres, anyres_max_N")
    images: Json = {"mode": "anyres", "pinpoints": _pinpoints(raw.get("image_grid_pinpoints"), size, where)}
    return images | {"pinpoint_order": "wh", "max_tiles": int(match[2]) if match[2] else None}


def _pinpoints(value: Any, size: int, where: str) -> tuple[tuple[int, int], ...]:
    """A list, a list as text, or a range of grids as LLaVA-NeXT writes it: "(1x1),...,(6x6)"."""
    wrong = UsageError(f"{where} says image_grid_pinpoints {value!r}, which is not a list of (width, height)")
    if isinstance(value, str) and (ends := re.fullmatch(r"\((\d+)x(\d+)\),\.\.\.,\((\d+)x(\d+)\)", value.strip())):
        a, b, c, d = map(int, ends.groups())
        grids = itertools.product(range(a, c + 1), range(b, d + 1))
        return tuple((i * size, j * size) for i, j in grids)
    try:
        value = ast.literal_eval(value) if isinstance(value, str) else value
        return tuple((int(w), int(h)) for w, h in value)
    except (ValueError, TypeError, SyntaxError):
        raise wrong from None


# ----------------------------------------------------------------------------------------------------------- templates

# (what a chat template and the type of the decoder, or a name, must hold; our template), the first that fits
CHAT_TEMPLATES = (
    (("[INST]", "mistral"), "mistral_instruct"),
    (("<<SYS>>",), "llava_llama_2"),
    (("[INST]",), "mistral_instruct"),
    (("<|im_start|>", "qwen"), "qwen_1_5"),
    (("<|im_start|>",), "chatml_direct"),
    (("a chat between a curious human",), "llava_v1"),
    (("a chat between a curious user",), "vicuna_v1"),
    (("user:", "assistant:"), "vicuna_v1_hf"),
    ((".upper() + ': '",), "vicuna_v1_hf"),
)
# By the name of the model alone. The Vicunas of 1.5 and 1.6 are trained and evaluated with `vicuna_v1`; LLaVA's
# run_llava.py asks them with `llava_v1`, which differs in two words.
NAMES = (
    (("llama-2",), "llava_llama_2"),
    (("llama-3",), "llava_llama_3"),
    (("llama3",), "llava_llama_3"),
    (("mistral",), "mistral_instruct"),
    (("34b",), "chatml_direct"),
    (("qwen",), "qwen_1_5"),
    (("vicuna",), "vicuna_v1"),
    (("v1.5",), "vicuna_v1"),
    (("llava-1.5",), "vicuna_v1"),
    (("v1.6",), "vicuna_v1"),
)


def tell_template(chat_template: str | None, raw: Json, folder: str) -> str | None:
    """The template that a checkpoint is talked to with, by its chat template or else its name; None where neither
    tells."""
    if chat_template and (ours := template_of(chat_template)):
        return ours
    decoder = raw.get("text_config") or raw
    text = f"{folder} {raw.get('_name_or_path')} {raw.get('model_type')}"
    rules: Sequence[tuple[tuple[str, ...], str]] = NAMES
    if chat_template:
        text, rules = f"{chat_template} {decoder.get('model_type')}", CHAT_TEMPLATES
    text = text.lower().replace("[inst]", "[INST]").replace("<<sys>>", "<<SYS>>")
    return next((name for needles, name in rules if all(needle in text for needle in needles)), None)
