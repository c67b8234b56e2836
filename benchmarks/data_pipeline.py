# ruff: noqa: E402 (the number of threads is set before numpy is imported)
"""Images per second and core: decode + resize + normalise at 336 px, beside Pillow and Hugging Face's CLIP processor.

    python benchmarks/data_pipeline.py [--output=data_pipeline.json]

Both sides get the same JPEGs (photograph-like: 1/f noise, quality 90, the sizes of COCO and some larger) in memory, in
one process with one thread, in turns; a figure is the median over the rounds. "PIL + HF" is `PIL.Image.open` and
transformers' `CLIPImageProcessorPil` (shortest side 336 bicubic, centre crop, CLIP's mean and std); for anyres
`LlavaNextImageProcessorPil` with LLaVA-1.6's five pinpoints. Training uses the uint8 form: the device normalises.
"""

from __future__ import annotations

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import argparse
import io
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL
import transformers
from machine import cpu_model
from PIL import Image, features
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from vlm_jax.data import ImageSettings, normalise, open_image, process

SIZES = [(640, 480)] * 10 + [(480, 640)] * 6 + [(500, 375)] * 6 + [(1024, 768)] * 2
SETTINGS = ImageSettings(336, 576)
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
ANYRES = ImageSettings(336, 576, "anyres", "spatial_unpad", PINPOINTS, "hw")


def photograph(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG with the spectrum of photographs: amplitude 1/f, channels mostly alike."""
    frequency = np.hypot(np.fft.rfftfreq(width), np.fft.fftfreq(height)[:, None])
    amplitude = 1 / np.maximum(frequency, 1 / max(width, height))

    def noise() -> np.ndarray:
        return np.fft.irfft2(amplitude * np.exp(2j * np.pi * rng.random(amplitude.shape)), s=(height, width))

    light = noise()
    pixels = np.stack([light + 0.4 * noise() for _ in range(3)], -1)
    pixels = 120 + 50 * (pixels - pixels.mean()) / pixels.std()
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def in_turns(sides: dict[str, Callable], jpegs: list[bytes], rounds: int) -> dict[str, float]:
    """Median seconds per image of each side."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            for jpeg in jpegs:
                side(jpeg)
            seconds[name].append((time.perf_counter() - start) / len(jpegs))
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data_pipeline.json"))
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()

    rng = np.random.default_rng(0)
    jpegs = [photograph(rng, *size) for size in SIZES]
    side = SETTINGS.size
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    processor = CLIPImageProcessorPil(**sizes)
    next_processor = LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=[list(point) for point in PINPOINTS])

    def reference(jpeg: bytes) -> np.ndarray:
        return processor(Image.open(io.BytesIO(jpeg)), return_tensors="np")["pixel_values"][0]

    def tile(jpeg: bytes) -> np.ndarray:
        return process(open_image(jpeg), SETTINGS)[0]

    def normalised(jpeg: bytes) -> np.ndarray:
        return normalise(tile(jpeg), SETTINGS.mean, SETTINGS.std)

    sides = {
        "PIL + HF processor, float32": reference,
        "vlm_jax, float32": normalised,
        "vlm_jax, uint8 (as in training)": tile,
        "anyres: PIL + HF processor, float32": lambda jpeg: next_processor(
            Image.open(io.BytesIO(jpeg)), return_tensors="np"
        ),
        "anyres: vlm_jax, uint8": lambda jpeg: process(open_image(jpeg), ANYRES),
        "decode alone (PIL)": lambda jpeg: Image.open(io.BytesIO(jpeg)).load(),
    }
    seconds = in_turns(sides, jpegs, arguments.rounds)
    first = {name: seconds["anyres: " * name.startswith("anyres") + "PIL + HF processor, float32"] for name in sides}
    levels = np.array(SETTINGS.std) * 255
    differences = np.concatenate(
        [(np.abs(normalised(j) - reference(j).transpose(1, 2, 0)) * levels).ravel() for j in jpegs]
    )
    report = {
        "cpu": cpu_model(),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "libjpeg_turbo": features.version("libjpeg_turbo"),
            "transformers": transformers.__version__,
            "simplejpeg": version("simplejpeg"),
        },
        "jpegs": {"count": len(jpegs), "mean_kilobytes": round(sum(map(len, jpegs)) / len(jpegs) / 1000)},
        "images_per_second": {name: round(1 / time_, 1) for name, time_ in seconds.items()},
        "times_reference": {name: round(first[name] / time_, 2) for name, time_ in seconds.items()},
        "max_difference_in_levels": round(float(differences.max()), 2),
        "share_of_values_that_differ": float(f"{(differences > 0.01).mean():.2g}"),
    }
    print(f"{report['cpu']}, one core; " + ", ".join(f"{name} {v}" for name, v in report["versions"].items()))
    print(f"{len(jpegs)} JPEGs of {report['jpegs']['mean_kilobytes']} kB on average, {side} px\n")
    print(f"{'':38}{'images/s':>10}{'times':>8}")
    for name in sides:
        print(f"{name:38}{report['images_per_second'][name]:>10}{report['times_reference'][name]:>8}")
    print(
        f"\nlargest difference of pixels: {report['max_difference_in_levels']} of 255 levels, "
        f"in {report['share_of_values_that_differ']:.2g} of the values"
    )
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
