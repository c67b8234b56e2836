"""Prompt templates as data: the strings around what the sides say, which of them are trained, and whose they are.

From haotian-liu/LLaVA llava/conversation.py (the strings) and llava/train/train.py (the masks). A template is a row of
this table and nothing else knows its name; `ALIASES` are the reference's other names of the same row.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace

from vlm_jax.errors import UsageError, suggest


class Trained(str):
    """A piece of a template whose tokens are trained."""


@dataclasses.dataclass(frozen=True)
class Rounds:
    """How the reference counts the tokens of a conversation, to find a "tokenization mismatch" (`data/mismatch.py`).

    end: what it cuts a text into rounds at. segments: how many cuts the first round and each later one hold.
    answer: what must stand exactly once in a round.
    begun: tokens counted before the first round. each: added to each round. later: added to each round but the first,
      with a tokenizer of the old behaviour (`legacy`) and of the new one.
    silent: the user's and the assistant's turn where the message is empty, which the reference takes for still to come.
    """

    end: str
    answer: str
    silent: tuple[str, str]
    segments: tuple[int, int] = (1, 1)
    begun: int = 1
    each: int = 0
    later: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class Template:
    """How a conversation becomes text. Pieces hold {content} (a message's texts and images), {images} (its images
    alone), {system}, {bos} and {eos} (the tokenizer's tokens of the begin and the end of a sequence).

    begin: before the first turn if there is a system text, and `bare` if there is none; a record's own system message
      replaces `system`. Where no piece of `begin` holds {system}, a record that has one is malformed.
    user, assistant: a turn. first_user: the first one, where it differs.
    prompt: what stands for the assistant's turn while it is still to be generated.
    end: after the last turn.
    image: what an {image} stands in.
    stop: what ends a generated answer, beside the end-of-sequence token.
    one_turn: takes exactly one turn of each side.
    always: tokens that are trained wherever they stand.
    late: the reference's v0 finds the user's turns by counting tokens, each turn with a BOS of its own, so that the
      untrained part of turn number i begins i tokens late and ends i + 1 late.
    apart: trained pieces are tokenised alone.
    rounds: how the reference counts; None where it never drops a sample.
    prompted: the template of prompts, where it is not the beginning of what is trained.
    """

    user: tuple[str, ...]
    assistant: tuple[str, ...]
    prompt: str
    begin: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    first_user: tuple[str, ...] | None = None
    end: tuple[str, ...] = ()
    system: str = ""
    image: str = "{image}"
    stop: tuple[str, ...] = ("{eos}",)
    one_turn: bool = False
    always: tuple[str, ...] = ()
    late: bool = False
    apart: bool = False
    rounds: Rounds | None = None
    prompted: Template | None = None


CURIOUS_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
CURIOUS_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LANGUAGE_AND_VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
# The missing space after "language." is the original's.
TAGGED = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
TAG = "<Image>{image}</Image>"
# Llama 2's, with its two spaces.
SAFE = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
# v0 shows the model one exchange before the first question.
ENERGY_QUESTION = "What are the key differences between renewable and non-renewable energy sources?"
ENERGY_ANSWER = (
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, such "
    "as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are finite and "
    "will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences between renewable "
    "and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are "
    "finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
    "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
    "operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations than "
    "non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations and "
    "needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable sources "
    "are not, and their depletion can lead to economic and social instability.\n"
)

# LLaVA 1.0 is trained on one form ("### Human: ...", a line each) and asked in another ("###Human: ...###"), both here
# as the reference has them: whichever of its v0 names a run is given, training writes the first and prompts the second.
V0_PROMPTED = Template(
    system=CURIOUS_HUMAN,
    begin=("{system}###",),
    user=("Human: {content}###",),
    assistant=("Assistant:", Trained(" {content}###")),
    prompt="Assistant:",
    stop=("###", "{eos}"),
)
V0 = Template(
    system=CURIOUS_HUMAN,
    begin=("{system}\n\n",),
    user=(Trained("### Human"), ": {content}\n"),
    assistant=(Trained("### Assistant: {content}\n"),),
    end=(Trained("### "),),
    prompt="### Assistant:",
    stop=("###", "{eos}"),
    late=True,
    prompted=V0_PROMPTED,
)

# LLaVA-1.5, and 1.6 on Vicuna. The space before the answer is trained, as in the reference.
VICUNA_V1 = Template(
    system=CURIOUS_USER,
    begin=("{system} ",),
    user=("USER: {content} ",),
    assistant=("ASSISTANT:", Trained(" {content}{eos}")),
    prompt="ASSISTANT:",
    rounds=Rounds(end="{eos}", answer=" ASSISTANT: ", silent=("USER:", "ASSISTANT:"), later=(0, -1)),
)

# The space before {eos} is trained too.
LLAMA_2 = Template(
    system=SAFE,
    begin=("[INST] <<SYS>>\n{system}\n<</SYS>>\n\n",),
    bare=("[INST] ",),
    first_user=("{content} [/INST]",),
    user=("{bos}[INST] {content} [/INST]",),
    assistant=(Trained(" {content} {eos}"),),
    prompt="",
    rounds=Rounds(end="{eos}", answer="[/INST] ", silent=("", "")),
)
MISTRAL_INSTRUCT = replace(LLAMA_2, system="", user=("[INST] {content} [/INST]",))


def _turns(user: str, assistant: str, end: str, system: str, header: str, rounds: Rounds | None) -> Template:
    """The reference's MPT style: each side's header, what it says, and one end. LLaVA masks nearly every such sample
    wholly by a slip in its counting; what it meant is that answers and their ends are trained."""
    return Template(
        system=system,
        begin=(f"{header}{{system}}{end}",),
        user=(f"{user}{{content}}{end}",),
        assistant=(assistant, Trained("{content}" + end)),
        prompt=assistant,
        stop=(end, "{eos}"),
        rounds=rounds,
    )


MPT_ROUNDS = Rounds(
    end="<|im_end|>",
    answer="<|im_end|><|im_start|>assistant\n",
    silent=("<|im_start|>user\n", "<|im_start|>assistant\n"),
    segments=(3, 2),
    begun=0,
    later=(1, 0),
)
LLAMA_3_ROUNDS = Rounds(
    end="<|eot_id|>",
    answer="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    silent=("<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    segments=(3, 2),
    begun=0,
    each=1,
    later=(-1, -1),
)
# No newline after <|im_end|>.
CHATML_DIRECT = _turns(
    "<|im_start|>user\n",
    "<|im_start|>assistant\n",
    "<|im_end|>",
    system="Answer the questions.",
    header="<|im_start|>system\n",
    rounds=MPT_ROUNDS,
)
LLAVA_LLAMA_3 = _turns(
    *LLAMA_3_ROUNDS.silent,
    "<|eot_id|>",
    system=LANGUAGE_AND_VISION,
    header="<|start_header_id|>system<|end_header_id|>\n\n",
    rounds=LLAMA_3_ROUNDS,
)
# ChatML as others write it, with a newline after each <|im_end|>.
CHATML = Template(
    begin=("<|im_start|>system\n{system}<|im_end|>\n",),
    user=("<|im_start|>user\n{content}<|im_end|>\n",),
    assistant=("<|im_start|>assistant\n", Trained("{content}<|im_end|>\n")),
    prompt="<|im_start|>assistant\n",
    stop=("<|im_end|>", "{eos}"),
)

# An interleaved document, which is trained as it stands whatever the template of conversations.
DOCUMENT = Template(user=(), assistant=(Trained("{content}"),), prompt="", end=(Trained("{eos}"),))

TEMPLATES: dict[str, Template] = {
    # LLaVA (llava/conversation.py).
    # Stage 1: the instruction (and a system message) is dropped, the caption follows the image.
    "plain": Template(
        user=("{images}",), assistant=(Trained("{content}\n"),), prompt="", stop=("\n", "{eos}"), one_turn=True
    ),
    "v0": replace(
        V0,
        prompted=replace(
            V0_PROMPTED, begin=(f"{{system}}###Human: {ENERGY_QUESTION}###Assistant: {ENERGY_ANSWER}###",)
        ),
    ),
    "llava_v0": V0,
    "v0_mmtag": replace(V0, system=TAGGED, image=TAG, prompted=replace(V0_PROMPTED, system=TAGGED, image=TAG)),
    "vicuna_v1": VICUNA_V1,
    "llava_v1": replace(VICUNA_V1, system=CURIOUS_HUMAN),
    "v1_mmtag": replace(VICUNA_V1, system=TAGGED, image=TAG),
    "llama_2": LLAMA_2,
    "llava_llama_2": replace(LLAMA_2, system=LANGUAGE_AND_VISION),
    "mistral_instruct": MISTRAL_INSTRUCT,
    "chatml_direct": CHATML_DIRECT,
    "mpt": replace(
        CHATML_DIRECT,
        system="A conversation between a user and an LLM-based AI assistant. "
        "The assistant gives helpful and honest answers.",
    ),
    # LLaVA-NeXT (LLaVA-VL/LLaVA-NeXT llava/conversation.py, llava/train/train.py): the assistant's header is trained,
    # and so are the marks and newlines of all turns.
    "qwen_1_5": replace(
        CHATML,
        system="You are a helpful assistant.",
        assistant=(Trained("<|im_start|>assistant\n{content}<|im_end|>\n"),),
        always=("\n", "<|im_start|>", "<|im_end|>"),
    ),
    "llava_llama_3_next": replace(
        LLAVA_LLAMA_3,
        assistant=(Trained("<|start_header_id|>assistant<|end_header_id|>\n\n{content}<|eot_id|>"),),
        always=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "\n\n"),
        rounds=None,
    ),
    "mistral_orca": replace(
        CHATML_DIRECT,
        system="You are MistralOrca, a large language model trained by Alignment Lab AI. "
        "Write out your reasoning step-by-step to be sure you get the right answers!",
    ),
    "mistral_zephyr": _turns(
        "<|user|>\n",
        "<|assistant|>\n",
        "{eos}",
        system="You are a helpful AI assistant.",
        header="<|system|>\n",
        rounds=replace(
            MPT_ROUNDS,
            end="{eos}",
            answer="{eos}<|assistant|>\n",
            silent=("<|user|>\n", "<|assistant|>\n"),
        ),
    ),
    # Open-LLaVA-NeXT (xiaoachen98/Open-LLaVA-NeXT llava/conversation.py).
    "llava_llama_3": LLAVA_LLAMA_3,
    # Hugging Face's hub (llava-hf/*). The hub's own Jinja ends an answer of 1.5 with a space in place of {eos}.
    "vicuna_v1_hf": replace(VICUNA_V1, system="", rounds=None),
    "mistral_instruct_hf": replace(
        MISTRAL_INSTRUCT,
        begin=("<<SYS>>\n{system}\n<</SYS>>\n\n",),
        bare=(),
        first_user=None,
        assistant=(Trained(" {content}{eos}"),),
        rounds=None,
    ),
    # LLaMA-Factory (hiyouga/LLaMA-Factory src/llamafactory/data/template.py). It tokenises answers alone.
    "llava": replace(VICUNA_V1, assistant=("ASSISTANT:", Trained("{content}{eos}")), apart=True, rounds=None),
    "llava_next_mistral": replace(
        MISTRAL_INSTRUCT,
        begin=("[INST] {system}\n\n",),
        first_user=("{content}[/INST]",),
        user=("[INST] {content}[/INST]",),
        assistant=(Trained(" {content}{eos}"),),
        apart=True,
        rounds=None,
    ),
    "llava_next_yi": replace(CHATML, apart=True),
    # ms-swift (modelscope/ms-swift swift/llm/template/template/llava.py). It tokenises answers alone.
    "llava1_5_hf": Template(
        user=("USER: {content}\n",),
        assistant=("ASSISTANT:", Trained("{content}{eos}")),
        prompt="ASSISTANT:",
        apart=True,
    ),
    "llava1_6_mistral_hf": Template(
        user=("[INST] {content} [/INST]",), assistant=(Trained("{content}{eos}"),), prompt="", apart=True
    ),
    "llava1_6_vicuna_hf": replace(
        VICUNA_V1,
        system=CURIOUS_HUMAN,
        assistant=("ASSISTANT:", Trained("{content}{eos}")),
        apart=True,
        rounds=None,
    ),
}

ALIASES: dict[str, str] = {
    "default": "v0",
    "v1": "vicuna_v1",
    "v0_plain": "plain",
    "mistral_direct": "chatml_direct",
    "llava_mistral_instruct": "mistral_instruct",  # LLaVA-NeXT's
    "llava_v0_mmtag": "v0_mmtag",  # LLaVA-NeXT's
    "llava_v1_mmtag": "v1_mmtag",  # LLaVA-NeXT's
    "qwen_2": "qwen_1_5",  # LLaVA-NeXT's
    "llava_next": "llava",  # LLaMA-Factory's
}


def get_template(name: str) -> Template:
    """The template of this name. Raises UsageError that suggests the nearest."""
    known = [*TEMPLATES, *ALIASES]
    if name not in known:
        raise UsageError(f"unknown template {name!r}{suggest(name, known)}; known: {', '.join(known)}")
    return TEMPLATES[ALIASES.get(name, name)]
