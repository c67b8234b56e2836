"""What a data set calls the parts of a record, in LLaMA-Factory's terms (its dataset_info.json)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Columns:
    """names: our name of each key that is called otherwise: (theirs, ours) pairs. role, content: the keys of a turn.
    roles: (theirs, ours) pairs of the roles."""

    names: tuple[tuple[str, str], ...] = ()
    role: str = "from"
    content: str = "value"
    roles: tuple[tuple[str, str], ...] = ()

    def translate(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """A record with our names."""
        ours = dict(self.names)
        return {ours.get(key, key): value for key, value in raw.items()}
