"""The same picture in several files: byte for byte, or stored again in another format or quality at the same size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from PIL import Image

SIDE = 8  # marks are the brightness of 8 x 8 fields of an image
NEAR = 3  # levels of 255 in which the marks of one picture may differ
BLOCK = 8  # pixels, as JPEG cuts images
MEAN, SPREAD = 4.0, 24.0  # what storing again may do to a block: to its mean, and root mean square over its pixels
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
POINTS = 4096  # looked up at a time


def marks(pixels: np.ndarray) -> bytes:
    """64 bytes that all forms of one picture have nearly alike. pixels: uint8 [H, W, 3]."""
    fields = Image.fromarray(pixels).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    return fields.tobytes()


def same_picture(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether one is the other stored again: the brightness of no block of 8 x 8 pixels differs by more than a lossy
    format makes it. A changed letter, or another scan of the same page, is not the same picture.

    one, other: uint8 [H, W, 3].
    """
    if one.shape != other.shape:
        return False
    difference = (one.astype(np.float32) - other) @ LUMA
    height, width = difference.shape
    difference = np.pad(difference, ((0, -height % BLOCK), (0, -width % BLOCK)))
    blocks = difference.reshape(len(difference) // BLOCK, BLOCK, -1, BLOCK)
    means, squares = blocks.mean((1, 3)), np.square(blocks).mean((1, 3))
    return bool((np.abs(means) <= MEAN).all() and (squares <= SPREAD**2).all())


def alike(sizes: Sequence[tuple[int, int]], marked: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    """Pairs (i, j), i < j, of images that may be the same picture: equal sizes, and nearly equal marks."""
    from sklearn.neighbors import KDTree  # not at the top: of all the processes that read, one needs it

    by_size = defaultdict(list)
    for number, size in enumerate(sizes):
        by_size[size].append(number)
    for members in by_size.values():
        if len(members) == 1:
            continue
        numbers = np.array(members)
        fields = np.frombuffer(b"".join(marked[i] for i in members), np.uint8).reshape(-1, SIDE, SIDE)
        coarse = fields.reshape(-1, SIDE // 2, 2, SIDE // 2, 2).mean((2, 4)).reshape(len(fields), -1)
        tree = KDTree(coarse, metric="chebyshev")
        for at in range(0, len(coarse), POINTS):
            for offset, near in enumerate(tree.query_radius(coarse[at : at + POINTS], NEAR)):
                later = near[near > at + offset]
                distance = np.abs(fields[later].astype(np.int16) - fields[at + offset])
                for other in later[(distance <= NEAR).all((1, 2))]:
                    yield int(numbers[at + offset]), int(numbers[other])


def group(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """For each of `count` things the first that it is the same as, directly or through others; itself if none is."""
    first = list(range(count))

    def root(number: int) -> int:
        while first[number] != number:
            first[number] = first[first[number]]
            number = first[number]
        return number

    for one, other in pairs:
        low, high = sorted((root(one), root(other)))
        first[high] = low
    return [root(number) for number in range(count)]


def group_images(
    sizes: Sequence[tuple[int, int]],
    digests: Sequence[bytes],
    marked: Sequence[bytes],
    same: Callable[[Sequence[tuple[int, int]]], Iterable[bool]],
) -> list[int]:
    """For each image the first that shows the same picture.

    sizes: (width, height). digests: of the files' bytes. marked: `marks`. same: compares the pixels of pairs.
    """
    first_of: dict[bytes, int] = {}
    files = [first_of.setdefault(digest, number) for number, digest in enumerate(digests)]
    different = list(first_of.values())
    near = alike([sizes[i] for i in different], [marked[i] for i in different])
    pairs = [(different[one], different[other]) for one, other in near]
    equal = [pair for pair, yes in zip(pairs, same(pairs), strict=True) if yes]
    return group(len(digests), [*enumerate(files), *equal])
