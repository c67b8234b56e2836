"""Imports a checkpoint of the shape of LLaVA-1.6 Mistral 7B (random bfloat16, 15 GB in shards): how much memory?

    python benchmarks/import_memory.py [--folder=DIR] [--output=import_memory.json]

The checkpoint and the model that it becomes are written below DIR (30 GB; default: the folder for temporary files) and
removed at the end. Printed is the peak resident memory of `python -m vlm_jax.convert import`, above that of an
interpreter which has imported nothing, and how much of it the imports of the command take. Status 1 above 2 GiB.

On an AMD EPYC with two cores, busy otherwise: 1.11 GiB, of which 0.18 GiB are imports, in 132 s.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from machine import cpu_model, versions

from vlm_jax.interop.hf_write import hf_config
from vlm_jax.interop.huggingface import shapes_of
from vlm_jax.interop.tables import FORMS, names
from vlm_jax.interop.weights import Lazy, write_shards
from vlm_jax.models import presets

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 2 << 30
POINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
IMAGES = {"mode": "anyres", "merge": "spatial_unpad", "pinpoints": POINTS, "pinpoint_order": "hw"}
# Prints the lines of Linux about a process when it ends; what `resource` tells begins with the peak of its parent.
TELL = "import atexit; atexit.register(lambda: print(open('/proc/self/status').read()))\n"


def write_checkpoint(folder: Path) -> int:
    """A `llava_next` of random numbers; returns its bytes."""
    model = presets.llava(
        vision=presets.clip_l14_336(),
        connector="mlp2x_gelu",
        decoder=presets.mistral_7b(vocab_size=32_064, rope_theta=1e6, sliding_window=None),
        newline=True,
    )
    shapes = shapes_of(model)
    random = np.random.default_rng(0)
    dtype = np.dtype(ml_dtypes.bfloat16)

    def tensors() -> Iterator[tuple[str, Lazy]]:
        for tensor in names(model):
            ours = shapes[tensor.path]
            shape = FORMS[tensor.form].theirs_shape(ours if tensor.layer is None else ours[1:])
            yield tensor.hf, Lazy(shape, dtype, lambda index, shape=shape: draw(shape)[index])
        for leaf in ("weight", "bias"):
            shape = (model["vision"]["hidden_size"],)
            name = f"vision_tower.vision_model.post_layernorm.{leaf}"
            yield name, Lazy(shape, dtype, lambda index, shape=shape: draw(shape)[index])

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return random.integers(0, 1 << 16, shape, np.uint16).view(dtype)

    folder.mkdir(parents=True)
    found = dict(tensors())
    config = hf_config(model, IMAGES, {}, image_token=32_000, dtype="bfloat16", head=False)
    (folder / "config.json").write_text(json.dumps(config))
    write_shards(folder, found, format="pt", shard_bytes=5 << 30, one_file=True)
    return sum(lazy.nbytes for lazy in found.values())


def peak(program: str, *args: str) -> int:
    """Peak resident bytes of a Python program."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", TELL + program, *args]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where there is room for 30 GB")
    parser.add_argument("--output", help="a JSON file for the figures")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        size = write_checkpoint(Path(place) / "hf")
        own = peak("pass")
        imports = peak("import vlm_jax.convert, vlm_jax.interop.transfer") - own
        began = time.monotonic()
        program = "import sys; from vlm_jax.convert import main; main(['import', *sys.argv[1:]])"
        above = peak(program, f"{place}/hf", f"{place}/ours") - own
        seconds = time.monotonic() - began
    figures = {
        "checkpoint_bytes": size,
        "peak_bytes_above_interpreter": above,
        "of_that_imports": imports,
        "interpreter_bytes": own,
        "seconds": round(seconds, 1),
        "cpu": cpu_model(),
        **versions("jax", "numpy", "transformers"),
    }
    print(f"checkpoint            {size / 1e9:6.1f} GB of bfloat16")
    print(f"peak above Python's   {above / 2**30:6.2f} GiB (limit {LIMIT / 2**30:.0f})")
    print(f"  of that, imports    {imports / 2**30:6.2f} GiB")
    print(f"time                  {seconds:6.0f} s, {size / seconds / 1e9:.2f} GB/s   ({figures['cpu']})")
    if given.output:
        Path(given.output).write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(above > LIMIT)


if __name__ == "__main__":
    main()
