"""What a data set calls the parts of a record: LLaMA-Factory's dataset_info.json (data/README.md there)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import UsageError, suggest

# LLaMA-Factory's name of a column, and ours of the key, for its two formattings.
OURS = {
    "sharegpt": {"messages": "messages", "images": "images", "system": "system", "videos": "videos", "tools": "tools"},
    "alpaca": {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "history": "history",
        "images": "images",
        "system": "system",
        "videos": "videos",
    },
}
NAMES = {"messages": "conversations", "prompt": "instruction", "query": "input", "response": "output"}  # the defaults
TAGS = {"role_tag": "from", "content_tag": "value"}
ROLES = {"user_tag": ("human", "user"), "assistant_tag": ("gpt", "assistant"), "system_tag": ("system", "system")}


@dataclasses.dataclass(frozen=True)
class Columns:
    """names: (theirs, ours) pairs of a record's keys. role, content: the keys of a turn. roles: (theirs, ours)."""

    names: tuple[tuple[str, str], ...]
    role: str
    content: str
    roles: tuple[tuple[str, str], ...]

    def translate(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """A record with our names; turns that do not have the named keys stay as they are, for the parser to refuse."""
        names, roles = dict(self.names), dict(self.roles)
        record = {names.get(key, key): value for key, value in raw.items()}
        if isinstance(record.get("messages"), (list, tuple)):
            keys = {self.role: "role", self.content: "content"}
            turns = []
            for turn in record["messages"]:
                if isinstance(turn, Mapping):
                    turn = {keys.get(key, key): value for key, value in turn.items()}
                    turn["role"] = roles.get(str(turn.get("role")), turn.get("role"))
                turns.append(turn)
            record["messages"] = turns
        return record


def columns_of(entry: Mapping[str, Any], where: str) -> Columns:
    """The columns that an entry of dataset_info.json describes. Raises UsageError for what it should not hold."""
    formatting = entry.get("formatting", "alpaca")
    if formatting not in OURS:
        raise UsageError(f"{where} has formatting {formatting!r}; known: {', '.join(OURS)}")
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    ours = OURS[formatting]
    for what, found, known in (("columns", columns, ours), ("tags", tags, {**TAGS, **ROLES})):
        for key in found:
            if key not in known:
                raise UsageError(
                    f"{where} has {what} {key!r}{suggest(key, known)}; those that are read: {', '.join(known)}"
                )
    names = {columns[key]: name for key, name in ours.items() if key in columns}
    names |= {NAMES[key]: name for key, name in ours.items() if key in NAMES and key not in columns}
    roles = tuple((tags.get(tag, default), role) for tag, (default, role) in ROLES.items())
    role, content = (tags.get(tag, default) for tag, default in TAGS.items())
    return Columns(tuple(names.items()), role, content, roles)
