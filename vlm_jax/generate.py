"""python -m vlm_jax.generate --model=PATH [--image=FILE ...] [--prompt=TEXT] [--max_new_tokens=N]

With --prompt, prints the answer and nothing else on stdout. Without, a chat: /image FILE adds an image, /help lists the
rest. With --data=questions.jsonl --output=answers.jsonl, answers a file of questions in LLaVA's formats; repeating the
command goes on where it stopped. Leaves with status 2 if a question of the file could not be answered.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vlm_jax.compat import check_versions
from vlm_jax.config import REQUIRED, parse_command
from vlm_jax.data.templates import get_template
from vlm_jax.errors import Interrupted, UsageError, run_command
from vlm_jax.inference.files import open_file
from vlm_jax.inference.questions import Answer, AnswerFile, read_questions
from vlm_jax.interop.hub import local_folder
from vlm_jax.interop.layout import MODEL, find_model, is_foreign, read_config
from vlm_jax.models.sampling import Sampling

FLAGS = {
    "model": (str, REQUIRED, "a workdir, a model of ours, of Hugging Face's or of LLaVA's, or a hub id owner/name"),
    "image": (str, [], "an image file"),
    "prompt": (str, None, "the question; images stand first, or where it has <image>"),
    "max_new_tokens": (int, 256, "longest answer"),
    "temperature": (float, 0.0, "0 takes the likeliest token, more draws"),
    "top_p": (float, 1.0, "draw from the likeliest tokens of this much probability together"),
    "seed": (int, 0, "of the draws"),
    "dtype": (("float32", "bfloat16"), "float32", "of weights and computation"),
    "template": (str, None, "of the conversation, if the model does not tell"),
    "data": (str, None, "questions: JSONL with question_id, text and image"),
    "output": (str, None, "where the answers to --data go"),
    "images": (str, None, "folder of the images of --data, if not the file's own"),
    "batch": (int, None, "questions answered at once, 8 if not given"),
}


def main(argv: Sequence[str]) -> None:
    given = parse_command(argv, FLAGS, usage=__doc__ or "")
    sampling = _check(given)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
    folder, template = _find(given.model, given.template)
    if get_template(template).one_turn and given.prompt is None and given.data is None:
        raise UsageError(f"the model in {folder} takes one turn (template {template!r}), no chat: give --prompt")
    pictures = [open_file(file) for file in given.image]
    place = folder.resolve()
    model_id = place.parent.name if place.name == MODEL else place.name
    file = _open_answers(given, model_id) if given.data else None
    if file is not None and not file.left:
        file.sort()
        print(f"all questions are answered in {given.output}", file=sys.stderr)
        return
    if get_template(template).one_turn:
        print(f"note: template {template!r} shows the model the images alone, not the text", file=sys.stderr)
    check_versions()

    # The heavy imports come after the command line has been understood, and what it names has been found.
    from vlm_jax.inference.load import load

    vlm = load(folder, dtype=given.dtype, template=given.template)
    settings = {"max_new_tokens": given.max_new_tokens, "sampling": sampling}
    if file is not None:
        _answer_data(vlm, file, given, settings)
    elif given.prompt is not None:
        print(_answer_prompt(vlm, given.prompt, pictures, given.seed, settings))
    else:
        _chat(vlm, pictures, given.seed, settings)


def _find(model: str, template: str | None) -> tuple[Path, str]:
    """The folder of the model, fetched if it is a hub id, and the template of its conversations."""
    folder = Path(local_folder(model)).expanduser()
    if is_foreign(folder):
        from vlm_jax.interop.checkpoint import describe_model

        template = template or describe_model(folder)["template"]
    else:
        folder = Path(find_model(folder))
        template = template or read_config(folder).get("template")
    if template is None:
        raise UsageError(f"the conversation template of {folder} is not known: give --template=NAME")
    return folder, template


def _check(given: SimpleNamespace) -> Sampling:
    """Everything that the words of the command alone can tell."""
    if given.data is None:
        for name in ("output", "images", "batch"):
            if getattr(given, name) is not None:
                raise UsageError(f"--{name} belongs to --data=questions.jsonl, which is missing")
    else:
        if given.output is None:
            raise UsageError("--data needs --output=answers.jsonl")
        if given.prompt is not None or given.image:
            raise UsageError("--data brings its own questions and images; leave --prompt and --image out")
    if given.prompt is not None and not given.prompt.strip() and not given.image:
        raise UsageError("--prompt is empty: ask something, or give an --image")
    given.batch = 8 if given.batch is None else given.batch
    for name in ("max_new_tokens", "batch"):
        if getattr(given, name) < 1:
            raise UsageError(f"--{name} is {getattr(given, name)}; give at least 1")
    try:
        return Sampling(given.temperature, given.top_p)
    except UsageError as error:
        raise UsageError(f"--{error}") from None


def _open_answers(given: SimpleNamespace, model_id: str) -> AnswerFile:
    questions = read_questions(given.data)
    given.images = Path(given.images or Path(given.data).parent).expanduser()
    if not given.images.is_dir():
        raise UsageError(f"the images folder {given.images} does not exist; correct --images")
    return AnswerFile(given.output, questions, model_id)


def _answer_prompt(vlm: Any, prompt: str, pictures: Sequence[Any], seed: int, settings: dict[str, Any]) -> str:
    from vlm_jax.inference.vlm import Request, as_messages

    (answer,) = vlm.answer([Request(as_messages(prompt, len(pictures)), pictures, seed=seed)], **settings)
    return answer


def _chat(vlm: Any, pictures: Sequence[Any], seed: int, settings: dict[str, Any]) -> None:
    from vlm_jax.inference.chat import Chat, terminal_lines
    from vlm_jax.inference.vlm import Request

    def stream(messages: list[dict[str, Any]], number: int) -> Iterator[str]:
        return vlm.stream(Request(messages, seed=seed + number), **settings)

    lines, interactive = terminal_lines()
    if interactive:
        print("Ask something. /image FILE adds an image, /help lists the rest.", file=sys.stderr)
    Chat(stream, pictures).run(lines, interactive=interactive)


def _answer_data(vlm: Any, file: AnswerFile, given: SimpleNamespace, settings: dict[str, Any]) -> None:
    from tqdm import tqdm

    from vlm_jax.inference.answering import answer_all

    began, failed, done = time.monotonic(), list[Answer](), 0
    if len(file.left) < file.total:
        print(f"{file.total - len(file.left):,} of {file.total:,} questions are answered already", file=sys.stderr)
    with tqdm(total=len(file.left), unit="question", disable=None) as bar:
        try:
            for some in answer_all(vlm, file.left, given.images, batch=given.batch, seed=given.seed, **settings):
                file.write(some)
                failed += [answer for answer in some if answer.error]
                done += len(some)
                bar.update(len(some))
        except KeyboardInterrupt:
            left = len(file.left) - done
            raise Interrupted(f"{left:,} questions are left; the same command goes on from there") from None
    file.sort()
    print(f"answered {done - len(failed):,} questions in {time.monotonic() - began:.0f} s", file=sys.stderr)
    for answer in failed:
        print(f"  question {answer.question.id}: {answer.error}", file=sys.stderr)
    if failed:
        raise UsageError(
            f"{len(failed):,} of {len(file.left):,} questions could not be asked (listed above, and under 'error' in "
            f"{file.path}); mend them and repeat the command, which asks those alone"
        )


if __name__ == "__main__":
    run_command(main, out_of_memory="lower --batch or --max_new_tokens, or choose --dtype=bfloat16")
