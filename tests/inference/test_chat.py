"""The terminal chat, with a scripted model: what it sends, what it keeps, and what goes to which stream."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_jax.errors import UsageError
from vlm_jax.inference.chat import Chat


class Scripted:
    """A model that answers with the number of messages and images it was shown, in two pieces."""

    def __init__(self) -> None:
        self.seen: list[list[dict[str, Any]]] = []
        self.trouble: BaseException | None = None
        self.after = 1  # pieces before the trouble

    def __call__(self, messages: list[dict[str, Any]], number: int) -> Iterator[str]:
        self.seen.append([dict(message) for message in messages])
        images = sum(part["type"] == "image" for message in messages for part in message["content"])
        for count, piece in enumerate([f"answer {number}: ", f"{len(messages)} messages, {images} images"]):
            if self.trouble is not None and count == self.after:
                raise self.trouble
            yield piece


def talk(model: Scripted, *lines: Any, images: Any = (), interactive: bool = False) -> tuple[str, str, Chat]:
    """What stands on stdout and on stderr after these lines; an exception among them happens while waiting."""

    class Lines:
        left = iter(lines)

        def __next__(self) -> str:
            line = next(self.left)
            if isinstance(line, BaseException):
                raise line
            return line

    out, notes = io.StringIO(), io.StringIO()
    chat = Chat(model, images, out=out, notes=notes)
    chat.run(Lines(), interactive=interactive)
    return out.getvalue(), notes.getvalue(), chat


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    file = tmp_path / "my photo.png"
    Image.new("RGB", (12, 9), "red").save(file)
    return file


def test_the_history_is_kept() -> None:
    model = Scripted()
    out, notes, _ = talk(model, "Hello\n", "\n", "  and now?\n")
    assert out == "answer 0: 1 messages, 0 images\nanswer 1: 3 messages, 0 images\n"
    assert notes == ""
    texts = [(message["role"], message["content"][0]["text"]) for message in model.seen[1]]
    assert texts == [("user", "Hello"), ("assistant", "answer 0: 1 messages, 0 images"), ("user", "and now?")]


@pytest.mark.parametrize("form", ["{}", "'{}'", '"{}"', "escaped"])
def test_an_image_goes_with_the_next_message(photo: Path, form: str) -> None:
    model = Scripted()
    name = str(photo).replace(" ", "\\ ") if form == "escaped" else form.format(photo)
    out, notes, _ = talk(model, f"/image {name}\n", "What?\n", "Why?\n", images=[np.zeros((2, 2, 3), np.uint8)])
    assert "12 x 9" in notes
    assert out.splitlines() == ["answer 0: 1 messages, 2 images", "answer 1: 3 messages, 2 images"]
    assert [part["type"] for part in model.seen[0][0]["content"]] == ["image", "image", "text"]
    assert model.seen[0][0]["content"][1]["image"].shape == (9, 12, 3)


def test_a_bad_line_is_one_note_and_the_chat_goes_on(tmp_path: Path, photo: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    lines = [f"/image {tmp_path}/none.png", f"/image {tmp_path}/a.png", f"/image {tmp_path}", "/image", "/image 'open"]
    for line in [*lines, "/imge x", "/", f"/image {photo.name}"]:
        out, notes, chat = talk(Scripted(), line + "\n", "Hello\n")
        assert notes.count("\n") == 1 and "Traceback" not in notes, notes
        assert out == "answer 0: 1 messages, 0 images\n"
        assert not chat.images
    assert "did you mean '/image'" in talk(Scripted(), "/imge x\n")[1]


def test_clear_help_and_exit(photo: Path) -> None:
    model = Scripted()
    out, notes, _ = talk(
        model,
        "Hello\n",
        f"/image {photo}\n",
        "/clear\n",
        "Hello\n",
        "/help\n",
        "/usr/bin is what?\n",
        "/exit\n",
        "No\n",
    )
    assert out.splitlines() == [
        "answer 0: 1 messages, 0 images",
        "answer 1: 1 messages, 0 images",
        "answer 2: 3 messages, 0 images",
    ]
    assert all(word in notes for word in ("/image FILE", "/clear", "/help", "/exit", "Ctrl-C"))


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said() -> None:
    model = Scripted()
    model.trouble = KeyboardInterrupt()
    out, notes, chat = talk(model, "Hello\n")
    assert out == "answer 0: \n" and "stopped" in notes
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]


def test_a_message_without_an_answer_is_taken_back_with_its_images(photo: Path) -> None:
    for trouble in (KeyboardInterrupt(), UsageError("too much")):
        model = Scripted()
        model.trouble, model.after = trouble, 0
        out, notes, chat = talk(model, f"/image {photo}\n", "Hello\n")
        assert out == "" and not chat.messages and len(chat.images) == 1
        assert ("too much" in notes) == isinstance(trouble, UsageError)


def test_ctrl_c_between_answers_leaves_only_where_nobody_sits() -> None:
    out, notes, _ = talk(Scripted(), KeyboardInterrupt(), "Hello\n", interactive=True)
    assert "/exit leaves" in notes and out
    with pytest.raises(KeyboardInterrupt):
        talk(Scripted(), KeyboardInterrupt(), "Hello\n")


SLOW = """
import sys, time
from vlm_jax.inference.chat import Chat, terminal_lines
def stream(messages, number):
    yield "so "
    for _ in range(600 if number == 0 else 0):
        time.sleep(0.1)  # short ones, since a signal just before a sleep waits for its end
    yield "it ends"
lines, interactive = terminal_lines()
Chat(stream).run(lines, interactive=interactive)
print("left")
"""


def test_a_real_terminal_shows_a_prompt_and_a_real_ctrl_c_stops_the_answer(repository: Path) -> None:
    ours, theirs = pty.openpty()
    environ = {**os.environ, "PYTHONPATH": str(repository), "TERM": "dumb"}
    # A shell's background job, as these tests may be, and its children ignore Ctrl-C otherwise.
    script = f"import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n{SLOW}"
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdin=theirs, stdout=theirs, stderr=theirs, env=environ, start_new_session=True
    )
    os.close(theirs)
    shown = b""

    def until(text: bytes) -> None:
        nonlocal shown
        end = time.monotonic() + 60
        while text not in shown:
            assert select.select([ours], [], [], max(0, end - time.monotonic()))[0], shown
            shown += os.read(ours, 4096)
        shown = shown.split(text, 1)[1]

    try:
        until(b"> ")
        os.write(ours, b"Hello\n")
        until(b"so ")
        child.send_signal(signal.SIGINT)
        until(b"stopped")
        until(b"> ")
        os.write(ours, b"Again\n")
        until(b"it ends")
        until(b"> ")
        os.write(ours, b"\x04")  # Ctrl-D
        until(b"left")
        assert child.wait(30) == 0
    finally:
        child.kill()
        child.wait()
        os.close(ours)


def test_without_a_terminal_there_is_no_prompt(run_piped: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run_piped("-c", SLOW.replace("600", "0"), lines="Hello\nAgain\n")
    assert done.stdout == "so it ends\nso it ends\nleft\n"
    assert done.stderr == ""
