"""The data set of the quickstart: real handwriting, made into a LLaVA data set on disk within seconds, offline.

The pictures are canvases of one to four of the 1,797 handwriting scans of `sklearn.datasets.load_digits` (8 x 8 pixels
each, from the UCI "Optical Recognition of Handwritten Digits" set), each drawn into its own quarter of the canvas with
a little rotation, shear, scale, shift and stroke strength, on tinted and noisy paper. The scans are divided first: the
canvases of `eval.json` show only scans that neither `train.json` nor `align.json` ever shows.

    DIR/align.json   captions for stage 1 (template `plain`): "<image>" -> "top left 5 and bottom right 3" or
                     "3 bottom right and 5 top left"
    DIR/train.json   conversations of one to three turns about one canvas
    DIR/eval.json    one question per record, so that exact match counts questions; `kind` and `scans` say which sort
    DIR/images/      {align,train,eval}/*.png
    DIR/tokenizer/   word-level tokenizer, opens with `transformers.AutoTokenizer`; tokenizer_chat/ also knows the words
                     of other chat templates
    DIR/digits.json  the settings it was made with; its presence says that the directory is complete

Every record keeps `scans` (how many are on the canvas) and `layout` ([[cell, digit, number of the scan], ...] in
reading order). Digits are balanced within every group of the mixture. The mixture, in percent of the questions:

    scans on the canvas    1   2   3   4   all
    which                 16   4   4   4    28   Which digit is this? | Which digit is top left?         7
    parity                 4   4   4   4    16   Is this digit odd or even? | Is the top left digit ...  odd
    count                  4   4   4   4    16   How many digits are there?                              3
    sum                    -   6   4   2    12   What is the sum?                                        12
    where                  4   4   4   4    16   Where is the 7? (only if there is exactly one)          top left
    describe               3   3   3   3    12   Describe the image.                                     top left 7
    all                   31  25  23  21   100

`eval.json` holds these numbers exactly (rounded to whole records). Training draws its questions from the same ones by
`TRAIN_MIXTURE`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_jax.errors import UsageError

# Pixels. A canvas is 2 x 2 cells; the 8 x 8 box of an unscaled scan is SCAN_SIDE wide in its cell.
CELL_SIDE = 16
CANVAS_SIDE = 2 * CELL_SIDE
SCAN_SIDE = 13

CELLS = ("top left", "top right", "bottom left", "bottom right")
SCANS = (1, 2, 3, 4)
MIXTURE = {  # percent of the questions on canvases of 1, 2, 3, 4 scans
    "which": (16, 4, 4, 4),
    "parity": (4, 4, 4, 4),
    "count": (4, 4, 4, 4),
    "sum": (0, 6, 4, 2),
    "where": (4, 4, 4, 4),
    "describe": (3, 3, 3, 3),
}
KINDS = tuple(MIXTURE)
# Training asks what is hard more often, on more of the canvases with several scans; captions show mostly full ones.
TRAIN_MIXTURE = {
    "which": (8, 6, 6, 6),
    "parity": (2, 2, 2, 2),
    "count": (1, 1, 1, 1),
    "sum": (0, 10, 7, 5),
    "where": (2, 12, 12, 12),
    "describe": (5, 5, 5, 5),
}
TRAIN_SIZES = (16, 32, 28, 24)
ALIGN_SIZES = (4, 12, 30, 54)
BY_DIGIT = 0.5  # of the captions are in the order of the digits
# Weights of conversations of 1, 2, 3 turns: a longer one trains more answers for the same image. One of three turns
# holds no description, so that all are about as long: what is shorter than the longest is padding.
TURNS = (1, 1, 6)

HELD_OUT_PER_DIGIT = 25

MARGIN = 0.75  # pixels between a scan's unrotated box and its cell: a 5 that has lost its bar is no 5


@dataclasses.dataclass(frozen=True)
class Hand:
    """How far a scan is turned (radians), slanted and scaled, both ways; what room that leaves, it is shifted by."""

    rotation: float
    shear: float
    scale: tuple[float, float]


# Training sees an unsteadier hand than the held-out canvases show: from 1,547 scans, this teaches more about others.
# The captions' is steadier than the conversations', since reading is learnt sooner from it.
ALIGN_HAND = Hand(rotation=0.15, shear=0.1, scale=(0.87, 1.05))
TRAIN_HAND = Hand(rotation=0.22, shear=0.14, scale=(0.82, 1.06))
EVAL_HAND = Hand(rotation=0.12, shear=0.06, scale=(0.92, 1.04))

# The atlas of smooth scans: each is given BORDER blank pixels around and drawn UPSAMPLE times as large, once.
BORDER = 2
UPSAMPLE = 4

# Each is one word of the tokenizer. The system sentence of `vicuna_v1` never varies here, and 25 tokens less per
# conversation is half of the text to train on.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PHRASES = (VICUNA_SYSTEM, "USER:", "ASSISTANT:", *CELLS)
# What `mistral_instruct`, `llava_llama_2` and the ChatML templates need beside them, for the recipes at a tiny size.
MARKERS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<|im_start|>", "<|im_end|>", "system", "user", "assistant")
SYSTEMS = ("Answer the questions.", "You are a helpful assistant.")
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
WORDS = r"\n|{phrases}|\w+|[^\w\s]"  # spaces stand in no token

Layout = list[tuple[int, int, int]]  # (cell, digit, number of the scan), in reading order
Record = dict[str, Any]


def make_digits(
    directory: str | os.PathLike,
    *,
    train_samples: int = 20_000,
    eval_samples: int = 2_000,
    align_samples: int = 20_000,
    seed: int = 0,
) -> Path:
    """Makes the data set in `directory` and returns it as a path; the same arguments give the same bytes.

    A directory that this function made with the same settings and the same version of this file is left as it is, one
    made otherwise is replaced. Writing goes to a hidden sibling that takes the name when complete, so that an
    interrupted or a second maker leaves nothing half done.

    Raises:
      UsageError: a number of samples is below 1, or `directory` holds something that this function did not make.
    """
    samples = {"align": align_samples, "train": train_samples, "eval": eval_samples}
    for name, count in samples.items():
        if count < 1:
            raise UsageError(f"make_digits: {name}_samples is {count}; give at least 1")
    directory = Path(os.path.abspath(directory))
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    settings = {"samples": samples, "seed": seed, "version": version}
    if _is_ready(directory, settings):
        return directory
    building = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    building.mkdir(parents=True)
    try:
        _write(building, samples, seed)
        (building / "digits.json").write_text(json.dumps(settings) + "\n")
        _take_name(building, directory, settings)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return directory


def _is_ready(directory: Path, settings: dict) -> bool:
    """Whether `directory` holds the data set of `settings`; raises if what it holds must not be replaced."""
    marker = directory / "digits.json"
    if marker.is_file():
        return json.loads(marker.read_text()) == settings
    if directory.is_dir() and not any(directory.iterdir()):
        return False
    if directory.exists():
        raise UsageError(f"{directory} exists and was not made by make_digits; name another directory or remove it")
    return False


def _take_name(building: Path, directory: Path, settings: dict) -> None:
    """Renames `building` to `directory`, unless another maker came first with the same."""
    for _ in range(10):
        try:
            building.rename(directory)  # succeeds onto nothing and onto an empty directory
            return
        except OSError:
            if _is_ready(directory, settings):
                return
        replaced = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
        try:
            directory.rename(replaced)
        except FileNotFoundError:  # another maker has just moved it away
            continue
        shutil.rmtree(replaced, ignore_errors=True)
    raise UsageError(f"{directory} is being remade by other processes with other settings; give each a directory")


def _write(directory: Path, samples: dict[str, int], seed: int) -> None:
    from sklearn.datasets import load_digits  # here, because only the maker needs scikit-learn

    scans = load_digits()
    atlas = smooth_scans(scans.images)
    kept, held_out = split_scans(scans.target, seed)
    builders = {
        "align": (align_records, kept, ALIGN_HAND),
        "train": (train_records, kept, TRAIN_HAND),
        "eval": (eval_records, held_out, EVAL_HAND),
    }
    for number, (split, (build, by_digit, hand)) in enumerate(builders.items()):
        words, pixels = np.random.default_rng([seed, number, 0]), np.random.default_rng([seed, number, 1])
        records = build(words, Deck(words, by_digit), samples[split])
        (directory / "images" / split).mkdir(parents=True)
        canvases = render([record["layout"] for record in records], atlas, pixels, hand)
        for i, (record, canvas) in enumerate(zip(records, canvases, strict=True)):
            record["image"] = f"{split}/{i:05d}.png"
            Image.fromarray(canvas).save(directory / "images" / record["image"], compress_level=1)
        lines = (json.dumps({"id": f"digits-{split}-{i:05d}", **record}) for i, record in enumerate(records))
        (directory / f"{split}.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
    save_tokenizer(directory / "tokenizer")
    save_tokenizer(directory / "tokenizer_chat", more=(*MARKERS, *SYSTEMS))


# ----------------------------------------------------------------------------------------------------------- scans


def split_scans(digits: np.ndarray, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Divides the scans, by a seeded permutation of each digit's: (kept for training, held out), numbers by digit."""
    rng = np.random.default_rng([seed, 3])
    shuffled = [rng.permutation(np.flatnonzero(digits == digit)) for digit in range(10)]
    return [s[HELD_OUT_PER_DIGIT:] for s in shuffled], [s[:HELD_OUT_PER_DIGIT] for s in shuffled]


class Deck:
    """Deals layouts in which every digit comes equally often, and so does every scan of a digit."""

    def __init__(self, rng: np.random.Generator, by_digit: Sequence[np.ndarray]):
        self._rng = rng
        self._scans = [self._forever(numbers) for numbers in by_digit]

    def _forever(self, numbers: np.ndarray) -> Iterator[int]:
        while True:
            yield from self._rng.permutation(numbers).tolist()

    def deal(self, sizes: Sequence[int]) -> list[Layout]:
        """One layout of so many scans for each of `sizes`: (cell, digit, scan) in reading order."""
        digits = np.arange(sum(sizes)) % 10
        digits = iter(self._rng.permutation(self._rng.permutation(10)[digits]).tolist())
        layouts = []
        for size in sizes:
            cells = sorted(self._rng.permutation(4)[:size].tolist())
            layouts.append([(cell, digit, next(self._scans[digit])) for cell in cells for digit in [next(digits)]])
        return layouts


# --------------------------------------------------------------------------------------------------- conversations


def questions(layout: Layout) -> dict[str, list[tuple[str, str]]]:
    """Every (question, answer) that can be asked about a canvas, by kind; a kind that has no question is empty."""
    digits = [digit for _, digit, _ in layout]
    alone = len(layout) == 1
    return {
        "which": [
            ("Which digit is this?" if alone else f"Which digit is {CELLS[cell]}?", str(digit))
            for cell, digit, _ in layout
        ],
        "parity": [
            (f"Is {'this' if alone else f'the {CELLS[cell]}'} digit odd or even?", "odd" if digit % 2 else "even")
            for cell, digit, _ in layout
        ],
        "count": [("How many digits are there?", str(len(layout)))],
        "sum": [] if alone else [("What is the sum?", str(sum(digits)))],
        "where": [(f"Where is the {digit}?", CELLS[cell]) for cell, digit, _ in layout if digits.count(digit) == 1],
        "describe": [("Describe the image.", describe(layout))],
    }


def describe(layout: Layout) -> str:
    """`top left 3, top right 5 and bottom left 7`: the place first, since a model learns to read much sooner where it
    is told to look."""
    *first, last = [f"{CELLS[cell]} {digit}" for cell, digit, _ in layout]
    return f"{', '.join(first)} and {last}" if first else last


def describe_by_digit(layout: Layout) -> str:
    """`3 top left, 5 bottom left and 7 top right`, in the order of the digits: this teaches to find."""
    *first, last = [f"{digit} {CELLS[cell]}" for digit, cell in sorted((digit, cell) for cell, digit, _ in layout)]
    return f"{', '.join(first)} and {last}" if first else last


def align_records(rng: np.random.Generator, deck: Deck, count: int) -> list[Record]:
    sizes = _shuffled(rng, SCANS, ALIGN_SIZES, count)
    return [
        _record(layout, [("", (describe_by_digit if rng.random() < BY_DIGIT else describe)(layout))])
        for layout in deck.deal(sizes)
    ]


def train_records(rng: np.random.Generator, deck: Deck, count: int) -> list[Record]:
    layouts = deck.deal(_shuffled(rng, SCANS, TRAIN_SIZES, count))
    records = []
    for layout, turns in zip(layouts, _shuffled(rng, (1, 2, 3), TURNS, count), strict=True):
        unasked = questions(layout)
        asked = []
        for _ in range(turns):
            left = {kind: row[len(layout) - 1] for kind, row in TRAIN_MIXTURE.items() if unasked[kind]}
            if turns == 3:
                left.pop("describe", None)
            weights = np.cumsum([left.get(kind, 0) for kind in KINDS])
            kind = KINDS[int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))]
            asked.append(unasked[kind].pop(int(rng.integers(len(unasked[kind])))))
        records.append(_record(layout, asked))
    return records


def eval_records(rng: np.random.Generator, deck: Deck, count: int) -> list[Record]:
    groups = list(itertools.product(KINDS, SCANS))
    shares = _shares([MIXTURE[kind][size - 1] for kind, size in groups], count)
    records = []
    for (kind, size), share in zip(groups, shares, strict=True):
        for layout in deck.deal([size] * share):
            while not (choices := questions(layout)[kind]):  # "where" on a canvas whose digits all come twice
                (layout,) = deck.deal([size])
            question = choices[int(rng.integers(len(choices)))]
            records.append(_record(layout, [question]) | {"kind": kind})
    return [records[i] for i in rng.permutation(count)]


def _record(layout: Layout, turns: Sequence[tuple[str, str]]) -> Record:
    """A LLaVA record, of which only the names are still missing; an empty question is a caption's."""
    conversation = []
    for number, (question, answer) in enumerate(turns):
        prompt = question if number else f"<image>\n{question}" if question else "<image>"
        conversation += [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]
    return {"image": "", "conversations": conversation, "scans": len(layout), "layout": layout}


def _shares(weights: Sequence[float], count: int) -> list[int]:
    """Whole numbers proportional to `weights` that sum to `count` (largest remainder; ties go to the first)."""
    exact = np.asarray(weights) * count / sum(weights)
    shares = np.floor(exact).astype(int)
    shares[np.argsort(shares - exact, kind="stable")[: count - shares.sum()]] += 1
    return shares.tolist()


def _shuffled(rng: np.random.Generator, values: Sequence[int], weights: Sequence[float], count: int) -> list[int]:
    return rng.permutation(np.repeat(values, _shares(weights, count))).tolist()


# ---------------------------------------------------------------------------------------------------------- pixels


def smooth_scans(images: np.ndarray) -> np.ndarray:
    """Scans [N, 8, 8] with ink from 0 to 16 -> their smooth enlargements [N, S, S] float32 with ink from 0 to 1."""
    images = np.pad(images.astype(np.float32) / 16, ((0, 0), (BORDER, BORDER), (BORDER, BORDER)))
    side = images.shape[-1] * UPSAMPLE
    enlarged = [Image.fromarray(scan).resize((side, side), Image.Resampling.BICUBIC) for scan in images]
    return np.stack([np.asarray(scan) for scan in enlarged]).clip(0, 1)


def render(layouts: Sequence[Layout], atlas: np.ndarray, rng: np.random.Generator, hand: Hand) -> Iterator[np.ndarray]:
    """Draws the canvases, uint8 [CANVAS_SIDE, CANVAS_SIDE, 3] each; 64 at a time, which stay in the cache."""
    for start in range(0, len(layouts), 64):
        some = layouts[start : start + 64]
        canvas = np.repeat(np.arange(len(some)), [len(layout) for layout in some])
        cell, _, scan = np.array([glyph for layout in some for glyph in layout]).T
        cells = np.zeros((len(some), 2, 2, CELL_SIDE, CELL_SIDE), np.float32)
        cells[canvas, cell // 2, cell % 2] = draw_scans(atlas, scan, rng, hand)
        yield from paint(cells.transpose(0, 1, 3, 2, 4).reshape(-1, CANVAS_SIDE, CANVAS_SIDE, 1), rng)


def paint(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ink [R, H, W, 1] from 0 to 1 -> uint8 [R, H, W, 3]: a dark coloured pen on light, tinted and noisy paper."""

    def each(low: float, high: float, channels: int = 1) -> np.ndarray:
        return rng.uniform(low, high, (len(ink), 1, 1, channels)).astype(np.float32)

    paper = each(200, 250) + each(-20, 5, channels=3)
    pen = each(10, 60) + each(-10, 30, channels=3)
    noise = each(0, 6) * rng.standard_normal(ink.shape, np.float32)
    return (paper + noise + ink * (pen - paper)).round().clip(0, 255).astype(np.uint8)


def draw_scans(atlas: np.ndarray, scan: np.ndarray, rng: np.random.Generator, hand: Hand) -> np.ndarray:
    """Draws the scans of these numbers, int [M], with their augmentation into cells: ink [M, CELL_SIDE, CELL_SIDE]."""

    def each(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, (len(scan), 1, 1)).astype(np.float32)

    angle, shear = each(-hand.rotation, hand.rotation), each(-hand.shear, hand.shear)
    scale = each(*hand.scale)
    room = (CELL_SIDE - SCAN_SIDE * scale) / 2 - MARGIN
    centre = np.arange(CELL_SIDE, dtype=np.float32) + 0.5 - CELL_SIDE / 2
    x, y = centre - each(-1, 1) * room, centre[:, None] - each(-1, 1) * room
    # From a place in the cell back to a place in the atlas: the inverse of scale, shear and rotation.
    zoom = UPSAMPLE * 8 / (SCAN_SIDE * scale)
    column = zoom * (np.cos(angle) * x + (np.sin(angle) + shear) * y)
    row = zoom * (np.cos(angle) * y - np.sin(angle) * x)
    side = atlas.shape[-1]
    column, row = ((place + side / 2 - 0.5).clip(0, side - 1.001) for place in (column, row))

    left, top = column.astype(np.int32), row.astype(np.int32)
    column, row = column - left, row - top
    flat, corner = atlas.reshape(-1), (scan.astype(np.int32)[:, None, None] * side + top) * side + left
    upper = flat[corner] * (1 - column) + flat[corner + 1] * column
    lower = flat[corner + side] * (1 - column) + flat[corner + side + 1] * column
    ink = upper * (1 - row) + lower * row
    return each(0.75, 1.0) * ink ** np.exp(each(-0.35, 0.35))


# ------------------------------------------------------------------------------------------------------- tokenizer


def save_tokenizer(directory: str | os.PathLike, *, more: Sequence[str] = ()) -> None:
    """Writes the word-level tokenizer of this data set in the form that `AutoTokenizer.from_pretrained` opens.

    Its words are those of all questions and answers and of the templates `plain` and `vicuna_v1`, then `more`; a
    number, the name of a cell, the system sentence and each of `more` are one word. A word is the same token wherever
    it stands, whatever spaces are around it, so that text encoded in pieces gives the tokens of the whole; the decoder
    puts the spaces back.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    texts = [str(number) for number in range(9 * len(CELLS) + 1)]
    for layout in ([(0, 7, 0)], [(cell, cell, 0) for cell in range(4)]):
        texts += [text for turns in questions(layout).values() for turn in turns for text in turn]
    pattern = WORDS.format(phrases="|".join(map(re.escape, (*PHRASES, *more))))
    found = (re.findall(pattern, text) for text in ["\n", *PHRASES, *texts, "odd even", *more])
    words = dict.fromkeys([*SPECIAL_TOKENS.values(), *itertools.chain.from_iterable(found)])

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    bos = SPECIAL_TOKENS["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, list(words).index(bos))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="right", clean_up_tokenization_spaces=False, **SPECIAL_TOKENS
    ).save_pretrained(directory)
