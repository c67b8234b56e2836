"""Shards: what `prepare` makes of each kind of source, and that nothing stops it halfway."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from vlm_jax.data import BadRecord, Image, Message, Record, open_source
from vlm_jax.data.prepare import main
from vlm_jax.data.preparing import Notes, divide
from vlm_jax.data.sources.shards import pack_record, unpack_record
from vlm_jax.errors import UsageError


def picture(number: int, kind: str = "PNG") -> bytes:
    """An image of one colour, of its own for each number."""
    file = io.BytesIO()
    Pillow.new("RGB", (8, 8), (number % 256, number // 256, 7)).save(file, kind)
    return file.getvalue()


def said(question: str, answer: str) -> tuple[Message, ...]:
    return Message("user", (Image(0), f"\n{question}")), Message("assistant", (answer,))


def make_csv(folder: Path) -> tuple[list[str], dict[str, Any]]:
    (folder / "a.png").write_bytes(picture(1))
    (folder / "b.png").write_bytes(picture(2))
    text = '\ufeffFile Name;Question;Answer;source\na.png;What, then?;"one\nred; thing";web\nb.png;Käse?;5 €;\n'
    (folder / "t.csv").write_text(text, "utf-8")
    return ["--from=csv", f"{folder}/t.csv"], {
        "t-1": (said("What, then?", "one\nred; thing"), {"source": "web"}),
        "t-2": (said("Käse?", "5 €"), {"source": ""}),
    }


def make_image_folder(folder: Path) -> tuple[list[str], dict[str, Any]]:
    for name, number in {"tabby_cat/1.png": 1, "tabby_cat/more/2.PNG": 2, "dog/1.png": 3}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number))
    return ["--from=imagefolder", str(folder), "--question=Which animal?"], {
        "dog/1.png": (said("Which animal?", "dog"), {"class": "dog"}),
        "tabby_cat/1.png": (said("Which animal?", "tabby cat"), {"class": "tabby_cat"}),
        "tabby_cat/more/2.PNG": (said("Which animal?", "tabby cat"), {"class": "tabby_cat"}),
    }


def make_coco(folder: Path) -> tuple[list[str], dict[str, Any]]:
    (folder / "train2017").mkdir()
    (folder / "train2017/000000000009.jpg").write_bytes(picture(1, "JPEG"))
    raw = {
        "images": [{"id": 9, "file_name": "000000000009.jpg"}],
        "annotations": [{"id": 1, "image_id": 9, "caption": "A bus."}, {"id": 2, "image_id": 9, "caption": "A van."}],
    }
    (folder / "captions.json").write_text(json.dumps(raw))
    return ["--from=coco", f"{folder}/captions.json", f"--images={folder}/train2017", "--validation=0"], {
        "1": (said("Describe the image.", "A bus."), {"image_id": 9}),
        "2": (said("Describe the image.", "A van."), {"image_id": 9}),
    }


def make_vqa(folder: Path) -> tuple[list[str], dict[str, Any]]:
    questions, annotations = [], []
    for number in (1, 2):
        (folder / f"COCO_val2014_{number:012}.jpg").write_bytes(picture(90 * number, "JPEG"))
        questions.append({"question_id": 10 * number, "image_id": number, "question": "Is it red?"})
        people = [{"answer": "yes"}] * 9 + [{"answer": "no"}]
        annotations.append({"question_id": 10 * number, "answers": people, "multiple_choice_answer": "yes"})
    (folder / "q.json").write_text(json.dumps({"data_subtype": "val2014", "questions": questions}))
    (folder / "a.json").write_text(json.dumps({"annotations": annotations}))
    ask = "--question={question}\nAnswer the question using a single word or phrase."
    answers = ["yes"] * 9 + ["no"]
    return ["--from=vqa", f"{folder}/q.json", f"--annotations={folder}/a.json", ask], {
        str(10 * number): (
            said("Is it red?\nAnswer the question using a single word or phrase.", "yes"),
            {"image_id": number, "answers": answers},
        )
        for number in (1, 2)
    }


def make_tars(folder: Path) -> tuple[list[str], dict[str, Any]]:
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "This."}]
    write_tar(folder / "s-00.tar", {"x/1.jpg": picture(1, "JPEG"), "x/1.txt": b"A cat.\n"})
    members = {
        "2.json": json.dumps({"conversations": turns, "image": "elsewhere.jpg"}).encode(),
        "2.png": picture(2),
        "3.webp": picture(3, "WEBP"),
        "3.json": b'{"caption": "A dog.", "width": 8}',
    }
    write_tar(folder / "s-01.tar", members)
    return ["--from=webdataset", f"{folder}/s-{{00..01}}.tar"], {
        "s-00/x/1": (said("Describe the image.", "A cat."), {}),
        "s-01/2": (said("Which?", "This."), {}),
        "s-01/3": (said("Describe the image.", "A dog."), {"width": 8}),
    }


def make_json(folder: Path) -> tuple[list[str], dict[str, Any]]:
    records = []
    for number in (1, 2):
        (folder / f"{number}.png").write_bytes(picture(number))
        turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "This."}]
        records.append({"id": number, "image": f"{number}.png", "conversations": turns, "kind": "k"})
    (folder / "r.json").write_text(json.dumps(records))
    return ["--from=json", f"{folder}/r.json"], {
        str(number): (said("Which?", "This."), {"kind": "k"}) for number in (1, 2)
    }


def write_tar(path: Path, members: dict[str, bytes], *special: tarfile.TarInfo) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in special:
            tar.addfile(info)


MAKERS = (make_csv, make_image_folder, make_coco, make_vqa, make_tars, make_json)


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__.removeprefix("make_"))
def test_each_kind_gives_its_records(make: Callable[[Path], Any], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "in").mkdir()
    words, expected = make(tmp_path / "in")
    main(["--validation=0.3", *words, f"--output={tmp_path}/out"])
    found = {}
    for side in sorted(path for path in (tmp_path / "out").iterdir() if path.is_dir()):
        source = open_source(side)
        for number in range(len(source)):
            record = source[number]
            found[record.id] = (record.messages, dict(record.extra))
            assert [Pillow.open(io.BytesIO(image)).size for image in record.images] == [(8, 8)]
    assert found == expected
    assert not (tmp_path / "out.preparing").exists()
    main(["--validation=0.3", *words, f"--output={tmp_path}/out"])
    assert "made already" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"made with other settings .--seed"):
        main(["--validation=0.3", *words, f"--output={tmp_path}/out", "--seed=1"])


def test_a_record_comes_back_as_it_was() -> None:
    messages = (Message("system", ("s",)), Message("assistant", (Image(0), "é\n", Image(1)), train=False))
    extra = {"a": [1, 2.5, None, b"x"], "n": {"3": True}}
    record = Record("7", messages, (b"\x00\xff", "a/b.png"), ("t",), None, extra)
    assert unpack_record(pack_record(record)) == record
    regions = np.arange(6, dtype=np.float32).reshape(2, 3)
    packed = pack_record(Record("7", regions=regions, extra={"n": np.int64(3), "v": np.arange(2)}))
    assert np.array_equal(unpack_record(packed).regions, regions) and unpack_record(packed).extra == {
        "n": 3,
        "v": [0, 1],
    }
    for value in (object(), 1 << 70, "\ud800"):
        with pytest.raises(BadRecord, match="cannot be stored"):
            pack_record(Record("7", extra={"x": value}))
    for data in (b"", b"\xc1", packed[:-1], b"\x80", b"\x93\x01\x02\x03"):
        with pytest.raises(BadRecord, match="no record of a shard"):
            unpack_record(data)


# --------------------------------------------------------------------------------------------------------- the division


def notes_of(images: list[list[int]]) -> Notes:
    counts = np.array([len(some) for some in images])
    digests = np.array([one for some in images for one in some], np.uint64)
    return Notes(np.where(counts, 1, 0), np.arange(len(images), dtype=np.uint64), counts, digests, ())


def test_no_image_is_on_both_sides() -> None:
    random = np.random.default_rng(0)
    # Chains: record i shares an image with i + 1, in groups of one to seven; every tenth record is bad.
    draws = random.integers(0, 1 << 63, 4000).tolist()
    images = [
        [] if i % 10 == 9 else [draws[i]] + ([draws[i + 1]] if random.random() < 0.6 else []) for i in range(3000)
    ]
    sides = divide(notes_of(images), 0.1)
    train, validation = ({one for i in sides[side].tolist() for one in images[i]} for side in ("train", "validation"))
    assert not train & validation
    good = [i for i, some in enumerate(images) if some]
    assert sorted([*sides["train"], *sides["validation"]]) == good
    assert len(sides["validation"]) == round(0.1 * len(good))
    with pytest.raises(UsageError, match="4 of them are connected by images they share"):
        divide(notes_of([[1], [1, 2], [2], [2]]), 0.25)


def test_the_seed_draws_and_files_of_the_same_pixels_stay_together(tmp_path: Path) -> None:
    rows = ["image,answer"]
    for number in range(12):
        for kind in ("png", "bmp"):
            (tmp_path / f"{number}.{kind}").write_bytes(picture(number, kind.upper()))
            rows.append(f"{number}.{kind},{number}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    held_out = set()
    for seed in (1, 2):
        out = tmp_path / f"out{seed}"
        main(["--from=csv", f"{tmp_path}/t.csv", f"--output={out}", "--validation=0.25", f"--seed={seed}"])
        source = open_source(out / "validation")
        answers = [source[i].messages[1].text for i in range(len(source))]
        assert len(answers) == 6 and all(answers.count(answer) == 2 for answer in answers)
        held_out.add(tuple(answers))
    assert len(held_out) == 2


# ------------------------------------------------------------------------------------------------------- cut short, bad


def make_many(folder: Path, count: int) -> None:
    rows = ["image,caption"]
    for number in range(count):
        (folder / f"{number}.png").write_bytes(picture(number))
        rows.append(f"{number}.png,number {number}")
    (folder / "t.csv").write_text("\n".join(rows))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_killed_and_repeated_it_makes_the_same_bytes(tmp_path: Path, repository: Path, monkeypatch: Any) -> None:
    """Killed as soon as a file of each pass is written, in a process of its own; then to the end."""
    make_many(tmp_path, 400)
    words = ["--from=csv", f"{tmp_path}/t.csv", "--shard_mb=1", "--validation=0.1"]
    monkeypatch.setattr("vlm_jax.data.prepare.MEGABYTE", 4000)  # several shards of it
    main([*words, f"--output={tmp_path}/whole"])
    code = (
        "import sys; from vlm_jax.data import prepare; prepare.MEGABYTE = 4000\n"
        f"prepare.main([*{words}, '--output={tmp_path}/cut'])"
    )
    work = tmp_path / "cut.preparing"
    for pattern in ("notes/*.npz", "result/train/train-*"):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=repository, stderr=subprocess.DEVNULL)
        while not list(work.glob(pattern)) and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert work.exists() and not (tmp_path / "cut").exists()
    kept = {file: file.stat().st_ino for file in (work / "result/train").glob("train-*")}
    (work / "result/train/.train-00000.half").write_bytes(b"half")  # of a process that was killed while writing
    main([*words, f"--output={tmp_path}/cut"])
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert len(contents(tmp_path / "cut")) > 8
    assert {(tmp_path / "cut/train" / file.name).stat().st_ino for file in kept} == set(kept.values())


def test_a_change_of_the_source_is_noticed(tmp_path: Path) -> None:
    make_many(tmp_path, 4)
    words = ["--from=csv", f"{tmp_path}/t.csv", f"--output={tmp_path}/out", "--max_bad_fraction=0"]
    (tmp_path / "3.png").write_bytes(b"<html>")
    with pytest.raises(UsageError, match=r"1 of 4 records cannot be used.*1 broken_image.*'t-4'"):
        main(words)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match=r"begun with something else .--seed.: delete it"):
        main([*words, "--seed=3"])
    (tmp_path / "0.png").write_bytes(picture(99))
    with pytest.raises(UsageError, match=r"record 0 of .* has changed since the first pass"):
        main([*words[:-1], "--max_bad_fraction=0.5"])
    os.utime(tmp_path / "t.csv", (1, 1))
    with pytest.raises(UsageError, match=r"begun with something else .the source itself."):
        main(words)


def test_bad_records_are_listed(tmp_path: Path) -> None:
    make_many(tmp_path, 10)
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").write_bytes(picture(2)[:40])
    with open(tmp_path / "t.csv", "a") as file:
        file.write("\n../../secret.png,a\n4.png\n5.png, ")
    main(["--from=csv", f"{tmp_path}/t.csv", f"--output={tmp_path}/out", "--max_bad_fraction=0.5"])
    bad = [json.loads(line) for line in (tmp_path / "out/bad_records.jsonl").read_text().splitlines()]
    assert {line["id"]: line["kind"] for line in bad} == {
        "t-2": "missing_image",
        "t-3": "broken_image",
        "t-11": "unsafe_path",
        "t-12": "malformed",
        "t-13": "malformed",
    }
    assert len(open_source(tmp_path / "out/train")) + len(open_source(tmp_path / "out/validation")) == 8


def special(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    ("member", "says"),
    [
        (special("/etc/1.txt"), "leads out"),
        (special("a/../../1.txt"), "leads out"),
        (special("C:\\1.txt"), "leads out"),
        (special("1.txt", tarfile.SYMTYPE, "/etc/passwd"), "a link, a device"),
        (special("1.txt", tarfile.LNKTYPE, "1.png"), "a link, a device"),
        (special("1.txt", tarfile.CHRTYPE), "a link, a device"),
        (special("1.txt", tarfile.FIFOTYPE), "a link, a device"),
    ],
    ids=lambda value: value.name if isinstance(value, tarfile.TarInfo) else "",
)
def test_a_hostile_tar_is_refused(tmp_path: Path, member: tarfile.TarInfo, says: str) -> None:
    write_tar(tmp_path / "t.tar", {"1.png": picture(1)}, member)
    with pytest.raises(UsageError, match=f"t.tar is refused: member .*{says}"):
        main(["--from=webdataset", f"{tmp_path}/t.tar", f"--output={tmp_path}/out"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.tar"]


def test_a_damaged_tar_loses_no_record_in_silence(tmp_path: Path) -> None:
    members = {f"{i}.{kind}": picture(i) if kind == "png" else b"x" for i in range(20) for kind in ("png", "txt")}
    write_tar(tmp_path / "t.tar", members)
    whole = (tmp_path / "t.tar").read_bytes()
    damaged = {
        "end mark": whole[: 512 * 20],  # between two members
        "10,240 of 10,340 ": whole[: 512 * 20 + 100],
        "it was cut off": whole[: 512 * 20] + b"\xff" * 512 + whole[512 * 21 :],
        "claims .* bytes": with_size(whole, "1" * 11),
        "negative size": with_size(whole, "-1"),
        "compressed": b"\x1f\x8b" + whole,
    }
    for says, data in damaged.items():
        (tmp_path / "t.tar").write_bytes(data)
        with pytest.raises(UsageError, match=says):
            main(["--from=webdataset", f"{tmp_path}/t.tar", f"--output={tmp_path}/out"])


def with_size(tar: bytes, size: str) -> bytes:
    """The first header claims this size, in octal or, if negative, in base 256."""
    field = size.encode().rjust(11, b"0") + b"\0" if size[0] != "-" else b"\xff" * 12
    header = bytearray(tar[:512])
    header[124:136] = field
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header) + tar[512:]


def test_a_shard_that_is_not_whole_is_noticed(tmp_path: Path) -> None:
    make_many(tmp_path, 8)
    main(["--from=csv", f"{tmp_path}/t.csv", f"--output={tmp_path}/out", "--validation=0"])
    folder = tmp_path / "out/train"
    (shard,) = folder.glob("*.array_record")
    whole = shard.read_bytes()
    at = whole.index(picture(3)[41:60])
    shard.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    source = open_source(folder)
    outcomes = []
    for number in range(8):
        try:
            outcomes.append(source[number].messages[1].text == f"number {number}")
        except BadRecord as error:
            outcomes.append("cannot be read" in str(error))
    assert all(outcomes) and len(outcomes) == 8
    with pytest.raises(BadRecord, match="cannot be read"):
        source[3]
    shard.write_bytes(whole[:-1])
    with pytest.raises(UsageError, match=r"1 of the 1 shards .* bytes instead of"):
        open_source(folder)
    with pytest.raises(UsageError, match=r"several sets of records; name one of them: .*train"):
        open_source(tmp_path / "out")
    index = json.loads((folder / "shards.json").read_text())
    for changed, says in (
        ({"version": 2}, "reads 1: upgrade"),
        ({"format": "x"}, "no index"),
        ({"shards": 3}, "no ind"),
    ):
        (folder / "shards.json").write_text(json.dumps({**index, **changed}))
        with pytest.raises(UsageError, match=says):
            open_source(folder)
    (folder / "shards.json").write_text(json.dumps(index).replace("train-0", "../train-0"))
    with pytest.raises(UsageError, match="no index of shards"):
        open_source(folder)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--from=csv", "gone.csv"], "gone.csv cannot be read"),
        (["--from=csv", "t.csv", "--answer_column=capshun"], "there are 'image', 'caption'"),
        (["--from=csv", "t.csv", "--question={question}?"], "takes the question of the data"),
        (["--from=json", "t.csv"], "no known kind|neither .json"),
        (["--from=coco", "t.csv"], "not valid JSON"),
        (["--from=vqa", "t.csv"], "needs the answers too"),
        (["--from=imagefolder", "empty"], "no folder in"),
        (["--from=imagefolder", "."], "lies in the source"),
        (["--from=imagefolder", "empty", "--images=."], "belongs to --from=json or"),
        (["--from=webdataset", "{0..2}.tar"], "3 of the 3 files"),
        (["--from=webdataset", "t.csv"], "is no tar"),
        (["--from=coco", "t.csv", "--image_column=x"], "belongs to --from=csv"),
        (["--from=csv", "t.csv", "--validation=1"], "a fraction below 1"),
    ],
)
def test_what_cannot_be_leaves_nothing(tmp_path: Path, monkeypatch: Any, words: list[str], says: str) -> None:
    monkeypatch.chdir(tmp_path)
    make_many(tmp_path, 2)
    (tmp_path / "empty").mkdir()
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=says):
        main([*words, "--output=out"])
    assert contents(tmp_path) == before and not (tmp_path / "out.preparing").exists()


def test_beam_makes_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("apache_beam")
    make_many(tmp_path, 150)
    words = ["--from=csv", f"{tmp_path}/t.csv", "--validation=0.1"]
    main([*words, f"--output={tmp_path}/here"])
    main([*words, f"--output={tmp_path}/beam", "--runner=DirectRunner"])
    assert contents(tmp_path / "beam") == contents(tmp_path / "here")
    (tmp_path / "7.png").unlink()
    with pytest.raises(UsageError, match="1 of 150 records cannot be used"):
        main([*words, f"--output={tmp_path}/bad", "--runner=DirectRunner", "--max_bad_fraction=0"])
