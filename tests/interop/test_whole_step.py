"""Whole steps of a recipe, from the loss to the new weights, equal transformers' model with torch's AdamW."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from vlm_jax.config import load_config, plain
from vlm_jax.families import make_family
from vlm_jax.inference.apply_hf import hf_batch
from vlm_jax.interop.checkpoint import open_checkpoint
from vlm_jax.interop.native import load_entries
from vlm_jax.training.optimizer import make_optimizer, make_schedule, multipliers
from vlm_jax.training.state import init_state, make_train_step

torch = pytest.importorskip("torch")

CONFIG = f"{Path(__file__).resolve().parents[2]}/configs/llava16_mistral.py"
STEPS, RANKS, LR = 3, 2, 1e-3


def weights(folder: Path, abstract: Any) -> dict[str, np.ndarray]:
    found = open_checkpoint(folder)
    params = load_entries(found.entries, abstract, str(folder), found.problems)
    return {path: np.asarray(value) for path, value in params.items()}


def labels_of(given: dict[str, np.ndarray], image_token: int) -> np.ndarray:
    """All text after the first three tokens is trained."""
    labels = np.where((given["attention_mask"] == 0) | (given["input_ids"] == image_token), -100, given["input_ids"])
    labels[:, :3] = -100
    return labels


def padded(array: np.ndarray, shape: tuple[int, ...], fill: int) -> np.ndarray:
    return np.pad(array, [(0, n - m) for n, m in zip(shape, array.shape, strict=True)], constant_values=fill)


def test_steps_of_the_recipe_equal_transformers(hf, tmp_path: Path, one_device) -> None:
    """Tower at a tenth of the rate, newline with the language model, clipping, warm-up and cosine, and the loss as the
    mean over ranks of each rank's mean."""
    model = hf.build("llava_next", "clip", "mistral")
    model.save_pretrained(tmp_path / "before")
    recipe, _ = load_config(CONFIG)
    stage = recipe.stages[1]
    found = open_checkpoint(tmp_path / "before")
    family = make_family(found.config["model"])
    abstract = family.bound.abstract
    before = weights(tmp_path / "before", abstract)

    # Theirs: each rank's batch by itself, the mean over ranks, one update.
    ranks = [hf.inputs("llava_next", model, seed=seed) for seed in range(RANKS)]
    image_token = model.config.image_token_index
    labels = [labels_of(given, image_token) for given in ranks]
    labels[1][0, :] = -100  # the second rank trains fewer tokens, so that it matters what the mean is over
    assert len({int((one != -100).sum()) for one in labels}) == RANKS
    groups = [
        {"params": [w for n, w in model.named_parameters() if ("vision_tower" in n) == tower], "lr": LR * rate}
        for tower, rate in ((True, 0.1), (False, 1.0))
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    from transformers import get_cosine_schedule_with_warmup

    scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=1, num_training_steps=2 * STEPS)
    theirs = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses = [
            model(**hf.torch(given), labels=torch.tensor(target)).loss
            for given, target in zip(ranks, labels, strict=True)
        ]
        loss = sum(losses) / RANKS
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip_norm)
        optimizer.step()
        scheduler.step()
        theirs.append((loss.item(), norm.item()))
    model.save_pretrained(tmp_path / "after")
    expected = weights(tmp_path / "after", abstract)

    # Ours: a micro-batch per rank.
    images = family.images(found.config["images"])
    arrays = [hf_batch(given, images, image_token) for given in ranks]
    for one, target in zip(arrays, labels, strict=True):
        one["labels"] = np.concatenate([target[:, 1:], np.full_like(target[:, :1], -100)], axis=1).astype(np.int32)
    length, tiles = (max(one[name].shape[1] for one in arrays) for name in ("tokens", "tiles"))
    P = images.features_per_tile
    for one in arrays:
        newline = one["tiles"].shape[1] * P
        one["visual_index"] = np.where(one["visual_index"] == newline, tiles * P, one["visual_index"])
    fills = {"labels": -100, "visual_index": -1, "visual_inverse": -1}
    widths = {"tiles": tiles, "tile_image": tiles, "visual_inverse": tiles * P}
    batch = {
        name: np.stack(
            [
                padded(one[name], (2, widths.get(name, length), *one[name].shape[2:]), fills.get(name, 0))
                for one in arrays
            ]
        )
        for name in arrays[0]
    }
    rates = multipliers(list(abstract), stage.groups)
    schedule = make_schedule(stage.schedule, peak=LR, total_steps=2 * STEPS, warmup=1)
    adamw = make_optimizer(schedule, rates, **plain(recipe.optimizer))
    weigh = functools.partial(family.weigh, norm=recipe.loss_norm, ranks=RANKS)
    step = make_train_step(family.loss, weigh, adamw, seed=0, ema_decay=None)
    params = {path: jax.device_put(value) for path, value in before.items()}
    state = init_state(params, rates, adamw, frozen_dtype=np.dtype("float32"), ema=False)
    for wanted in theirs:
        state, metrics = step(state, batch)
        assert (float(metrics["loss"]), float(metrics["grad_norm"])) == pytest.approx(wanted, rel=2e-5)

    still = {path for path in expected if np.abs(expected[path] - before[path]).max() == 0}
    assert still == set()  # the tower's last layer is unused, but stacked with those that are
    for path, value in expected.items():
        if path != "vision/layers/attention/key/bias":  # its gradient is rounding alone
            rate = LR * (0.1 if path.startswith("vision/") else 1.0)
            error = np.abs(np.asarray(state.trained[path]) - value)
            moved = np.abs(value - before[path]).max()
            assert moved > rate and error.max() <= 0.02 * rate, path
