"""python -m vlm_jax.data.show --config=FILE[:ARGS] [--config.KEY=VALUE ...] [--stage=NAME] [--samples=N] [--html]

Shows what the model will see: rows as training makes them, in its order, with the tokens that are trained coloured
(between [[ and ]] where the output is no terminal), images by the places they take, and their tiles as pictures. With
packing, a row with all of its records. Needs no weights and compiles nothing.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm_jax.compat import check_versions
from vlm_jax.config import load_config, parse_command, plain, split_spec
from vlm_jax.errors import UsageError, run_command, suggest

FLAGS = {
    "stage": (str, None, "of the config; default its last"),
    "samples": (int, 4, "rows to show"),
    "first": (int, 0, "the first of them, counted in the order of training"),
    "output": (str, None, "folder of the pictures (default runs/show/<config>)"),
    "html": (bool, False, "write index.html too, one page with everything, for a browser"),
}


def main(argv: Sequence[str]) -> None:
    given = parse_command(argv, FLAGS, config=True, usage=__doc__ or "")
    for name, least in (("samples", 1), ("first", 0)):
        if getattr(given, name) < least:
            raise UsageError(f"--{name} is {getattr(given, name)}; give at least {least}")
    config, name = load_config(given.config, given.overrides)
    output = Path(given.output or Path("runs/show") / name)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
    check_versions()

    # The heavy imports come after the command line has been understood.
    from vlm_jax.data.rendering import COLOURS, MARKS, describe, page, png, token_row

    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    loader, stage = _loader(config, given.stage)
    shown = []
    try:
        output.mkdir(parents=True, exist_ok=True)
        for number, one in _rows(loader, given.first, given.samples):
            print(f"{one.title}\n{one.facts}")
            for text in one.bad:
                print(f"\x1b[31m{text}\x1b[0m" if colours else text)
            for part in one.segments:
                print(f"{describe(part)}\n\n{token_row(part, COLOURS if colours else MARKS)}\n")
            if one.picture is not None:
                file = output / f"row-{number:06d}.png"
                file.write_bytes(png(one.picture))
                print(f"tiles: {file}")
            print()
            shown.append(one)
        if given.html:
            title = f"{split_spec(given.config)[0]}, stage {stage.name}"
            (output / "index.html").write_text(page(title, shown), encoding="utf-8")
            print(f"page: {output / 'index.html'}")
    except OSError as error:
        raise UsageError(f"cannot write to --output={output}: {error.strerror}") from error


def _loader(config: Any, name: str | None) -> tuple[Any, Any]:
    """The training data of a stage, as the trainer makes it, and the stage."""
    import jax

    from vlm_jax.data.packing import AUTO
    from vlm_jax.families import make_family
    from vlm_jax.inputs import run_tokenizer, stage_loader
    from vlm_jax.recipe import stages
    from vlm_jax.sharding import make_mesh

    known = stages(config)
    names = [stage.name for stage in known]
    name = name or names[-1]
    if name not in names:
        raise UsageError(f"the config has no stage {name!r}{suggest(name, names)}; it has {', '.join(names)}")
    number = names.index(name)
    stage = known[number]
    if stage.packing.fit == AUTO:
        raise UsageError("config.packing.fit is 'auto', which a run decides on its devices; give best_fit or None here")
    with jax.set_mesh(make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])):
        family = make_family(plain(config.model))
        tokenizer, images = run_tokenizer(config, family.vocab_size), family.images(stage.images)
        return stage_loader(config, stage, number, tokenizer=tokenizer, images=images), stage


def _rows(loader: Any, first: int, count: int) -> Iterator[tuple[int, Any]]:
    """The rows `first` to `first + count` of the loader's order, with their numbers; slots that stay empty are left
    out."""
    import numpy as np

    from vlm_jax.data.conversation import begin_with_user
    from vlm_jax.data.reading import Reader
    from vlm_jax.data.records import USED
    from vlm_jax.data.rendering import PageRow, Segment, picture, segment
    from vlm_jax.data.rows import fusion_fields

    slots, encode = loader.order.slots, loader.encode
    reader = Reader(loader.order, loader.sources, encode, fusion_fields(encode.images), np.arange(slots))
    last = loader.steps * slots
    if first >= last:
        raise UsageError(f"--first is {first}, but the stage has {last:,} rows; give less")
    for number in range(first, min(first + count, last)):
        slot = reader(number)
        if not slot.samples:
            continue
        step, place = divmod(number, slots)
        segments: list[Segment] = []
        bad, tile = [], 0
        for position, sample in enumerate(slot.samples):
            source = loader.sources[sample.source]
            if sample.kind and sample.kind not in USED:
                bad.append(
                    f"record {sample.id!r}, number {sample.index} of {source.path}: {sample.kind}: {sample.message}"
                )
                continue
            record, _ = begin_with_user(source[sample.index])
            whole = encode.measure(record, source.images, (loader.order.seed, step, place, position))
            measured, _ = encode.limit(whole)
            segments.append(
                segment(slot.row, len(segments) + 1, tile, measured, sample, str(source.path), encode.tokenizer)
            )
            tile += measured.tiles
        yield (
            number,
            PageRow(
                title=f"row {number:,} (step {step:,}, slot {place:,})",
                facts=_facts(loader, slot),
                segments=tuple(segments),
                bad=tuple(bad),
                picture=picture(segments),
                row=slot.row,
            ),
        )


def _facts(loader: Any, slot: Any) -> str:
    """How full the row is."""
    if not slot.row:
        return "nothing of it can be used: it is a row of padding"
    tokens, tiles = len(slot.row["tokens"]), len(slot.row["tile_image"])
    longest, most = (
        min(size for size in sizes if size >= need) for sizes, need in ((loader.lengths, tokens), (loader.tiles, tiles))
    )
    records = f", {slot.used} records" if slot.used > 1 else ""
    return f"{tokens:,} of {longest:,} tokens, {tiles} of {most} tiles{records}"


if __name__ == "__main__":
    run_command(main)
