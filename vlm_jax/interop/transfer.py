"""Import and export: a checkpoint of another's layout becomes a model of ours on disk, and back, tensor by tensor.

import   names and arrangement become ours; the tokenizer's, processor's and config's files travel along
export   LoRA is merged; what was imported from the same layout is given back byte for byte
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.data.chat_template import chat_template
from vlm_jax.errors import UsageError
from vlm_jax.interop.checkpoint import locate, open_checkpoint
from vlm_jax.interop.hf_config import WHOLE, Json, describe, is_original, tell_template
from vlm_jax.interop.hf_write import (
    hf_config,
    llava_config,
    llava_tower,
    preprocessor_config,
    processor_config,
)
from vlm_jax.interop.hub import local_folder
from vlm_jax.interop.huggingface import (
    Checkpoint,
    as_theirs,
    image_processor,
    normal,
    read_chat_template,
    read_json,
    shapes_of,
)
from vlm_jax.interop.layout import CONFIG, HF_CONFIG, MODEL, PARTIAL
from vlm_jax.interop.llava_artefacts import is_artefact
from vlm_jax.interop.native import write_model, written_aside
from vlm_jax.interop.peft import write_adapter
from vlm_jax.interop.tables import in_llava_layout, names
from vlm_jax.interop.tokenizers import add_image_token, drop_tokens, has_tokenizer, image_token_id, open_tokenizer
from vlm_jax.interop.weights import Lazy, held, write_shards

SHARD = 5 << 30  # bytes, as transformers 4 writes them
# Vocabularies of decoders that are found in LLaVAs, to tell how many rows of a padded embedding are theirs.
VOCABULARIES = (32_000, 32_768, 64_000, 128_256, 151_936, 152_064)
FROM_TEMPLATE = ("preprocessor_config.json", "processor_config.json")


def import_model(
    source: str,
    target: str | os.PathLike[str],
    *,
    template: str | None = None,
    vision: str | None = None,
    base: str | None = None,
) -> Checkpoint:
    """Writes the Hugging Face or LLaVA checkpoint at `source`, or an adapter with its base, as a model of ours into the
    folder `target`.

    Every tensor keeps its dtype. Raises UsageError for a target that holds something, and as `open_checkpoint`.
    """
    check_target(target)
    folder = os.path.expanduser(local_folder(source))
    if not is_artefact(folder) and locate(folder)[1]:
        raise UsageError(f"{folder} is a model of ours already")
    found = open_checkpoint(folder, vision=vision, base=base)
    config = {**found.config, "template": template or found.config["template"]}
    write_model(target, found.entries, config, extra=found.extra, files=found.files)
    return found


def export_model(source: str, target: str | os.PathLike[str], *, layout: str = "hf") -> None:
    """Writes the model at `source` (a workdir, a model of ours, or another layout) as one of Hugging Face's ("hf") or
    of the original LLaVA ("llava") into the folder `target`.

    Raises UsageError for a target that holds something, and for a model that the layout cannot express.
    """
    check_target(target)
    found = open_checkpoint(source)
    model, images = {**normal(found.config["model"]), "lora": None}, found.config["images"]
    raw = read_json(found.files[HF_CONFIG]) if HF_CONFIG in found.files else {}
    origin = "llava" if raw and is_original(raw) else "hf" if raw.get("model_type") in WHOLE else None
    as_it_came = origin == layout and _unchanged(raw, found, model, images)
    tensors = _tensors(found, model)
    tokenizer = open_tokenizer(str(found.folder)) if has_tokenizer(str(found.folder)) else None
    rows, image_token = model["decoder"]["vocab_size"], image_token_id(found, tokenizer)
    if layout == "llava" and origin == "hf":
        rows = _without_padding(rows, image_token)
    elif layout == "hf" and origin != "hf" and (image_token + 2 > rows):
        rows = -(-(rows + 2) // 64) * 64
    _resize(tensors, rows)
    model = {**model, "decoder": {**model["decoder"], "vocab_size": rows}}
    extra = dict(found.extra) or _neutral(tensors)
    dtype = tensors["language_model.model.embed_tokens.weight"].dtype.name
    if as_it_came:
        config = raw
    elif layout == "hf":
        head = any(".head." in name for name in extra)
        config = hf_config(model, images, raw, image_token=image_token, dtype=dtype, head=head)
    else:
        config = llava_config(model, images, raw, dtype=dtype)
    named = {**tensors, **extra}
    if layout == "llava":
        named = {in_llava_layout(name): lazy for name, lazy in named.items()}
    with written_aside(target) as partial:
        place = Path(partial)
        for name, file in found.files.items():
            if name != HF_CONFIG and (as_it_came or not (layout == "llava" and name in FROM_TEMPLATE)):
                shutil.copyfile(file, place / name)
        if as_it_came:
            shutil.copyfile(found.files[HF_CONFIG], place / CONFIG)
        else:
            _side_files(place, layout, config, model, images, found, tokenizer, rows, origin)
        if layout == "hf":
            _chat_template(place, found, raw, trained=os.path.isdir(os.path.join(source, MODEL)))
        write_shards(place, named, format="pt", shard_bytes=SHARD, one_file=True)
        if not as_it_came:
            (place / CONFIG).write_text(json.dumps(config, indent=2))


def export_adapter(source: str, target: str | os.PathLike[str], *, base: str | None = None) -> str:
    """Writes the LoRA of the model at `source` as an adapter of PEFT's for `base`, by default what its run started
    from, and returns the name of that. Raises UsageError where there is none."""
    check_target(target)
    run = Path(source) / CONFIG
    started = read_json(run).get("init_from") if run.exists() else None
    name = base or started
    if not isinstance(name, str):
        raise UsageError(f"what the LoRA of {source} was trained on is not known: give --base=PATH")
    write_adapter(target, open_checkpoint(source), open_checkpoint(name), base_name=name)
    return name


def check_target(target: str | os.PathLike[str]) -> None:
    """Raises UsageError unless `target` is nothing yet, an empty folder, or one that was not finished."""
    place = Path(target)
    if place.exists() and not place.is_dir():
        raise UsageError(f"{place} is a file: give a folder that does not exist yet")
    if place.is_dir() and any(place.iterdir()) and not (place / PARTIAL).exists():
        raise UsageError(f"{place} is not empty: give another folder, or remove it")


# ------------------------------------------------------------------------------------------------------------- tensors


def _tensors(found: Checkpoint, model: Json) -> dict[str, Lazy]:
    """All tensors in hub layout, adapters merged. Raises UsageError that lists what does not fit the config."""
    entries = _merged(found)
    shapes = shapes_of(model)
    tensors, problems = {}, []
    for tensor in names(model):
        if tensor.entry not in entries:
            problems.append(found.problems.get(tensor.entry, f"missing {tensor.entry}"))
            continue
        lazy, expected = entries.pop(tensor.entry), shapes[tensor.path]
        expected = expected if tensor.layer is None else expected[1:]
        if lazy.shape != expected:
            problems.append(f"{tensor.entry} is {list(lazy.shape)}, expected {list(expected)}")
        tensors[tensor.hf] = as_theirs(lazy, tensor.form)
    problems += [f"left over {name}" for name in entries]
    if problems:
        listed = "".join(f"\n  {problem}" for problem in sorted(problems))
        raise UsageError(f"the weights in {found.folder} do not fit the model of its {CONFIG}:{listed}")
    return tensors


def _merged(found: Checkpoint) -> dict[str, Lazy]:
    """The tensors with `A B alpha / rank` added to their kernels, in float32 and then in the kernel's own dtype."""
    entries = dict(found.entries)
    lora = found.config["model"].get("lora")
    if not lora:
        return entries
    scale = lora["alpha"] / lora["rank"]
    for name in [name for name in entries if name.endswith(".lora_a")]:
        module = name.removesuffix(".lora_a")
        kernel, a, b = entries[f"{module}.kernel"], entries.pop(name), entries.pop(f"{module}.lora_b")

        def fetch(index: Any, kernel: Lazy = kernel, a: Lazy = a, b: Lazy = b) -> np.ndarray:
            change = a.read().astype(np.float32) @ b.read().astype(np.float32)
            return (kernel.read().astype(np.float32) + change * np.float32(scale)).astype(kernel.dtype)[index]

        entries[f"{module}.kernel"] = Lazy(kernel.shape, kernel.dtype, fetch)
    return entries


def _resize(tensors: dict[str, Lazy], rows: int) -> None:
    """Brings embedding and head to so many rows: the last ones go, new ones are the mean of the others. No token that
    is computed with has such a row."""
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        if name in tensors and tensors[name].shape[0] != rows:
            tensors[name] = _with_rows(tensors[name], rows)


def _with_rows(lazy: Lazy, rows: int) -> Lazy:
    def fetch(index: Any) -> np.ndarray:
        value = lazy.read()
        if rows > len(value):
            mean = value.mean(axis=0, dtype=np.float32, keepdims=True).astype(value.dtype)
            value = np.concatenate([value, np.repeat(mean, rows - len(value), axis=0)])
        return value[:rows][index]

    return Lazy((rows, *lazy.shape[1:]), lazy.dtype, fetch)


def _without_padding(rows: int, image_token: int) -> int:
    """How many of the rows of an embedding that Hugging Face padded are the decoder's own."""
    padded = {count: -(-(count + 2) // 64) * 64 for count in (image_token, *VOCABULARIES)}
    return next((count for count, length in padded.items() if length == rows), rows)


def _neutral(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """The last norm of a tower, which transformers' classes have and do not compute with, where none was imported."""
    like = tensors["vision_tower.vision_model.encoder.layers.0.layer_norm1.weight"]
    norm = "vision_tower.vision_model.post_layernorm"
    return {
        f"{norm}.weight": held(np.ones(like.shape, like.dtype)),
        f"{norm}.bias": held(np.zeros(like.shape, like.dtype)),
    }


# --------------------------------------------------------------------------------------------------------------- files


def _unchanged(raw: Json, found: Checkpoint, model: Json, images: Json) -> bool:
    """Whether the file that was imported still says what the model is."""
    try:
        described = describe(
            raw,
            HF_CONFIG,
            processor=image_processor(found.folder),
            tower=lambda _: llava_tower(model["vision"], {}),
            tower_layers=model["vision"]["num_layers"],
        )
    except UsageError:
        return False
    theirs = normal(described.model)
    theirs["decoder"]["tie_embeddings"] = model["decoder"]["tie_embeddings"]
    told = {key: value for key, value in images.items() if value not in (None, ()) or key in (described.images or {})}
    plain = lambda value: json.loads(json.dumps(value))  # noqa: E731
    return bool(plain([theirs, described.images]) == plain([model, told]))


def _side_files(
    place: Path,
    layout: str,
    config: Json,
    model: Json,
    images: Json,
    found: Checkpoint,
    tokenizer: Any,
    rows: int,
    origin: str | None,
) -> None:
    """Tokenizer, processor and generation settings of a model whose config is made anew."""
    if layout == "llava":
        drop_tokens(place, rows)
        return
    (place / FROM_TEMPLATE[0]).write_text(json.dumps(preprocessor_config(model, images), indent=2))
    (place / FROM_TEMPLATE[1]).write_text(json.dumps(processor_config(model, images), indent=2))
    if tokenizer is None:
        return
    if origin != "hf":
        add_image_token(tokenizer)
        tokenizer.save_pretrained(str(place))
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    told = {key: value for key, value in special.items() if value is not None}
    config["text_config"] |= told
    if "generation_config.json" not in found.files:
        (place / "generation_config.json").write_text(json.dumps({"_from_model_config": True, **told}, indent=2))


def _chat_template(place: Path, found: Checkpoint, raw: Json, *, trained: bool) -> None:
    """The conversation template of the model as Jinja, where what it came with says another one or nothing. What was
    `trained` here says its own: a template from elsewhere that is told to be ours may differ in a system message."""
    name, carried = found.config["template"], read_chat_template(place)
    if name is None or (carried and not trained and name == tell_template(carried, raw, str(found.folder))):
        return
    text = chat_template(name)
    if text is None:
        return
    (place / "chat_template.json").unlink(missing_ok=True)
    (place / "chat_template.jinja").write_text(text)
