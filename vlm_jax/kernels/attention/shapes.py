"""Argument shapes of `attention`, by name, shared by its tests and its benchmarks.

A small shape runs in a test on a CPU within a second. The others are those of the models that this codebase trains.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """One call. `segments` packed samples per row with padding at the end; 0: no segment ids. `padded`: one, by its
    length; the last row is all padding."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    features: int
    causal: bool = False
    sliding_window: int | None = None
    softcap: float | None = None
    segments: int = 0
    padded: bool = False
    positions: str | None = (
        None  # "prefix": the first third is one block, seen by all; "last": T queries at the end of S
    )
    bias: tuple[int, int, int, int] | None = None
    small: bool = False

    def arguments(self, seed: int = 0) -> tuple[dict[str, np.ndarray], dict]:
        """Made-up arrays: float32 q, k, v (and bias), and the other keyword arguments of the call."""
        rng = np.random.default_rng(seed)
        arrays = {
            "q": rng.standard_normal((self.batch, self.queries, self.heads, self.features), np.float32),
            "k": rng.standard_normal((self.batch, self.keys, self.kv_heads, self.features), np.float32),
            "v": rng.standard_normal((self.batch, self.keys, self.kv_heads, self.features), np.float32),
        }
        if self.bias is not None:
            arrays["bias"] = rng.standard_normal(self.bias, np.float32)
        options = {"causal": self.causal, "sliding_window": self.sliding_window, "softcap": self.softcap}
        if self.segments:
            ids = options["q_segment_ids"] = _segments(rng, self.batch, self.queries, self.segments)
            if self.queries != self.keys:
                ids = _segments(rng, self.batch, self.keys, self.segments)
                ids[-1] = np.where(ids[-1] == 1, 2, ids[-1])  # queries of segment 1 that see nothing
            options["kv_segment_ids"] = ids
        if self.padded:
            options["lengths"] = rng.integers(1, self.queries + 1, self.batch, np.int32)
            options["lengths"][-1] = 0
        if self.positions == "prefix":
            index = np.maximum(np.arange(self.queries, dtype=np.int32) - self.queries // 3, 0)
            options["q_positions"] = options["kv_positions"] = np.tile(index, (self.batch, 1))
        elif self.positions == "last":
            index = np.arange(self.keys - self.queries, self.keys, dtype=np.int32)
            options["q_positions"] = np.tile(index, (self.batch, 1))
        return arrays, options


def _segments(rng: np.random.Generator, batch: int, length: int, segments: int) -> np.ndarray:
    """int32 [B, T]: 1, 1, .. 2, 2, .. 0, 0, .. with random cuts."""
    cuts = np.sort(rng.choice(np.arange(1, length), (batch, segments), replace=False), -1)
    ids = 1 + (np.arange(length) >= cuts[:, :, None]).sum(1)
    return np.where(ids > segments, 0, ids).astype(np.int32)


S = AttentionShape
SHAPES = {
    # vision towers: full attention at lengths that no tile divides
    "clip_l14_336": S(8, 577, 577, 16, 16, 64),
    "siglip_so400m_384": S(8, 729, 729, 16, 16, 72),
    "siglip_b16_224": S(32, 196, 196, 12, 12, 64),
    # text towers
    "clip_text": S(64, 77, 77, 12, 12, 64, causal=True),
    "t5_xl_encoder": S(8, 512, 512, 32, 32, 64, segments=1, bias=(1, 32, 512, 512)),
    # decoders
    "mistral_7b": S(1, 4096, 4096, 32, 8, 128, causal=True, sliding_window=4096, segments=4),
    "vicuna_7b": S(2, 2048, 2048, 32, 32, 128, causal=True, padded=True),
    "mistral_7b_long": S(1, 16384, 16384, 32, 8, 128, causal=True, segments=8),
    "mistral_7b_decode": S(8, 1, 4096, 32, 8, 128, causal=True, positions="last"),
    "paligemma_prefix": S(2, 1152, 1152, 8, 1, 256, causal=True, positions="prefix"),
    # fusion
    "flamingo_cross": S(4, 1024, 320, 8, 8, 64, segments=5),
    "blip2_qformer": S(8, 32, 257, 12, 12, 64),
    # small
    "odd": S(2, 37, 37, 3, 3, 8, small=True),
    "odd_causal_grouped": S(2, 45, 45, 6, 2, 8, causal=True, small=True),
    "padded_causal": S(3, 43, 43, 4, 2, 8, causal=True, padded=True, small=True),
    "packed_causal": S(3, 64, 64, 4, 2, 8, causal=True, segments=3, small=True),
    "packed_window_softcap": S(2, 53, 53, 4, 1, 8, causal=True, sliding_window=9, softcap=2.0, segments=2, small=True),
    "window_both_sides": S(2, 40, 40, 2, 2, 8, sliding_window=5, small=True),
    "cross_packed": S(2, 29, 50, 4, 4, 8, segments=3, small=True),
    "prefix": S(2, 48, 48, 4, 2, 8, causal=True, positions="prefix", small=True),
    "decode": S(2, 1, 70, 4, 2, 8, causal=True, positions="last", small=True),
    "bias_per_head": S(2, 33, 41, 4, 2, 8, bias=(1, 4, 33, 41), small=True),
    "bias_per_key_softcap": S(2, 30, 30, 4, 2, 8, causal=True, softcap=3.0, segments=2, bias=(2, 1, 1, 30), small=True),
}

SMALL = {name: shape for name, shape in SHAPES.items() if shape.small}
