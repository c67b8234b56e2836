"""What a config file is written with: an experiment, its stages, and their typed form for the trainer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.data import SourceSpec
from vlm_jax.errors import UsageError
from vlm_jax.models.schema import from_dict


def experiment(*, seed: int = 42) -> ConfigDict:
    """All settings of a run with their defaults; locked, so that a typo in a config file is an error. A None in `data`,
    `steps` or `batch` leaves it to each stage; a value there holds for all stages."""
    return ConfigDict(
        {
            "seed": seed,
            "init_from": None,  # a model whose weights the run starts from
            "model": {},
            "tokenizer": None,  # a folder or hub id
            "images": {"mode": "square"},  # square (crop), pad or resize (squash)
            "data": {"train": None, "eval": None, "images": None, "workers": 0, "max_bad_fraction": 0.01},
            "steps": None,
            "batch": {"samples": None, "per_device": None},
            "buckets": {"lengths": (512, 1024, 2048), "tiles": (1, 4)},
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
            "dtype": "bfloat16",  # of the computation; float32 is right on a CPU
            "frozen_dtype": "float32",  # of weights that are not trained; trained ones are float32
            "remat": "none",  # none, full, dots or offload
            "loss_norm": "global_tokens",  # or rank_mean, over `loss_ranks` groups of the batch
            "loss_ranks": 8,
            "optimizer": {
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "clip_norm": None,
                "first_moment": "float32",
            },
            "ema": None,  # decay of an average of the trained weights, which evaluation and export then use
            "stages": (),
            "eval": {  # every 0: at the end only; `by` groups the final table by these keys of the records
                "every": 500,
                "max_samples": 256,
                "batch": 64,
                "max_new_tokens": 64,
                "by": (),
            },
            "log": {"every": 10, "tensorboard": True, "wandb": None},
            "checkpoint": {"every": 500, "keep": 2},
        },
        type_safe=False,
    ).lock()


def stage(
    name: str,
    *,
    train: str | Sequence[Mapping[str, Any]],
    groups: Sequence[tuple[str, float | None]] = ((".*", 1.0),),
    template: str,
    samples: int,
    lr: float,
    eval: str | None = None,
    images: str | None = None,
    epochs: float = 1.0,
    steps: int | None = None,
    schedule: str = "cosine",
    warmup: float = 0.03,
) -> ConfigDict:
    """One stage. `train` is a path or a mixture of `{"path", "images", "weight"}`; `samples` is the batch; `steps` wins
    over `epochs`; `groups` lists (regex of parameter paths, learning-rate multiplier or None to freeze)."""
    values = {
        "name": name,
        "data": {"train": train, "eval": eval, "images": images},
        "template": template,
        "samples": samples,
        "lr": lr,
        "groups": tuple(tuple(group) for group in groups),
        "epochs": epochs,
        "steps": steps,
        "schedule": schedule,
        "warmup": warmup,
    }
    return ConfigDict(values, type_safe=False).lock()


# Settings of a run that count something, with the least that they may be. None is no number.
LEAST = {
    "steps": 1,
    "batch.samples": 1,
    "batch.per_device": 1,
    "log.every": 1,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "eval.every": 0,
    "eval.max_samples": 1,
    "eval.batch": 1,
    "eval.max_new_tokens": 1,
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage as the trainer runs it."""

    name: str
    train: tuple[SourceSpec, ...]
    eval: SourceSpec | None
    template: str
    samples: int
    lr: float
    groups: tuple[tuple[str, float | None], ...]
    epochs: float
    steps: int | None
    schedule: str
    warmup: float


def stages(config: ConfigDict) -> list[Stage]:
    """The stages of a config with the run's overrides applied. Raises UsageError when a stage cannot be run."""
    for path, least in LEAST.items():
        count = functools.reduce(lambda group, key: group[key], path.split("."), config)
        if count is not None and (not isinstance(count, int) or count < least):
            raise UsageError(f"config.{path} is {count!r}; give a whole number of at least {least}")
    result = []
    for values in config.stages:
        data = config.data
        train = data.train or values.data.train
        images = data.images or values.data.images
        if not train:
            raise UsageError(f"stage {values.name!r} has no training data: give --config.data.train=FILE.json")
        if isinstance(train, str):
            train = ({"path": train},)
        sources = tuple(
            from_dict(SourceSpec, {"images": images, **dict(one)}, f"stages.{values.name}.data.train") for one in train
        )
        evaluation = data.eval or (values.data.eval if not data.train else None)
        samples = config.batch.samples or values.samples
        steps = config.steps or values.steps
        if samples < 1 or (steps is not None and steps < 1) or values.lr <= 0:
            raise UsageError(f"stage {values.name!r} needs samples, steps and lr above 0")
        result.append(
            Stage(
                name=values.name,
                train=sources,
                eval=SourceSpec(evaluation, images) if evaluation else None,
                template=values.template,
                samples=samples,
                lr=float(values.lr),
                groups=tuple((str(pattern), rate) for pattern, rate in values.groups),
                epochs=float(values.epochs),
                steps=steps,
                schedule=values.schedule,
                warmup=float(values.warmup),
            )
        )
    if not result:
        raise UsageError("the config has no stages")
    if len({one.name for one in result}) != len(result):
        raise UsageError(f"two stages share a name: {[one.name for one in result]}")
    return result
