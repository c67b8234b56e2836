"""Adapters of Hugging Face's PEFT, read and written: a folder with adapter_config.json and adapter_model.safetensors.

PEFT's `lora_A [r, in]`, `lora_B [out, r]` of one layer are our `lora_a [in, r]`, `lora_b [r, out]` of that layer, and
the scale is alpha / r in both. Modules that it saves whole take the place of the base model's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vlm_jax.errors import UsageError
from vlm_jax.interop.huggingface import Checkpoint, as_ours, as_theirs, read_json, shapes_of
from vlm_jax.interop.native import written_aside
from vlm_jax.interop.tables import FORMS, Tensor, canonical, names
from vlm_jax.interop.weights import Lazy, open_safetensors, open_torch, write_safetensors

__all__ = ["base_of", "fitted", "is_adapter", "open_adapter", "with_tensors", "write_adapter"]

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
ORIGIN = "adapter_origin.json"  # ours, beside PEFT's files: which weights the adapter was trained on

# What a field of adapter_config.json may say. Those of the first two lists are understood, or change nothing of what
# the saved weights compute; every other one, known or not, has to be off.
_READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "base_model_name_or_path")
_OF_TRAINING = (
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),  # told by keys
    *(
        "task_type",
        "auto_mapping",
        "peft_version",
        "revision",
        "inference_mode",
        "runtime_config",
        "ensure_weight_tying",
    ),
    *("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
)
_OFF: tuple[Any, ...] = (None, False, "none", {}, [])
# Others change the base model as they begin, so that the adapter does not fit the one that is published.
_STARTS = (None, True, False, "default", "gaussian", "eva", "orthogonal")

_ADAPTED = re.compile(r"(?P<module>.*)\.lora_(?P<side>[AB])(\.\w+)?\.weight")
_SAVED_WHOLE = re.compile(r"modules_to_save\.(default\.)?|base_layer\.")

# Our components beside the adapted layers that PEFT can save whole, and the module by which it knows them. The newline
# is a parameter, no module: it is simply among the tensors, and PEFT puts it into the base model.
_WHOLE = {
    "connector/": "multi_modal_projector",
    "decoder/embed/": "embed_tokens",
    "decoder/lm_head/": "lm_head",
    "newline": None,
}


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    return (Path(folder) / CONFIG).is_file()


def base_of(folder: str | os.PathLike[str]) -> str:
    """The model that an adapter was trained on, as it names it; '' where it does not."""
    return str(read_json(Path(folder) / CONFIG).get("base_model_name_or_path") or "")


# ------------------------------------------------------------------------------------------------------------- reading


def open_adapter(folder: str | os.PathLike[str], base: Checkpoint) -> Checkpoint:
    """`base` with the adapter in `folder`: `config.model.lora` and, per layer, its two matrices.

    Raises UsageError for what a LoRA of ours cannot be, and one that lists every tensor that does not fit `base`.
    """
    place = Path(folder)
    lora = read_lora(place / CONFIG)
    file = next((place / name for name in WEIGHTS if (place / name).exists()), None)
    if file is None:
        raise UsageError(f"{place} holds no weights of an adapter ({' or '.join(WEIGHTS)})")
    tensors = open_safetensors(file) if file.suffix == ".safetensors" else open_torch(file)
    if base.config["model"].get("lora"):
        raise UsageError(f"{base.folder} has adapters of its own: merge them first (convert export --format=hf)")
    _check_origin(place, base)
    return with_tensors(base, tensors, lora=lora, where=str(place))


def read_lora(file: Path) -> dict[str, Any]:
    """`rank`, `alpha` and `dropout` of an adapter_config.json. Raises UsageError for what has no counterpart."""
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise UsageError(f"{file} is of peft_type {config.get('peft_type')!r}; only LORA can be read")
    strange = {k: v for k, v in config.items() if k not in (*_READ, *_OF_TRAINING) and v not in _OFF}
    if config.get("init_lora_weights") not in _STARTS:
        strange["init_lora_weights"] = config["init_lora_weights"]
    if strange:
        listed = ", ".join(f"{key}={value!r}" for key, value in strange.items())
        raise UsageError(
            f"{file} has {listed}, which a LoRA here cannot be: merge the adapter with PEFT (merge_and_unload) and "
            "import the whole model"
        )
    try:
        rank, alpha, dropout = int(config["r"]), float(config["lora_alpha"]), float(config.get("lora_dropout", 0.0))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{file} is damaged: {type(error).__name__} {error}") from None
    # Rank-stabilised LoRA scales by alpha / sqrt(r).
    return {"rank": rank, "alpha": alpha * math.sqrt(rank) if config.get("use_rslora") else alpha, "dropout": dropout}


def with_tensors(
    base: Checkpoint, tensors: Mapping[str, Lazy], *, lora: Mapping[str, Any] | None, where: str
) -> Checkpoint:
    """`base` with these tensors, by the names that a model within PEFT (or LLaVA) gives them: adapters are added, the
    others take the place of the base's. Raises UsageError that lists all that do not fit."""
    model = base.config["model"]
    entries, targets = fitted(model, tensors, lora=lora, where=where, target=f"the model in {base.folder}")
    if lora is not None:
        model = {**model, "lora": {**lora, "targets": targets}}
    return dataclasses.replace(base, config={**base.config, "model": model}, entries={**base.entries, **entries})


def fitted(
    model: Mapping[str, Any], tensors: Mapping[str, Lazy], *, lora: Mapping[str, Any] | None, where: str, target: str
) -> tuple[dict[str, Lazy], str]:
    """These tensors by the names of our entries, for a model with these settings, and the paths that have adapters, as
    a regex. Raises UsageError that lists all that do not fit."""
    bare_model = {**model, "lora": None}
    table = {tensor.hf: tensor for tensor in names(bare_model)}
    shapes = shapes_of(bare_model)
    problems: list[str] = []
    entries: dict[str, Lazy] = {}
    sides: dict[str, dict[str, Lazy]] = {}
    for name, lazy in tensors.items():
        bare = re.sub(r"^(base_model\.model\.|base_model\.)", "", name)
        adapted = _ADAPTED.fullmatch(bare) if lora is not None else None
        hf = canonical(f"{adapted['module']}.weight" if adapted else _SAVED_WHOLE.sub("", bare))
        tensor = table.get(hf)
        if tensor is None:
            problems.append(f"left over {name}")
        elif adapted and tensor.form != "transposed":
            problems.append(f"{name} adapts what is no linear layer here")
        elif adapted:
            sides.setdefault(hf, {})[adapted["side"]] = lazy
        elif lazy.shape != (expected := FORMS[tensor.form].theirs_shape(_of_layer(tensor, shapes))):
            problems.append(f"{name} is {list(lazy.shape)}, expected {list(expected)}")
        else:
            entries[tensor.entry] = as_ours(lazy, tensor.form)
    if lora is not None:
        entries |= _adapters(table, sides, shapes, int(lora["rank"]), problems)
        if not sides:
            problems.append("no lora_A and lora_B at all")
    if problems:
        listed = "".join(f"\n  {problem}" for problem in sorted(problems))
        raise UsageError(f"the tensors in {where} do not fit {target}:{listed}")
    return entries, "|".join(sorted({table[hf].path.removesuffix("/kernel") for hf in sides}))


def _adapters(
    table: Mapping[str, Tensor],
    sides: Mapping[str, Mapping[str, Lazy]],
    shapes: Mapping[str, tuple[int, ...]],
    rank: int,
    problems: list[str],
) -> dict[str, Lazy]:
    """Our entries of the adapters; what is wrong with them is added to `problems`."""
    entries: dict[str, Lazy] = {}
    adapted = {table[hf].path for hf in sides}
    for hf, tensor in table.items():
        if tensor.path not in adapted:
            continue
        if hf not in sides:
            problems.append(f"missing an adapter of {hf}: ours are on all layers or on none")
            continue
        width, height = _of_layer(tensor, shapes)
        for side, shape in (("A", (width, rank)), ("B", (rank, height))):
            if side not in sides[hf]:
                problems.append(f"missing lora_{side} of {hf}")
                continue
            ours = as_ours(sides[hf][side], "transposed")
            if ours.shape != shape:
                problems.append(f"lora_{side} of {hf} is {list(ours.shape[::-1])}, expected {list(shape[::-1])}")
            entries[f"{tensor.entry.removesuffix('.kernel')}.lora_{side.lower()}"] = ours
    return entries


def _of_layer(tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    return shapes[tensor.path] if tensor.layer is None else shapes[tensor.path][1:]


def fingerprint(entries: Mapping[str, Lazy]) -> str:
    """Of a model's weights, without reading them all: the first and the last kernel of its decoder, in bfloat16, which
    is what is left of them where a training kept its frozen weights narrow."""
    kernels = sorted(name for name in entries if re.fullmatch(r"decoder\.layers\.\d+\..*\.kernel", name))
    digest = hashlib.sha256()
    for name in (kernels[0], kernels[-1]):
        values = np.ascontiguousarray(entries[name].read().astype(ml_dtypes.bfloat16))
        digest.update(name.encode() + values.view(np.uint16).tobytes())
    return digest.hexdigest()[:32]


def _check_origin(place: Path, base: Checkpoint) -> None:
    """An adapter of ours knows the weights that it was trained on."""
    if not (place / ORIGIN).exists():
        return
    origin = read_json(place / ORIGIN)
    if origin.get("fingerprint") != fingerprint(base.entries):
        raise UsageError(
            f"the adapter in {place} was trained on other weights than those in {base.folder}: give the model that it "
            f"names, {origin.get('base')!r}"
        )


# ------------------------------------------------------------------------------------------------------------- writing


def write_adapter(folder: str | os.PathLike[str], found: Checkpoint, base: Checkpoint, *, base_name: str) -> None:
    """Writes the LoRA of `found`, and what else of it differs from `base`, as an adapter that PEFT loads onto
    `base_name` in transformers.

    Raises UsageError when `found` has no LoRA, when `base` is not what it was trained on, or when it has changed more
    than PEFT can hold.
    """
    model = found.config["model"]
    lora = model.get("lora")
    if not lora:
        raise UsageError(f"the model in {found.folder} has no LoRA to write as an adapter: use --format=hf")
    table = names({**model, "lora": None})
    changed = _changed(table, found, base)
    whole = {prefix: module for prefix, module in _WHOLE.items() if any(path.startswith(prefix) for path in changed)}
    adapted = {name.removesuffix(".lora_a") for name in found.entries if name.endswith(".lora_a")}
    both = {tensor.path for tensor in table if tensor.entry.removesuffix(".kernel") in adapted} & changed
    beyond = sorted({path for path in changed if not path.startswith(tuple(whole))} | both)
    if beyond:
        raise UsageError(
            f"an adapter cannot hold all that differs between {found.folder} and {base.folder}: {', '.join(beyond[:4])}"
            f"{' and more' if len(beyond) > 4 else ''} changed too; use --format=hf, or name the base that it was "
            "trained on"
        )
    tensors: dict[str, Lazy] = {}
    modules: set[str] = set()
    for tensor in table:
        name = "base_model.model." + in_memory(tensor.hf)
        ours = tensor.entry.removesuffix(".kernel")
        if ours in adapted:
            module = name.removesuffix(".weight")
            for side in ("a", "b"):
                tensors[f"{module}.lora_{side.upper()}.weight"] = as_theirs(
                    found.entries[f"{ours}.lora_{side}"], "transposed"
                )
            modules.add(re.sub(r"\.\d+\.", ".{}.", in_memory(tensor.hf).removesuffix(".weight")))
        elif tensor.path.startswith(tuple(whole)):
            tensors[name] = as_theirs(found.entries[tensor.entry], tensor.form)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora["rank"],
        "lora_alpha": int(lora["alpha"]) if float(lora["alpha"]).is_integer() else lora["alpha"],
        "lora_dropout": lora["dropout"],
        "target_modules": "|".join(re.escape(module).replace(r"\{\}", r"\d+") for module in sorted(modules)),
        "modules_to_save": [module for module in whole.values() if module] or None,
        "bias": "none",
        "inference_mode": True,
    }
    origin = {"base": base_name, "fingerprint": fingerprint(base.entries)}
    with written_aside(folder) as partial:
        write_safetensors(partial / WEIGHTS[0], tensors, format="pt")
        (partial / ORIGIN).write_text(json.dumps(origin, indent=2))
        (partial / CONFIG).write_text(json.dumps(config, indent=2))


def in_memory(hf: str) -> str:
    """The name that transformers 5 gives a tensor in memory, from hub layout."""
    for prefix, new in (
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.vision_model.", "model.vision_tower."),
    ):
        if hf.startswith(prefix):
            return new + hf.removeprefix(prefix)
    return f"model.{hf}"


def _changed(table: Iterable[Tensor], found: Checkpoint, base: Checkpoint) -> set[str]:
    """Paths of the parameters that differ, in the narrower of the two types. Raises UsageError for another model."""
    changed = set()
    for tensor in table:
        ours, theirs = (side.entries.get(tensor.entry) for side in (found, base))
        if ours is None or theirs is None or ours.shape != theirs.shape:
            shapes = [None if side is None else list(side.shape) for side in (ours, theirs)]
            raise UsageError(
                f"{base.folder} is not what {found.folder} was trained on: {tensor.entry} is {shapes[1]} there, "
                f"{shapes[0]} here"
            )
        if tensor.path not in changed:
            narrow = min(ours.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
            if not np.array_equal(ours.read().astype(narrow), theirs.read().astype(narrow)):
                changed.add(tensor.path)
    return changed
