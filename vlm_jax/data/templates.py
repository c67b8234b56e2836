"""Prompt templates as data: the strings around what the sides say, and which of them are trained.

From haotian-liu/LLaVA llava/conversation.py and llava/train/train.py (the masks). A template is a row of this table and
nothing else knows its name. The reference's others fit the same columns: `v0` trains pieces of the user's turn
(`Trained("### Human")`), `llava_llama_2` has a `first_user` with the system text inside, `mistral_instruct` and the
ChatML family differ in their strings only.
"""

from __future__ import annotations

import dataclasses

from vlm_jax.errors import UsageError, suggest


class Trained(str):
    """A piece of a template whose tokens are trained."""


@dataclasses.dataclass(frozen=True)
class Template:
    """How a conversation becomes text. Pieces hold {content} (a message's texts and images), {images} (its images
    alone), {system} and {eos} (the tokenizer's end-of-sequence token).

    begin: before the first turn, if there is a system text; a record's own system message replaces `system`.
    user, assistant: a turn. first_user: the first one, where it differs.
    prompt: what stands for the assistant's turn while it is still to be generated.
    end: after the last turn.
    stop: what ends a generated answer, beside the end-of-sequence token.
    one_turn: takes exactly one turn of each side.
    """

    user: tuple[str, ...]
    assistant: tuple[str, ...]
    prompt: str
    begin: tuple[str, ...] = ()
    first_user: tuple[str, ...] | None = None
    end: tuple[str, ...] = ()
    system: str = ""
    stop: tuple[str, ...] = ("{eos}",)
    one_turn: bool = False


TEMPLATES: dict[str, Template] = {
    # Stage 1: the instruction is dropped, the caption follows the image.
    "plain": Template(
        user=("{images}",), assistant=(Trained("{content}\n"),), prompt="", stop=("\n", "{eos}"), one_turn=True
    ),
    # LLaVA-1.5, and 1.6 on Vicuna. The space before the answer is trained, as in the reference.
    "vicuna_v1": Template(
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        begin=("{system} ",),
        user=("USER: {content}",),
        assistant=(" ASSISTANT:", Trained(" {content}{eos}")),
        prompt=" ASSISTANT:",
    ),
    # LLaVA-1.6 on Yi-34B. No newline after <|im_end|>; the reference masks most such samples wholly.
    "chatml_direct": Template(
        system="Answer the questions.",
        begin=("<|im_start|>system\n{system}<|im_end|>",),
        user=("<|im_start|>user\n{content}<|im_end|>",),
        assistant=("<|im_start|>assistant\n", Trained("{content}<|im_end|>")),
        prompt="<|im_start|>assistant\n",
        stop=("<|im_end|>", "{eos}"),
    ),
}


def get_template(name: str) -> Template:
    """The template of this name. Raises UsageError that suggests the nearest."""
    if name not in TEMPLATES:
        raise UsageError(f"unknown template {name!r}{suggest(name, TEMPLATES)}; known: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
