"""What is trained, what is computed at all, and what it costs."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.errors import UsageError
from vlm_jax.models.presets import lora
from vlm_jax.training.optimizer import multipliers


def logits(tiny, family, params, batch) -> np.ndarray:
    """Of one micro-batch."""

    @jax.jit
    def forward(params, batch):
        model = family.bound.bind(params)
        return model.decoder.logits(model(batch)[0])

    return np.asarray(forward(params, {name: a[0] for name, a in batch.items()}))


# ---------------------------------------------------------------------------------------------------------------- LoRA


def test_lora_begins_as_the_base_and_trains_alone(tiny) -> None:
    targets = r"decoder/(layers/attention/(query|out)|lm_head)"
    adapted = tiny.family("siglip_vit", lora=lora(3, 6.0, targets=targets))
    base = tiny.family("siglip_vit")
    paths = {
        f"{linear}/{leaf}"
        for linear in ("decoder/layers/attention/query", "decoder/layers/attention/out", "decoder/lm_head")
        for leaf in ("lora_a", "lora_b")
    }
    assert set(adapted.bound.abstract) - set(base.bound.abstract) == paths
    assert adapted.bound.abstract["decoder/lm_head/lora_b"].shape == (3, 32)
    assert adapted.bound.abstract["decoder/layers/attention/out/lora_a"].shape == (2, 16, 3)

    initial = jax.eval_shape(adapted.bound.init, 0)
    assert set(initial) == set(adapted.bound.abstract)
    params = tiny.params(adapted.bound.abstract)
    at_start = {p: jnp.zeros_like(a) if p.endswith("lora_b") else a for p, a in params.items()}
    batch = tiny.batch(rows=3)
    before = logits(tiny, base, {p: a for p, a in params.items() if p not in paths}, batch)
    np.testing.assert_array_equal(logits(tiny, adapted, at_start, batch), before)
    assert np.abs(logits(tiny, adapted, params, batch) - before).max() > 0.1

    # The whole effect is that of kernels to which A B alpha / rank was added.
    merged = {p: a for p, a in params.items() if p not in paths}
    for linear in {path.rpartition("/")[0] for path in paths}:
        update = params[f"{linear}/lora_a"] @ params[f"{linear}/lora_b"] * (6.0 / 3)
        merged[f"{linear}/kernel"] = merged[f"{linear}/kernel"] + update
    np.testing.assert_allclose(
        logits(tiny, adapted, params, batch), logits(tiny, base, merged, batch), rtol=1e-4, atol=1e-4
    )

    state, step = tiny.train_step(adapted, trains="/lora_")
    assert set(state.trained) == paths
    trained, frozen = tiny.on_host(state.trained), tiny.on_host(state.frozen)
    state, _ = step(state, batch)
    assert all(np.abs(state.trained[path] - value).max() > 1e-5 for path, value in trained.items())
    for path, value in frozen.items():
        np.testing.assert_array_equal(state.frozen[path], value)


def test_lora_starts_from_zero(tiny) -> None:
    family = tiny.family("siglip_vit", lora=lora(2, 4.0, targets="connector/first"))
    params = jax.jit(lambda: {p: a for p, a in family.bound.init(0).items() if "/lora_" in p})()
    assert set(params) == {"connector/first/lora_a", "connector/first/lora_b"}
    assert np.abs(params["connector/first/lora_a"]).max() > 0.1
    assert np.abs(params["connector/first/lora_b"]).max() == 0


# ------------------------------------------------------------------------------------------------- layers that are used


def scan_lengths(jaxpr) -> list[int]:
    """Trip counts of all scans of a program, in their order."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            found.append(eqn.params["length"])
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += scan_lengths(inner)
    return found


@pytest.mark.parametrize(("feature_layer", "used"), [(-1, 4), (-2, 3), (1, 1), (0, 0), (-5, 0)])
def test_layers_above_the_chosen_one_are_not_computed(tiny, feature_layer: int, used: int) -> None:
    family = tiny.family("clip_vit", vision_changes={"num_layers": 4, "feature_layer": feature_layer})
    tiles = jax.ShapeDtypeStruct((1, 1, 8, 8, 3), jnp.uint8)

    def see(params, tiles):
        return family.bound.bind(params).see(tiles, dtype=jnp.float32)

    assert scan_lengths(jax.make_jaxpr(see)(family.bound.abstract, tiles).jaxpr) == [used]


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"connector": "mlp2x_gleu"}, "connector 'mlp2x_gleu' is not one of .*did you mean 'mlp2x_gelu'"),
        (
            {"connector": "identity", "vision_changes": {"hidden_size": 32}},
            "equal widths, but the tower gives 32 and the decoder takes 16",
        ),
        ({"vision_changes": {"feature_layer": -4}}, "feature_layer -4 does not exist: there are 2 layers"),
        ({"vision_changes": {"image_size": 3}}, "image_size 3 does not hold a patch of patch_size 4"),
        ({"decoder_changes": {"num_kv_heads": 3}}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"decoder_changes": {"head_dim": 5}}, "head_dim 5 is odd"),
        ({"decoder_changes": {"rope_scaling": {"kind": "dynamic", "factor": 2.0}}}, "'dynamic' is not one of linear,"),
        ({"vision_changes": {"activation": "quickgelu"}}, "activation .*did you mean 'quick_gelu'"),
        ({"lora": lora(2, 4.0, targets="decoder/layer/.*")}, "targets .* matches none of .*decoder/layers/mlp/up"),
        ({"lora": lora(2, 4.0, targets="decoder/(")}, r"'decoder/\(' is not a regex"),
        ({"lora": lora(0, 4.0)}, "rank above 0"),
        ({"decoder_changes": {"slidng_window": 4}}, "no setting 'slidng_window' .*did you mean 'sliding_window'"),
        ({"remat": "ful"}, "remat 'ful' is not one of .*did you mean 'full'"),
    ],
)
def test_a_mistake_in_the_model_is_one_sentence(tiny, change: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        tiny.family(**change)


# ---------------------------------------------------------------------------------------------------------------- FLOPs


def rates(family, groups) -> dict[str, float | None]:
    return multipliers(list(family.bound.abstract), groups)


def size(family, prefix: str, leaf: str = "kernel") -> int:
    return sum(
        math.prod(a.shape) for p, a in family.bound.abstract.items() if p.startswith(prefix) and p.endswith(leaf)
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"mode": "pad", "marge": "flat"},
            "config.images has no setting 'marge' (did you mean 'merge'?); it has mode, ",
        ),
        ({"size": 336}, "config.images has no setting 'size'"),
        ({"mode": "anyres", "pinpoints": [[16, 12]]}, "images.pinpoints has [16, 12]; give pairs of multiples of 8"),
        ({"mode": "pad", "merge": "spatial_unpad"}, "set config.model.newline to True"),
    ],
)
def test_a_mistake_in_the_images_is_one_sentence(tiny, settings: dict, says: str) -> None:
    family = tiny.family("siglip_vit")
    assert family.images({"mode": "pad"}).features_per_tile == tiny.PATCHES
    with pytest.raises(UsageError) as error:
        family.images(settings)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_flops_of_text_are_six_per_weight_and_token(tiny) -> None:
    family = tiny.family()
    rows, length = 2, 16
    arrays = {name: a[0] for name, a in tiny.batch(rows=3, length=length).items()}
    arrays = {name: a[[1, 1]] for name, a in arrays.items()}  # text alone
    arrays |= {"segment_ids": np.ones((rows, length), int), "labels": np.ones((rows, length), int)}
    costs = family.costs(rates(family, [(".*", 1.0)]))
    weights = size(family, "decoder/")
    pairs = rows * length * (length + 1) / 2
    attention = 3 * 2 * 2 * pairs * 16 * 2  # 3 (trained) x 2 products x 2 FLOPs x pairs x width x layers
    assert costs.of_batch(arrays) == 6 * weights * rows * length + attention


def test_flops_of_a_batch_by_hand(tiny) -> None:
    """One row of two samples of 5 and 3 tokens, a window of 4, one tile and two labels; the rest is padding."""
    family = tiny.family("clip_vit", decoder="mistral", decoder_changes={"sliding_window": 4})
    arrays = {name: np.zeros_like(a[:1]) for name, a in tiny.batch(rows=1, length=16).items()}
    arrays["segment_ids"][..., :8] = [1, 1, 1, 1, 1, 2, 2, 2]
    arrays["labels"][:] = -100
    arrays["labels"][..., 6:8] = 7
    arrays["visual_inverse"][:] = -1
    arrays["visual_inverse"][..., 4:8] = range(4)  # the second tile
    head, decoder = size(family, "decoder/lm_head/"), size(family, "decoder/layers/")
    # CLIP's second-last of two layers: half of the stacked weights, on 4 patches and the class token.
    vision, patches, connector = size(family, "vision/layers/") / 2, size(family, "vision/patch"), size(family, "conn")
    vision_attention = 2 * 2 * 5 * 5 * 16
    pairs = (1 + 2 + 3 + 4 + 4) + (1 + 2 + 3)
    decoder_attention = 2 * 2 * pairs * 16 * 2

    def by_hand(see: int, connect: int, speak: int) -> float:
        """Each part times 1 (not crossed by the gradient), 2 (frozen, crossed) or 3 (trained)."""
        return (
            see * 2 * (vision * 5 + patches * 4)
            + (3 if see > 1 else 1) * vision_attention
            + connect * 2 * connector * 4
            + speak * 2 * (decoder * 8 + head * 2)
            + (3 if speak > 1 else 1) * decoder_attention
        )

    for groups, times in {
        ((".*", 1.0),): (3, 3, 3),
        (("vision/.*", None), (".*", 1.0)): (1, 3, 3),
        (("connector/.*", 1.0), (".*", None)): (1, 3, 2),
        (("vision/.*", 1.0), (".*", None)): (3, 2, 2),
        (("decoder/.*", 1.0), (".*", None)): (1, 1, 3),
        ((".*", None),): (1, 1, 1),
    }.items():
        assert family.costs(rates(family, groups)).of_batch(arrays) == by_hand(*times), groups

    adapted = tiny.family(
        "clip_vit",
        decoder="mistral",
        decoder_changes={"sliding_window": 4},
        lora=lora(2, 4.0, targets="decoder/layers/.*"),
    )
    costs = adapted.costs(rates(adapted, [(".*/lora_.*", 1.0), (".*", None)]))
    adapters = size(adapted, "decoder/", "lora_a") + size(adapted, "decoder/", "lora_b")
    assert costs.of_batch(arrays) == by_hand(1, 1, 2) + 6 * adapters * 8
