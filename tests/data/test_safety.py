"""Data sets that mean harm: what leads out of its folder, and what unfolds into more than it is."""

from __future__ import annotations

import io
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from vlm_jax.data import BadRecord, open_image, open_source
from vlm_jax.data.images import MAX_SCANS
from vlm_jax.data.sources import parquet
from vlm_jax.errors import UsageError


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def scans() -> bytes:
    """A progressive JPEG of 64 pixels, whose last scan is repeated."""
    whole = saved(Image.new("RGB", (8, 8), (200, 30, 30)), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * MAX_SCANS + whole[-2:]


def texts() -> bytes:
    """A PNG of 64 pixels with a text of 20 million letters."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * 20_000_000, zip=True)
    return saved(Image.new("RGB", (8, 8)), "PNG", pnginfo=info)


def frames(width: int) -> bytes:
    """A GIF of two frames, the first of which claims to be wider than the picture."""
    two = [Image.new("P", (8, 8), color) for color in (1, 2)]
    file = saved(two[0], "GIF", save_all=True, append_images=two[1:])
    first = b"\x2c\x00\x00\x00\x00"
    return file.replace(first + struct.pack("<HH", 8, 8), first + struct.pack("<HH", width, 60_000), 1)


@pytest.mark.parametrize(
    ("image", "kind"),
    [(scans(), "broken_image"), (texts(), "broken_image"), (frames(60_000), "image_too_large")],
    ids=["scans", "texts", "frames"],
)
def test_images_that_unfold_are_refused_before_they_are_decoded(image: bytes, kind: str) -> None:
    assert len(image) < 100_000
    with pytest.raises(BadRecord) as error:
        open_image(image)
    assert error.value.kind == kind


def test_of_an_animation_the_first_picture_is_decoded() -> None:
    pictures = [Image.new("RGB", (8, 8), (50 * n, 0, 0)) for n in range(4)]
    for format in ("GIF", "WEBP", "PNG"):
        moving = saved(pictures[0], format, save_all=True, append_images=pictures[1:], lossless=True)
        assert Image.open(io.BytesIO(moving)).n_frames == 4  # type: ignore[attr-defined]
        assert (open_image(moving) == 0).all()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder `set` with a photo, a link to the folder `elsewhere`, and a link to a photo there."""
    for name in ("set", "elsewhere"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "a.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "set" / "folder")
    os.symlink(tmp_path / "elsewhere" / "a.png", tmp_path / "set" / "link.png")
    return tmp_path / "set"


def one(photos: Path, image: str) -> Path:
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A."}]
    (photos / "one.json").write_text(json.dumps([{"image": image, "conversations": turns}]))
    return photos / "one.json"


def test_images_stay_in_their_folder_unless_the_source_says_otherwise(photos: Path) -> None:
    for image in ("../elsewhere/a.png", str(photos / "a.png"), "folder/a.png", "link.png"):
        with pytest.raises(BadRecord, match="confined=False") as error:
            source = open_source(one(photos, image))
            open_image(source[0].images[0], source.images)
        assert error.value.kind == "unsafe_path"
        source = open_source(one(photos, image), confined=False)
        assert open_image(source[0].images[0], source.images).shape == (4, 4, 3)
    for image in ("https://example.com/a.png", "file:///etc/passwd", "a\0.png"):
        with pytest.raises(BadRecord) as error:
            open_image(open_source(one(photos, image), confined=False)[0].images[0], photos)
        assert error.value.kind == "unsafe_path"


def test_the_files_of_a_mixture_stay_in_its_folder(photos: Path) -> None:
    outside = photos.parent / "elsewhere" / "data.json"
    outside.write_text(one(photos, "a.png").read_text())
    for path in ("../elsewhere/data.json", str(outside), "folder/data.json", "https://example.com/data.json"):
        for name, text in (
            ("mix.yaml", json.dumps({"datasets": [{"json_path": path}]})),
            ("dataset_info.json", json.dumps({"mine": {"file_name": path, "formatting": "sharegpt"}})),
        ):
            (photos / name).write_text(text)
            given = photos / (name + ":mine" * (name == "dataset_info.json"))
            with pytest.raises(BadRecord, match=f"(json_path|file_name) '{path}'"):
                open_source(given)
            if "://" not in path:
                assert len(open_source(given, confined=False)) == 1


ALIASES = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
HOSTILE = {
    "aliases.yaml": (ALIASES, "by alias"),
    "deep.yaml": ("[" * 5000, "nested"),
    "code.yaml": ("datasets: !!python/object/apply:os.system ['true']", "not valid YAML"),
    "long.yaml": ("a: " + "x" * 2_000_000, "more than"),
    "deep.json": ("[" * 200_000, "nested too deeply"),
    "deep.jsonl": ("[" * 200_000, "nested too deeply"),
    "number.json": ("[" + "9" * 10_000 + "]", "not valid JSON"),
    "nothing.parquet": ("PAR1" + "\xff" * 100 + "PAR1", "no Parquet file"),
    "dataset_info.json:x": ("[" * 200_000, "not valid JSON"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_files_that_unfold_are_refused_in_a_line(tmp_path: Path, name: str) -> None:
    text, says = HOSTILE[name]
    (tmp_path / name.partition(":")[0]).write_text(text)
    with pytest.raises(UsageError, match=says) as error:
        open_source(tmp_path / name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_a_row_group_that_unfolds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(parquet, "MAX_GROUP", 1_000_000)
    picture = {"images": [{"bytes": bytes(100_000), "path": None}], "texts": [{"user": "What?", "assistant": "A."}]}
    pq.write_table(pa.Table.from_pylist([picture] * 1000), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 200_000
    with pytest.raises(UsageError, match="unfolds into more than 1,000,000 bytes"):
        open_source(tmp_path / "a.parquet")[3]


def test_a_tfds_folder_names_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    folder = tmp_path / "toy" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "features.json").write_text('{"pythonClassName": "antigravity.Module"}')
    with pytest.raises(UsageError, match="none of TensorFlow Datasets' own"):
        open_source("tfds:toy")
    with pytest.raises(UsageError, match="is no name"):
        open_source("tfds:../toy:train")
    with pytest.raises(UsageError, match="prepare it there"):
        open_source("tfds:other:train")
