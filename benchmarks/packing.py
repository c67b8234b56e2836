"""How full the rows are, and how fast they train: padding to the longest of the batch, first-fit and best-fit.

    python benchmarks/packing.py [--output=packing.json] [--records=65536]

The mixture below is made, with the image sizes, tiles and text lengths of LLaVA's 665k records seen as LLaVA-1.6 sees
them (336 px, five pinpoints, `spatial_unpad`): shares as LLaVA lists them, sizes as the image sets have them (COCO,
Visual Genome, book covers, OpenImages), lengths of texts log-normal about what each part's kind of question and answer
takes. A window has 4,096 records. The padded batches are of 16 records in random order.

The speed is that of a tiny model (one layer over the true 577 positions of each tile, two layers over the tokens) on
the same records, in steps of loss and gradients on random pixels, compiled before; the layouts take turns, and a
figure is the median. `tokens/s` counts real ones, `trained/s` those with a label.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from machine import cpu_model, versions

from vlm_jax.data import ImageSettings
from vlm_jax.data.conversation import IMAGE_ID, UNTRAINED
from vlm_jax.data.images import layout
from vlm_jax.data.packing import pack
from vlm_jax.data.rows import PREFIX_FUSION, Row, collate, fusion_row, join
from vlm_jax.families import make_family
from vlm_jax.models import presets
from vlm_jax.sharding import make_mesh

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
IMAGES = ImageSettings(336, 576, "anyres", "spatial_unpad", PINPOINTS, several="pad")

# (width, height): share within the set, in percent
COCO = {
    (640, 480): 45,
    (640, 427): 18,
    (480, 640): 16,
    (427, 640): 6,
    (640, 426): 4,
    (500, 375): 4,
    (640, 360): 3,
    (612, 612): 2,
    (500, 333): 2,
}
GENOME = {
    (500, 375): 25,
    (1024, 768): 15,
    (640, 480): 12,
    (800, 600): 10,
    (500, 333): 10,
    (375, 500): 8,
    (1024, 683): 8,
    (768, 1024): 5,
    (333, 500): 4,
    (683, 1024): 3,
}
COVERS = {
    (333, 500): 12,
    (327, 500): 10,
    (331, 500): 10,
    (381, 499): 10,
    (500, 500): 10,
    (318, 475): 10,
    (386, 499): 8,
    (400, 500): 8,
    (313, 475): 8,
    (260, 400): 6,
    (300, 300): 4,
    (475, 318): 4,
}
OPEN = {(1024, 768): 40, (1024, 683): 30, (768, 1024): 12, (683, 1024): 10, (1024, 576): 5, (1024, 1024): 3}

# part: thousands of records, image sizes (None: text alone), turns (median, sigma), tokens around the turns, tokens of
# a turn (median, sigma), the share of them that is the answer
MIXTURE: dict[str, tuple[float, dict[tuple[int, int], int] | None, tuple, int, tuple, float]] = {
    "LLaVA conversation": (57, COCO, (3.5, 0.3), 45, (85, 0.5), 0.75),
    "LLaVA detail": (23, COCO, (1, 0), 45, (130, 0.4), 0.9),
    "LLaVA reasoning": (77, COCO, (1, 0), 45, (190, 0.35), 0.85),
    "VQAv2": (83, COCO, (5.5, 0.4), 60, (14, 0.2), 0.2),
    "OKVQA, A-OKVQA": (75, COCO, (1.3, 0.4), 55, (45, 0.3), 0.1),
    "RefCOCO": (48, COCO, (5, 0.6), 45, (38, 0.2), 0.5),
    "GQA": (72, GENOME, (9, 0.5), 60, (15, 0.2), 0.2),
    "VG": (86, GENOME, (8, 0.5), 45, (40, 0.2), 0.5),
    "OCR-VQA": (80, COVERS, (5, 0.1), 60, (22, 0.4), 0.35),
    "TextCaps": (22, OPEN, (1, 0), 90, (22, 0.3), 0.6),
    "ShareGPT": (41, None, (4, 0.7), 40, (330, 0.8), 0.7),
}
LONGEST_TEXT, LONGEST = 2048, 4096  # what is longer is cut, as LLaVA does; few are
WINDOW, BATCH = 4096, 16
BUDGETS = {4096: 8, 8192: 16, 16384: 40}  # tokens of a row: its tiles
STEP = 32_768  # positions of a timed step


def make(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Tokens, tiles and trained tokens of each record, its part, and the size of its image (0: none)."""
    rng = np.random.default_rng(seed)
    shares = np.array([part[0] for part in MIXTURE.values()])
    parts = rng.choice(len(MIXTURE), count, p=shares / shares.sum())
    text, trained, width, height, tokens, tiles = np.zeros((6, count), np.int64)
    for number, (_, sizes, turns, around, turn, answers) in enumerate(MIXTURE.values()):
        at = np.flatnonzero(parts == number)
        counts = np.maximum(1, np.rint(turns[0] * np.exp(turns[1] * rng.standard_normal(len(at))))).astype(int)
        of = np.repeat(np.arange(len(at)), counts)
        said = np.bincount(of, turn[0] * np.exp(turn[1] * rng.standard_normal(len(of))), len(at))
        text[at] = np.minimum(around + said, LONGEST_TEXT)
        if sizes is not None:
            drawn = rng.choice(len(sizes), len(at), p=np.array(list(sizes.values())) / sum(sizes.values()))
            layouts = [layout(size, IMAGES) for size in sizes]
            tokens[at] = np.array([len(one.places) for one in layouts])[drawn]
            tiles[at] = np.array([one.tiles for one in layouts])[drawn]
            width[at], height[at] = np.array(list(sizes))[drawn].T
        text[at] = np.minimum(text[at], LONGEST - tokens[at])
        trained[at] = np.maximum(1, (text[at] - around) * answers)
    return {
        "tokens": tokens + text,
        "tiles": tiles,
        "trained": trained,
        "text": text,
        "part": parts,
        "width": width,
        "height": height,
    }


def row_of(made: dict[str, np.ndarray], record: int, rng: np.random.Generator) -> Row:
    """The arrays of a record; its pixels are noise."""
    text = int(made["text"][record])
    ids = rng.integers(1, VOCABULARY, text).astype(np.int32)
    labels = np.full(text, UNTRAINED, np.int32)
    labels[text - int(made["trained"][record]) :] = ids[text - int(made["trained"][record]) :]
    if not made["tiles"][record]:
        return fusion_row(ids, labels, [], [], IMAGES)
    ids, labels = np.insert(ids, 1, IMAGE_ID), np.insert(labels, 1, UNTRAINED)
    one = layout((int(made["width"][record]), int(made["height"][record])), IMAGES)
    pixels = rng.integers(0, 256, (one.tiles, IMAGES.size, IMAGES.size, 3), dtype=np.uint8)
    return fusion_row(ids, labels, [pixels], [one], IMAGES)


VOCABULARY = 512


def tiny_model() -> Any:
    tower = {"image_size": 336, "patch_size": 14, "hidden_size": 32, "intermediate_size": 64}
    language = {"vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 384, "num_layers": 2}
    return make_family(
        presets.llava(
            vision=presets.clip_vit(**tower, num_layers=1, num_heads=2, feature_layer=-1),
            connector="linear",
            decoder=presets.mistral(**language, num_heads=4, num_kv_heads=2),
            newline=True,
        )
    )


def time_layouts(batches: dict[str, Row], rounds: int) -> dict[str, float]:
    """Median seconds of a step of each."""
    family = tiny_model()
    params = family.bound.init(0)

    @jax.jit
    def step(params: Any, arrays: Any) -> Any:
        weights, total = family.weigh(arrays, norm="global_tokens", ranks=1)
        one = {name: array[0] for name, array in arrays.items()}
        return jax.value_and_grad(lambda p: family.loss(p, {}, one, weights[0], None)[0] / total)(params)

    seconds: dict[str, list[float]] = {name: [] for name in batches}
    for _ in range(rounds + 1):
        for name, arrays in batches.items():
            placed = {key: array[None] for key, array in arrays.items()}
            start = time.perf_counter()
            jax.block_until_ready(step(params, placed))
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("packing.json"))
    parser.add_argument("--records", type=int, default=65_536)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    made = make(arguments.records)
    tokens, tiles = made["tokens"], made["tiles"]
    layouts: dict[str, dict[str, Any]] = {}
    batches = [np.arange(at, min(at + BATCH, len(tokens))) for at in range(0, len(tokens), BATCH)]
    padded = sum(len(batch) * tokens[batch].max() for batch in batches)
    padded_tiles = sum(len(batch) * tiles[batch].max() for batch in batches)
    layouts["padded to the longest"] = {
        "T": None,
        "real_tokens": tokens.sum() / padded,
        "real_tiles": tiles.sum() / padded_tiles,
        "seconds_per_window": 0.0,
        "rows": [[record] for record in batches[0]],
    }
    for length, room in BUDGETS.items():
        for fit in ("first_fit", "best_fit"):
            start, rows, first = time.perf_counter(), 0, []
            windows = [slice(at, at + WINDOW) for at in range(0, len(tokens), WINDOW)]
            for window in windows:
                packed = pack(tokens[window], tiles[window], budget_tokens=length, budget_tiles=room, fit=fit)
                first, rows = first or packed, rows + len(packed)
            layouts[f"{fit}, T = {length:,}"] = {
                "T": length,
                "real_tokens": tokens.sum() / (rows * length),
                "real_tiles": tiles.sum() / (rows * room),
                "seconds_per_window": (time.perf_counter() - start) / len(windows),
                "rows": [row.tolist() for row in first[: STEP // length]],
            }

    timed, rng = {}, np.random.default_rng(1)
    for name, one in layouts.items():
        rows_ = [join([row_of(made, record, rng) for record in row], PREFIX_FUSION) for row in one["rows"]]
        length = one["T"] or max(len(row["tokens"]) for row in rows_)
        room = BUDGETS.get(length, max(len(row["tiles"]) for row in rows_))
        timed[name] = collate(rows_, PREFIX_FUSION, {"T": length, "K": room, "P": 576, "H": 336, "W": 336})
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        seconds = time_layouts(timed, arguments.rounds)
    for name, one in layouts.items():
        del one["rows"]
        one["tokens_per_second"] = float((timed[name]["segment_ids"] > 0).sum() / seconds[name])
        one["trained_per_second"] = float((timed[name]["labels"] >= 0).sum() / seconds[name])

    report = {
        "cpu": cpu_model(),
        "versions": versions("jax", "flax", "numpy"),
        "mixture": {
            name: {
                "share": float((made["part"] == number).mean()),
                "tokens": float(tokens[made["part"] == number].mean()),
                "trained": float(made["trained"][made["part"] == number].mean()),
            }
            for number, name in enumerate(MIXTURE)
        },
        "records": len(tokens),
        "mean_tokens": float(tokens.mean()),
        "window": WINDOW,
        "batch": BATCH,
        "tiles_of_a_row": BUDGETS,
        "layouts": {
            name: {key: None if value is None else float(f"{value:.5g}") for key, value in one.items()}
            for name, one in layouts.items()
        },
    }
    print(f"{report['cpu']}; " + ", ".join(f"{name} {number}" for name, number in report["versions"].items()))
    print(f"{len(tokens):,} records of {tokens.mean():,.0f} tokens on average, in windows of {WINDOW:,}\n")
    print(f"{'mixture':24}{'share':>8}{'tokens':>8}{'trained':>9}")
    for name, part in report["mixture"].items():
        print(f"{name:24}{part['share']:>8.1%}{part['tokens']:>8.0f}{part['trained']:>9.0f}")
    print(f"\n{'rows':24}{'real tokens':>12}{'real tiles':>12}{'s/window':>10}{'tokens/s':>10}{'trained/s':>11}")
    for name, one in layouts.items():
        fill = f"{one['real_tokens']:>12.1%}{one['real_tiles']:>12.1%}{one['seconds_per_window']:>10.3f}"
        print(f"{name:24}{fill}{one['tokens_per_second']:>10,.0f}{one['trained_per_second']:>11,.0f}")
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
