"""Model FLOPs, as MFU counts them.

Forward FLOPs are 2mnk of every matrix product on real positions: padding tokens and padding tiles count nothing, nor do
embedding look-ups and recomputation. The head counts where it is computed, which is where a position has a label. A
product counts 3 times where its weight is trained, twice where it is frozen but crossed by the gradient, once where it
is not crossed. Attention counts the visible pairs, 3 times if a gradient crosses it, else once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
import numpy as np

from vlm_jax.kernels.attention.cost import visible_pairs
from vlm_jax.models.llava import LlavaConfig

ORDER = ("vision", "connector", "newline", "decoder")  # of the flow; a gradient reaches what lies after a trained part


@dataclasses.dataclass(frozen=True)
class Costs:
    """FLOPs of a training step per unit of what the data holds."""

    per_tile: float
    per_token: float
    per_label: float
    per_pair: float
    sliding_window: int | None

    def of_batch(self, arrays: Mapping[str, np.ndarray]) -> float:
        """FLOPs of the rows in `arrays` (host arrays of docs/design.md, any leading axes)."""
        segments = arrays["segment_ids"].reshape(-1, arrays["segment_ids"].shape[-1])
        tokens = int((segments != 0).sum())
        pairs = 0
        for row in segments:
            pairs += sum(visible_pairs(n, self.sliding_window) for n in np.bincount(row)[1:].tolist())
        labels = int((arrays["labels"] >= 0).sum())
        places = arrays["visual_inverse"].reshape(arrays["tile_image"].size, -1)  # of the features of each tile
        tiles = int((places >= 0).any(axis=-1).sum())
        return self.per_tile * tiles + self.per_token * tokens + self.per_label * labels + self.per_pair * pairs


def llava_costs(
    config: LlavaConfig, abstract: Mapping[str, jax.ShapeDtypeStruct], rates: Mapping[str, float | None]
) -> Costs:
    """Costs of a LLaVA with these parameters, of which those with a rate (not None) are trained."""
    parts = {path: path.split("/")[0] for path in abstract}
    trained_parts = [ORDER.index(parts[path]) for path, rate in rates.items() if rate is not None]
    first = min(trained_parts, default=len(ORDER))

    def crossed(part: str) -> bool:
        return ORDER.index(part) >= first

    def times(path: str) -> int:
        return 3 if rates[path] is not None else 2 if crossed(parts[path]) else 1

    vision, decoder = config.vision, config.decoder
    positions = vision.patches + vision.class_token
    per_tile = per_token = per_label = 0.0
    for path, a in abstract.items():
        leaf = path.rsplit("/", 1)[-1]
        head = path.startswith("decoder/lm_head/") or (decoder.tie_embeddings and path == "decoder/embed/embedding")
        if leaf not in ("kernel", "lora_a", "lora_b") and not head:
            continue
        size = math.prod(a.shape)
        if head:
            per_label += 2 * times(path) * size
        elif path.startswith("vision/layers/"):
            per_tile += 2 * times(path) * size / vision.num_layers * vision.layers_used * positions
        elif path.startswith("vision/"):
            per_tile += 2 * times(path) * size * vision.patches
        elif path.startswith("connector/"):
            per_tile += 2 * times(path) * size * vision.features_per_tile
        else:
            per_token += 2 * times(path) * size
    see = 3 if crossed("vision") else 1
    per_tile += see * 4 * vision.layers_used * positions**2 * vision.hidden_size
    per_pair = (3 if crossed("decoder") else 1) * 4 * decoder.num_layers * decoder.num_heads * decoder.head_dim
    return Costs(per_tile, per_token, per_label, per_pair, decoder.sliding_window)
