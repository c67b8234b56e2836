"""What LLaVA's own training leaves: parts of a model, which are nothing without the model that they were trained on.

    mm_projector.bin           stage 1: the connector (LLaVA leaves out the newline, which stage 1 does not train)
    adapter_model.bin          LoRA: the adapters, as PEFT writes them, with adapter_config.json,
    non_lora_trainables.bin      and what was trained besides: the connector, the newline
    config.json                of the LLaVA that they make together

The model that they were trained on is a LLaVA, or a decoder alone: then the tower is the one that config.json names.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from vlm_jax.errors import UsageError
from vlm_jax.interop.hf_config import Described, describe, tell_template
from vlm_jax.interop.hub import local_folder
from vlm_jax.interop.huggingface import TOKENIZER_FILES, Checkpoint, describe_huggingface, open_part, read_json
from vlm_jax.interop.layout import CONFIG, is_foreign
from vlm_jax.interop.peft import base_of, fitted, is_adapter, open_adapter, with_tensors
from vlm_jax.interop.tables import names, part_names
from vlm_jax.interop.weights import Lazy, open_safetensors, open_torch

__all__ = ["is_artefact", "open_artefact", "open_connector"]

CONNECTOR = "mm_projector.bin"
BESIDES = ("non_lora_trainables.bin", "non_lora_trainables.safetensors")
WHOLE = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json")


def is_artefact(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` holds a part of a model: adapters, of PEFT or of LLaVA, or LLaVA's connector."""
    place = Path(folder)
    part = is_adapter(place) or (place / CONNECTOR).is_file()
    return part and not any((place / name).exists() for name in WHOLE)


def open_connector(path: str | os.PathLike[str], model: dict[str, object]) -> dict[str, Lazy]:
    """The connector in `mm_projector.bin`, the file or its folder, by the names of our entries, for a LLaVA with the
    settings `model`. Raises UsageError that lists what does not fit."""
    file = Path(path) / CONNECTOR if Path(path).is_dir() else Path(path)
    wanted = f"the connector {model['connector']!r} of this model"
    entries, _ = fitted(model, _connector_tensors(file), lora=None, where=str(file), target=wanted)
    missing = [tensor.hf for tensor in part_names(model, "connector") if tensor.entry not in entries]
    if missing:
        raise UsageError(f"{file} lacks {', '.join(missing)} of {wanted}")
    return entries


def open_artefact(
    folder: str | os.PathLike[str],
    *,
    whole: Callable[[str], Checkpoint],
    base: str | None = None,
    vision: str | None = None,
) -> Checkpoint:
    """The model that the parts in `folder` make with the one that they were trained on.

    whole: opens a whole model by its path.
    base: the model that they were trained on, where it is not at the path that they name.
    vision: the vision tower, where it is not at the path that config.json names.
    Raises UsageError that lists every tensor that does not fit.
    """
    place = Path(folder)
    own = read_json(place / CONFIG) if (place / CONFIG).exists() else {}
    named = base or (base_of(place) if is_adapter(place) else str(own.get("_name_or_path") or ""))
    if not named:
        raise UsageError(f"{place} holds a part of a model and does not name the rest: give --base=PATH")
    described = describe(own, str(place / CONFIG), processor={}, tower=_tower_config) if _is_llava(own) else None
    start = _start(place, named, described, vision or str(own.get("mm_vision_tower") or ""), whole)
    if (place / CONNECTOR).is_file():
        start = with_tensors(start, _connector_tensors(place / CONNECTOR), lora=None, where=str(place / CONNECTOR))
    for file in filter(Path.is_file, (place / name for name in BESIDES)):
        tensors = open_safetensors(file) if file.suffix == ".safetensors" else open_torch(file)
        start = with_tensors(start, tensors, lora=None, where=str(file))
    model = {**start.config["model"], "lora": None}
    missing = [tensor.hf for tensor in names(model) if tensor.entry not in start.entries]
    if missing:
        listed = "".join(f"\n  missing {name}" for name in missing)
        raise UsageError(f"{place} and {named} together are no whole model:{listed}")
    found = open_adapter(place, start) if is_adapter(place) else start
    config = dict(found.config)
    if described is not None and described.images is not None:
        config["images"] = described.images
        config["template"] = tell_template(None, own, str(place)) or config["template"]
    notes = (*found.notes, f"the model that it was trained on is {named}")
    return dataclasses.replace(found, config=config, notes=notes)


def _start(
    place: Path,
    named: str,
    described: Described | None,
    tower: str,
    whole: Callable[[str], Checkpoint],
) -> Checkpoint:
    """The model that the parts are put on; without a connector where that is a decoder alone."""
    folder = os.path.expanduser(local_folder(named))
    if not is_foreign(folder) or "connector" in describe_huggingface(folder)["model"]:
        return whole(folder)
    if described is None:
        raise UsageError(
            f"{place} was trained on {named}, which is no LLaVA, and has no config.json of LLaVA's that tells what it "
            "became: give a LLaVA with --base=PATH"
        )
    decoder = open_part(folder, "decoder", described.model)
    eyes = open_part(local_folder(tower), "vision", described.model)
    files = {name: Path(folder) / name for name in TOKENIZER_FILES if (Path(folder) / name).is_file()}
    return Checkpoint(
        folder=Path(folder),
        config={"model": described.model, "images": described.images, "template": None},
        entries={**decoder.entries, **eyes.entries},
        extra=eyes.extra,
        files=files,
        notes=(*decoder.notes, *eyes.notes),
    )


def _connector_tensors(file: Path) -> dict[str, Lazy]:
    """As LLaVA reads it: whatever stands before `mm_projector.` is left away."""
    found: dict[str, Lazy] = {}
    for name, lazy in open_torch(file).items():
        _, mark, rest = name.rpartition("mm_projector.")
        found[f"model.mm_projector.{rest}" if mark else name] = lazy
    return found


def _is_llava(own: dict[str, object]) -> bool:
    return any(key.startswith("mm_") for key in own)


def _tower_config(name: str) -> dict[str, object]:
    return read_json(Path(local_folder(name, weights=False)) / CONFIG)
