"""Models on the Hugging Face hub: fetched into huggingface_hub's cache, pushed with a model card.

Weights, tokenizer and json files travel, nothing that could be run. The token, the cache and the address of the hub are
those that huggingface_hub knows (`hf auth login`, HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE); no token is printed.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm_jax.errors import UsageError

__all__ = ["fetch", "is_hub_id", "local_folder", "model_card", "origin", "push"]

_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")

# Files at the top of a repository. Of each pair of weights the second is taken where there is none of the first. What
# is in no list (code, optimizer states, weights for other frameworks) is left where it is.
TEXTS = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
WEIGHTS = (
    (("model.safetensors", "model-*-of-*.safetensors"), ("pytorch_model.bin", "pytorch_model-*-of-*.bin")),
    (("adapter_model.safetensors",), ("adapter_model.bin",)),
    (("hf_extra.safetensors",), ()),
    (("non_lora_trainables.safetensors",), ("non_lora_trainables.bin",)),
    (("mm_projector.safetensors",), ("mm_projector.bin",)),
)
CARD = "README.md"


def is_hub_id(spec: str | os.PathLike[str]) -> bool:
    """Whether `spec` can only be `owner/name[@revision]`: it looks like one, and nothing on this disk has that name."""
    return bool(_ID.fullmatch(os.fspath(spec))) and not os.path.exists(spec)


def local_folder(path: str | os.PathLike[str], *, weights: bool = True) -> str:
    """`path` itself, or where the model of that name on the hub now lies on this disk."""
    return fetch(os.fspath(path), weights=weights) if is_hub_id(path) else os.fspath(path)


def choose(files: Iterable[str], *, weights: bool = True) -> list[str]:
    """The files of a repository that are fetched or pushed."""
    files = [file for file in files if "/" not in file]
    chosen = [file for file in files if _fits(file, TEXTS)]
    if not weights:
        return [file for file in chosen if not file.endswith(".index.json")]
    for safetensors, torch in WEIGHTS:
        found = [file for file in files if _fits(file, safetensors)]
        if found:
            chosen = [file for file in chosen if not _fits(file, [f"{pattern}.index.json" for pattern in torch])]
        chosen += found or [file for file in files if _fits(file, torch)]
    return chosen


def _fits(file: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns)


def fetch(spec: str, *, weights: bool = True) -> str:
    """Downloads what is missing of `owner/name[@revision]`, and says how much that is; returns the local folder.

    Where the hub cannot be reached, what an earlier call has downloaded is used. Raises UsageError in one sentence.
    """
    from huggingface_hub import HfApi, get_cached_repo_tree, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import CachedRepoTreeNotFoundError
    from huggingface_hub.hf_api import RepoFile

    match = _ID.fullmatch(spec)
    if match is None:
        raise UsageError(f"{spec} is neither a folder nor a model on the hub, which is written owner/name[@revision]")
    repo, revision = match["repo"], match["revision"]
    api = HfApi()
    with _explained(repo, revision):
        commit = api.resolve_revision(repo, revision=revision)
        try:
            listed: Iterable[Any] = get_cached_repo_tree(repo, revision=commit)
        except CachedRepoTreeNotFoundError:
            listed = api.list_repo_tree(repo, revision=commit)
        sizes = {file.path: int(file.size) for file in listed if isinstance(file, RepoFile)}
        chosen = choose(sizes, weights=weights)
        if weights and not any(file.endswith((".safetensors", ".bin")) for file in chosen):
            raise UsageError(f"{repo} on the hub holds no weights that can be read (safetensors or torch's .bin files)")
        absent = [f for f in chosen if not isinstance(try_to_load_from_cache(repo, f, revision=commit), str)]
        if absent:
            needed = sum(sizes[file] for file in absent)
            print(f"{repo}: fetching {_bytes(needed)} in {len(absent)} files", file=sys.stderr, flush=True)
        return str(snapshot_download(repo, revision=commit, allow_patterns=[glob.escape(file) for file in chosen]))


def push(folder: str | os.PathLike[str], repo: str, *, card: str) -> str:
    """Uploads the model in `folder` in one commit and returns its address; a new repository is private.

    `card` becomes its README.md unless it has one. Weights of an earlier push that this one does not replace are
    removed in the same commit. Raises UsageError in one sentence.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    match = _ID.fullmatch(repo)
    if match is None or match["revision"]:
        raise UsageError(f"--push={repo} is not the name of a model on the hub, which is written owner/name")
    source = Path(folder)
    chosen = choose(file.name for file in source.iterdir() if file.is_file())
    old_weights = ["*.index.json", *(pattern for pair in WEIGHTS for side in pair for pattern in side)]
    api = HfApi()
    with _explained(repo, None):
        size = sum((source / file).stat().st_size for file in chosen)
        print(f"{repo}: pushing {_bytes(size)} in {len(chosen)} files", file=sys.stderr, flush=True)
        url = api.create_repo(repo, private=True, exist_ok=True)
        there = set(api.list_repo_files(repo))
        operations: list[Any] = [CommitOperationAdd(file, str(source / file)) for file in chosen]
        operations += [CommitOperationDelete(file) for file in sorted(there - set(chosen)) if _fits(file, old_weights)]
        if CARD not in there:
            operations.append(CommitOperationAdd(CARD, card.encode()))
        api.create_commit(repo, operations=operations, commit_message="Upload a model of vlm_jax")
    return str(url)


@contextlib.contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Turns what the hub answers, or that it does not answer, into one sentence with the way out."""
    from huggingface_hub import constants, errors, is_offline_mode

    hub, login = constants.ENDPOINT, "log in with `hf auth login` or set HF_TOKEN"
    off = "HF_HUB_OFFLINE is set" if is_offline_mode() else f"{hub} cannot be reached"
    away = f"{repo} is not wholly in the cache ({constants.HF_HUB_CACHE}) and {off}: fetch it where there is a network"
    sentences: tuple[tuple[type[Exception], str], ...] = (
        (errors.GatedRepoError, f"{repo} is gated: ask for access at {hub}/{repo}, then {login}"),
        (
            errors.RevisionNotFoundError,
            f"{repo} has no revision {revision!r}: name a branch, tag or commit of it, or leave the @ away",
        ),
        (
            errors.RepositoryNotFoundError,
            f"there is no folder {repo} here and no model of that name at {hub}; if it is private, {login}",
        ),
        (errors.RevisionResolutionError, away),
        (errors.LocalEntryNotFoundError, away),
        (errors.OfflineModeIsEnabled, away),
    )
    try:
        yield
    except errors.HFValidationError as error:
        raise UsageError(f"{repo} is no name of a model on the hub: {str(error).splitlines()[0]}") from None
    except tuple(kind for kind, _ in sentences) as error:
        raise UsageError(next(sentence for kind, sentence in sentences if isinstance(error, kind))) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        way = login if status in (401, 403) else "try again later"
        raise UsageError(f"{hub} refuses {repo} with status {status}: {way}") from None
    except errors.HTTPError:  # of its http client: no connection, or one that broke
        raise UsageError(away) from None
    except OSError as error:
        raise UsageError(f"{repo} cannot be stored in or read from this disk: {error}") from None


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


# ------------------------------------------------------------------------------------------------------ the model card

_HOW = {
    "hf": """from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{repo}")
processor = AutoProcessor.from_pretrained("{repo}")""",
    "llava": """from llava.model.builder import load_pretrained_model

tokenizer, model, image_processor, _ = load_pretrained_model("{repo}", None, "{name}")""",
    "adapter": """from peft import PeftModel
from transformers import AutoModelForImageTextToText

model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained("{base}"), "{repo}")""",
}


def origin(source: str | os.PathLike[str], base: str | None = None) -> dict[str, Any]:
    """`base_models` and `recipe` of a model card, as the workdir `source` tells them; local paths stay here."""
    file = Path(source) / "config.json"
    run = json.loads(file.read_text()) if file.exists() else {}
    parts = run.get("parts") or {}
    started = [base] if base else [run.get("init_from"), parts.get("decoder"), parts.get("vision")]
    lines = [
        f"- stage `{stage['name']}`: {stage['samples']} samples a step, learning rate {stage['lr']:g} "
        f"({stage['schedule']}; {', '.join(_rate(*group) for group in stage['groups'])}), "
        f"template `{stage['template']}`"
        for stage in run.get("stages") or ()
    ]
    lora = (run.get("model") or {}).get("lora")
    if lora:
        lines.append(f"- LoRA of rank {lora['rank']}, alpha {lora['alpha']:g}, on `{lora['targets']}`")
    return {"base_models": [name for name in started if name and is_hub_id(name)], "recipe": "\n".join(lines) or None}


def _rate(path: str, rate: float | None) -> str:
    return f"`{path}` {'frozen' if rate is None else f'× {rate:g}'}"


def model_card(
    repo: str,
    *,
    format: str,
    base_models: Sequence[str] = (),
    recipe: str | None = None,
    license: str | None = None,
) -> str:
    """The text of README.md for `repo`: what the model was made from and how, its licence, and how to load it.

    format: `hf`, `llava` or `adapter`, as it was exported. recipe: how it was trained, in Markdown. What is not given
    is said to be unstated, so that its author can add it.
    """
    name = repo.split("/")[-1]
    meta: dict[str, Any] = {
        "license": license or "other",
        "library_name": "peft" if format == "adapter" else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["vlm_jax", *(["lora"] if format == "adapter" else [])],
    }
    if base_models:
        meta["base_model"] = list(base_models)
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in meta.items())
    made_from = " and ".join(f"`{name}`" for name in base_models)
    start = f"Made from {made_from}" if made_from else "What it was made from is not stated"
    how = f" by vlm_jax:\n\n{recipe}\n" if recipe else "; with which recipe is not stated.\n"
    rights = f"The licence is {license}." if license else "The licence is not stated: its author should name it above."
    load = _HOW[format].format(repo=repo, name=name, base=next(iter(base_models), "BASE"))
    ours = (
        ""
        if format == "adapter"
        else f"""
or, in JAX,

```python
import vlm_jax
from PIL import Image

print(vlm_jax.load("{repo}").generate("What is this?", images=[Image.open("photo.jpg")]))
```
"""
    )
    return f"""---
{head}
---

# {name}

{start}{how}
{rights} The terms of the model that it was made from hold too.

```python
{load}
```
{ours}"""
