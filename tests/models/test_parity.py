"""Decoders and vision towers compute what transformers computes on the same weights.

The weights are drawn larger than transformers initialises them, norm scales and biases too, and each test first shows
that the reference reacts to every weight, every input and the setting in question; otherwise equality would say little.
Tolerance: 1e-4 of the largest value, which float32 sums in another order stay well within.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.layers.attention import Mask
from vlm_jax.models import presets
from vlm_jax.models.binding import Bound
from vlm_jax.models.schema import from_dict
from vlm_jax.models.towers.decoder import Decoder, DecoderConfig
from vlm_jax.models.towers.vit import ViT, ViTConfig, normalise

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LAYERS = 2
TOLERANCE = 1e-4


def enlarge(model: Any) -> Any:
    """Draws every weight anew so that it matters: kernels 1.5 / sqrt(fan-in), norm scales 1 ± 0.3, the rest ± 0.5."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            draw = torch.randn(weight.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                weight.copy_(1 + 0.3 * draw)
            elif weight.ndim in (2, 4) and "embed_tokens" not in name and "position" not in name:
                weight.copy_(draw * 1.5 * weight[0].numel() ** -0.5)
            else:
                weight.copy_(0.5 * draw)
    return model.eval()


def check_reacts(model: Any, inputs: Any, output: Any, *, never: tuple[str, ...] = ()) -> None:
    """Every weight and every input moves the output, except the weights whose names end with one of `never`."""
    model.zero_grad()
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    still = {name for name, w in model.named_parameters() if w.grad is None or w.grad.abs().max() < 1e-2}
    assert {name for name in still if not name.endswith(never)} == set()
    assert inputs.grad.abs().flatten(2).amax(-1).min() > 1e-3


def copied(
    names: Mapping[str, str], model: Any, abstract: Mapping[str, jax.ShapeDtypeStruct], *, tied: bool = False
) -> dict[str, jax.Array]:
    """The weights of `model` under our paths, by a table from ours to theirs; none may be left over."""
    state = {name: w.detach().numpy() for name, w in model.named_parameters()}
    taken = {"lm_head.weight"} if tied else set()

    def take(path: str, name: str) -> np.ndarray:
        taken.add(name)
        value = state[name]
        if path.endswith("kernel"):  # a patch is [row, column, channel] here and [channel, row, column] there
            value = value.transpose(2, 3, 1, 0).reshape(-1, len(value)) if value.ndim == 4 else value.T
        return value

    params = {}
    for path, a in abstract.items():
        head, _, leaf = path.rpartition("/")
        name = names[head or path] + ("" if not head else ".bias" if leaf == "bias" else ".weight")
        stacked = [take(path, name.format(i)) for i in range(LAYERS)] if "{}" in name else take(path, name)
        params[path] = jnp.asarray(np.reshape(stacked, a.shape))
    assert not set(state) - taken
    return params


def check_close(ours: Any, theirs: Any) -> None:
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


# ------------------------------------------------------------------------------------------------------------ decoders

DECODER_NAMES = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
    "layers/attention_norm": "model.layers.{}.input_layernorm",
    "layers/attention/query": "model.layers.{}.self_attn.q_proj",
    "layers/attention/key": "model.layers.{}.self_attn.k_proj",
    "layers/attention/value": "model.layers.{}.self_attn.v_proj",
    "layers/attention/out": "model.layers.{}.self_attn.o_proj",
    "layers/attention/query_norm": "model.layers.{}.self_attn.q_norm",
    "layers/attention/key_norm": "model.layers.{}.self_attn.k_norm",
    "layers/mlp_norm": "model.layers.{}.post_attention_layernorm",
    "layers/mlp/gate": "model.layers.{}.mlp.gate_proj",
    "layers/mlp/up": "model.layers.{}.mlp.up_proj",
    "layers/mlp/down": "model.layers.{}.mlp.down_proj",
}


def rope(kind: str, theta: float, **more: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


# name: (class in transformers, its settings, ours, the same class's settings without what is special)
DECODERS: dict[str, tuple[str, dict, Callable[..., dict], dict]] = {
    "llama3": (
        "Llama",
        rope(
            "llama3",
            100.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
        lambda **s: presets.llama3(
            **s, rope_theta=100.0, rope_scaling={"kind": "llama3", "factor": 8.0, "original_length": 32}
        ),
        rope("default", 100.0),
    ),
    "llama_linear": (
        "Llama",
        rope("linear", 1e4, factor=4.0),
        lambda **s: presets.llama(**s, rope_scaling={"kind": "linear", "factor": 4.0}),
        rope("default", 1e4),
    ),
    "llama_yarn": (
        "Llama",
        rope("yarn", 100.0, factor=4.0, original_max_position_embeddings=16),
        lambda **s: presets.llama(
            **s, rope_theta=100.0, rope_scaling={"kind": "yarn", "factor": 4.0, "original_length": 16}
        ),
        rope("default", 100.0),
    ),
    "mistral": (
        "Mistral",
        {"sliding_window": 5, **rope("default", 1e4)},
        lambda **s: presets.mistral(**s, sliding_window=5),
        {"sliding_window": None, **rope("default", 1e4)},
    ),
    "yi_tied": (
        "Llama",
        {"tie_word_embeddings": True, **rope("default", 5e6)},
        lambda **s: presets.yi(**s, tie_embeddings=True),
        {"tie_word_embeddings": True, **rope("default", 1e2)},
    ),
    "qwen2_tied": (
        "Qwen2",
        {"tie_word_embeddings": True, "rms_norm_eps": 1e-6, **rope("default", 1e6)},
        lambda **s: presets.qwen2(**s, tie_embeddings=True),
        {"tie_word_embeddings": True, "rms_norm_eps": 1e-6, **rope("default", 1e2)},
    ),
    "qwen3": (
        "Qwen3",
        {"rms_norm_eps": 1e-6, "head_dim": 8, **rope("default", 1e6)},
        lambda **s: presets.qwen3(**s, head_dim=8),
        {"rms_norm_eps": 1e-6, "head_dim": 8, **rope("default", 1e2)},
    ),
}


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_equals_transformers(tiny, name: str) -> None:
    kind, theirs, preset, plain = DECODERS[name]
    length, cut = 24, 10
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    common = {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "attn_implementation": "eager"}
    common |= {**sizes, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2}

    def reference(settings: Mapping[str, Any]) -> Any:
        config = getattr(transformers, f"{kind}Config")(**common | dict(settings))
        return enlarge(getattr(transformers, f"{kind}ForCausalLM")(config))

    model = reference(theirs)
    tokens = np.random.default_rng(0).integers(0, 64, (2, length))
    # The first row is one sample; the second holds two, whose positions begin at 0.
    positions = np.stack([np.arange(length), np.r_[np.arange(cut), np.arange(length - cut)]])
    inputs = model.get_input_embeddings()(torch.tensor(tokens)).detach().requires_grad_()
    given = {"inputs_embeds": inputs, "position_ids": torch.tensor(positions)}
    logits = model(**given, use_cache=False).logits
    check_reacts(model, inputs, logits, never=("embed_tokens.weight",))  # the inputs are its rows
    without = reference(plain)(**given, use_cache=False).logits
    assert (without - logits).abs().max() > 100 * TOLERANCE * logits.abs().max()

    config = from_dict(DecoderConfig, preset(**sizes, num_layers=LAYERS, num_heads=4, num_kv_heads=2), "decoder")
    bound = Bound(lambda scope: Decoder(scope, config))
    params = copied(DECODER_NAMES, model, bound.abstract, tied=config.tie_embeddings)
    segments = np.ones_like(positions)
    segments[1, cut:] = 2

    @jax.jit
    def forward(params: dict[str, jax.Array], tokens: jax.Array, positions: jax.Array) -> jax.Array:
        decoder = bound.bind(params)
        hidden, _ = decoder(decoder.embed(tokens, jnp.float32), Mask(jnp.asarray(segments), positions))
        return decoder.logits(hidden)

    check_close(forward(params, tokens, positions), logits)


# -------------------------------------------------------------------------------------------------------------- towers


def block_names(layer: str, attention: str, out: str, norms: tuple[str, str]) -> dict[str, str]:
    projections = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": out}
    return {
        "layers/attention_norm": f"{layer}.{norms[0]}",
        "layers/mlp_norm": f"{layer}.{norms[1]}",
        **{f"layers/attention/{ours}": f"{layer}.{attention}.{theirs}" for ours, theirs in projections.items()},
        "layers/mlp/up": f"{layer}.mlp.fc1",
        "layers/mlp/down": f"{layer}.mlp.fc2",
    }


CLIP_NAMES = {
    "patch_embed": "embeddings.patch_embedding",
    "position_embedding": "embeddings.position_embedding.weight",
    "class_token": "embeddings.class_embedding",
    "pre_norm": "pre_layrnorm",
    "post_norm": "post_layernorm",
    **block_names("encoder.layers.{}", "self_attn", "out_proj", ("layer_norm1", "layer_norm2")),
}
VIT_NAMES = {
    "patch_embed": "embeddings.patch_embeddings.projection",
    "position_embedding": "embeddings.position_embeddings",
    "class_token": "embeddings.cls_token",
    "post_norm": "layernorm",
    **block_names("layers.{}", "attention", "o_proj", ("layernorm_before", "layernorm_after")),
}

# name: (class in transformers, more for its config, more for its constructor, names, our preset)
TOWERS: dict[str, tuple[str, dict, dict, dict, Callable[..., dict]]] = {
    "clip": ("CLIPVision", {}, {}, CLIP_NAMES, presets.clip_vit),
    "siglip": ("SiglipVision", {"vision_use_head": False}, {}, CLIP_NAMES, presets.siglip_vit),
    "vit": ("ViT", {"layer_norm_eps": 1e-6}, {"add_pooling_layer": False}, VIT_NAMES, presets.vit),
}


@pytest.mark.parametrize("name", TOWERS)
def test_tower_equals_transformers_at_every_layer(tiny, name: str) -> None:
    kind, more, arguments, names, preset = TOWERS[name]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "image_size": 12, "patch_size": 4}
    config = getattr(transformers, f"{kind}Config")(
        **sizes, **more, num_hidden_layers=LAYERS, num_attention_heads=4, attn_implementation="eager"
    )
    model = enlarge(getattr(transformers, f"{kind}Model")(config, **arguments))
    token = name != "siglip"
    settings = preset(**sizes, num_layers=LAYERS, num_heads=4, class_token=token, post_norm=False, feature_layer=-1)

    def ours(**changes: Any) -> ViTConfig:
        return from_dict(ViTConfig, settings | changes, "vision")

    tiles = np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3), dtype=np.uint8)
    pixels = np.array(normalise(jnp.asarray(tiles), settings.get("mean", (0.5,) * 3), settings.get("std", (0.5,) * 3)))
    given = torch.tensor(pixels.transpose(0, 3, 1, 2)).requires_grad_()
    output = model(given, output_hidden_states=True)
    # Without RoPE a bias of the keys adds the same to all scores of a query. CLIP's last norm is for its class token.
    never = ("k_proj.bias", "post_layernorm.weight", "post_layernorm.bias") if name == "clip" else ("k_proj.bias",)
    check_reacts(model, given, output.last_hidden_state, never=never)

    cases = {
        **{f"layer {i}": (ours(feature_layer=i), output.hidden_states[i][:, token:]) for i in (0, 1, -2, -1)},
        "class token": (ours(keep_class_token=True), output.hidden_states[-1]),
    }
    if name != "clip":
        cases["post norm"] = (ours(post_norm=True), output.last_hidden_state[:, token:])
    bounds = {case: Bound(lambda scope, c=config: ViT(scope, c)) for case, (config, _) in cases.items()}
    abstract = max((bound.abstract for bound in bounds.values()), key=len)
    if name == "clip":  # the last norm is not part of the features that LLaVA uses
        del model.post_layernorm
    params = copied(names, model, abstract)

    @jax.jit
    def forward(params: dict[str, jax.Array], tiles: jax.Array) -> dict[str, jax.Array]:
        return {case: bound.bind(params)(tiles, jnp.float32) for case, bound in bounds.items()}

    features = forward(params, tiles)
    for case, (_, expected) in cases.items():
        check_close(features[case], expected)
