"""Images that the user names, as opposed to those that a data set names: any path is fine."""

from __future__ import annotations

import os

import numpy as np

from vlm_jax.data.images import open_image
from vlm_jax.errors import UsageError


def open_file(path: str | os.PathLike[str]) -> np.ndarray:
    """The pixels uint8 [H, W, 3] of an image file. Raises UsageError when there is none or it cannot be decoded."""
    name = os.fspath(path)
    if "://" in name:
        raise UsageError(f"image {name!r} is a URL: download it and give the file")
    full = os.path.realpath(os.path.expanduser(name))
    if not os.path.exists(full):
        raise UsageError(f"there is no image {name!r}: correct the path")
    folder, file = os.path.split(full)
    return open_image(file, folder)
