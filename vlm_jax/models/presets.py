"""The parts that configs name, as plain settings. Each function takes changes as keywords: `llama(..., num_layers=2)`.

Sizes and constants are those of the published models (Hugging Face config files).
"""

from __future__ import annotations

from typing import Any

Settings = dict[str, Any]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def llava(*, vision: Settings, connector: str, decoder: Settings, newline: bool = False) -> Settings:
    """A LLaVA: any tower, connector and decoder; `lora` is None until a config sets it."""
    return {
        "family": "llava",
        "vision": vision,
        "connector": connector,
        "decoder": decoder,
        "newline": newline,
        "lora": None,
    }


def lora(rank: int, alpha: float, *, dropout: float = 0.0, targets: str = r"decoder/layers/.*") -> Settings:
    """Low-rank adapters on every `Linear` whose path matches `targets` wholly."""
    return {"rank": rank, "alpha": alpha, "dropout": dropout, "targets": targets}


def vit(
    *,
    image_size: int,
    patch_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    intermediate_size: int | None = None,
    **changes: Any,
) -> Settings:
    """A plain vision transformer without a class token; the last layer's output, normalised."""
    return {
        "image_size": image_size,
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size or 4 * hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "activation": "gelu",
        "post_norm": True,
        **changes,
    }


def clip_vit(**sizes: Any) -> Settings:
    """CLIP's tower as LLaVA uses it: class token, norm before the layers, quick-GELU, second-last layer without it."""
    settings = {
        "activation": "quick_gelu",
        "class_token": True,
        "keep_class_token": False,
        "pre_norm": True,
        "patch_bias": False,
        "post_norm": False,
        "norm_eps": 1e-5,
        "feature_layer": -2,
        "mean": CLIP_MEAN,
        "std": CLIP_STD,
    }
    return vit(**{**settings, **sizes})


def siglip_vit(**sizes: Any) -> Settings:
    """SigLIP's tower as LLaVA variants use it: no class token, tanh-GELU, second-last layer."""
    return vit(**{"activation": "gelu_tanh", "post_norm": False, "feature_layer": -2, **sizes})


def llama(
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    **changes: Any,
) -> Settings:
    """Llama; Yi is this with its own sizes, theta and vocabulary."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads or num_heads,
        "head_dim": head_dim or hidden_size // num_heads,
        "rope_theta": 1e4,
        "rope_scaling": None,
        "norm_eps": 1e-5,
        "sliding_window": None,
        "qkv_bias": False,
        "qk_norm": False,
        "tie_embeddings": False,
        **changes,
    }


def llama3(**sizes: Any) -> Settings:
    """Llama 3.1 and later: theta 500,000 and the scaling of its frequencies."""
    scaling = {"kind": "llama3", "factor": 8.0, "original_length": 8192}
    return llama(**{"rope_theta": 5e5, "rope_scaling": scaling, **sizes})


def mistral(**sizes: Any) -> Settings:
    """Mistral v0.1: a sliding window of 4,096 (None from v0.2 on)."""
    return llama(**{"sliding_window": 4096, **sizes})


def yi(**sizes: Any) -> Settings:
    """Yi: Llama with theta 5,000,000."""
    return llama(**{"rope_theta": 5e6, **sizes})


def qwen2(**sizes: Any) -> Settings:
    """Qwen2 and Qwen2.5: biases on q, k and v."""
    return llama(**{"rope_theta": 1e6, "norm_eps": 1e-6, "qkv_bias": True, **sizes})


def qwen3(**sizes: Any) -> Settings:
    """Qwen3: q and k normalised per head."""
    return llama(**{"rope_theta": 1e6, "norm_eps": 1e-6, "qk_norm": True, **sizes})


# ------------------------------------------------------------------------------------------------- models with a name


def clip_l14_336(**changes: Any) -> Settings:
    """openai/clip-vit-large-patch14-336: 576 features per tile."""
    sizes = {"image_size": 336, "patch_size": 14, "hidden_size": 1024, "num_layers": 24, "num_heads": 16}
    return clip_vit(**{**sizes, **changes})


def clip_l14_224(**changes: Any) -> Settings:
    """openai/clip-vit-large-patch14: 256 features per tile."""
    return clip_l14_336(**{"image_size": 224, **changes})


def siglip_so400m_384(**changes: Any) -> Settings:
    """google/siglip-so400m-patch14-384 without its last layer, as LLaVA variants take it: 729 features per tile."""
    return siglip_vit(
        **{
            "image_size": 384,
            "patch_size": 14,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_layers": 26,
            "num_heads": 16,
            "feature_layer": -1,
            **changes,
        }
    )


def vicuna_7b(**changes: Any) -> Settings:
    """lmsys/vicuna-7b-v1.5."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_layers": 32, "num_heads": 32}
    return llama(**{"vocab_size": 32_000, **sizes, **changes})


def vicuna_13b(**changes: Any) -> Settings:
    """lmsys/vicuna-13b-v1.5."""
    sizes = {"hidden_size": 5120, "intermediate_size": 13824, "num_layers": 40, "num_heads": 40}
    return llama(**{"vocab_size": 32_000, **sizes, **changes})


def mistral_7b(**changes: Any) -> Settings:
    """mistralai/Mistral-7B-v0.1; Instruct v0.2 is this with `rope_theta=1e6, sliding_window=None`."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8}
    return mistral(**{"vocab_size": 32_000, **sizes, **changes})


def yi_34b(**changes: Any) -> Settings:
    """NousResearch/Nous-Hermes-2-Yi-34B."""
    sizes = {"hidden_size": 7168, "intermediate_size": 20480, "num_layers": 60, "num_heads": 56, "num_kv_heads": 8}
    return yi(**{"vocab_size": 64_000, **sizes, **changes})


def qwen15_05b(**changes: Any) -> Settings:
    """Qwen/Qwen1.5-0.5B-Chat (model type qwen2)."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_layers": 24, "num_heads": 16}
    return qwen2(**{"vocab_size": 151_936, "tie_embeddings": True, **sizes, **changes})
