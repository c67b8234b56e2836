"""Files that name other files of records: LLaVA-NeXT's YAML mixtures (LLaVA-VL/LLaVA-NeXT llava/train/train.py), and
LLaMA-Factory's dataset_info.json."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.data.formats.columns import Columns, columns_of
from vlm_jax.data.records import Record
from vlm_jax.data.safety import locate, read_yaml
from vlm_jax.data.sources.base import Source
from vlm_jax.errors import UsageError, suggest

KEYS = ("json_path", "sampling_strategy")
STRATEGY = re.compile(r"all|(first|end|random):(\d+)(%?)")
FETCHED = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")

OpenPart = Callable[[Path, Path, Columns | None], Source]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A `Source` of chosen records of other sources. chosen: int64 [n] of each, the numbers of its records."""

    path: Path
    images: Path
    parts: tuple[Source, ...]
    chosen: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return sum(len(chosen) for chosen in self.chosen)

    def __getitem__(self, index: int) -> Record:
        number = index
        for part, chosen in zip(self.parts, self.chosen, strict=True):
            if 0 <= number < len(chosen):
                return part[int(chosen[number])]
            number -= len(chosen)
        raise IndexError(index)


def open_mixture(path: Path, images: Path, confined: bool, open_part: OpenPart) -> Source:
    """A YAML mixture: `datasets`, a list of {json_path, sampling_strategy: all | first:N | end:N | random:N}.

    N is a number of records or, with %, a share of them, rounded up; more than there are means all. A draw is without
    repetition, by the place of the entry in the list alone: it is the same in every run. json_path is relative to the
    file's own folder.
    """
    found = read_yaml(path)
    entries = found.get("datasets") if isinstance(found, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{path} has no list 'datasets' of {{json_path, sampling_strategy}}")
    parts, chosen = [], []
    for number, entry in enumerate(entries):
        where = f"entry {number + 1} of {path}"
        if not isinstance(entry, dict) or not isinstance(entry.get("json_path"), str):
            raise UsageError(f"{where} has no json_path")
        if unknown := next((key for key in entry if key not in KEYS), None):
            raise UsageError(f"{where} has {unknown!r}{suggest(str(unknown), KEYS)}; known: {', '.join(KEYS)}")
        file = Path(locate(entry["json_path"], path.parent, f"{where}: json_path", confined))
        parts.append(open_part(file, images, None))
        chosen.append(_choose(entry.get("sampling_strategy", "all"), len(parts[-1]), number, where))
    return Mixture(path, images, tuple(parts), tuple(chosen))


def open_listed(path: Path, name: str, images: Path, confined: bool, open_part: OpenPart) -> Source:
    """The data set `name` of LLaMA-Factory's dataset_info.json, with the columns and tags that stand there."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from None
    entry = listed.get(name) if isinstance(listed, dict) else None
    where = f"{name!r} of {path}"
    if not isinstance(entry, dict):
        known = [key for key in listed if isinstance(key, str)] if isinstance(listed, dict) else []
        raise UsageError(f"there is no {where}{suggest(name, known)}; it has {', '.join(known) or 'nothing'}")
    if not isinstance(entry.get("file_name"), str):
        fetched = next((key for key in FETCHED if key in entry), None)
        why = f"is fetched from elsewhere ({fetched}); download it and name it" if fetched else "names no file"
        raise UsageError(f"{where} {why} with file_name")
    if entry.get("ranking"):
        raise UsageError(f"{where} holds pairs of answers to choose between, which are not read")
    file = Path(locate(entry["file_name"], path.parent, f"{where}: file_name", confined))
    whole = open_part(file, images, columns_of(entry, where))
    most = entry.get("num_samples")
    if most is None or most >= len(whole):
        return whole
    return Mixture(path, images, (whole,), (_draw(len(whole), int(most), 0),))


def _choose(strategy: Any, count: int, number: int, where: str) -> np.ndarray:
    match = STRATEGY.fullmatch(str(strategy))
    if match is None:
        raise UsageError(
            f"{where} has sampling_strategy {strategy!r}; give all, first:N, end:N or random:N, N a number or N%"
        )
    how, amount, percent = match.groups()
    if how is None:
        return np.arange(count)
    wanted = min(count, math.ceil(int(amount) * count / 100) if percent else int(amount))
    if not wanted:
        raise UsageError(f"{where} takes no record (sampling_strategy {strategy!r}); leave it out")
    if how == "random":
        return _draw(count, wanted, number)
    return np.arange(count)[:wanted] if how == "first" else np.arange(count)[count - wanted :]


def _draw(count: int, wanted: int, number: int) -> np.ndarray:
    """`wanted` of `count` numbers in their order, drawn with raw Philox bits, which no version of numpy will change."""
    bits = np.random.Philox(np.random.SeedSequence(number)).random_raw(count)
    return np.sort(np.argsort(bits, kind="stable")[:wanted])
