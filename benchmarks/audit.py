"""An audit of 10,000 images with 200 planted faults of 8 kinds: what it finds, what it invents, and how fast it is.

    python benchmarks/audit.py [--output=audit.json] [--images=10000] [--faults=200] [--workers=2]

Makes the set first: JPEGs of quality 85 cut from clouds of noise with the spectrum of photographs, of the sizes below
(small ones, COCO's, and a few of two megapixels), each with a conversation; one in twenty is validation data. Then runs
`python -m vlm_jax.data.audit` on it and compares its faults.jsonl with what was planted. Half of the duplicated images
and of those leaked are stored again in another quality or format.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from machine import cpu_model, versions
from PIL import Image

# (width, height): share of the images
SIZES = {
    (640, 480): 0.38,
    (480, 640): 0.18,
    (500, 375): 0.18,
    (640, 427): 0.1,
    (224, 224): 0.06,
    (160, 120): 0.04,
    (1024, 768): 0.04,
    (1920, 1080): 0.02,
}
FAULTS = ("broken_image", "image_too_large", "unsafe_path", "malformed", "duplicate_image", "duplicate_record", "leak")
KINDS = (*FAULTS, "exif_rotated")
HELD_OUT = 20  # one image in so many


Record = dict[str, Any]


def clouds(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """uint8 [H, W, 3] with the spectrum of photographs: amplitude 1/f, channels mostly alike."""
    frequency = np.hypot(np.fft.rfftfreq(width), np.fft.fftfreq(height)[:, None])
    amplitude = 1 / np.maximum(frequency, 1 / max(width, height))

    def noise() -> np.ndarray:
        return np.fft.irfft2(amplitude * np.exp(2j * np.pi * rng.random(amplitude.shape)), s=(height, width))

    light = noise()
    pixels = np.stack([light + 0.4 * noise() for _ in range(3)], -1)
    return (120 + 50 * (pixels - pixels.mean()) / pixels.std()).clip(0, 255).astype(np.uint8)


def make_set(
    folder: Path, images: int, faults: int, sizes: dict[tuple[int, int], float] = SIZES
) -> tuple[Path, Path, set[tuple[int, str]]]:
    """Writes train.json, eval.json and photos/. Returns both files, and the faults of the first as (record, kind)."""
    rng = np.random.default_rng(0)
    sky = clouds(rng, 2400, 1600) if max(sizes)[0] > 1000 else clouds(rng, 600, 400)
    chosen = rng.choice(len(sizes), images, p=list(sizes.values()))
    photos = folder / "photos"
    records: list[Record] = []
    cuts: set[tuple[int, ...]] = set()
    for number in range(images):
        width, height = list(sizes)[chosen[number]]
        left = top = -1
        while (width, height, left, top) in cuts or left < 0:  # no two images alike but those that are planted
            left, top = int(rng.integers(sky.shape[1] - width)), int(rng.integers(sky.shape[0] - height))
        cuts.add((width, height, left, top))
        pixels = np.ascontiguousarray(sky[top : top + height, left : left + width])
        name = f"{number % 100:02d}/{number:06d}.jpg"
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(simplejpeg.encode_jpeg(pixels, 85))
        turns = [
            {"from": "human", "value": f"<image>\nWhat is at {left}, {top}?"},
            {"from": "gpt", "value": "A cloud. " * int(rng.integers(1, 60)) + f"Number {number}."},
        ]
        records.append({"id": f"r{number:06d}", "image": name, "conversations": turns})
    held_out = records[::HELD_OUT]
    train = [record for number, record in enumerate(records) if number % HELD_OUT]
    # The second half of the training data gets the faults, the first half is what they repeat.
    half, planted = len(train) // 2, set()
    places = half + rng.permutation(len(train) - half)[:faults]
    models = rng.permutation(half)[:faults]
    for number, (place, model) in enumerate(zip(places, models, strict=True)):
        kind, form = KINDS[number % len(KINDS)], number // len(KINDS)
        record = train[place]
        other = held_out[form % len(held_out)] if kind == "leak" else train[model]
        PLANT[kind](record, other, photos, form)
        planted.add((int(place), kind))
    files = folder / "train.json", folder / "eval.json"
    for file, some in zip(files, (train, held_out), strict=True):
        file.write_text(json.dumps(some))
    return *files, planted


def _break(record: Record, other: Record, photos: Path, form: int) -> None:
    file = photos / record["image"]
    whole = file.read_bytes()
    file.write_bytes((whole[: len(whole) // 2], b"<html>404 Not Found</html>", b"", whole[:20] + bytes(500))[form % 4])


def _blow_up(record: Record, other: Record, photos: Path, form: int) -> None:
    """A PNG of a few bytes that claims billions of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000 + form, 60_000, 8, 2, 0, 0, 0)
    record["image"] = record["image"].replace(".jpg", ".png")
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (photos / record["image"]).write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def _lead_out(record: Record, other: Record, photos: Path, form: int) -> None:
    if form % 4 == 3:
        outside = photos.parent / "outside.jpg"
        shutil.copyfile(photos / other["image"], outside)
        (photos / record["image"]).unlink()
        (photos / record["image"]).symlink_to(outside)
    else:
        record["image"] = ("../train.json", "/etc/hosts", "https://example.com/a.jpg")[form % 4]


def _malform(record: Record, other: Record, photos: Path, form: int) -> None:
    question, answer = record["conversations"]
    record["conversations"] = (
        [{**question, "value": "<image><image>\nWhat is this?"}, answer],
        [{**question, "from": "robot"}, answer],
        [question, question, answer],
        "What is this?",
        [question, {"from": "gpt"}],
    )[form % 5]


def _copy_image(record: Record, other: Record, photos: Path, form: int) -> None:
    """The bytes of another's image, or its pixels stored again."""
    original, file = photos / other["image"], photos / record["image"]
    how = (None, ("JPEG", 60), ("JPEG", 92), ("WEBP", 80), ("PNG", 0))[form % 2 and form // 2 % 4 + 1]
    if how is None:
        shutil.copyfile(original, file)
        return
    file.unlink()
    record["image"] = record["image"].replace(".jpg", f".{how[0].lower()}")
    Image.open(original).save(photos / record["image"], how[0], quality=how[1])


def _copy_record(record: Record, other: Record, photos: Path, form: int) -> None:
    record |= {"image": other["image"], "conversations": other["conversations"]}


def _turn(record: Record, other: Record, photos: Path, form: int) -> None:
    image, out = Image.open(photos / record["image"]), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = (3, 6, 8, 2)[form % 4]
    image.save(out, "JPEG", quality=85, exif=exif)
    (photos / record["image"]).write_bytes(out.getvalue())


PLANT: dict[str, Callable[[Record, Record, Path, int], None]] = {
    "broken_image": _break,
    "image_too_large": _blow_up,
    "unsafe_path": _lead_out,
    "malformed": _malform,
    "duplicate_image": _copy_image,
    "duplicate_record": _copy_record,
    "leak": _copy_image,
    "exif_rotated": _turn,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("audit.json"))
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.monotonic()
        train, held_out, planted = make_set(folder, arguments.images, arguments.faults)
        files = [file.stat().st_size for file in (folder / "photos").rglob("*") if file.is_file()]
        print(f"{len(files):,} images of {sum(files) / len(files) / 1000:.0f} kB on average", end=" ")
        print(f"made in {time.monotonic() - began:.0f} s")
        command = [sys.executable, "-m", "vlm_jax.data.audit", f"--data={train}", f"--eval={held_out}"]
        command += [f"--images={folder / 'photos'}", f"--output={folder / 'report'}", f"--workers={arguments.workers}"]
        began = time.monotonic()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        seconds = time.monotonic() - began
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(done.stdout)
        lines = (folder / "report" / "faults.jsonl").read_text().splitlines()
        found = {(line["record"], line["kind"]) for line in map(json.loads, lines) if line["source"] == str(train)}
        audit = json.loads((folder / "report" / "audit.json").read_text())
    report = {
        "cpu": cpu_model(),
        "versions": versions("numpy", "pillow", "simplejpeg", "scikit-learn", "grain"),
        "images": audit["images"],
        "mean_kilobytes": round(sum(files) / len(files) / 1000),
        "sizes": {f"{width}x{height}": share for (width, height), share in SIZES.items()},
        "workers": arguments.workers,
        "planted": dict(Counter(kind for _, kind in planted)),
        "found": dict(Counter(kind for _, kind in found & planted)),
        "missed": sorted(planted - found),
        "invented": sorted(found - planted),
        "invented_in_validation": len(lines) - len(found),
        "status": done.returncode,
        "seconds": round(seconds, 1),
        "images_per_second": audit["images_per_second"],
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
    }
    print(f"{report['cpu']}; " + ", ".join(f"{package} {v}" for package, v in report["versions"].items()))
    print(f"{'kind':<20}{'planted':>9}{'found':>9}")
    for kind, count in report["planted"].items():
        print(f"{kind:<20}{count:>9}{report['found'].get(kind, 0):>9}")
    invented = len(report["invented"]) + report["invented_in_validation"]
    print(f"missed {len(report['missed'])}, invented {invented}; exit status {report['status']}")
    print(
        f"{report['images_per_second']} images/s on {arguments.workers} processes; "
        f"the whole command took {seconds:.0f} s, and {report['processor_seconds']:.0f} s of the processors' time"
    )
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
