"""python -m vlm_jax.kernels.tune [--only=OPERATION] [--shapes=NAME,NAME] [--rounds=5] [--budget=300] [--output=FILE]

Searches for the sizes of tiles (docs/kernels.md) with which the operations are fastest on the device of this machine.
VLM_JAX_TILES=FILE makes any program use the file that it writes.

One size after another: a half, twice, a quarter and four times the present one, each on the shapes of the operation's
shapes.py whose program it changes. A candidate must compute what the present size does, value and all gradients; then
all take turns. It replaces the present one if it is at least 3 % faster on (geometric) average and loses more than 5 %
on no shape, and is so again when the two are timed a second time. Features are bfloat16; on a CPU they are float32, and
larger shapes are cut.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vlm_jax.compat import check_versions
from vlm_jax.config import parse_command
from vlm_jax.errors import UsageError, run_command, suggest
from vlm_jax.kernels import tiles
from vlm_jax.kernels.attention.api import attention
from vlm_jax.kernels.attention.shapes import SHAPES as ATTENTION
from vlm_jax.kernels.contrastive.api import sigmoid_contrastive_loss, softmax_contrastive_loss
from vlm_jax.kernels.contrastive.shapes import SHAPES as CONTRASTIVE
from vlm_jax.kernels.cross_entropy.api import linear_cross_entropy
from vlm_jax.kernels.cross_entropy.shapes import SHAPES as CROSS_ENTROPY
from vlm_jax.kernels.placement import compute_capability, platform_named

FLAGS = {
    "only": (tiles.OPERATIONS, [], "an operation whose sizes are searched for; else all are"),
    "shapes": (str, None, "names of its shapes.py, with commas; else all that are not small"),
    "rounds": (int, 5, "how often a candidate is timed"),
    "budget": (float, 300.0, "seconds for all, about; shapes that would take longer are left out, the largest first"),
    "output": (str, "tiles.json", "the file to write; what it has of other devices and operations stays"),
}
FACTORS = (0.5, 2, 0.25, 4)  # of the present size; of two that make the same program the first is taken
BETTER, WORST = 1.03, 0.95  # times as fast as at present: on average at least, on each shape at least
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of an output's largest entry
LIGHT = 2e10  # arithmetic operations: a fifth of a second on two cores


# -------------------------------------------------------------------------------------------------------- what is timed


@dataclasses.dataclass(frozen=True)
class Call:
    """A value and all its gradients at one shape: `function` of `arguments()`, which are trees of numpy arrays.

    work: its arithmetic operations, from which a time is foretold.
    """

    name: str
    function: Callable[..., Any]
    arguments: Callable[[], tuple[Any, ...]]
    work: float


@dataclasses.dataclass(frozen=True)
class Subject:
    """An operation. calls: of a name, a shape and a type of features. work: arithmetic operations of a shape. cut: what
    is halved on a CPU while the work is beyond `LIGHT`: fields that go together, and the least of the first."""

    shapes: Mapping[str, Any]
    calls: Callable[[str, Any, np.dtype], list[Call]]
    work: Callable[[Any], float]
    cut: Sequence[tuple[tuple[str, ...], int]]


def _contrastive(name: str, shape: Any, dtype: np.dtype) -> list[Call]:
    def call(kind: str, loss: Callable[..., Any], count: int, products: int) -> Call:
        def arguments() -> tuple[Any, ...]:
            arrays = shape.arguments()
            features = (arrays[key].astype(dtype) for key in ("image", "text"))
            return (*features, arrays["scale"], arrays["bias"])[:count]

        function = jax.value_and_grad(loss, argnums=tuple(range(count)))
        return Call(f"{kind} {name}", function, arguments, 2 * products * shape.pairs**2 * shape.width)

    return [call("softmax", softmax_contrastive_loss, 3, 4), call("sigmoid", sigmoid_contrastive_loss, 4, 3)]


def _attention(name: str, shape: Any, dtype: np.dtype) -> list[Call]:
    def function(arrays: Any, mask: Any, d_out: Any) -> Any:
        out, pull = jax.vjp(lambda arrays: attention(**arrays, **mask, **options), arrays)
        return out, pull(d_out)

    def arguments() -> tuple[Any, ...]:
        arrays, others = shape.arguments()
        arrays = {key: x.astype(dtype) for key, x in arrays.items()}
        return arrays, {key: x for key, x in others.items() if key not in options}, arrays["q"][:, ::-1]

    options = {key: getattr(shape, key) for key in ("causal", "sliding_window", "softcap")}
    return [Call(name, function, arguments, _work_of_attention(shape))]


def _work_of_attention(shape: Any) -> float:
    whole = 14 * shape.batch * shape.heads * shape.queries * shape.keys * shape.features
    return whole / 2 if shape.causal and shape.queries > 1 else whole


def _cross_entropy(name: str, shape: Any, dtype: np.dtype) -> list[Call]:
    def loss(hidden: Any, kernel: Any, labels: Any, weights: Any) -> Any:
        return linear_cross_entropy(hidden, kernel, labels, weights, **options)[0]

    def arguments() -> tuple[Any, ...]:
        arrays, _ = shape.arguments()
        return arrays["hidden"].astype(dtype), arrays["kernel"].astype(dtype), arrays["labels"], arrays["weights"]

    options = {key: getattr(shape, key) for key in ("softcap", "z_loss", "label_smoothing")}
    return [Call(name, jax.value_and_grad(loss, argnums=(0, 1)), arguments, _work_of_cross_entropy(shape))]


def _work_of_cross_entropy(shape: Any) -> float:
    return 6 * shape.tokens * shape.labelled * shape.features * shape.entries


SUBJECTS = {
    "contrastive": Subject(CONTRASTIVE, _contrastive, lambda x: 8 * x.pairs**2 * x.width, [(("pairs",), 2048)]),
    "attention": Subject(ATTENTION, _attention, _work_of_attention, [(("batch",), 1), (("kv_heads", "heads"), 1)]),
    "cross_entropy": Subject(CROSS_ENTROPY, _cross_entropy, _work_of_cross_entropy, [(("features",), 128)]),
}


def lighter(subject: Subject, shape: Any) -> Any:
    """The shape as a CPU takes it."""
    for fields, least in subject.cut:
        while subject.work(shape) > LIGHT and getattr(shape, fields[0]) >= 2 * least:
            shape = dataclasses.replace(shape, **{field: getattr(shape, field) // 2 for field in fields})
    return shape


def calls_of(operation: str, names: Sequence[str], dtype: str, on_cpu: bool) -> list[Call]:
    """Those of the shapes of these names, or of all that are not small; the lightest first."""
    subject, found = SUBJECTS[operation], {}
    for name, shape in subject.shapes.items():
        if name in names if names else not shape.small:
            cut = lighter(subject, shape) if on_cpu else shape
            found.setdefault(cut, name if cut == shape else f"{name}, cut")
    calls = [call for shape, name in found.items() for call in subject.calls(name, shape, jnp.dtype(dtype))]
    return sorted(calls, key=lambda call: call.work)


# --------------------------------------------------------------------------------------------------------------- timing


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def in_turns(sides: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[float]]:
    """Seconds of each side, round after round, each beginning with another side; a first round is not counted."""
    took: dict[Any, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            one = seconds(sides[name])
            if number:
                took[name].append(one)
    return took


@dataclasses.dataclass
class Comparison:
    """Of values of one size; the first is the present one.

    took: milliseconds by call and value. ratios: times as fast as the present value, by value and call. out: what is
    wrong with a value. left_out: why a call was not timed.
    """

    values: list[int]
    took: dict[str, dict[int, float]] = dataclasses.field(default_factory=dict)
    ratios: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)
    out: dict[int, str] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    def average(self, value: int) -> float:
        """Over the calls whose program the value changes."""
        return statistics.geometric_mean(self.ratios[value].values())

    def running(self) -> list[int]:
        """The candidates that are right, and have lost too much on no call."""
        lost = {value for value, ratios in self.ratios.items() if min(ratios.values()) < WORST}
        return [value for value in self.values[1:] if value not in self.out and value not in lost]

    def best(self) -> int | None:
        """The value to take instead of the present one."""
        better = [value for value in self.running() if value in self.ratios and self.average(value) >= BETTER]
        return max(better, key=self.average, default=None)


class Bench:
    """The calls of one operation on this device, compiled once per program.

    sizes: the present ones. place: arrays to the device. tolerance: of an output's largest entry. memory: bytes that a
    call may take. Of calls that are the same program, the first stays.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        sizes: Mapping[str, int],
        place: Callable[[Any], Any],
        tolerance: float,
        memory: float,
    ):
        self.place, self.tolerance, self.memory = place, tolerance, memory
        self._arrays: dict[str, Any] = {}
        self._programs: dict[tuple[str, str], jax.stages.Compiled] = {}
        self._reads: dict[str, set[str]] = {}  # which sizes a call looks up
        self._once: dict[str, float] = {}  # seconds of a call
        self._made_in = 0.0  # seconds, to make a program
        distinct: dict[str, Call] = {}
        for call in calls:
            distinct.setdefault(self._lower(call, sizes).as_text(), call)
        self.calls = list(distinct.values())

    def compare(
        self,
        name: str,
        values: Sequence[int],
        sizes: Mapping[str, int],
        rounds: int,
        until: float = math.inf,
        only: Sequence[str] | None = None,
    ) -> Comparison:
        """Times values of the size `name`, the first the present one, with the other sizes as in `sizes`.

        A value that lost too much on one call is not timed on the next. until: when to be done, by `time.perf_counter`,
        about; what would take longer is left out. only: names of calls.
        """
        found = Comparison(list(values))
        for call in self.calls:
            if (only is not None and call.name not in only) or name not in self._reads[call.name]:
                continue
            if not (running := found.running()):
                break
            once = self._once.get(call.name, self._pace() * call.work)
            if time.perf_counter() + (1 + len(running)) * (self._made_in + (rounds + 2) * once) > until:
                found.left_out[call.name] = "for want of time"
                continue
            self._compare(found, call, name, sizes, rounds)
        return found

    def _compare(self, found: Comparison, call: Call, name: str, sizes: Mapping[str, int], rounds: int) -> None:
        present, want = found.values[0], None
        same: dict[tuple[str, str], list[int]] = {}  # the values that make a program
        for value in [present, *found.running()]:
            try:
                program = self._program(call, {**sizes, name: value})
                if program not in same:
                    result = self._run(call, program)
                    if value == present:
                        want = result
                    elif not (off := apart(result, want)) <= self.tolerance:
                        raise ArithmeticError(f"{off:.1e} off what the present size computes")
            except Exception as error:  # whatever a compiler says of a tile that does not fit
                why = (str(error).splitlines() or [type(error).__name__])[0]
                if value == present:
                    found.left_out[call.name] = why
                    return
                found.out[value] = f"{call.name}: {why}"
            else:
                same.setdefault(program, []).append(value)
        if len(same) == 1:
            return
        arrays = self._arrays[call.name]
        sides = {values[0]: functools.partial(self._programs[program], *arrays) for program, values in same.items()}
        took = in_turns(sides, rounds)
        self._once[call.name] = statistics.median(took[present])
        found.took[call.name] = {}
        for first, *others in same.values():
            ratio = statistics.median(ours / theirs for ours, theirs in zip(took[present], took[first], strict=True))
            for value in (first, *others):
                found.took[call.name][value] = 1e3 * statistics.median(took[first])
                if first != present:
                    found.ratios.setdefault(value, {})[call.name] = ratio

    def _lower(self, call: Call, sizes: Mapping[str, int]) -> jax.stages.Lowered:
        if call.name not in self._arrays:
            self._arrays[call.name] = self.place(call.arguments())
        with tiles.trying(sizes) as read:
            lowered = jax.jit(call.function).lower(*self._arrays[call.name])
        self._reads.setdefault(call.name, set()).update(read)
        return lowered

    def _program(self, call: Call, sizes: Mapping[str, int]) -> tuple[str, str]:
        """The key of the program that the call is under these sizes."""
        began, lowered = time.perf_counter(), self._lower(call, sizes)
        key = call.name, lowered.as_text()
        if key not in self._programs:
            self._programs[key] = lowered.compile()
            self._made_in = time.perf_counter() - began
        return key

    def _run(self, call: Call, program: tuple[str, str]) -> Any:
        used = self._programs[program].memory_analysis()
        if used is not None:
            needed = used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes
            if needed > self.memory:
                raise MemoryError(f"needs {needed / 1e9:,.1f} GB of memory, and may take {self.memory / 1e9:,.1f}")
        began = time.perf_counter()
        result = jax.block_until_ready(self._programs[program](*self._arrays[call.name]))
        self._once.setdefault(call.name, time.perf_counter() - began)
        return result

    def _pace(self) -> float:
        """Seconds per arithmetic operation, of the fastest call so far; 0 before the first."""
        return min((self._once[call.name] / call.work for call in self.calls if call.name in self._once), default=0.0)


def apart(got: Any, want: Any) -> float:
    """The largest difference of any output, by its largest entry; NaN where there is one."""

    def one(a: jax.Array, b: jax.Array) -> float:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-30))

    offs = [one(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)]
    return math.nan if any(map(math.isnan, offs)) else max(offs)


# --------------------------------------------------------------------------------------------------------------- search


def candidates(name: str, present: int) -> list[int]:
    operation, _, size = name.partition(".")
    unit = tiles.SIZES[operation][size].unit
    found = [max(1, round(present * factor / unit)) * unit for factor in FACTORS]
    return [value for value in dict.fromkeys(found) if value != present]


def search(operation: str, bench: Bench, sizes: dict[str, int], rounds: int, until: float) -> dict[str, int]:
    """The sizes that were compared, and what was found; prints every comparison.

    sizes: all that the device uses, by the names of `tile_size`; what is found replaces what is there.
    """
    found = {}
    for number, name in enumerate(list(sizes)):
        began, present = time.perf_counter(), sizes[name]
        share = (until - began) / (len(sizes) - number)
        seen = bench.compare(name, [present, *candidates(name, present)], sizes, rounds, began + share)
        best, note = seen.best(), f"{present:,} stays"
        if best is not None:
            won = f"{best:,} is {seen.average(best):.2f} times as fast"
            best = bench.compare(name, [present, best], sizes, rounds, only=list(seen.took)).best()
            note = f"{won}, twice, and taken" if best is not None else f"{won}, but not a second time: {note}"
        print("\n".join(table(name, seen, note)), flush=True)
        if seen.ratios:
            found[name] = sizes[name] = best or present
    return found


def table(name: str, seen: Comparison, note: str) -> list[str]:
    """Milliseconds, and times as fast as the present size."""
    operation, _, size = name.partition(".")
    lines = [f"\n{name}, the most {tiles.SIZES[operation][size].what}"]
    if seen.took:
        present, columns = seen.values[0], sorted(set(seen.values) - set(seen.out))
        heads = [f"{value:,}{', present' * (value == present)}" for value in columns]
        rows = [("ms (times as fast)", heads)]
        for call, took in seen.took.items():
            ratios = {
                value: f" ({seen.ratios[value][call]:.2f})" for value in seen.ratios if call in seen.ratios[value]
            }
            rows.append((call, [f"{took[x]:,.1f}{ratios.get(x, '')}" if x in took else "" for x in columns]))
        if timed := [x for x in seen.running() if x in seen.ratios]:
            rows.append(("average", [f"{seen.average(x):.2f}" if x in timed else "" for x in columns]))
        width = max(len(row) for row, _ in rows)
        lines += [f"  {row:<{width}}" + "".join(f"{cell:>20}" for cell in cells) for row, cells in rows]
        lines.append(f"  {note}")
    elif not seen.left_out:
        lines.append("  makes no difference to any of these shapes here")
    lines += [f"  {value:,} is out: {why}" for value, why in seen.out.items()]
    for why in dict.fromkeys(seen.left_out.values()):
        lines.append(f"  without {'; '.join(call for call, one in seen.left_out.items() if one == why)}: {why}")
    return lines


# -------------------------------------------------------------------------------------------------------------- command


def main(argv: Sequence[str]) -> None:
    given = parse_command(argv, FLAGS, usage=__doc__ or "")
    operations = [name for name in tiles.OPERATIONS if not given.only or name in given.only]
    names = [word.strip() for word in (given.shapes or "").split(",") if word.strip()]
    known = [name for operation in operations for name in SUBJECTS[operation].shapes]
    for name in names:
        if name not in known:
            raise UsageError(f"--shapes: {name!r} is no shape of {' or '.join(operations)}{suggest(name, known)}")
    if given.rounds < 1 or not given.budget > 0:
        raise UsageError(f"--rounds={given.rounds} and --budget={given.budget:g} must be positive")
    output = Path(given.output)
    if not output.parent.is_dir():
        raise UsageError(f"--output={output}: there is no folder {output.parent}")
    whole = tiles.read_table(output) if output.exists() else {}
    check_versions()

    began = time.perf_counter()
    device = jax.local_devices()[0]
    kind, platform = device.device_kind, platform_named(device.device_kind)
    halves = platform == "tpu" or (platform == "gpu" and (compute_capability(kind) or 8.0) >= 8.0)
    dtype = "bfloat16" if halves else "float32"
    print(f"{kind}, jax {version('jax')}, {dtype}, {given.rounds} rounds, about {given.budget:g} s")
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,), devices=[device])
    place = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec()))
    counts = {operation: len(sizes_of(operation, platform)) for operation in operations}
    found = {}
    with jax.set_mesh(mesh):
        for number, operation in enumerate(operations):
            calls = calls_of(operation, names, dtype, platform == "cpu")
            sizes = {name: tiles.tile_size(name, kind) for name in sizes_of(operation, platform)}
            now = time.perf_counter()
            left = began + given.budget - now
            until = now + left * counts[operation] / sum(counts[name] for name in operations[number:])
            if calls:
                bench = Bench(calls, sizes, place, TOLERANCE[dtype], memory_of(device))
                found[operation] = search(operation, bench, sizes, given.rounds, until)
    if not any(found.values()):
        raise UsageError("no two sizes could be compared: give a longer --budget, or other --shapes")
    words = [f"--only={name}" for name in given.only] + [f"--shapes={given.shapes}"] * bool(names)
    command = " ".join(["python -m vlm_jax.kernels.tune", *words])
    source = f"{command}, jax {version('jax')}, {datetime.date.today()}"
    entry = whole.setdefault(kind, {})
    for operation, sizes in found.items():
        if sizes:
            entry[operation] = {tiles.SOURCE: source} | {name.partition(".")[2]: size for name, size in sizes.items()}
    output.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    took = f"{time.perf_counter() - began:.0f} s"
    print(f"\n{output} is written ({took}); {tiles.ENVIRONMENT}={output} makes programs use it")


def sizes_of(operation: str, platform: str) -> list[str]:
    return [f"{operation}.{name}" for name, size in tiles.SIZES[operation].items() if platform in size.platforms]


def memory_of(device: jax.Device) -> float:
    """Bytes that a call may take: nine tenths of the device's, half of a CPU's machine's."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        return 0.9 * limit
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 if hasattr(os, "sysconf") else math.inf


if __name__ == "__main__":
    run_command(main, out_of_memory="choose other --shapes")
