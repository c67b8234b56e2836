"""What differs between the versions of jax and flax that we support: jax 0.10.2 (Python 3.11) to 0.12 (3.12 and later).

At present every name that we use is the same in all of them, and what is left is that not every pair fits together.
When a version needs a special case, it goes here, with the versions and the reason, and nowhere else.
"""

from __future__ import annotations

import re
from importlib import metadata

from vlm_jax.errors import UsageError


def version(package: str) -> tuple[int, ...]:
    """The installed version as numbers, without importing the package: `(0, 10, 2)`."""
    return tuple(int(part) for part in re.findall(r"\d+", metadata.version(package))[:3])


def check_versions() -> None:
    """Raises UsageError where jax and flax do not fit; to be called before flax is first imported.

    pip keeps them apart by our bounds, but not where one of them was changed by hand.
    """
    jax, flax = version("jax"), version("flax")
    if jax >= (0, 11, 1) and flax <= (0, 12, 9):
        found = f"flax {metadata.version('flax')} does not import with jax {metadata.version('jax')}"
        raise UsageError(f"{found}: pip install 'flax>=0.12.12,<0.13'")
    if not (0, 10, 2) <= jax < (0, 13):
        raise UsageError(f"jax {metadata.version('jax')} is not supported: pip install 'jax>=0.10.2,<0.13'")
