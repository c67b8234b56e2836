"""python -m vlm_jax.data.audit --data=FILE [--images=DIR] [--eval=FILE] [--config=FILE[:ARGS]] [--output=DIR] [--fix]

Reads all of a data set and says what is wrong with it: records that training cannot use, images that stand in it twice
or in the validation data too, photos on their side. With a config also how long its records are in tokens and tiles,
how many are too long, and how well they fill rows. No model is needed. --fix writes a clean copy; the original stays as
it is. Leaves with status 2, as training would, if more than 1 % of the records are bad (config.data.max_bad_fraction).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vlm_jax.compat import check_versions
from vlm_jax.config import load_config, parse_command, plain
from vlm_jax.data.sources import SourceSpec, cache_folder, open_source
from vlm_jax.errors import UsageError, run_command, suggest

FLAGS = {
    "data": (str, None, "the records; default those of the config's stage"),
    "images": (str, None, "folder of the images, if not the file's own"),
    "eval": (str, None, "validation data, which nothing of --data may show"),
    "stage": (str, None, "of the config; default its last"),
    "output": (str, None, "folder of the report (default runs/audit/<name of the data>)"),
    "fix": (bool, False, "write a clean copy into the folder clean/ of the report"),
    "workers": (int, None, "processes; default the number of cores"),
}
MAX_BAD_FRACTION = 0.01
LENGTHS = (0.5, 1, 2, 4)  # rows, as multiples of the config's longest
TIMED = 200  # images that are made into tiles, for the speed of training


def main(argv: Sequence[str]) -> None:
    given = parse_command(argv, FLAGS, config=True, usage=__doc__ or "")
    workers = (os.cpu_count() or 1) if given.workers is None else given.workers
    if given.data is None and given.config is None:
        raise UsageError("nothing to audit: give --data=FILE, or --config=FILE for the data of a config")
    if given.config is None and (given.overrides or given.stage):
        raise UsageError("--stage and --config.KEY belong to --config=FILE, which is missing")
    check_versions()

    from vlm_jax.data.cleaning import check_cleanable, write_clean
    from vlm_jax.data.inspection import inspect

    recipe = _recipe(given) if given.config else None
    if recipe is not None:
        train, held_out = recipe.stage.train, recipe.stage.eval
    else:
        train = (SourceSpec(given.data, given.images),)
        held_out = SourceSpec(given.eval, given.images) if given.eval else None
    specs = [*train, *([held_out] if held_out else [])]
    sources = [open_source(spec.path, spec.images, confined=spec.confined) for spec in specs]
    output = Path(given.output or Path("runs/audit") / sources[0].path.stem)
    if given.fix:
        check_cleanable(sources, output / "clean")
    _make(output)
    template = recipe.stage.template if recipe else None
    found = inspect(sources, [spec is held_out for spec in specs], template=template, workers=workers)
    sizes = _measure(found, recipe, workers) if recipe else None
    report = _report(found, sizes, recipe, workers)
    _write(output, found, report, sizes)
    print(table(report, found))
    if given.fix:
        for copy in write_clean(found, output / "clean"):
            turned = f", {copy.turned:,} images turned" if copy.turned else ""
            print(
                f"clean: {copy.file} ({copy.kept:,} records, {copy.removed:,} removed{turned}), images: {copy.images}"
            )
    for name in ("audit.json", "histograms.png", "faults.jsonl"):
        print(f"  {output / name}")
    allowed = recipe.config.data.max_bad_fraction if recipe else MAX_BAD_FRACTION
    if report["bad_fraction"] > allowed:
        mend = "" if given.fix else "; --fix writes a clean copy"
        raise UsageError(
            f"{report['bad']:,} of {report['records']:,} records are bad, more than {allowed:.2%} (above, and one by "
            f"one in {output / 'faults.jsonl'}){mend}"
        )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a config says of its data. encoder: makes the rows of training."""

    config: Any
    spec: str
    stage: Any
    encoder: Any


def _recipe(given: SimpleNamespace) -> Recipe:
    import jax

    from vlm_jax.data.reading import FusionEncoder
    from vlm_jax.families import make_family
    from vlm_jax.inputs import run_tokenizer
    from vlm_jax.recipe import stages
    from vlm_jax.sharding import make_mesh

    config, _ = load_config(given.config, given.overrides)
    for key, value in {"train": given.data, "eval": given.eval, "images": given.images}.items():
        if value is not None:
            config.data[key] = value
    known = {stage.name: stage for stage in stages(config)}
    name = given.stage or list(known)[-1]
    if name not in known:
        raise UsageError(f"the config has no stage {name!r}{suggest(name, known)}; it has {', '.join(known)}")
    stage = known[name]
    with jax.set_mesh(make_mesh()):
        family = make_family(plain(config.model))
    images, tokenizer = family.images(stage.images), run_tokenizer(config, family.vocab_size)
    encoder = FusionEncoder(
        tokenizer,
        stage.template,
        images,
        max(config.buckets.lengths),
        max(config.buckets.tiles),
        stage.image_placement,
        stage.compat_drop_mismatch,
        config.data.truncate,
    )
    return Recipe(config, given.config, stage, encoder)


# ------------------------------------------------------------------------------------------------------------ measuring


def _measure(found: Any, recipe: Recipe, workers: int) -> Any:
    """The index of all records. What the encoder finds wrong, and an inspection without a tokenizer could not, is
    added."""
    from vlm_jax.data.index import KINDS, build_index
    from vlm_jax.data.inspection import NOTES, Measurer, in_parallel

    index = build_index(found.sources, recipe.encoder, workers=workers, cache=cache_folder() / "index")
    unusable = {
        (fault.source, fault.index) for fault in found.faults if fault.kind in KINDS and fault.kind not in NOTES
    }
    kinds = index.limited(recipe.encoder).kinds
    odd = [place for place, kind in zip(found.records, kinds, strict=True) if kind and place not in unusable]
    for place, (kind, message) in zip(
        odd, in_parallel(Measurer(found.sources, recipe.encoder), odd, workers, "records"), strict=True
    ):
        if kind:
            found.add(place, kind, message)
    found.faults.sort(key=lambda one: (one.source, one.index))
    return index


def _report(found: Any, index: Any, recipe: Recipe | None, workers: int) -> dict[str, Any]:
    """What audit.json holds."""
    import numpy as np

    from vlm_jax.data.inspection import ADVICE, NOTES
    from vlm_jax.data.statistics import spread

    by_kind: dict[str, list[Any]] = {}
    for fault in found.faults:
        by_kind.setdefault(fault.kind, []).append(fault)
    bad = {(fault.source, fault.index) for fault in found.faults if fault.kind not in NOTES}
    read = [facts for facts in found.images.values() if not facts.kind]
    report = {
        "data": [str(one.path) for one, held in zip(found.sources, found.held_out, strict=True) if not held],
        "eval": [str(one.path) for one, held in zip(found.sources, found.held_out, strict=True) if held],
        "records": len(found.records),
        "images": len(found.images),
        "bad": len(bad),
        "bad_fraction": len(bad) / len(found.records),
        "faults": {
            kind: {
                "records": len({(one.source, one.index) for one in faults}),
                "bad": kind not in NOTES,
                "first": " ".join(f"{faults[0].id}: {faults[0].message}".split()),
                "advice": ADVICE[kind],
            }
            for kind, faults in sorted(by_kind.items(), key=lambda item: (item[0] in NOTES, -len(item[1])))
        },
        "malformed": dict(Counter(_pattern(fault.message) for fault in by_kind.get("malformed", ())).most_common()),
        "images_per_second": round(len(found.images) / found.seconds, 1) if found.images else None,
        "workers": workers,
        "width": spread(np.array([facts.size[0] for facts in read])),
        "height": spread(np.array([facts.size[1] for facts in read])),
        "kilobytes": spread(np.array([facts.bytes / 1000 for facts in read])),
        "words": spread(np.array([facts.words for facts in found.records.values() if facts.digest])),
    }
    return report | (_lengths(found, index, recipe, workers) if recipe is not None else {})


def _pattern(message: str) -> str:
    """A message without what differs from record to record: texts in quotes and numbers."""
    return re.sub(r"\d+", "N", re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", message))


def _lengths(found: Any, index: Any, recipe: Recipe, workers: int) -> dict[str, Any]:
    """The part of the report that a config adds: of the training data that can be used."""
    from vlm_jax.data.statistics import fill, spread

    used = trained_on(found, index)
    tokens, tiles = index.tokens[used], index.tiles[used]
    longest = recipe.encoder.longest
    buckets = sorted({*recipe.config.buckets.lengths, *(int(longest * times) for times in LENGTHS)})
    rows = [int(longest * times) for times in LENGTHS]
    cut = recipe.encoder.truncate
    filling = fill(tokens, tiles, rows, samples=recipe.stage.samples, seed=0, truncate=cut)
    return {
        "config": recipe.spec,
        "stage": recipe.stage.name,
        "tokens": spread(tokens),
        "tiles": spread(tiles),
        "trained": spread(index.trained[used]),
        "too_long": {
            str(length): round(float((tokens > length).mean()), 4) if len(tokens) else 0.0 for length in buckets
        },
        "filling": [one.as_json() for one in filling],
        "training_images_per_second": _training_speed(found, recipe, workers),
    }


def trained_on(found: Any, index: Any) -> Any:
    """bool [N]: the records of the training data that can be used."""
    import numpy as np

    held_out = np.concatenate(
        [np.full(len(one), held) for one, held in zip(found.sources, found.held_out, strict=True)]
    )
    return index.usable & ~held_out


def _training_speed(found: Any, recipe: Recipe, workers: int) -> float | None:
    """Images per second that are read and made into tiles as for training, of some that stand all over the data; None
    where there are too few to tell."""
    from vlm_jax.data.inspection import CHUNK, ImageLooker, TileMaker, in_parallel

    names = [name for name, facts in found.images.items() if not facts.kind]
    names = names[:: max(len(names) // TIMED, 1)][:TIMED]
    if len(names) < TIMED:
        return None
    maker = TileMaker(ImageLooker(found.sources), recipe.encoder.images)
    done = in_parallel(maker, names, workers, "images")
    for _ in range(4 * CHUNK):  # until all processes are at work
        next(done)
    began = time.monotonic()
    return round(sum(1 for _ in done) / (time.monotonic() - began), 1)


# ------------------------------------------------------------------------------------------------------------- output


def table(report: Mapping[str, Any], found: Any) -> str:
    """The report for a terminal."""
    from vlm_jax.data.rendering import printable

    lines = []
    for source, held_out in zip(found.sources, found.held_out, strict=True):
        lines.append(f"{source.path}: {len(source):,} records{' (validation)' if held_out else ''}")
    on = f"on {report['workers']} processes" if report["workers"] else "in threads"
    speed = f", read at {report['images_per_second']:,} a second {on}" if report["images"] else ""
    lines += [f"{report['images']:,} images{speed}", ""]
    lines += [f"{'fault':<20}{'records':>9}  first"] if report["faults"] else ["no faults"]
    for kind, fault in report["faults"].items():
        lines.append(f"{kind:<20}{fault['records']:>9,}  {'' if fault['bad'] else '(note) '}{fault['first']:.160}")
        lines.append(f"{'':<31}-> {fault['advice']}")
        if kind == "malformed" and len(report["malformed"]) > 1:
            lines += [f"{'':<20}{count:>9,}  {message:.160}" for message, count in report["malformed"].items()]
    lines.append(f"bad: {report['bad']:,} of {report['records']:,} records ({report['bad_fraction']:.2%})")
    named = ("width", "height", "kilobytes", "words", "tokens", "tiles", "trained")
    shown = [name for name in named if report.get(name)]
    lines += ["", f"{'':<20}{'min':>9}{'median':>9}{'mean':>9}{'p95':>9}{'max':>9}"]
    for name in shown:
        label = {"trained": "trained tokens"}.get(name, name)
        lines.append(f"{label:<20}" + "".join(f"{value:>9,.4g}" for value in report[name].values()))
    if "config" in report:
        lines += [
            "",
            "longer than T       "
            + "   ".join(f"{length}: {share:.1%}" for length, share in report["too_long"].items()),
        ]
    if report.get("filling"):
        names = [name for name in report["filling"][0] if name.endswith("_fit")]
        heads = "".join(f"{name.replace('_', ' '):>12}" for name in ("padded", *names))
        lines += ["", f"{'real tokens at T':<20}{'tiles':>9}{heads}{'records a row':>16}"]
        for one in report["filling"]:
            shares = "".join(f"{one[name]:>12.1%}" for name in ("padded", *names))
            lines.append(f"{one['length']:<20,}{one['tiles']:>9,}{shares}{one['per_row']:>16.1f}")
    if report.get("training_images_per_second"):
        lines += ["", f"this host reads {report['training_images_per_second']:,} images a second for training"]
    return "\n".join([*map(printable, lines), ""])


def _make(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to --output={output}: {error.strerror}") from error


def _write(output: Path, found: Any, report: Mapping[str, Any], index: Any) -> None:
    from vlm_jax.data.histograms import plot

    faults = [
        {
            "id": one.id,
            "source": str(found.sources[one.source].path),
            "record": one.index,
            "kind": one.kind,
            "file": one.file,
            "message": one.message,
        }
        for one in found.faults
    ]
    try:
        (output / "faults.jsonl").write_text("".join(json.dumps(line) + "\n" for line in faults))
        (output / "audit.json").write_text(json.dumps(report, indent=1) + "\n")
        plot(found, report, output / "histograms.png", None if index is None else (index, trained_on(found, index)))
    except OSError as error:
        raise UsageError(f"cannot write to --output={output}: {error.strerror}") from error


if __name__ == "__main__":
    run_command(main)
