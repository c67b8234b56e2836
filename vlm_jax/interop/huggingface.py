"""Opens a Hugging Face or original LLaVA checkpoint as one of ours: our names, our arrangement, read on demand.

Nothing is read here but configs and the headers of the weight files; a tensor turns into ours while it is read, slice
by slice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from vlm_jax.errors import UsageError
from vlm_jax.families import make_family
from vlm_jax.interop.hf_config import Described, Json, describe, tell_template
from vlm_jax.interop.hub import local_folder
from vlm_jax.interop.layout import CONFIG, HF_CONFIG
from vlm_jax.interop.tables import FORMS, Tensor, canonical, carried, ignored, names, part_names
from vlm_jax.interop.weights import Index, Lazy, open_safetensors, open_torch
from vlm_jax.models.llava import LlavaConfig
from vlm_jax.models.schema import from_dict
from vlm_jax.sharding import make_mesh

# Beside the weights: what the tokenizer needs, and what is given back by export.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "generation_config.json")


# Settings that say how a LLaVA takes a part, not what the part is.
PLACES = ("mean", "std", "feature_layer", "keep_class_token", "num_layers", "tie_embeddings", "post_norm")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model on disk in our terms.

    config: as our config.json holds it: model, images, template.
    entries: its tensors by their names in our files; `problems` tells of those that cannot be read.
    extra: the tensors that LLaVA does not compute with, in hub layout.
    files: those that travel along, by the name that they have in a folder of ours.
    notes: what whoever imports it should know.
    """

    folder: Path
    config: Json
    entries: Mapping[str, Lazy]
    extra: Mapping[str, Lazy]
    files: Mapping[str, Path]
    problems: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Part:
    """A tower or a decoder for a new LLaVA: its tensors by their names in our files, and those of EXTRA."""

    entries: Mapping[str, Lazy]
    extra: Mapping[str, Lazy]
    notes: tuple[str, ...] = ()


def open_huggingface(folder: str | os.PathLike[str], *, vision: str | None = None) -> Checkpoint:
    """A whole `llava`, `llava_next` or original LLaVA.

    vision: where the vision tower is, for an original LLaVA that names its tower and does not hold it.
    Raises UsageError that lists every missing, left-over, duplicate and misshapen tensor and every damaged file.
    """
    place = Path(folder)
    raw, described, weights = _open(place, vision)
    if described.kind == "part":
        (part,) = described.model
        raise UsageError(
            f"{place} holds a {part} alone: name it in a training config, "
            f"--config.parts.{part}={place}, and a LLaVA starts from it"
        )
    model, notes = described.model, []
    if described.kind == "llava" and not any(hf.startswith("vision_tower.") for hf in weights.found):
        tower = _tower_folder(raw, place, vision)
        weights.add(_Weights.open(Path(tower)), only="vision_tower.")
        notes.append(f"the vision tower is that of {tower}")
    if described.tied and (note := _untie(model, weights)):
        notes.append(note)
    entries = weights.match(names(model), shapes_of(model), extra=True)
    if weights.problems:
        raise UsageError(f"the weights in {place} do not fit the model of its {CONFIG}:{_listed(weights.problems)}")
    template = tell_template(read_chat_template(place), raw, str(place))
    if template is None:
        notes.append("its conversation template cannot be told: where one is needed, give --template=NAME")
    files = {name: place / name for name in (*TOKENIZER_FILES, *PROCESSOR_FILES) if (place / name).is_file()}
    if not set(files) & {"tokenizer.json", "tokenizer.model", "vocab.json"}:
        notes.append("it has no tokenizer: what needs one will say so")
    return Checkpoint(
        folder=place,
        config={"model": model, "images": described.images, "template": template},
        entries=entries,
        extra={hf: lazy for hf, (_, lazy) in weights.found.items() if carried(hf)},
        files={**files, HF_CONFIG: place / CONFIG},
        notes=tuple(notes),
    )


def open_part(folder: str | os.PathLike[str], part: str, model: Mapping[str, Any]) -> Part:
    """The vision tower or the decoder at `folder`, a model of its own or a part of a whole one, for a LLaVA with the
    settings `model`."""
    place = Path(folder)
    _, described, weights = _open(place, None)
    if part not in described.model:
        raise UsageError(f"{place} holds no {part} (its model_type is of a {', '.join(described.model)})")
    settings = described.model[part]
    wanted, notes = part_names(model, part), []
    if part == "vision":
        count = model["vision"]["num_layers"]
        above = {hf for hf in weights.found if (at := _tower_layer(hf)) is not None and at >= count}
        if above:
            notes.append(f"the vision tower of {place} goes on above its layer {count}, which is left out")
        weights.drop(above)
    head, embedding = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    if part == "decoder" and described.tied:
        note = _untie({"decoder": dict(settings)}, weights)
        if note is None and head not in weights.found and not model["decoder"]["tie_embeddings"]:
            weights.found[head] = weights.found[embedding]
            notes.append(f"the head of {place} is its embedding: here it becomes one of its own")
    if part == "decoder" and embedding in weights.found:
        check_vocabulary(weights.found[embedding][1].shape[0], model, str(place))
    prefixes = {tensor.hf.split(".")[0] + "." for tensor in wanted}
    entries = weights.match(wanted, shapes_of(model), extra=False, within=tuple(prefixes))
    if weights.problems:
        raise UsageError(f"the weights in {place} do not fit config.model.{part}:{_listed(weights.problems)}")
    notes += differences({part: model[part]}, {part: settings}, str(place))
    extra = {hf: lazy for hf, (_, lazy) in weights.found.items() if part == "vision" and carried(hf)}
    return Part(entries, extra, tuple(notes))


def check_vocabulary(rows: int, model: Mapping[str, Any], where: str) -> None:
    """Raises UsageError where the embedding of a run has other rows than the one that it starts from."""
    expected = model["decoder"]["vocab_size"]
    if rows != expected:
        raise UsageError(
            f"the embedding in {where} has {rows} rows, config.model.decoder.vocab_size is {expected}: set "
            f"--config.model.decoder.vocab_size={rows}"
        )


def differences(model: Mapping[str, Any], found: Mapping[str, Any], where: str) -> list[str]:
    """What `model`, the settings of a run, computes otherwise with weights than the model at `where` does."""
    notes = []
    for part in sorted({"vision", "decoder"} & set(model) & set(found)):
        for key in sorted(set(found[part]) & set(model[part])):
            ours, theirs = model[part][key], found[part][key]
            if key in PLACES or json.dumps(ours) == json.dumps(theirs):
                continue
            notes.append(f"config.model.{part}.{key} is {ours!r}, but {where} has {theirs!r}")
    return notes


def describe_huggingface(folder: str | os.PathLike[str]) -> Json:
    """The config that `open_huggingface` would give, without a look at the weights."""
    place = Path(folder)
    raw, described, _ = _open(place, None)
    return {
        "model": described.model,
        "images": described.images,
        "template": tell_template(read_chat_template(place), raw, str(place)),
    }


def _open(place: Path, vision: str | None) -> tuple[Json, Described, _Weights]:
    raw = read_json(place / CONFIG)
    weights = _Weights.open(place)
    layers = [at for hf in weights.found if (at := _tower_layer(hf)) is not None]

    def tower(name: str) -> Json:
        return read_json(Path(_tower_folder({"mm_vision_tower": name}, place, vision)) / CONFIG)

    described = describe(
        raw,
        str(place / CONFIG),
        processor=image_processor(place),
        tower=tower,
        tower_layers=max(layers) + 1 if layers else None,
    )
    return raw, described, weights


def _tower_folder(raw: Json, place: Path, vision: str | None) -> str:
    """Where the tower is that an original LLaVA names: as a folder, beside it, or on the hub."""
    name = str(raw.get("mm_vision_tower") or raw.get("vision_tower"))
    if vision is not None:
        return local_folder(vision)
    for candidate in (Path(name), place / name):
        if (candidate / CONFIG).exists():
            return str(candidate)
    return local_folder(name)


def _tower_layer(hf: str) -> int | None:
    match = re.match(r"vision_tower\.vision_model\.encoder\.layers\.(\d+)\.", hf)
    return int(match[1]) if match else None


def _untie(model: Json, weights: _Weights) -> str | None:
    """A head that the file says is the embedding: where it stands there too and differs, it is a head of its own, as
    for transformers; where it is the same, it is left out."""
    head = weights.found.get("language_model.lm_head.weight")
    embedding = weights.found.get("language_model.model.embed_tokens.weight")
    if head is None or embedding is None:
        return None
    a, b = head[1], embedding[1]
    rows = max(1, (64 << 20) // max(1, a.nbytes // max(1, a.shape[0])))
    blocks = (slice(start, start + rows) for start in range(0, a.shape[0], rows))
    if a.shape == b.shape and all((a.read((i, slice(None))) == b.read((i, slice(None)))).all() for i in blocks):
        weights.drop({"language_model.lm_head.weight"})
        return "its head is written twice (lm_head, embed_tokens) and said to be tied: one is kept"
    model["decoder"]["tie_embeddings"] = False
    return "its config says that head and embedding are tied, but they differ: they are kept apart"


# ------------------------------------------------------------------------------------------------------------- weights


class _Weights:
    """The tensors of a folder by their names in hub layout, `(name in the file, tensor)`, and what is wrong with it."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[str, Lazy]] = {}
        self.problems: list[str] = []
        self.explained: set[str] = set()  # names that are missing for a problem told already
        self.blind = False  # whether that may be any name

    @classmethod
    def open(cls, place: Path) -> _Weights:
        self = cls()
        files, index = _weight_files(place)
        seen: dict[str, str] = {}
        for file in files:
            try:
                tensors = open_torch(place / file) if file.endswith(".bin") else open_safetensors(place / file)
            except UsageError as error:
                self.problems.append(str(error))
                seen |= dict.fromkeys((name for name, at in index.items() if at == file), file)
                self.explained |= {canonical(name) for name, at in index.items() if at == file}
                self.blind |= not index
                continue
            for name, lazy in tensors.items():
                if name in seen:
                    self.problems.append(f"duplicate {name}, in {seen[name]} and {file}")
                    continue
                seen[name] = file
                if ignored(name):
                    continue
                hf = canonical(name)
                if hf in self.found:
                    self.problems.append(f"duplicate {name}, which is {self.found[hf][0]} by another name")
                    continue
                self.found[hf] = (name, lazy)
        for name in set(index) - set(seen):
            self.problems.append(f"missing {name}, which the index places in {index[name]}")
            self.explained.add(canonical(name))
        return self

    def add(self, other: _Weights, *, only: str) -> None:
        self.found |= {hf: pair for hf, pair in other.found.items() if hf.startswith(only)}
        self.problems += other.problems

    def drop(self, hf_names: Iterable[str]) -> None:
        for hf in hf_names:
            del self.found[hf]

    def match(
        self,
        tensors: Iterable[Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        *,
        extra: bool,
        within: tuple[str, ...] = ("",),
    ) -> dict[str, Lazy]:
        """The tensors by their names in our files, arranged as ours. What is missing, left over within these prefixes,
        or of another shape is added to the problems; `extra` lets pass what is carried along."""
        entries, wanted = {}, set()
        for tensor in tensors:
            wanted.add(tensor.hf)
            if tensor.hf not in self.found:
                if not self.blind and tensor.hf not in self.explained:
                    self.problems.append(f"missing {tensor.hf}")
                continue
            name, lazy = self.found[tensor.hf]
            form, ours = FORMS[tensor.form], shapes[tensor.path]
            expected = form.theirs_shape(ours if tensor.layer is None else ours[1:])
            if lazy.shape != expected:
                self.problems.append(f"{name} is {list(lazy.shape)}, expected {list(expected)}")
                continue
            entries[tensor.entry] = as_ours(lazy, tensor.form)
        for hf, (name, _) in self.found.items():
            if hf not in wanted and hf.startswith(within) and not carried(hf):
                self.problems.append(f"left over {name}")
        return entries


def as_ours(lazy: Lazy, form: str) -> Lazy:
    """A tensor of Hugging Face's, arranged as ours while it is read."""
    arranged = FORMS[form]

    def fetch(index: Index) -> Any:
        if form == "patches":
            return arranged.ours(lazy.read())[index]
        if form == "transposed" and index is not ...:
            index = index[::-1]
        return arranged.ours(lazy.read(index))

    return Lazy(arranged.ours_shape(lazy.shape), lazy.dtype, fetch)


def as_theirs(lazy: Lazy, form: str) -> Lazy:
    """The other way round."""
    arranged = FORMS[form]
    return Lazy(arranged.theirs_shape(lazy.shape), lazy.dtype, lambda index: arranged.theirs(lazy.read())[index])


def _weight_files(place: Path) -> tuple[list[str], dict[str, str]]:
    """The files of a model's weights, and their index where there is one."""
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (place / index).exists():
            where = read_json(place / index).get("weight_map")
            if not isinstance(where, dict) or not where:
                raise UsageError(f"{place / index} is damaged: it has no weight_map")
            where = {str(name): os.path.basename(str(file)) for name, file in where.items()}
            return sorted(set(where.values())), where
        if (place / single).exists():
            return [single], {}
    shards = sorted(file.name for file in place.glob("model-*-of-*.safetensors"))
    if not shards:
        raise UsageError(f"{place} holds no weights (model.safetensors, pytorch_model.bin, or shards with their index)")
    return shards, {}


def normal(model: Mapping[str, Any]) -> Json:
    """The settings of a model with every default filled in, so that two of them can be compared."""
    settings = {key: value for key, value in model.items() if key != "family"}
    return {"family": "llava", **dataclasses.asdict(from_dict(LlavaConfig, settings, "config.model"))}


def shapes_of(model: Json | Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a model, by its path; nothing is allocated."""
    bare = {**model, "lora": None}
    alone = jax.sharding.get_abstract_mesh().empty
    mesh = jax.set_mesh(make_mesh(devices=jax.local_devices()[:1])) if alone else contextlib.nullcontext()
    with mesh:
        return {path: tuple(a.shape) for path, a in make_family(bare).bound.abstract.items()}


def _listed(problems: Iterable[str]) -> str:
    return "".join(f"\n  {problem}" for problem in sorted(problems))


# --------------------------------------------------------------------------------------------------------------- files


def read_json(file: Path) -> Json:
    try:
        value = json.loads(file.read_text())
    except FileNotFoundError:
        raise UsageError(f"{file} is missing: copy the model again") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} is damaged or cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{file} is damaged: it holds a {type(value).__name__}, not an object")
    return value


def image_processor(place: Path) -> Json:
    """The image processor's settings; transformers 5 writes them into processor_config.json."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (place / name).exists():
            found = read_json(place / name)
            settings = found.get("image_processor") if name == "processor_config.json" else found
            if settings:
                return dict(settings)
    return {}


def read_chat_template(place: Path) -> str | None:
    """The chat template of a checkpoint, wherever its version of transformers put it."""
    if (place / "chat_template.jinja").exists():
        return (place / "chat_template.jinja").read_text()
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (place / name).exists():
            found = read_json(place / name).get("chat_template")
            if isinstance(found, str):
                return found
    return None
