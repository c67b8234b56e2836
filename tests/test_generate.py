"""The command `generate`: what stands on stdout and stderr, its exit statuses, and that mistakes show at once."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import vlm_jax
from vlm_jax.errors import Interrupted, UsageError
from vlm_jax.generate import main
from vlm_jax.inference.load import save
from vlm_jax.interop.layout import find_model
from vlm_jax.models import presets
from vlm_jax.sharding import make_mesh

WORDS = "USER ASSISTANT : What is this ? Which one a cat dog bird A chat between".split()
NEW = 6


def tiny_model() -> dict[str, Any]:
    return presets.llava(
        vision=presets.vit(image_size=8, patch_size=4, hidden_size=16, num_layers=1, num_heads=2),
        connector="linear",
        decoder=presets.llama(vocab_size=32, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2),
    )


def tiny_tokenizer() -> Any:
    """One token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = dict.fromkeys(["<unk>", "</s>", "<pad>", "<s>", *WORDS])
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir as a run leaves it, and two images: cat.png and more/bird.png."""
    from vlm_jax.families import make_family

    folder = tmp_path_factory.mktemp("runs") / "w"
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        family = make_family(tiny_model())
        params = {
            path: jax.device_put(np.random.default_rng(i).normal(size=a.shape).astype(a.dtype))
            for i, (path, a) in enumerate(family.bound.abstract.items())
        }
        for name, template in [("w", "vicuna_v1"), ("captions", "plain")]:
            place = folder.parent / name / "model"
            images = {"mode": "resize"}
            save(place, params, model=tiny_model(), images=images, template=template, tokenizer=tiny_tokenizer())
    (folder / "config.json").write_text("{}")
    for number, name in enumerate(("cat.png", "more/bird.png")):
        (folder / name).parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (9, 12, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def vlm(workdir: Path) -> Any:
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        return vlm_jax.load(workdir)


@pytest.fixture(scope="module")
def expected(vlm: Any) -> Callable[..., str]:
    """What the Python interface answers."""
    return lambda *args, **settings: vlm.generate(*args, max_new_tokens=NEW, **settings)


@pytest.fixture
def compiled(vlm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command finds this model loaded and compiled."""
    monkeypatch.setattr("vlm_jax.inference.load.load", lambda path, dtype, template: vlm)


def run(model: Path, *argv: str) -> None:
    main([f"--model={model}", f"--max_new_tokens={NEW}", *argv])


def test_python_and_command_say_the_same_and_only_that(
    workdir: Path, expected: Callable[..., str], run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    images = [workdir / "cat.png", workdir / "more/bird.png"]
    flags = [f"--image={image}" for image in images]
    done = run_python(
        "-m", "vlm_jax.generate", f"--model={workdir}", *flags, "--prompt", "Which one?", f"--max_new_tokens={NEW}"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == expected("Which one?", images) + "\n"
    assert expected("Which one?", images) != expected("Which one?", images[::-1])


@pytest.mark.usefixtures("compiled")
def test_a_prompt_without_an_image(workdir: Path, expected: Callable[..., str], capsys: Any) -> None:
    run(workdir / "model", "--prompt=What is this?")
    assert capsys.readouterr() == (expected("What is this?") + "\n", "")


def test_the_flags_reach_the_model(workdir: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm_jax.models.sampling import Sampling

    asked: dict[str, Any] = {}

    class Recorder:
        def answer(self, requests: Any, **settings: Any) -> list[str]:
            asked.update(settings, seed=requests[0].seed)
            return ["so"]

    def load(path: Path, **settings: Any) -> Recorder:
        asked.update(settings)
        return Recorder()

    monkeypatch.setattr("vlm_jax.inference.load.load", load)
    flags = ("--temperature=2", "--top_p=0.95", "--seed=3", "--dtype=bfloat16", "--template=llava_v1")
    run(workdir, "--prompt=What?", *flags)
    assert capsys.readouterr() == ("so\n", "")
    sampling = {"max_new_tokens": NEW, "sampling": Sampling(2.0, 0.95), "seed": 3}
    assert asked == {**sampling, "dtype": "bfloat16", "template": "llava_v1"}


def test_bfloat16_halves_the_weights_and_says_about_the_same(workdir: Path, vlm: Any) -> None:
    from vlm_jax.inference.vlm import Request, as_messages

    with jax.set_mesh(vlm.mesh):
        half = vlm_jax.load(workdir, dtype="bfloat16")
    assert {a.dtype for a in half.params.values()} == {jax.numpy.dtype("bfloat16")}
    request = Request(as_messages("What is this?", 0))
    narrow, wide = half.logits([request]), vlm.logits([request])
    # bfloat16 has 8 bits: some hundredths of the spread after two dozen roundings.
    assert 0 < np.abs(narrow - wide).max() < 0.1 * np.ptp(wide)


@pytest.mark.usefixtures("compiled")
def test_a_chat_over_piped_lines(
    workdir: Path, expected: Callable[..., str], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = workdir / "more/bird.png"
    monkeypatch.setattr(
        "sys.stdin", io.StringIO(f"/image {image}\nWhat is this?\n/image none.png\nWhich one?\n/clear\nWhat is this?\n")
    )
    run(workdir, f"--image={workdir / 'cat.png'}")
    out, notes = capsys.readouterr()
    first = expected("What is this?", [workdir / "cat.png", image])
    history = [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Which one?"},
    ]
    pixels = [Image.open(workdir / "cat.png"), Image.open(image)]
    # Two images of a message stay where they are; a question puts each on a line of its own.
    first = expected(history[:1], pixels)
    history[1]["content"] = first
    assert out.split("\n") == [first, expected(history, pixels), expected("What is this?"), ""]
    assert "12 x 9" in notes and "there is no image 'none.png'" in notes and "Traceback" not in notes


# --------------------------------------------------------------------------------------------------- files of questions


@pytest.fixture
def questions(workdir: Path, tmp_path: Path) -> Path:
    for name in ("cat.png", "bird.png"):
        shutil.copy(next(workdir.rglob(name)), tmp_path / name)
    lines = [
        {"question_id": 1, "image": "cat.png", "text": "What is this?"},
        {"question_id": 2, "text": "What is this?"},
        {"question_id": 3, "image": "gone.png", "text": "What is this?"},
        {"question_id": 4, "image": ["bird.png", "cat.png"], "text": "Which one?"},
        {"question_id": 5, "image": "bird.png", "text": "What is this?"},
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.usefixtures("compiled")
def test_a_file_of_questions_is_answered_and_taken_up_again(
    workdir: Path, questions: Path, expected: Callable[..., str], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, output = questions.parent, questions.parent / "out" / "answers.jsonl"
    flags = [f"--data={questions}", f"--output={output}", "--batch=2"]

    def answers() -> list[dict[str, Any]]:
        return [json.loads(line) for line in output.read_text().splitlines()]

    with pytest.raises(UsageError, match="1 of 5 questions could not be asked"):
        run(workdir, *flags)
    out, notes = capsys.readouterr()
    assert out == "" and "question 3: image 'gone.png' is not in" in notes
    assert [line["question_id"] for line in answers()] == [1, 2, 3, 4, 5]
    assert ["error" in line for line in answers()] == [False, False, True, False, False]
    assert answers()[2]["text"] == "" and {line["model_id"] for line in answers()} == {"w"}
    assert answers()[0]["text"] == expected("What is this?", [folder / "cat.png"])
    assert answers()[1]["text"] == expected("What is this?")
    assert answers()[3]["text"] == expected("Which one?", [folder / "bird.png", folder / "cat.png"])

    # Cut off within the last line but one; the missing image is there now.
    before = output.read_bytes().split(b"\n")
    output.write_bytes(b"\n".join(before[:3]) + b"\n" + before[3][:20])
    shutil.copy(folder / "cat.png", folder / "gone.png")
    run(workdir, *flags)
    assert "2 of 5 questions are answered already" in capsys.readouterr().err
    lines = [json.dumps({k: v for k, v in line.items() if k != "error"}) for line in answers()]
    assert [line.encode() for i, line in enumerate(lines) if i != 2] == before[:2] + before[3:5]
    assert answers()[2]["text"] == expected("What is this?", [folder / "cat.png"])

    # Nothing is left: the model is not even opened.
    monkeypatch.setattr("vlm_jax.inference.load.load", None)
    run(workdir, *flags)
    assert "all questions are answered" in capsys.readouterr().err


@pytest.mark.usefixtures("compiled")
def test_ctrl_c_keeps_what_is_answered(
    workdir: Path, questions: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_jax.inference.questions import Answer

    def interrupted(vlm: Any, questions: Any, *args: Any, **kwargs: Any) -> Any:
        yield [Answer(questions[0], "so")]
        raise KeyboardInterrupt

    monkeypatch.setattr("vlm_jax.inference.answering.answer_all", interrupted)
    output = questions.parent / "answers.jsonl"
    with pytest.raises(Interrupted, match="4 questions are left; the same command goes on"):
        run(workdir, f"--data={questions}", f"--output={output}")
    assert len(output.read_text().splitlines()) == 1


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--prompt=x", "--model=none"], "no model at none: the folder does not exist"),
        (["--prompt=x", "--model=tests"], "holds neither a workdir nor a model"),
        (["--prompt=x", "--image=none.png"], "there is no image 'none.png'"),
        (["--prompt=x", "--image=README.md"], "'README.md' is not a JPEG, PNG"),
        (["--prompt=x", "--image=tests"], "is not a file"),
        (["--prompt=x", "--image=https://localhost/a.png"], "is a URL: download it"),
        (["--imag=a.png"], "unknown flag --imag .did you mean '--image'"),
        (["--prompt=x", "word"], "left-over word 'word'"),
        (["--prompt="], "--prompt is empty"),
        (["--prompt=x", "--max_new_tokens=0"], "--max_new_tokens is 0; give at least 1"),
        (["--prompt=x", "--max_new_tokens=many"], "expects a whole number"),
        (["--prompt=x", "--temperature=-1"], "--temperature is -1.0; give 0"),
        (["--prompt=x", "--top_p=2"], "--top_p is 2.0; give a number from 0 to 1"),
        (["--prompt=x", "--dtype=bf16"], "--dtype expects one of float32, bfloat16"),
        (["--prompt=x", "--output=a.jsonl"], "--output belongs to --data"),
        (["--batch=4"], "--batch belongs to --data"),
        (["--data=a.jsonl"], "--data needs --output"),
        (["--data=a.jsonl", "--output=b.jsonl", "--prompt=x"], "leave --prompt and --image out"),
        (["--data=none.jsonl", "--output=b.jsonl"], "none.jsonl cannot be read"),
        (["--data={questions}", "--output=b.jsonl", "--images=none"], "images folder none does not exist"),
        (["--data={questions}", "--output={questions}"], "is not an answer; choose another --output"),
        (["--data={questions}", "--output=b.jsonl", "--batch=0"], "--batch is 0; give at least 1"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_loaded(
    workdir: Path, questions: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], says: str
) -> None:
    monkeypatch.setattr("vlm_jax.inference.load.load", None)
    model = [] if any(flag.startswith("--model") for flag in flags) else [f"--model={workdir}"]
    with pytest.raises(UsageError, match=says) as error:
        main([*model, *(flag.format(questions=questions) for flag in flags)])
    assert error.value.exit_status == 2 and "\n" not in str(error.value)


def test_a_model_of_captions_has_no_chat(workdir: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = workdir.parent / "captions"
    with pytest.raises(UsageError, match=r"takes one turn .template 'plain'., no chat: give --prompt"):
        run(captions)
    monkeypatch.setattr("vlm_jax.inference.load.load", None)
    with pytest.raises(TypeError, match="NoneType"):  # it goes on to load the model
        run(captions, f"--image={workdir / 'cat.png'}", "--prompt=What is this?")
    assert "the images alone, not the text" in capsys.readouterr().err


def test_a_damaged_model_is_one_sentence(workdir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "w"
    shutil.copytree(workdir, copy)
    (shard,) = find_model(copy).glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UsageError, match=r"weight file .* is damaged"):
        run(copy, "--prompt=x")
    config = json.loads((copy / "model/config.json").read_text())
    for change, says in [
        ({"template": "vicuna"}, "unknown template 'vicuna'"),
        ({"model": {**config["model"], "conector": "linear"}}, "did you mean 'connector'"),
        ({"images": {}}, "config.json in .* is damaged"),
    ]:
        (copy / "model/config.json").write_text(json.dumps(config | change))
        with pytest.raises(UsageError, match=says):
            run(copy, "--prompt=x")


def test_a_mistake_leaves_with_status_2_and_without_jax(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    code = (
        "import sys, vlm_jax.generate as g\n"
        "try: g.run_command(g.main)\n"
        "finally: print([name for name in ('jax', 'flax', 'transformers') if name in sys.modules])"
    )
    done = run_python("-c", code, "--model=none", "--prompt=x")
    assert (done.returncode, done.stdout.strip()) == (2, "[]")
    assert done.stderr.startswith("error: no model at none") and done.stderr.count("\n") == 1
