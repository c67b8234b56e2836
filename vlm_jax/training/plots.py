"""Two pictures of a run: curves.png from its metrics.jsonl, and samples.png with questions, answers and truths."""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from vlm_jax.training.metrics import read_metrics

_COLORS = ("#1f77b4", "#d9730d", "#2e8540", "#7b4fb3", "#8c564b", "#17becf")
_WRONG, _RIGHT, _QUIET = "#c0392b", "#2e8540", "#555555"


def _figure(width: float, height: float) -> Any:
    # Without pyplot: no global state, no window, whatever backend the user has chosen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    epath.Path(path).write_bytes(data.getvalue())


def plot_curves(metrics: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Draws loss (training and held-out), learning rate, gradient norm and tokens per second over the steps of each
    stage, one after the other on one axis. Without records nothing is written."""
    records = read_metrics(metrics)
    stages = list(dict.fromkeys(record["stage"] for record in records if "stage" in record))
    if not stages:
        return
    starts: dict[str, int] = {}
    total = 0
    for stage in stages:
        starts[stage] = total
        total += max(record["step"] for record in records if record["stage"] == stage)

    panels = (
        ("loss", "loss", "log"),
        ("learning_rate", "learning rate", "linear"),
        ("grad_norm", "gradient norm", "log"),
        ("tokens_per_second", "tokens per second", "linear"),
    )
    figure = _figure(11, 7)
    axes = figure.subplots(2, 2).flat
    for axis, (key, title, scale) in zip(axes, panels, strict=True):
        for index, stage in enumerate(stages):
            color = _COLORS[index % len(_COLORS)]
            steps, values = _series(records, stage, key)
            dense = len(steps) > 60
            axis.plot(steps + starts[stage], values, color=color, linewidth=1.2, alpha=0.35 if dense else 1.0)
            if dense:
                axis.plot(steps + starts[stage], _smooth(values), color=color, linewidth=1.6)
            axis.plot([], [], color=color, linewidth=1.6, label=stage)
            held_out = _series(records, stage, f"eval/{key}")
            if len(held_out[0]):
                label = f"{stage}, held-out"
                axis.plot(held_out[0] + starts[stage], held_out[1], "o--", color=color, markersize=4, label=label)
        drawn = [value for line in axis.lines for value in np.ravel(line.get_ydata()) if np.isfinite(value)]
        # A log scale only where it shows more than a linear one.
        if scale == "log" and drawn and min(drawn) > 0 and max(drawn) / min(drawn) > 20:
            axis.set_yscale("log")
        for start in starts.values():
            if start:
                axis.axvline(start, color="#bbbbbb", linewidth=0.8)
        if key == "tokens_per_second":
            axis.set_ylim(bottom=0)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        if key == "loss":
            axis.legend(frameon=False)
    _save(figure, path)


def _series(records: Sequence[Mapping[str, Any]], stage: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(record["step"], record[key]) for record in records if record.get("stage") == stage and key in record]
    steps = np.array([step for step, _ in pairs], dtype=np.float64)
    return steps, np.array([np.nan if value is None else value for _, value in pairs], dtype=np.float64)


def _smooth(values: np.ndarray) -> np.ndarray:
    """A centred running mean over a fortieth of the curve; gaps stay gaps."""
    half = max(1, len(values) // 80)
    padded = np.pad(values, half, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    known = np.isfinite(windows)
    sums, counts = np.where(known, windows, 0.0).sum(-1), known.sum(-1)
    return np.where(np.isfinite(values), sums / np.maximum(counts, 1), np.nan)


def plot_samples(
    samples: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    columns: int = 4,
    limit: int = 16,
    correct: Callable[[str, str], bool] = lambda answer, truth: answer.strip() == truth.strip(),
) -> None:
    """Draws samples as a grid: the images of each with question, answer and truth; a wrong answer stands in red.

    Args:
      samples: each has `question`, `answer`, and optionally `truth`, `correct` (else `correct(answer, truth)` decides)
        and `images`, a list of PIL images or uint8 arrays `[H, W]` or `[H, W, 3]`.
      path: the picture. Without samples nothing is written.
      limit: at most this many are drawn.
    """
    shown = list(samples)[:limit]
    if not shown:
        return
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    figure = _figure(3.1 * columns, 4.1 * rows)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.14)
    grid = np.atleast_1d(np.array(figure.subplots(rows, columns), dtype=object)).reshape(-1)
    for axis in grid:
        axis.axis("off")
    for axis, sample in zip(grid, shown, strict=False):
        images = [np.asarray(image) for image in sample.get("images") or ()]
        axis.set_anchor("S")
        axis.imshow(_side_by_side(images or [np.full((32, 32), 240, np.uint8)]), vmin=0, vmax=255)
        if not images:
            axis.text(0.5, 0.5, "(no image)", ha="center", va="center", color=_QUIET, transform=axis.transAxes)
        truth = sample.get("truth")
        right = sample.get("correct")
        if right is None and truth is not None:
            right = correct(sample["answer"], truth)
        color = _QUIET if right is None else _RIGHT if right else _WRONG
        lines = [(_wrap(sample["question"], 3), "black"), (_wrap(f"answer: {sample['answer']}", 4), color)]
        if truth is not None and not right:
            lines.append((_wrap(f"truth: {truth}", 3), _QUIET))
        height = 0.0
        for text, text_color in lines:
            # A dollar sign of an answer is a dollar sign, not mathematics.
            axis.annotate(
                text.replace("$", r"\$"),
                (0.0, 0.0),
                (0, -6 - height),
                xycoords="axes fraction",
                textcoords="offset points",
                va="top",
                fontsize=9,
                color=text_color,
                weight="bold" if text_color == _WRONG else "normal",
            )
            height += 12.5 * (text.count("\n") + 1) + 3
    _save(figure, path)


def _wrap(text: str, lines: int, width: int = 34) -> str:
    return textwrap.fill(" ".join(str(text).split()), width, max_lines=lines, placeholder=" …")


def _side_by_side(images: Sequence[np.ndarray]) -> np.ndarray:
    """Several images as one `[H, W, 3]`, padded with white to one height, 4 pixels apart."""
    colored = [np.repeat(image[..., None], 3, -1) if image.ndim == 2 else image[..., :3] for image in images]
    height = max(image.shape[0] for image in colored)
    padded = [np.pad(i, ((0, height - len(i)), (0, 4), (0, 0)), constant_values=255) for i in colored]
    return np.concatenate(padded, 1)[:, :-4]
