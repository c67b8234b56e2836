"""A conversation in the terminal. Answers go to stdout as they are made; everything else goes to stderr."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from vlm_jax.errors import UsageError, suggest
from vlm_jax.inference.files import open_file

COMMANDS = {
    "/image FILE": "adds an image to your next message",
    "/clear": "forgets the conversation and the images",
    "/help": "shows this list",
    "/exit": "leaves, as Ctrl-D does; Ctrl-C stops an answer",
}
WORDS = ("/image", "/clear", "/help", "/exit")

Streamer = Callable[[list[dict[str, Any]], int], Iterator[str]]


class Chat:
    """The state of a conversation: its messages so far, and the images that wait for the next one.

    stream: `(messages, number of the answer) -> its pieces`.
    """

    def __init__(
        self,
        stream: Streamer,
        images: Iterable[np.ndarray] = (),
        *,
        out: TextIO | None = None,
        notes: TextIO | None = None,
    ):
        self.stream = stream
        self.images = list(images)
        self.messages: list[dict[str, Any]] = []
        self.out, self.notes = out or sys.stdout, notes or sys.stderr
        self.answers = 0

    def run(self, lines: Iterator[str], *, interactive: bool) -> None:
        """Takes lines until they end or one says /exit. A Ctrl-C between answers leaves, unless it is `interactive`."""
        while True:
            try:
                line = next(lines).strip()
            except (StopIteration, EOFError):
                return
            except KeyboardInterrupt:
                if not interactive:
                    raise
                self._note("\n(Ctrl-D or /exit leaves)")
                continue
            word, _, rest = line.partition(" ")
            if re.fullmatch(r"/[A-Za-z]*", word):
                if word == "/exit":
                    return
                self._command(word, rest.strip())
            elif line:
                self._say(line)

    def _command(self, word: str, rest: str) -> None:
        if word == "/image":
            self._add(rest)
        elif word == "/clear":
            self.messages, self.images = [], []
            self._note("(a new conversation)")
        elif word == "/help":
            self._note("\n".join(f"  {name:<12} {what}" for name, what in COMMANDS.items()))
        else:
            self._note(f"there is no command {word}{suggest(word, WORDS)}; /help lists them")

    def _add(self, rest: str) -> None:
        try:
            # A path with blanks may come bare, or quoted as terminals do when a file is dropped on them.
            names = [rest] if Path(rest).expanduser().is_file() else shlex.split(rest)
            opened = [open_file(name) for name in names]
        except (UsageError, ValueError, OSError) as error:
            self._note(f"error: {error}")
            return
        if not opened:
            self._note("which image? /image FILE")
        self.images += opened
        for name, image in zip(names, opened, strict=True):
            self._note(f"({name}, {image.shape[1]} x {image.shape[0]}, goes with your next message)")

    def _say(self, text: str) -> None:
        """Sends a message with the waiting images and shows the answer. An answer that is stopped stays as far as it
        came; a message without any answer is taken back."""
        parts = [{"type": "image", "image": image} for image in self.images]
        message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
        answer, finished = "", False
        try:
            for piece in self.stream([*self.messages, message], self.answers):
                answer += piece
                self.out.write(piece)
                self.out.flush()
            finished = True
        except KeyboardInterrupt:
            self._note(" (stopped)")
        except UsageError as error:
            self._note(f"error: {error}")
        if answer or finished:
            self.out.write("\n")
            self.out.flush()
            self.messages += [message, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
            self.images = []
            self.answers += 1

    def _note(self, text: str) -> None:
        print(text, file=self.notes, flush=True)


def terminal_lines() -> tuple[Iterator[str], bool]:
    """(the user's lines, whether the user sits at a terminal: only there is a prompt shown)."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return iter(sys.stdin.readline, ""), False
    try:
        import readline  # noqa: F401  line editing and a history for input()
    except ImportError:
        pass
    return _Prompted(), True


class _Prompted:
    """Unlike a generator, it goes on after a KeyboardInterrupt."""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            return input("> ")
        except EOFError:
            print()
            raise StopIteration from None
