"""Tables of images with what is said about them, as records: CSV files, folders that are classes, COCO captions, VQA.

Each reader yields (id, record), or (id, what is wrong with it).
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlm_jax.data.records import BadRecord, Image, Message, Record
from vlm_jax.data.sources.shards import ShardSource, pack_record, write_shard
from vlm_jax.data.tasks import write_whole
from vlm_jax.errors import UsageError

Row = tuple[str, Record | BadRecord]

OWN_QUESTION = "{question}"
CAPTION = "Describe the image."
CLASS = "What is in the image?"
# What the columns of a table are called, the likeliest first; case, spaces and hyphens do not count.
COLUMNS: dict[str, tuple[str, ...]] = {
    "image": ("image", "image_path", "image_file", "filepath", "file_path", "file_name", "filename", "file", "path"),
    "question": ("question", "prompt", "instruction", "query"),
    "answer": ("answer", "response", "output", "target", "label", "class"),
    "caption": ("caption", "text", "title", "description"),
}
DELIMITERS = ",\t;|"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
# Where the images of COCO and VQA lie: the names under which the official archives unpack.
IMAGE_NAMES = ("COCO_{split}_{id:012d}.jpg", "{split}/COCO_{split}_{id:012d}.jpg", "{id:012d}.jpg")


@dataclasses.dataclass(frozen=True)
class Table:
    """What is read, as the flags of the command say it.

    images: the folder of the images. question: the template of `answered`. columns: our name -> the table's, where
      given. annotations: of VQA. note: is told what was left out.
    """

    path: Path
    images: Path
    question: str | None = None
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    annotations: Path | None = None
    note: Callable[[str], None] = print


def columns_of(names: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """Our name of what a table has -> the table's name of it. A question goes with an answer; without one, a caption
    is taken rather than an answer.

    names: those of the table. given: what the user said, which wins. Raises UsageError: `names` lacks one of those.
    """
    plain = {name.strip().lower().replace(" ", "_").replace("-", "_"): name for name in reversed(names)}
    found: dict[str, str] = {}
    for ours, known in COLUMNS.items():
        if ours in given:
            if given[ours] not in names:
                raise UsageError(f"--{ours}_column={given[ours]}: there are {', '.join(map(repr, names))}")
            found[ours] = given[ours]
        elif present := next((plain[name] for name in known if name in plain), None):
            found[ours] = present
    if "answer" in found and "caption" in found:
        if "answer" in given and "caption" in given:
            raise UsageError("a record has one answer: give --answer_column or --caption_column, not both")
        by_answer = "answer" in given or ("question" in found and "caption" not in given)
        found.pop("caption" if by_answer else "answer")
    return found


def answered(name: str, image: Any, said: Mapping[str, str], template: str | None, extra: Mapping[str, Any]) -> Record:
    """A record of one image, one question and one answer.

    image: a path or bytes. said: "question", and "answer" or "caption". template: what the user says, with
      "{question}" where the question of the data goes; None is the question, or one that fits the kind of answer.
    Raises BadRecord("malformed") without image, question or answer; UsageError for a "{question}" that no data have.
    """
    question = said.get("question")
    answer = said.get("answer", said.get("caption", ""))
    text = template if template is not None else OWN_QUESTION
    if question is None and template is None:
        text = CLASS if "answer" in said else CAPTION
    if question is None and OWN_QUESTION in text:
        raise UsageError(f"--question={text!r} takes the question of the data, and {name!r} has none")
    for what, value in (("image", image), ("question", question), ("answer", answer)):
        if value is not None and not value.strip():
            raise BadRecord("malformed", f"its {what} is empty")
    text = text.replace(OWN_QUESTION, (question or "").strip())
    content = (Image(0), f"\n{text}") if text else (Image(0),)
    return Record(name, (Message("user", content), Message("assistant", (answer,))), (image,), extra=extra)


def _row(name: str, image: str, said: Mapping[str, str], table: Table, extra: Mapping[str, Any]) -> Row:
    try:
        return name, answered(name, image, said, table.question, extra)
    except BadRecord as error:
        return name, error


# ------------------------------------------------------------------------------------------------------------------ csv


def read_csv(table: Table) -> Iterator[Row]:
    """Rows of a CSV, TSV or semicolon-separated file with a header."""
    csv.field_size_limit(1 << 24)
    with open(table.path, encoding="utf-8-sig", newline="") as file:
        try:
            header = file.readline()
            delimiter = max(DELIMITERS, key=header.count)
            file.seek(0)
            rows = csv.reader(file, delimiter=delimiter, strict=True)
            names = next(rows, [])
            columns = columns_of(names, table.columns)
            _check_columns(names, columns, table.path)
            for number, row in enumerate(rows, 1):
                if row:
                    yield _csv_row(f"{table.path.stem}-{number}", row, names, columns, table)
        except UnicodeDecodeError:
            raise UsageError(f"{table.path} is not UTF-8; convert it: iconv -f LATIN1 -t UTF-8") from None
        except csv.Error as error:
            raise UsageError(f"line {rows.line_num} of {table.path} is not CSV: {error}") from None


def _check_columns(names: Sequence[str], columns: Mapping[str, str], path: Path) -> None:
    for wanted in (("image",), ("answer", "caption")):
        if not any(ours in columns for ours in wanted):
            flags = " or ".join(f"--{ours}_column=NAME" for ours in wanted)
            raise UsageError(
                f"no column of {path} is known to hold the {' or '.join(wanted)}: name it with {flags}. Its header has "
                f"{', '.join(map(repr, names)) or 'nothing'}"
            )


def _csv_row(name: str, row: list[str], names: Sequence[str], columns: Mapping[str, str], table: Table) -> Row:
    if len(row) != len(names):
        return name, BadRecord("malformed", f"it has {len(row)} columns, and the header has {len(names)}")
    cells = dict(zip(names, row, strict=True))
    said = {ours: cells.pop(theirs) for ours, theirs in columns.items()}
    return _row(cells.pop("id", "") or name, said.pop("image").strip(), said, table, cells)


# ---------------------------------------------------------------------------------------------------------- imagefolder


def read_image_folder(table: Table) -> Iterator[Row]:
    """Images in folders that are named as what they show; deeper folders belong to the first."""
    if not table.path.is_dir():
        raise UsageError(f"{table.path} is not a folder; imagefolder takes a folder that has one per class")
    other, classes = Counter[str](), 0
    for folder in sorted(entry for entry in table.path.iterdir() if entry.is_dir() and entry.name[0] != "."):
        answer, some = folder.name.replace("_", " ").strip(), False
        for place, folders, files in os.walk(folder):
            folders.sort()
            for file in sorted(files):
                path = Path(place, file)
                if file.startswith("."):
                    continue
                if path.suffix.lower() not in IMAGE_SUFFIXES:
                    other[path.suffix or "no suffix"] += 1
                    continue
                some = True
                name = path.relative_to(table.path).as_posix()
                yield _row(name, name, {"answer": answer}, table, {"class": folder.name})
        classes += some
    if not classes:
        raise UsageError(
            f"no folder in {table.path} has images ({', '.join(IMAGE_SUFFIXES)}); give one folder per class"
        )
    loose = sum(entry.suffix.lower() in IMAGE_SUFFIXES for entry in table.path.iterdir() if entry.is_file())
    if loose:
        table.note(f"{loose:,} images lie in {table.path} itself, in the folder of no class, and are left out")
    if other:
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in other.most_common(5))
        table.note(f"files in {table.path} that are no images by their names are left out: {kinds}")


# ------------------------------------------------------------------------------------------------------------ COCO, VQA


def read_coco(table: Table) -> Iterator[Row]:
    """captions_*.json of COCO: one record per caption."""
    raw = _read_json(table.path, ("images", "annotations"), "captions of COCO")
    files = {image.get("id"): str(image.get("file_name", "")) for image in raw["images"] if isinstance(image, Mapping)}
    if not any("caption" in one for one in raw["annotations"][:1]):
        raise UsageError(f"the annotations of {table.path} have no 'caption'; give COCO's captions_*.json")
    for number, one in enumerate(raw["annotations"]):
        image = one.get("image_id")
        name = str(one.get("id", f"{table.path.stem}-{number}"))
        said = {"caption": str(one.get("caption", ""))}
        yield _row(name, files.get(image, ""), said, table, {"image_id": image})


def read_vqa(table: Table) -> Iterator[Row]:
    """The questions of VQAv2 (v2_OpenEnded_mscoco_*_questions.json) and its annotations; the answer is the one that
    most people gave, and all of them are kept in `extra["answers"]`."""
    if table.annotations is None:
        raise UsageError("vqa needs the answers too: --annotations=v2_mscoco_train2014_annotations.json")
    raw = _read_json(table.path, ("questions",), "questions of VQA")
    annotations = _read_json(table.annotations, ("annotations",), "annotations of VQA")["annotations"]
    answers = {one.get("question_id"): one for one in annotations}
    pattern = _image_name(table, raw)
    for number, one in enumerate(raw["questions"]):
        identity, image = one.get("question_id"), one.get("image_id")
        name = str(identity if identity is not None else f"{table.path.stem}-{number}")
        found = answers.get(identity)
        if found is None or not isinstance(image, int) or not one.get("question"):
            lacks = "no answer in the annotations" if found is None else "no image_id or no question"
            yield name, BadRecord("malformed", f"it has {lacks}")
            continue
        all_answers = [str(answer.get("answer", "")) for answer in found.get("answers", ())]
        answer = found.get("multiple_choice_answer") or (Counter(all_answers).most_common(1) or [("", 0)])[0][0]
        extra = {"image_id": image, "answers": all_answers}
        extra |= {key: found[key] for key in ("answer_type", "question_type") if key in found}
        file = pattern.format(split=raw.get("data_subtype", ""), id=image)
        yield _row(name, file, {"question": str(one["question"]), "answer": str(answer)}, table, extra)


def _image_name(table: Table, raw: Mapping[str, Any]) -> str:
    """Which of `IMAGE_NAMES` the images folder has, by the first hundred questions."""
    split = raw.get("data_subtype", "")
    numbers = [one["image_id"] for one in raw["questions"][:100] if isinstance(one.get("image_id"), int)]
    for pattern in IMAGE_NAMES:
        if any((table.images / pattern.format(split=split, id=number)).exists() for number in numbers):
            return pattern
    tried = ", ".join(pattern.format(split=split, id=number) for number in numbers[:1] for pattern in IMAGE_NAMES)
    raise UsageError(f"the images folder {table.images} has none of the images ({tried}); correct --images")


def _read_json(path: Path, keys: Sequence[str], what: str) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from None
    for key in keys:
        rows = raw.get(key) if isinstance(raw, Mapping) else None
        if not isinstance(rows, list) or not rows or not all(isinstance(one, Mapping) for one in rows):
            raise UsageError(f"{path} does not hold {what}: its {key!r} is no list of objects")
    return dict(raw)


TABLES: dict[str, Callable[[Table], Iterator[Row]]] = {
    "csv": read_csv,
    "imagefolder": read_image_folder,
    "coco": read_coco,
    "vqa": read_vqa,
}


def open_table(kind: str, table: Table, work: Path) -> tuple[ShardSource, list[str]]:
    """Reads a table once for a work folder, into a shard of records whose images are paths still.

    Returns them, and JSON lines of the rows that are no records. Raises UsageError: no such table, or no usable row.
    """
    rows, bad = work / "rows.array_record", work / "rows.json"
    if not bad.exists():
        lines: list[str] = []
        count = 0

        def packed() -> Iterator[bytes]:
            nonlocal count
            for index, (name, record) in enumerate(tqdm(TABLES[kind](table), "list", unit="record", disable=None)):
                if isinstance(record, BadRecord):
                    line = {"index": index, "id": name, "kind": record.kind, "message": str(record)}
                    lines.append(json.dumps(line))
                else:
                    count += 1
                    yield pack_record(record)

        write_shard(rows, packed())
        with write_whole(bad) as out:
            out.write(json.dumps({"records": count, "bad": lines}).encode())
    told = json.loads(bad.read_text())
    if not told["records"]:
        first = f": {json.loads(told['bad'][0])['message']}" if told["bad"] else ""
        raise UsageError(f"{table.path} has no usable record{first}")
    return ShardSource(work, table.images, (rows.name,), (told["records"],)), told["bad"]
