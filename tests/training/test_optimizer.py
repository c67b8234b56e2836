"""Schedules equal Hugging Face's, groups equal torch's parameter groups, and a mistake in a group is a sentence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlm_jax.errors import UsageError
from vlm_jax.training.optimizer import (
    decays,
    group_table,
    learning_rates,
    make_optimizer,
    make_schedule,
    multipliers,
)

ADAMW = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip_norm": None, "first_moment": "float32"}
PATHS = [
    "vision/layers/mlp/up/kernel",
    "vision/layers/mlp/up/bias",
    "connector/first/kernel",
    "decoder/final_norm/scale",
]

# ----------------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(("kind", "warmup"), [("cosine", 0.03), ("cosine", 0), ("linear", 7), ("constant", 0.1)])
def test_schedules_are_those_of_hugging_face(kind: str, warmup: float) -> None:
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    total, rise = 101, {0.03: 4, 0: 0, 7: 7, 0.1: 11}[warmup]  # a fraction is rounded up
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, optimizer, num_warmup_steps=rise, num_training_steps=total)
    wanted = []
    for _ in range(total + 2):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    steps = jnp.arange(total + 1)  # cosine rises again after the end; a run stops there
    ours = jax.vmap(make_schedule(kind, peak=2e-3, total_steps=total, warmup=warmup))(steps)
    np.testing.assert_allclose(ours, wanted[: total + 1], rtol=1e-5, atol=1e-9)


def test_an_unknown_schedule_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"schedule 'cosin' .*did you mean 'cosine'"):
        make_schedule("cosin", peak=1.0, total_steps=10, warmup=0)


# -------------------------------------------------------------------------------------------------------------- groups


def test_the_first_regex_that_matches_wholly_decides() -> None:
    chosen = multipliers(PATHS, [("vision/.*bias", 2.0), ("vision/.*", None), (".*", 0.5)])
    assert chosen == dict(zip(PATHS, (None, 2.0, 0.5, 0.5), strict=True))


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ([("visoin/.*", None), (".*", 1.0)], r"'visoin/\.\*' .*matches no parameter \(did you mean 'vision'\?\)"),
        ([("vision", None), (".*", 1.0)], "'vision' .*matches no parameter"),
        ([(".*", 1.0), ("vision/.*", None)], r"'vision/\.\*' .*comes too late.*the first match wins"),
        ([("vision/.*", None), ("connector/.*", 1.0)], "no group .*matches parameter 'decoder/final_norm/scale'"),
        ([("vision/(", None), (".*", 1.0)], "is not a regex"),
    ],
)
def test_a_mistake_in_the_groups_is_one_sentence(groups: list, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        multipliers(PATHS, groups)


def test_the_table_of_groups_counts_parameters() -> None:
    abstract = {path: jax.ShapeDtypeStruct((10, 20), jnp.float32) for path in PATHS}
    groups = [("connector/.*", 0.1), ("decoder/.*", 1.0), (".*", None)]
    lines = group_table(abstract, groups, 2e-5).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["connector/.*", "2.00e-06", "1", "200"],
        ["decoder/.*", "2.00e-05", "1", "200"],
        [".*", "frozen", "2", "400"],
    ]
    assert lines[4] == "trained 400 of 800 parameters (50.0%)"
    assert learning_rates(optax.constant_schedule(2.0), groups, 0) == {"connector/.*": 0.2, "decoder/.*": 2.0}


def test_weight_decay_goes_by_name() -> None:
    """A stacked norm scale or bias has two axes and must not be taken for a matrix."""
    assert decays("decoder/layers/mlp/up/kernel") and decays("decoder/embed/embedding") and decays("x/lora_a")
    for leaf in ("attention_norm/scale", "mlp/up/bias", "position_embedding", "class_token", "newline"):
        assert not decays(f"vision/layers/{leaf}")


# -------------------------------------------------------------------------------------------------------------- updates


def run(rates: dict, params: dict, gradients: list[dict], lr: float = 1e-2, **changes) -> tuple[dict, optax.OptState]:
    optimizer = make_optimizer(optax.constant_schedule(lr), rates, **{**ADAMW, **changes})
    params = {path: jnp.asarray(a) for path, a in params.items()}
    opt_state = optimizer.init(params)
    for gradient in gradients:
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
    return {path: np.asarray(a) for path, a in params.items()}, opt_state


def made(steps: int = 3) -> tuple[dict, list[dict]]:
    rng = np.random.default_rng(0)
    draw = lambda: {path: rng.standard_normal((3, 4), np.float32) for path in PATHS}  # noqa: E731
    return draw(), [draw() for _ in range(steps)]


def test_groups_are_parameter_groups_of_torch() -> None:
    """A multiplier is a learning rate of its own, which in AdamW scales the decay too."""
    torch = pytest.importorskip("torch")
    params, gradients = made()
    rates = dict(zip(PATHS, (0.1, 0.1, 1.0, 1.0), strict=True))
    weights = {path: torch.nn.Parameter(torch.tensor(a)) for path, a in params.items()}
    groups = [
        {"params": [weights[path]], "lr": 1e-2 * rates[path], "weight_decay": 0.1 if decays(path) else 0.0}
        for path in PATHS
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for gradient in gradients:
        for path, weight in weights.items():
            weight.grad = torch.tensor(gradient[path])
        optimizer.step()
    ours, _ = run(rates, params, gradients)
    for path, weight in weights.items():
        np.testing.assert_allclose(ours[path], weight.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_clipping_is_by_the_norm_of_all_gradients() -> None:
    params, gradients = made(1)
    norm = np.sqrt(sum((g**2).sum() for g in gradients[0].values()))
    rates, plain = dict.fromkeys(PATHS, 1.0), {"weight_decay": 0.0, "eps": 1e-1}  # with a large eps the size matters
    clipped, _ = run(rates, params, gradients, clip_norm=0.5, **plain)
    by_hand, _ = run(rates, params, [{p: g * (0.5 / norm) for p, g in gradients[0].items()}], **plain)
    unclipped, _ = run(rates, params, gradients, **plain)
    loose, _ = run(rates, params, gradients, clip_norm=float(norm) + 1, **plain)
    for path in PATHS:
        np.testing.assert_allclose(clipped[path], by_hand[path], rtol=1e-6)
        np.testing.assert_array_equal(loose[path], unclipped[path])
        assert np.abs(clipped[path] - unclipped[path]).max() > 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_moment_has_its_type(dtype: str) -> None:
    params, gradients = made()
    after, opt_state = run(dict.fromkeys(PATHS, 1.0), params, gradients, first_moment=dtype)
    (adam,) = (s for s in opt_state if isinstance(s, optax.ScaleByAdamState))
    assert {a.dtype for a in adam.mu.values()} == {jnp.dtype(dtype)}
    assert {a.dtype for a in adam.nu.values()} == {jnp.dtype("float32")}
    assert all(a.dtype == np.float32 for a in after.values())


def test_an_unknown_first_moment_is_one_sentence() -> None:
    with pytest.raises(UsageError, match="first_moment 'float16' is not one of float32, bfloat16"):
        make_optimizer(optax.constant_schedule(1.0), {}, **{**ADAMW, "first_moment": "float16"})
