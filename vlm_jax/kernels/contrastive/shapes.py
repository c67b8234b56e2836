"""Argument shapes of the contrastive losses, by name, shared by their tests and their benchmark."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class ContrastiveShape:
    """One call. `features` are how the vectors are made.

    "alike": unit vectors, partners are close (a cosine of 0.7); "distant": of 0.16, where tens of thousands of pairs
    have a loss of about 1 at a scale of 100; "equal": all N are the same vector; "zero": every third image and text is
    0; "opposed": partners point away from each other (the largest losses).
    """

    pairs: int
    width: int
    scale: float = 14.3
    bias: float = -10.0
    features: str = "alike"
    small: bool = False

    def arguments(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Made-up float32 image [N, D], text [N, D], scale and bias; the softmax loss takes no bias."""
        rng = np.random.default_rng(seed)
        image, noise = rng.standard_normal((2, self.pairs, self.width), np.float32)
        text = image + noise * (6 if self.features == "distant" else 1)
        if self.features == "equal":
            image = text = np.broadcast_to(image[:1], image.shape)
        elif self.features == "opposed":
            text = -image
        image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
        if self.features == "zero":
            image[::3] = text[1::3] = 0
        return {"image": image, "text": text, "scale": np.float32(self.scale), "bias": np.float32(self.bias)}


S = ContrastiveShape
SHAPES = {
    "clip_b32": S(32768, 512, scale=100.0, features="distant"),
    "clip_l14": S(32768, 768, scale=100.0, features="distant"),
    "siglip_b16": S(32768, 768, scale=117.0, bias=-12.9),
    "siglip_so400m": S(32768, 1152, scale=112.0, bias=-16.5),
    "open_clip_benchmark": S(4096, 512),
    "large": S(16384, 512),
    "huge": S(131072, 512),
    # small
    "one_row": S(1, 8, small=True),
    "two_rows": S(2, 3, small=True),
    "odd": S(37, 19, small=True),
    "tiles": S(48, 16, small=True),
    "prime": S(101, 24, small=True),
    "sharp": S(50, 16, scale=100.0, small=True),
    "flat": S(33, 8, scale=1e-3, bias=0.0, small=True),
    "negative_scale": S(21, 8, scale=-5.0, bias=3.0, small=True),
    "equal": S(29, 12, scale=100.0, features="equal", small=True),
    "zero": S(31, 12, scale=100.0, features="zero", small=True),
    "opposed": S(40, 12, scale=100.0, bias=20.0, features="opposed", small=True),
}

SMALL = {name: shape for name, shape in SHAPES.items() if shape.small}
