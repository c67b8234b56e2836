"""Data sets that TensorFlow Datasets has prepared, read without tensorflow: `tfds:name`, `tfds:name/config:split`.

Only what lies on disk is opened, by its own description: no code of a builder is imported and nothing is fetched.
Images stay encoded until they are looked at; `Picture` decodes them, with its checks.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.data.formats import parse_record
from vlm_jax.data.formats.turns import malformed
from vlm_jax.data.records import Record
from vlm_jax.data.sources.base import Source
from vlm_jax.errors import UsageError

NAME = re.compile(r"\w+(/[\w.-]+){0,2}")  # name, configuration, version
VERSION = re.compile(r"\d+\.\d+\.\d+")
DESCRIBED = "dataset_info.json"
FEATURE_CLASS = re.compile(r'"pythonClassName"\s*:\s*"([^"]*)"')
FEATURES = "tensorflow_datasets.core.features."


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """A `Source` of one split of a prepared data set. path: the folder of its version."""

    path: Path
    images: Path
    split: str
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self.count:
            raise IndexError(index)
        examples, parser, features = _opened(self.path, self.split)
        try:
            example = _plain(parser.parse_example(examples[index]), features)
        except (KeyError, ValueError, AttributeError, TypeError) as error:
            raise malformed(f"it is not of the data set's own features: {error}") from None
        return parse_record(example, f"{self.path.parts[-2]}-{self.split}-{index}")


def open_tfds(name: str, images: Path | None = None) -> Source:
    """name: what follows `tfds:`. The split is "train" if none is named; it may be a slice, such as `train[:80%]`.

    The data set stands in $TFDS_DATA_DIR (default ~/tensorflow_datasets), prepared with file_format="array_record";
    of several versions the newest is read.
    """
    name, _, split = name.partition(":")
    root = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    if not NAME.fullmatch(name):
        raise UsageError(f"tfds:{name} is no name of a data set; write tfds:name/config:split")
    folder = _version(root / name, name)
    for wanted in FEATURE_CLASS.findall((folder / "features.json").read_text(encoding="utf-8")):
        if not wanted.startswith(FEATURES):
            raise UsageError(
                f"{folder} has a feature {wanted!r}, which is none of TensorFlow Datasets' own; not opened"
            )
    examples, _, _ = _opened(folder, split or "train")
    if not len(examples):
        raise UsageError(f"split {split or 'train'!r} of {folder} has no records")
    return TfdsSource(folder, images or folder, split or "train", len(examples))


def _version(folder: Path, name: str) -> Path:
    if (folder / DESCRIBED).is_file():
        return folder
    inside = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    versions = [one for one in inside if VERSION.fullmatch(one) and (folder / one / DESCRIBED).is_file()]
    if versions:
        return folder / max(versions, key=lambda one: tuple(int(number) for number in one.split(".")))
    if configs := [one for one in inside if any((folder / one).glob(f"*/{DESCRIBED}"))]:
        raise UsageError(f"tfds:{name} has the configurations {', '.join(configs)}; write tfds:{name}/{configs[0]}")
    raise UsageError(
        f"tfds:{name} is not in {folder.parent}; prepare it there (tfds build {name} --file_format=array_record), or "
        "name the folder in TFDS_DATA_DIR"
    )


@functools.lru_cache(maxsize=8)
def _opened(folder: Path, split: str) -> tuple[Sequence[bytes], Any, Any]:
    """The encoded examples of a split, what parses one, and the features."""
    import tensorflow_datasets as tfds  # seconds to import, and only here is it needed
    from tensorflow_datasets.core.example_parser import ExampleParserNp

    try:
        builder = tfds.builder_from_directory(folder)
        raw = tfds.core.decode.DeserializeMethod.RAW_BYTES
        examples = builder.as_data_source(split, deserialize_method=raw)
    except NotImplementedError:
        raise UsageError(
            f"{folder} is prepared as {builder.info.file_format.value}, which is read from its begin only; prepare it "
            "with --file_format=array_record"
        ) from None
    except (ValueError, KeyError) as error:
        known = ", ".join(builder.info.splits) if "builder" in locals() else ""
        raise UsageError(
            f"split {split!r} of {folder} cannot be opened: {' '.join(str(error).split())[:200]}; it has {known}"
        ) from None
    features = builder.info.features
    return examples, ExampleParserNp(features.get_serialized_info()), features


def _plain(value: Any, feature: Any) -> Any:
    """Values of numpy as what JSON would hold: texts as texts, a sequence of objects as a list of them. Images stay the
    bytes of their files."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Sequence) and isinstance(feature.feature, tfds.features.FeaturesDict):
        columns = {key: list(value[key]) for key in feature.feature}
        return [
            _plain(dict(zip(columns, row, strict=True)), feature.feature) for row in zip(*columns.values(), strict=True)
        ]
    if isinstance(feature, Mapping) or isinstance(feature, tfds.features.FeaturesDict):
        return {key: _plain(value[key], feature[key]) for key in feature}
    if isinstance(feature, tfds.features.Sequence):
        return [_plain(one, feature.feature) for one in value]
    if isinstance(feature, tfds.features.Image):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray):
        return [one.decode("utf-8") if isinstance(one, bytes) else one for one in value.tolist()]
    return value
