"""What a config file is written with: an experiment, its stages and their usual changes; and their typed form for the
trainer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.config import plain
from vlm_jax.data import SourceSpec
from vlm_jax.data.packing import Packing
from vlm_jax.errors import UsageError
from vlm_jax.models.presets import lora
from vlm_jax.models.schema import from_dict


def experiment(*, seed: int = 42) -> ConfigDict:
    """All settings of a run with their defaults; locked, so that a typo in a config file is an error. A None in `data`,
    `steps` or `batch` leaves it to each stage; a value there holds for all stages."""
    return ConfigDict(
        {
            "seed": seed,
            "init_from": None,  # a model whose weights the run starts from
            "parts": {"vision": None, "connector": None, "decoder": None},  # else: what gives it one part each
            "model": {},
            "tokenizer": None,  # a folder or hub id
            "images": {  # vlm_jax/data/images.py says what each does; a stage may change some (`image_settings`)
                "mode": "square",  # square (crop), pad, resize (squash) or anyres (tiles)
                "merge": "flat",  # order of the features: flat, spatial or spatial_unpad
                "pinpoints": (),  # canvases of anyres, ((w, h), ...), or ((h, w), ...) in the order hw
                "pinpoint_order": "wh",  # wh (LLaVA) or hw (Hugging Face)
                "max_tiles": None,  # N of anyres_max_N
                "several": None,  # mode of the images of a record with several; None: mode
            },
            "data": {
                "train": None,
                "eval": None,
                "images": None,
                "confined": True,  # images lie in their folder; False: anywhere on this machine, by path or link
                "workers": 0,  # processes that read; 0: threads of this one
                "threads": 4,
                "truncate": False,  # cut off what is longer than the longest row, as LLaVA does; False: leave it out
                "max_bad_fraction": 0.01,
            },
            "steps": None,
            "batch": {"samples": None, "per_device": None},
            "buckets": {"lengths": (512, 1024, 2048), "tiles": (1, 4)},
            "packing": {"fit": None, "window": 4096},  # best_fit, first_fit: rows of the largest bucket, filled; auto
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
    train: str | Sequence[Mapping[str, Any]] | None,
    groups: Sequence[tuple[str, float | None]] = ((".*", 1.0),),
    template: str,
    image_placement: str = "first",
    compat_drop_mismatch: bool = False,
    samples: int,
    lr: float,
    image_settings: Mapping[str, Any] | None = None,
    eval: str | None = None,
    images: str | None = None,
    epochs: float = 1.0,
    steps: int | None = None,
    schedule: str = "cosine",
    warmup: float = 0.03,
) -> ConfigDict:
    """One stage. `train` is a path or a mixture of `{"path", "images", "weight"}`; `samples` is the batch; `steps` wins
    over `epochs`; `groups` lists (regex of parameter paths, learning-rate multiplier or None to freeze);
    `image_settings` changes keys of `config.images` for this stage; `image_placement` (first, last, random or as_is) is
    where a message's only image stands; `compat_drop_mismatch` leaves out what LLaVA loses to "tokenization mismatch".
    """
    values = {
        "name": name,
        "data": {"train": train, "eval": eval, "images": images},
        "template": template,
        "image_placement": image_placement,
        "compat_drop_mismatch": compat_drop_mismatch,
        "image_settings": dict(image_settings or {}),
        "samples": samples,
        "lr": lr,
        "groups": tuple(tuple(group) for group in groups),
        "epochs": epochs,
        "steps": steps,
        "schedule": schedule,
        "warmup": warmup,
    }
    return ConfigDict(values, type_safe=False).lock()


# ------------------------------------------------------------------------------------- what the recipes have in common

CONNECTOR_ONLY = (("connector/.*", 1.0), (".*", None))  # stage 1 of every LLaVA


def anyres(tile: int) -> dict[str, Any]:
    """LLaVA-1.6's `config.images` for tiles of so many pixels: two to four tiles and the whole image, padding dropped.
    Images that share a record are padded squares, as LLaVA-NeXT trains them."""
    grids = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # in LLaVA's order, which decides between equals
    pinpoints = tuple((wide * tile, high * tile) for wide, high in grids)
    return {"mode": "anyres", "merge": "spatial_unpad", "pinpoints": pinpoints, "several": "pad"}


def adapt(c: ConfigDict, *, rank: int, alpha: float, dropout: float, lr: float, connector_lr: float) -> None:
    """Makes the last stage one of LoRA as LLaVA's: adapters on every linear layer of the language model but its head,
    a fully trained connector with a learning rate of its own, and all else frozen."""
    c.model.lora = lora(rank, alpha, dropout=dropout)
    c.stages[-1].lr = lr
    c.stages[-1].groups = ((".*/lora_[ab]", 1.0), ("connector/.*", connector_lr / lr), (".*", None))


def own_data(c: ConfigDict, *, init_from: str, vocab_size: int) -> None:
    """The last stage alone, from a released model, on data that the user names. `vocab_size` counts the rows of that
    model's embedding. The loss is the mean over the tokens of the batch, whatever the number of devices."""
    c.init_from, c.tokenizer = init_from, None
    c.parts = dict.fromkeys(c.parts)
    c.model.decoder.vocab_size = vocab_size
    c.stages = c.stages[-1:]
    c.stages[0].data.train = c.stages[0].data.images = None
    c.loss_norm = "global_tokens"


def without(c: ConfigDict, name: str) -> None:
    """Leaves out the stage `name`. Raises UsageError if another variant has left it out already."""
    if name not in [one.name for one in c.stages]:
        raise UsageError(f"these variants contradict each other: there is no stage {name!r} left to leave out")
    c.stages = tuple(one for one in c.stages if one.name != name)


def tiny(c: ConfigDict) -> None:
    """The same model and recipe at a size that a laptop's CPU trains in a minute, on the handwriting of the quickstart.

    Kinds, ratios of heads, feature layer, merging, groups and their multipliers stay. Weights start at random, so that
    the learning rates, made for pretrained ones, are replaced.
    """
    vision, decoder, tiled = c.model.vision, c.model.decoder, c.images.mode == "anyres"
    side = 16 if tiled else 32  # a canvas of the data has 32 pixels: it is four tiles, or one
    c.images.pinpoints = tuple(
        (wide * side // vision.image_size, high * side // vision.image_size) for wide, high in c.images.pinpoints
    )
    vision.update(image_size=side, patch_size=8, hidden_size=64, intermediate_size=256, num_layers=3, num_heads=4)
    sharing = decoder.num_heads // decoder.num_kv_heads
    heads = 8 if 8 % sharing == 0 else sharing
    decoder.update(
        vocab_size=83,
        hidden_size=16 * heads,
        intermediate_size=48 * heads,
        num_layers=3,
        num_heads=heads,
        num_kv_heads=heads // sharing,
        head_dim=16,
    )
    if c.model.lora is not None:
        c.model.lora.update(rank=8, alpha=8 * c.model.lora.alpha / c.model.lora.rank)
    c.init_from, c.parts, c.tokenizer = None, dict.fromkeys(c.parts), "digits:tokenizer_chat"
    for one, steps in zip(c.stages[::-1], (300, 150), strict=False):
        one.samples, one.steps, one.lr = 32, steps, 2e-3
        one.data.update(train="digits:align" if one.template == "plain" else "digits:train", images=None)
    c.stages[-1].data.eval = "digits:eval"
    c.buckets.lengths, c.buckets.tiles = ((56, 96), (5,)) if tiled else ((40, 80), (1,))
    c.dtype, c.frozen_dtype, c.remat, c.loss_ranks = "float32", "float32", "none", 8
    c.log.every, c.checkpoint.every = 20, 100
    c.eval.update(every=0, max_samples=100, batch=100, max_new_tokens=16, by=("kind",))


# Settings of a run that count something, with the least that they may be. None is no number.
LEAST = {
    "steps": 1,
    "batch.samples": 1,
    "batch.per_device": 1,
    "data.workers": 0,
    "data.threads": 1,
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
    image_placement: str
    compat_drop_mismatch: bool
    images: Mapping[str, Any]
    packing: Packing
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
    packing = from_dict(Packing, plain(config.packing), "config.packing")
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
            from_dict(
                SourceSpec,
                {"images": images, "confined": data.confined, **dict(one)},
                f"stages.{values.name}.data.train",
            )
            for one in train
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
                eval=SourceSpec(evaluation, images, confined=data.confined) if evaluation else None,
                template=values.template,
                image_placement=values.image_placement,
                compat_drop_mismatch=bool(values.compat_drop_mismatch),
                images={**plain(config.images), **plain(values.image_settings)},
                packing=packing,
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
