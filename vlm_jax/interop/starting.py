"""What a run starts from: a whole model, or parts from different places; the rest is drawn."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from vlm_jax.interop.checkpoint import open_checkpoint
from vlm_jax.interop.hub import local_folder
from vlm_jax.interop.huggingface import check_vocabulary, differences, normal, open_part
from vlm_jax.interop.layout import CARRIED, is_foreign
from vlm_jax.interop.llava_artefacts import is_artefact, open_connector
from vlm_jax.interop.native import check_entries, load_entries
from vlm_jax.interop.weights import Lazy


@dataclasses.dataclass(frozen=True)
class Start:
    """Tensors by their names in our files, and where they are from; what is not among them starts fresh.

    extra, files: what the models that the run writes carry along (`native.save_model`).
    """

    where: str
    abstract: Mapping[str, jax.ShapeDtypeStruct]
    entries: Mapping[str, Lazy]
    problems: Mapping[str, str] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, Lazy] = dataclasses.field(default_factory=dict)
    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def load(self) -> dict[str, jax.Array]:
        """The tensors in their sharding, on the mesh in use."""
        return load_entries(self.entries, self.abstract, self.where, self.problems)


def open_start(
    init_from: str | None, parts: Mapping[str, str | None], model: Mapping[str, Any], abstract: Mapping[str, Any]
) -> Start | None:
    """What `config.init_from` names or, where it names nothing, `config.parts`, checked against the parameters
    `abstract` of the run's model; None where neither names anything.

    A model without adapters may be given adapters. Raises UsageError that lists all that does not fit.
    """
    named = {part: path for part, path in parts.items() if path}
    if init_from is None and not named:
        return None
    model = normal(model)
    start = _whole(init_from, model, abstract) if init_from is not None else _parts(named, model, abstract)
    if "decoder.embed.embedding" in start.entries:
        check_vocabulary(start.entries["decoder.embed.embedding"].shape[0], model, start.where)
    check_entries(start.entries, start.abstract, start.where, start.problems)
    return start


def _whole(path: str, model: Mapping[str, Any], abstract: Mapping[str, Any]) -> Start:
    found = open_checkpoint(path)
    theirs = normal(found.config["model"])
    bare = not theirs.get("lora")
    return Start(
        where=str(found.folder),
        abstract={path: a for path, a in abstract.items() if not (bare and "/lora_" in path)},
        entries=found.entries,
        problems=found.problems,
        extra=found.extra,
        files={name: file for name, file in found.files.items() if name in CARRIED},
        notes=(*found.notes, *differences(model, theirs, str(found.folder))),
    )


def _parts(named: Mapping[str, str], model: Mapping[str, Any], abstract: Mapping[str, Any]) -> Start:
    entries: dict[str, Lazy] = {}
    extra: dict[str, Lazy] = {}
    notes: list[str] = []
    for part, path in named.items():
        folder = os.path.expanduser(local_folder(path))
        if part == "connector" and (os.path.isfile(folder) or is_artefact(folder)):
            entries |= open_connector(folder, dict(model))
            continue
        if not is_foreign(folder):
            whole = open_checkpoint(folder).entries
            entries |= {name: lazy for name, lazy in whole.items() if name.split(".")[0] == part}
            continue
        found = open_part(folder, part, model)
        entries |= found.entries
        extra |= found.extra
        notes += found.notes
    own = {path: a for path, a in abstract.items() if path.split("/")[0] in named and "/lora_" not in path}
    return Start(where=", ".join(named.values()), abstract=own, entries=entries, extra=extra, notes=tuple(notes))
