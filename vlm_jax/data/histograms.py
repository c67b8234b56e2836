"""The picture of an audit: how large images are, how long texts and rows, and how full rows get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.data.index import Index
from vlm_jax.data.inspection import Inspection

BLUE, ORANGE, GREEN, GREY = "#3b6fb6", "#d9730d", "#2e8540", "#8a8a8a"
WAYS = {"padded": (GREY, "padded"), "first_fit": (ORANGE, "first fit"), "best_fit": (GREEN, "best fit")}
WIDTH, HEIGHT = 4.2, 3.0  # inches of a panel


def plot(found: Inspection, report: Mapping[str, Any], file: Path, lengths: tuple[Index, np.ndarray] | None) -> None:
    """Writes the PNG. lengths: the index of all records, and which of them are trained on; None without a config."""
    # Without pyplot: no global state, no window, whatever backend the user has chosen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    images = [facts for facts in found.images.values() if not facts.kind]
    words = np.array([facts.words for facts in found.records.values() if facts.digest])
    figure = Figure(figsize=(3 * WIDTH, HEIGHT * (1 if lengths is None else 2)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1 if lengths is None else 2, 3, squeeze=False).flat)
    _sizes(axes[0], np.array([facts.size for facts in images]).reshape(-1, 2))
    _one(axes[1], "words of a record", "words", words, "records")
    if lengths is None:
        _one(axes[2], "image files", "kB", np.array([facts.bytes / 1000 for facts in images]), "images")
    else:
        index, used = lengths
        _one(axes[2], "trained tokens of a record", "tokens", index.trained[used], "records")
        _one(axes[3], "tokens of a record", "tokens", index.tokens[used], "records", report["too_long"])
        _one(axes[4], "tiles of a record", "tiles", index.tiles[used], "records")
        _filling(axes[5], report["filling"])
    figure.savefig(file, dpi=110)


def _bins(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if high - low < 40 and (values == np.round(values)).all():
        margin = max(4 - (high - low), 0) // 2  # a single value is a bar, not a wall
        return np.arange(low - margin, high + margin + 2) - 0.5
    return np.linspace(low, high, 41)


def _one(
    axis: Any, title: str, unit: str, values: np.ndarray, what: str, longer: Mapping[str, float] | None = None
) -> None:
    """A histogram with its median. longer: for lengths of rows, marked where they lie, the share beyond."""
    _head(axis, title, unit, what)
    if not len(values):
        return
    axis.hist(values, _bins(values), color=BLUE)
    median = float(np.median(values))
    axis.axvline(median, color="black", linewidth=1)
    axis.text(median, 1.0, f" median {median:,.4g}", va="bottom", fontsize=8, transform=axis.get_xaxis_transform())
    near = [(int(length), share) for length, share in (longer or {}).items() if int(length) <= 1.1 * values.max()]
    for number, (length, share) in enumerate(near):
        axis.axvline(length, color=ORANGE, linestyle="--", linewidth=1)
        at = 0.97 - 0.16 * (number % 3)
        label = f" T={length:,}\n {share:.1%} longer"
        drawn = axis.text(length, at, label, va="top", fontsize=8, color=ORANGE, transform=axis.get_xaxis_transform())
        drawn.set_bbox({"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1})


def _sizes(axis: Any, sizes: np.ndarray) -> None:
    _head(axis, "sizes of images", "pixels", "images")
    if not len(sizes):
        return
    for name, some, color in (("width", sizes[:, 0], BLUE), ("height", sizes[:, 1], ORANGE)):
        axis.hist(some, _bins(sizes), color=color, alpha=0.6, label=name)
    axis.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)


def _filling(axis: Any, filling: Sequence[Mapping[str, Any]]) -> None:
    _head(axis, "share of real tokens in rows of T", "T", "share")
    places = np.arange(len(filling))
    for number, (name, (color, label)) in enumerate(WAYS.items()):
        bars = axis.bar(places + (number - 1) * 0.28, [one[name] for one in filling], 0.26, color=color, label=label)
        axis.bar_label(bars, [f"{one[name]:.0%}" for one in filling], fontsize=7)
    axis.set_xticks(places, [f"{one['length']:,}" for one in filling])
    axis.set_ylim(0, 1.3)
    axis.legend(fontsize=8, frameon=False, ncols=3, loc="upper left")


def _head(axis: Any, title: str, unit: str, what: str) -> None:
    axis.set_title(title, fontsize=10, loc="left", pad=12)
    axis.set_xlabel(unit, fontsize=8)
    axis.set_ylabel(what, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
