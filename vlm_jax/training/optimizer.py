"""AdamW with schedules, learning rates by group of parameters, and freezing, all chosen by path."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vlm_jax.errors import UsageError, suggest

Groups = Sequence[tuple[str, float | None]]
SCHEDULES = ("cosine", "linear", "constant")


def multipliers(paths: Sequence[str], groups: Groups) -> dict[str, float | None]:
    """The learning-rate multiplier of each path by the first regex that matches it wholly; None freezes it.

    Raises UsageError for what is not a regex, for one that is the first match of nothing, and for a path that nothing
    matches.
    """
    for pattern, _ in groups:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(f"{pattern!r} in `groups` is not a regex: {error}") from error
    result: dict[str, float | None] = {}
    claimed = [0] * len(groups)
    for path in paths:
        for i, (pattern, multiplier) in enumerate(groups):
            if re.fullmatch(pattern, path):
                result[path] = multiplier
                claimed[i] += 1
                break
        else:
            raise UsageError(f"no group of `groups` matches parameter {path!r}; end the list with ('.*', None) or 1.0")
    for (pattern, _), count in zip(groups, claimed, strict=True):
        if not count:
            heads = sorted({path.split("/")[0] for path in paths})
            reason = "matches no parameter" if not any(re.fullmatch(pattern, p) for p in paths) else "comes too late"
            raise UsageError(
                f"the regex {pattern!r} in `groups` {reason}{suggest(pattern.split('/')[0], heads)}; "
                f"paths begin with {', '.join(heads)}, and the first match wins"
            )
    return result


def group_table(abstract: Mapping[str, jax.ShapeDtypeStruct], groups: Groups, lr: float) -> str:
    """A table for people: each group with its learning rate and number of parameters."""
    chosen = multipliers(list(abstract), groups)
    lines = [f"{'parameters':<36}{'learning rate':>14}{'tensors':>9}{'parameters':>15}"]
    left = dict(chosen)
    for pattern, multiplier in groups:
        paths = [path for path in left if re.fullmatch(pattern, path)]
        count = sum(math.prod(abstract[path].shape) for path in paths)
        rate = "frozen" if multiplier is None else f"{lr * multiplier:.2e}"
        lines.append(f"{pattern:<36}{rate:>14}{len(paths):>9}{count:>15,}")
        for path in paths:
            del left[path]
    total = sum(math.prod(a.shape) for a in abstract.values())
    trained = sum(math.prod(abstract[path].shape) for path, m in chosen.items() if m is not None)
    lines.append(f"trained {trained:,} of {total:,} parameters ({trained / total:.1%})")
    return "\n".join(lines)


def decays(path: str) -> bool:
    """Whether weight decay applies: by name, since a stacked norm scale has two axes. Matrices and embeddings do."""
    return path.rsplit("/", 1)[-1] not in ("bias", "scale", "newline", "class_token", "position_embedding")


def make_schedule(kind: str, *, peak: float, total_steps: int, warmup: float) -> optax.Schedule:
    """Learning rate at each step, equal to Hugging Face's: rising from 0 over the warm-up, then `cosine` or `linear` to
    0 at `total_steps`, or `constant`. `warmup` below 1 is a fraction of the steps (rounded up), else their number."""
    if kind not in SCHEDULES:
        raise UsageError(f"schedule {kind!r} is not one of {', '.join(SCHEDULES)}{suggest(kind, SCHEDULES)}")
    rise = math.ceil(warmup * total_steps) if warmup < 1 else int(warmup)

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - rise) / max(1, total_steps - rise), 0.0, 1.0)
        shape = {
            "cosine": 0.5 * (1 + jnp.cos(jnp.pi * progress)),
            "linear": 1 - progress,
            "constant": jnp.ones_like(progress),
        }[kind]
        return peak * jnp.where(step < rise, step / max(1, rise), shape)

    return schedule


def make_optimizer(
    schedule: optax.Schedule,
    rates: Mapping[str, float | None],
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float | None,
    first_moment: str,
) -> optax.GradientTransformation:
    """AdamW on a flat dict of the trained parameters; `rates` is what `multipliers` gave.

    A group's multiplier scales its whole update, weight decay included, as a learning rate of its own does in torch.
    """
    if first_moment not in ("float32", "bfloat16"):
        raise UsageError(f"first_moment {first_moment!r} is not one of float32, bfloat16")
    clip = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]

    trained = {path: rate for path, rate in rates.items() if rate is not None}

    def scale_groups(updates: dict[str, jax.Array], params: object) -> dict[str, jax.Array]:
        del params
        return {path: update * trained[path] for path, update in updates.items()}

    def mask(params: Mapping[str, jax.Array]) -> dict[str, bool]:
        return {path: decays(path) for path in params}

    decay = [] if weight_decay == 0 else [optax.add_decayed_weights(weight_decay, mask=mask)]
    return optax.chain(
        *clip,
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=jnp.dtype(first_moment)),
        *decay,
        optax.stateless(scale_groups),
        optax.scale_by_learning_rate(schedule),
    )


def learning_rates(schedule: Callable[[Any], jax.Array], groups: Groups, step: jax.Array | int) -> dict[str, jax.Array]:
    """The learning rate of each trained group at `step`, for the metrics."""
    return {pattern: schedule(step) * multiplier for pattern, multiplier in groups if multiplier is not None}
