"""The index of a set: how many tokens and tiles each of its records takes, or what is wrong with it.

Known from the texts and the headers of the images; no image is decoded. Packing (`data/packing.py`) and the audit need
no more of a record than this.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vlm_jax.data.conversation import begin_with_user
from vlm_jax.data.reading import FusionEncoder, Measured, read
from vlm_jax.data.records import BAD_KINDS, BadRecord
from vlm_jax.data.sources import Source
from vlm_jax.data.templates import Trained, get_template

FORMAT = 2  # of what is measured and how it is stored; a higher number makes every index anew
KINDS = ("", *BAD_KINDS)
CHUNK = 128  # records that a worker measures at a time
FEW = 4  # chunks that are measured without workers

Agree = Callable[[np.ndarray], Any]


@dataclasses.dataclass(frozen=True)
class Index:
    """What the records of some sources need, all sources in their order. Every array is [N].

    tokens: int32, positions of the token row, visual ones among them. tiles: int32. trained: int32, tokens of them that
      are somebody's target. least: int32, tokens up to the first of these. All 0 where a record cannot be used.
    kinds: int8, the number in `KINDS` of what is wrong; 0 nothing. Of the kinds in `records.py: USED` the rest is used.
    """

    tokens: np.ndarray
    tiles: np.ndarray
    trained: np.ndarray
    least: np.ndarray
    kinds: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def usable(self) -> np.ndarray:
        """bool [N]"""
        return self.tokens > 0

    @property
    def bad(self) -> dict[str, int]:
        """How many records there are of each kind of `BAD_KINDS`."""
        return dict(zip(KINDS[1:], np.bincount(self.kinds, minlength=len(KINDS)).tolist()[1:], strict=True))

    def limited(self, encoder: FusionEncoder) -> Index:
        """What the limits of an encoder make of it (`FusionEncoder.limit`): `tokens` and `tiles` are those of its rows.
        `trained` still counts what is cut off."""
        longer = self.tokens > encoder.longest
        refused = (self.tiles > encoder.most_tiles) | (longer & (not encoder.truncate))
        untrained = longer & (self.least > encoder.longest)
        wrong = {"too_long": refused, "no_trainable_token": untrained, "truncated": longer}  # the first that holds
        kinds = np.select(list(wrong.values()), [np.int8(KINDS.index(kind)) for kind in wrong], self.kinds)
        sizes = {name: np.where(refused | untrained, 0, size) for name, size in _arrays(self).items()}
        return Index(**sizes | {"tokens": np.minimum(sizes["tokens"], encoder.longest), "kinds": kinds})

    @property
    def digest(self) -> str:
        """Of the sizes: two indexes with the same digest are packed alike."""
        return hashlib.sha256(self.tokens.tobytes() + self.tiles.tobytes()).hexdigest()

    def save(self, file: Path, digest: str = "") -> None:
        """Writes the file wholly or not at all. digest: of what it was made from."""
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.{os.urandom(4).hex()}.tmp")
        with open(temporary, "wb") as out:
            arrays: dict[str, Any] = {"made_from": np.array(digest), "names": np.array(KINDS), **_arrays(self)}
            np.savez(out, **arrays)
        temporary.replace(file)

    @classmethod
    def load(cls, file: Path, digest: str | None = None) -> Index | None:
        """None where there is no such file, or a damaged one, or one that was made from something else."""
        try:
            with np.load(file, allow_pickle=False) as stored:
                if digest is not None and str(stored["made_from"]) != digest:
                    return None
                numbers = np.array([KINDS.index(str(name)) for name in stored["names"]], np.int8)
                arrays = {field.name: stored[field.name] for field in dataclasses.fields(cls)}
                return cls(**{**arrays, "kinds": numbers[arrays["kinds"]]})
        except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile):
            return None


def _arrays(index: Index) -> dict[str, np.ndarray]:
    return {field.name: getattr(index, field.name) for field in dataclasses.fields(index)}


def build_index(
    sources: Sequence[Source],
    encoder: FusionEncoder,
    *,
    workers: int = 0,
    cache: str | os.PathLike | None = None,
    process_index: int = 0,
    process_count: int = 1,
    agree: Agree | None = None,
) -> Index:
    """Measures every record, or takes what the cache holds. Progress is shown on stderr.

    encoder: its tokenizer, template, image settings and placement count; its limits do not, so that one index serves
      every T and K. With random placement a record takes what the longer of its two forms does.
    workers: processes that measure, beside this one; 0 measures in threads.
    cache: folder of `<digest>.npz`, the digest being of all that the sizes depend on except the image files: there may
      be millions. So a record that has outgrown its index is told by the loader, which leaves it out and counts it; and
      what could not be used when the index was made is looked at again each time, since it may have been mended.
    process_index, process_count, agree: of a run on several hosts, as in `Loader`: each measures its share, and all
      have the same index in the end, whatever each of them finds in its cache.
    Raises UsageError when a source has changed since it was opened.
    """
    digest = made_from(sources, encoder)
    file = Path(cache).expanduser() / f"{digest}.npz" if cache is not None else None
    known = Index.load(file, digest) if file is not None else None
    count = sum(len(source) for source in sources)
    columns = [field.name for field in dataclasses.fields(Index)]
    table = np.zeros((count, len(columns)), np.int32) if known is None else np.stack(list(_arrays(known).values()), 1)
    share = np.arange(count)[process_index::process_count]
    todo = share if known is None else share[table[share, 0] == 0]
    for numbers, measured in _measure(tuple(sources), encoder, todo, workers):
        table[numbers] = measured
    if process_count > 1:
        assert agree is not None
        mine = np.zeros((-(-count // process_count), len(columns)), np.int32)
        mine[: len(share)] = table[share]
        gathered = np.asarray(agree(mine.reshape(-1))).reshape(process_count, -1, len(columns))
        table = gathered.transpose(1, 0, 2).reshape(-1, len(columns))[:count]
    arrays = dict(zip(columns, map(np.ascontiguousarray, table.T), strict=True))
    index = Index(**arrays | {"kinds": arrays["kinds"].astype(np.int8)})
    if file is not None and (known is None or not np.array_equal(index.kinds, known.kinds)):
        with contextlib.suppress(OSError):  # a full or read-only disk: the next run measures again
            index.save(file, digest)
    return index


def made_from(sources: Sequence[Source], encoder: FusionEncoder) -> str:
    """The digest of all that decides the sizes: the sources (what they know of the places of their records, and the
    sizes and times of change of their files; the images by their folder alone), the tokenizer, the template and the
    image settings."""
    files = [
        [str(source.images), hashlib.sha256(pickle.dumps(source)).hexdigest(), *_stamps(Path(str(source.path)))]
        for source in sources
    ]
    tokenizer = encoder.tokenizer
    reads = [
        type(tokenizer).__name__,
        hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        tokenizer("").input_ids,
        str(tokenizer.special_tokens_map),
        tokenizer.model_max_length if encoder.compat_drop_mismatch else 0,
    ]
    how = [encoder.template, _spelled(get_template(encoder.template)), repr(encoder.images)]
    how += [encoder.image_placement, encoder.compat_drop_mismatch]
    return hashlib.sha256(json.dumps([FORMAT, files, reads, how]).encode()).hexdigest()[:32]


def _stamps(path: Path) -> Iterator[list[Any]]:
    """[name, bytes, time of change] of a file, or of all files in a folder."""
    for one in [path] if path.is_file() else sorted(path.rglob("*")):
        if one.is_file():
            status = one.stat()
            yield [one.name, status.st_size, status.st_mtime_ns]


def _spelled(value: Any) -> Any:
    """A template as JSON, in which trained pieces are lists."""
    if dataclasses.is_dataclass(value):
        return {field.name: _spelled(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return {"tuple": [_spelled(one) for one in value]}
    return [str(value)] if isinstance(value, Trained) else value


def _measure(
    sources: tuple[Source, ...], encoder: FusionEncoder, numbers: np.ndarray, workers: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The numbers a few at a time, and of each few the columns of the index, [n, columns]."""
    chunks = [numbers[at : at + CHUNK] for at in range(0, len(numbers), CHUNK)]
    measurer = Measurer(sources, encoder, tuple(chunks))
    workers = workers if len(chunks) > FEW else 0  # it takes seconds to start one
    found = read(measurer, 0, len(chunks), workers, ahead=2 * workers) if chunks else iter(())
    shown = {"desc": "measuring the records", "unit": " records", "delay": 2.0, "mininterval": 1.0}
    with tqdm(total=len(numbers), **shown) as progress:
        for chunk, measured in zip(chunks, found, strict=True):
            progress.update(len(chunk))
            yield chunk, measured


@dataclasses.dataclass(frozen=True)
class Measurer:
    """`reader` of `data/reading.py: read`: the sizes of chunk number n, int32 [its records, columns]."""

    sources: tuple[Source, ...]
    encoder: FusionEncoder
    chunks: tuple[np.ndarray, ...]

    def __call__(self, number: int) -> np.ndarray:
        return np.array([self._sizes(int(one)) for one in self.chunks[number]], np.int32)

    def _sizes(self, number: int) -> tuple[int, ...]:
        for source in self.sources:
            if number < len(source):
                break
            number -= len(source)
        try:
            record, left_out = begin_with_user(source[number])
            forms = list(self._forms(record, source))
        except BadRecord as error:
            return 0, 0, 0, 0, KINDS.index(error.kind)
        tokens, tiles, trained = (max(getattr(form, size) for form in forms) for size in ("tokens", "tiles", "trained"))
        least = min(form.least for form in forms)
        return tokens, tiles, trained, least, KINDS.index("assistant_first") if left_out else 0

    def _forms(self, record: Any, source: Source) -> Iterator[Measured]:
        """Random placement gives a record one of two forms; the index does not know which."""
        drawn = self.encoder.image_placement == "random"
        for placement in ("first", "last") if drawn else (self.encoder.image_placement,):
            yield dataclasses.replace(self.encoder, image_placement=placement).measure(record, source.images)
