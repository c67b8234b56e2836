"""Argument shapes of `linear_cross_entropy`, by name, shared by its tests and its benchmarks."""

from __future__ import annotations

import dataclasses

import numpy as np

from vlm_jax.kernels.cross_entropy.reference import IGNORE


@dataclasses.dataclass(frozen=True)
class CrossEntropyShape:
    """One call; `labelled` is the share of tokens that have a label (a tenth to a third in instruction tuning)."""

    tokens: int
    features: int
    entries: int
    labelled: float = 1.0
    bias: bool = False
    softcap: float | None = None
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    small: bool = False

    def arguments(self, seed: int = 0) -> tuple[dict[str, np.ndarray], dict]:
        """Made-up arrays: float32 hidden, kernel, weights (and bias), int32 labels, and the other keyword arguments."""
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, self.entries, self.tokens).astype(np.int32)
        labels = np.where(rng.random(self.tokens) < self.labelled, labels, IGNORE).astype(np.int32)
        arrays = {
            "hidden": rng.standard_normal((self.tokens, self.features), np.float32),
            "kernel": rng.standard_normal((self.features, self.entries), np.float32) * 2 * self.features**-0.5,
            "labels": labels,
            "weights": rng.random(self.tokens, np.float32),
        }
        if self.bias:
            arrays["bias"] = rng.standard_normal(self.entries, np.float32)
        options = {"softcap": self.softcap, "z_loss": self.z_loss, "label_smoothing": self.label_smoothing}
        return arrays, options


S = CrossEntropyShape
SHAPES = {
    "mistral_7b": S(8192, 4096, 32000, labelled=0.25),
    "mistral_7b_all_labelled": S(8192, 4096, 32000),
    "qwen2_7b": S(8192, 3584, 152064, labelled=0.25),
    "gemma2_2b": S(4096, 2304, 256000, labelled=0.25, softcap=30.0),
    "t5_xl": S(2048, 2048, 32128, z_loss=1e-4),
    # small
    "odd": S(37, 8, 29, small=True),
    "mostly_ignored": S(64, 16, 33, labelled=0.2, bias=True, small=True),
    "everything": S(50, 12, 40, labelled=0.6, bias=True, softcap=2.0, z_loss=0.1, label_smoothing=0.1, small=True),
    "smoothed": S(41, 8, 16, labelled=0.7, label_smoothing=0.2, small=True),
}

SMALL = {name: shape for name, shape in SHAPES.items() if shape.small}
