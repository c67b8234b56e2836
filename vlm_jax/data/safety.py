"""What a data set must not do: name files outside of its folder, or unfold into more than it is."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import yaml

from vlm_jax.data.records import BadRecord
from vlm_jax.errors import UsageError

MAX_BYTES = 200_000_000  # of one image
MAX_YAML = 1 << 18
MAX_DEPTH = 32
ALLOW = "; --config.data.confined=False allows it"


def locate(path: str, root: str | os.PathLike, what: str = "image", confined: bool = True) -> str:
    """The file that a data set means by `path`: below `root`, whatever links there are on the way.

    confined: False lets it be anywhere on this machine, relative to `root` or absolute. A URL never is a file.
    Raises BadRecord("unsafe_path").
    """
    if "://" in path or path.startswith("data:"):
        raise BadRecord(
            "unsafe_path", f"{what} {path[:200]!r} is a URL, and nothing is fetched; download it into {root}"
        )
    if "\0" in path:
        raise BadRecord("unsafe_path", f"{what} {path[:200]!r} is no path")
    base = os.path.realpath(root)
    if confined and (os.path.isabs(path) or ".." in path.replace("\\", "/").split("/")):
        raise BadRecord("unsafe_path", f"{what} {path[:200]!r} is not a plain path relative to {base}{ALLOW}")
    full = os.path.realpath(os.path.join(base, path))
    if confined and os.path.commonpath([base, full]) != base:
        raise BadRecord("unsafe_path", f"{what} {path[:200]!r} is a link that leads out of {base}{ALLOW}")
    return full


def read_file(path: str, root: str | os.PathLike, confined: bool = True) -> bytes:
    """The bytes of an image's file. Raises BadRecord: "unsafe_path", "missing_image", "image_too_large"."""
    full = locate(path, root, confined=confined)
    try:
        status = os.stat(full)
        if not stat.S_ISREG(status.st_mode):
            raise BadRecord("missing_image", f"image {path!r} in {root} is not a file")
        if status.st_size > MAX_BYTES:
            raise BadRecord("image_too_large", f"image {path!r} has {status.st_size:,} bytes, more than {MAX_BYTES:,}")
        with open(full, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise BadRecord("missing_image", f"image {path!r} is not in {root}") from None
    except OSError as error:
        raise BadRecord("missing_image", f"image {path[:200]!r} in {root} cannot be read: {error.strerror}") from None


def read_yaml(path: Path) -> Any:
    """The content of a YAML file: plain values only, and no aliases, with which a few lines stand for terabytes.

    Raises UsageError; OSError where it cannot be read.
    """
    with open(path, "rb") as file:
        text = file.read(MAX_YAML + 1)
    if len(text) > MAX_YAML:
        raise UsageError(f"{path} has more than {MAX_YAML:,} bytes; it is no list of data sets")
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise UsageError(f"{path} repeats parts by alias (*{event.anchor}); write them out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise UsageError(f"{path} is nested more than {MAX_DEPTH} deep; it is no list of data sets")
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())[:300]}") from None
