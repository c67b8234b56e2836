"""Names of tensors: one table per component, ours beside Hugging Face's; both directions are derived from it.

A name in *hub layout* is the one that transformers has written since 4.36 and reads until today; the other layouts are
the same names under other prefixes:

    hub       language_model.model.layers.0.mlp.up_proj.weight       vision_tower.vision_model.pre_layrnorm.bias
    LLaVA     model.layers.0.mlp.up_proj.weight                      model.vision_tower.vision_tower.vision_model.pre_…
    memory    model.language_model.layers.0.mlp.up_proj.weight       model.vision_tower.pre_layrnorm.bias
    fresh     language_model.model.layers.0.mlp.up_proj.weight       vision_tower.pre_layrnorm.bias

(`memory`: transformers 5 with `save_original_format=False`; `fresh`: a model built, not loaded, by transformers 5.)
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

__all__ = ["FORMS", "Form", "Tensor", "canonical", "carried", "ignored", "in_llava_layout", "names"]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a model.

    path: of our parameter, which holds all layers: `decoder/layers/mlp/up/kernel`.
    layer: its layer there, None where the parameter is not stacked.
    hf: its name in hub layout.
    form: a key of FORMS, how the values are arranged there.
    """

    path: str
    layer: int | None
    hf: str
    form: str

    @property
    def entry(self) -> str:
        """Its name in our files: `decoder.layers.3.mlp.up.kernel`."""
        path = self.path if self.layer is None else self.path.replace("layers/", f"layers/{self.layer}/", 1)
        return path.replace("/", ".")


# ---------------------------------------------------------------------------------------------------------- the tables

# (our path, Hugging Face's name, the setting without which it is absent); {} is the number of the layer. `tied` is
# derived: the head is absent where the embedding takes its place.
Rows = tuple[tuple[str, str, str | None], ...]


def _attention(out: str) -> Rows:
    pairs = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": out}
    return tuple((f"attention/{ours}", f"self_attn.{theirs}", None) for ours, theirs in pairs.items())


def _dense(rows: Rows, bias: str | None) -> Rows:
    """The kernels of linear layers and, if the setting `bias` is on, their biases."""
    kernels = tuple((f"{ours}/kernel", f"{theirs}.weight", None) for ours, theirs, _ in rows)
    return kernels + tuple((f"{ours}/bias", f"{theirs}.bias", bias) for ours, theirs, _ in rows)


def _norm(ours: str, theirs: str, when: str | None = None) -> Rows:
    return ((f"{ours}/scale", f"{theirs}.weight", when), (f"{ours}/bias", f"{theirs}.bias", when))


def _each_layer(rows: Rows, theirs: str) -> Rows:
    return tuple((f"layers/{ours}", f"{theirs}.{{}}.{name}", when) for ours, name, when in rows)


DECODER: Rows = (
    ("embed/embedding", "model.embed_tokens.weight", None),
    *_each_layer(
        (
            ("attention_norm/scale", "input_layernorm.weight", None),
            *((ours + "/kernel", theirs + ".weight", None) for ours, theirs, _ in _attention("o_proj")),
            *((ours + "/bias", theirs + ".bias", "qkv_bias") for ours, theirs, _ in _attention("o_proj")[:3]),
            ("attention/query_norm/scale", "self_attn.q_norm.weight", "qk_norm"),
            ("attention/key_norm/scale", "self_attn.k_norm.weight", "qk_norm"),
            ("mlp_norm/scale", "post_attention_layernorm.weight", None),
            ("mlp/gate/kernel", "mlp.gate_proj.weight", None),
            ("mlp/up/kernel", "mlp.up_proj.weight", None),
            ("mlp/down/kernel", "mlp.down_proj.weight", None),
        ),
        "model.layers",
    ),
    ("final_norm/scale", "model.norm.weight", None),
    ("lm_head/kernel", "lm_head.weight", "untied"),
)
TOWER: Rows = (  # CLIP and SigLIP
    ("class_token", "embeddings.class_embedding", "class_token"),
    ("patch_embed/kernel", "embeddings.patch_embedding.weight", None),
    ("patch_embed/bias", "embeddings.patch_embedding.bias", "patch_bias"),
    ("position_embedding", "embeddings.position_embedding.weight", None),
    *_norm("pre_norm", "pre_layrnorm", "pre_norm"),  # so written by its authors
    *_each_layer(
        (
            *_norm("attention_norm", "layer_norm1"),
            *_dense(_attention("out_proj"), None),
            *_norm("mlp_norm", "layer_norm2"),
            *_dense((("mlp/up", "mlp.fc1", None), ("mlp/down", "mlp.fc2", None)), None),
        ),
        "encoder.layers",
    ),
    *_norm("post_norm", "post_layernorm", "post_norm"),
)
CONNECTORS: dict[str, Rows] = {
    "identity": (),
    "linear": _dense((("linear", "linear", None),), None),
    "mlp2x_gelu": _dense((("first", "linear_1", None), ("second", "linear_2", None)), None),
}

# component of ours: (prefix in hub layout, its rows by the model's settings, the settings that its rows ask about)
PREFIXES = {"vision": "vision_tower.vision_model.", "connector": "multi_modal_projector.", "decoder": "language_model."}
NEWLINE = Tensor("newline", None, "image_newline", "same")

# Tower settings that our schema leaves out where they have their default (models/towers/vit.py).
TOWER_DEFAULTS = {"class_token": False, "patch_bias": True, "pre_norm": False, "post_norm": False}


def names(model: Mapping[str, Any]) -> list[Tensor]:
    """Every tensor of a LLaVA with these settings (`model` of our config), adapters aside."""
    return [tensor for part in ("vision", "connector", "newline", "decoder") for tensor in part_names(model, part)]


def part_names(model: Mapping[str, Any], part: str) -> list[Tensor]:
    """The tensors of one component: vision, connector, newline or decoder."""
    if part == "newline":
        return [NEWLINE] if model.get("newline") else []
    if part == "connector":
        return list(_expand(CONNECTORS[model["connector"]], part, {}))
    settings = dict(model[part])
    if part == "vision":
        return list(_expand(TOWER, part, TOWER_DEFAULTS | settings))
    return list(_expand(DECODER, part, {**settings, "untied": not settings.get("tie_embeddings")}))


def _expand(rows: Rows, part: str, settings: Mapping[str, Any]) -> Iterator[Tensor]:
    for ours, theirs, when in rows:
        if when is not None and not settings.get(when):
            continue
        path, hf = f"{part}/{ours}", PREFIXES[part] + theirs
        form = "patches" if "patch_embed/kernel" in path else "transposed" if path.endswith("/kernel") else "same"
        for layer in range(settings["num_layers"]) if "{}" in hf else (None,):
            yield Tensor(path, layer, hf.format(layer), form)


# ------------------------------------------------------------------------------------------------------------- layouts

# A name of any layout -> hub layout: the first that matches. Parts alone (CLIPModel, LlamaForCausalLM) are told by the
# names within them.
_TOWER = r"(?P<rest>(embeddings|pre_layrnorm|encoder|post_layernorm|head)\..*)"
_RENAMES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (rf"(model\.)?vision_tower\.(vision_tower\.)?(vision_model\.)?{_TOWER}", r"vision_tower.vision_model.\g<rest>"),
        (rf"(vision_model\.)?{_TOWER}", r"vision_tower.vision_model.\g<rest>"),
        (r"model\.mm_projector\.0\.(?P<rest>weight|bias)", r"multi_modal_projector.linear_1.\g<rest>"),
        (r"model\.mm_projector\.2\.(?P<rest>weight|bias)", r"multi_modal_projector.linear_2.\g<rest>"),
        (r"model\.mm_projector\.(?P<rest>weight|bias)", r"multi_modal_projector.linear.\g<rest>"),
        (r"(model\.)?multi_modal_projector\.(?P<rest>.*)", r"multi_modal_projector.\g<rest>"),
        (r"(model\.)?image_newline", r"image_newline"),
        (r"((model\.)?language_model\.)?lm_head\.(?P<rest>.*)", r"language_model.lm_head.\g<rest>"),
        (
            r"(model\.language_model\.|language_model\.model\.|language_model\.|model\.)(?P<rest>.*)",
            r"language_model.model.\g<rest>",
        ),
        (r"(?P<rest>(embed_tokens|layers|norm)\..*)", r"language_model.model.\g<rest>"),
    )
)
# hub layout -> LLaVA's: the first prefix that fits.
_LLAVA = (
    ("vision_tower.", "model.vision_tower.vision_tower."),
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("multi_modal_projector.linear.", "model.mm_projector."),
    ("image_newline", "model.image_newline"),
    ("language_model.", ""),
)
# Not weights: buffers that old files hold (hub layout).
_IGNORED = re.compile(r".*\.embeddings\.position_ids|.*\.rotary_emb\.inv_freq")
# Of a whole CLIPModel or SiglipModel, what a LLaVA has no place for.
_OTHER_HALF = re.compile(r"text_model\..*|visual_projection\..*|text_projection\..*|logit_scale|logit_bias")
# Weights of a tower that a LLaVA never computes with, yet gives back as it found them.
_CARRIED = re.compile(r"vision_tower\.vision_model\.(post_layernorm|head)\..*")


def canonical(name: str) -> str:
    """The name of a tensor in hub layout, from any layout; a name that fits none is returned as it is."""
    for pattern, new in _RENAMES:
        if match := pattern.fullmatch(name):
            return match.expand(new)
    return name


def in_llava_layout(hf: str) -> str:
    """The original LLaVA's name of a tensor, from hub layout."""
    for prefix, new in _LLAVA:
        if hf.startswith(prefix):
            return new + hf.removeprefix(prefix)
    raise ValueError(f"{hf} is not a name in hub layout")


def ignored(name: str) -> bool:
    """Whether a tensor (any layout) is a buffer without meaning, or of a text tower that LLaVA has no place for."""
    return bool(_IGNORED.fullmatch(canonical(name)) or _OTHER_HALF.fullmatch(name))


def carried(hf: str) -> bool:
    """Whether a tensor (hub layout) is never computed with, but travels along (`hf_extra.safetensors`)."""
    return bool(_CARRIED.fullmatch(hf))


# --------------------------------------------------------------------------------------------------------------- forms


@dataclasses.dataclass(frozen=True)
class Form:
    """How a tensor of Hugging Face is arranged as ours, and back: shapes and values."""

    def ours_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def theirs_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def ours(self, value: np.ndarray) -> np.ndarray:
        return value

    def theirs(self, value: np.ndarray) -> np.ndarray:
        return value


class _Transposed(Form):
    """torch's Linear [out, in]; our kernel [in, out]."""

    def ours_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[::-1]

    theirs_shape = ours_shape

    def ours(self, value: np.ndarray) -> np.ndarray:
        return value.T

    theirs = ours


class _Patches(Form):
    """torch's convolution [D, 3, p, p]; our kernel [p * p * 3, D]."""

    def ours_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (math.prod(shape[1:]), shape[0])

    def theirs_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        side = math.isqrt(shape[0] // 3)
        return (shape[1], 3, side, side)

    def ours(self, value: np.ndarray) -> np.ndarray:
        return value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])

    def theirs(self, value: np.ndarray) -> np.ndarray:
        features, _, side, _ = self.theirs_shape(value.shape)
        return value.reshape(side, side, 3, features).transpose(3, 2, 0, 1)


FORMS: dict[str, Form] = {"same": Form(), "transposed": _Transposed(), "patches": _Patches()}
