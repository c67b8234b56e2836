"""Templates as Jinja, in the form of transformers' `apply_chat_template`, for models that leave this house."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from vlm_jax.data.formats import PLACEHOLDER
from vlm_jax.data.templates import TEMPLATES, get_template

# What stands for a message's content: its only image before its stripped text, as we place it by default; several
# images where they are. A content that is one string stays as it is.
CONTENT = (
    "{% macro content(message) %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% set seen = namespace(images=0, text='') %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{% set seen.text = seen.text + part['text'] %}"
    "{% else %}{% set seen.images = seen.images + 1 %}{% endif %}{% endfor %}"
    "{% if seen.images == 1 %}{{ IMAGE }}{% if seen.text | trim %}{{ '\\n' + seen.text | trim }}{% endif %}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ IMAGE }}{% endif %}{% endfor %}"
    "{% endif %}{% endif %}{% endmacro %}"
)
IMAGES = (
    "{% macro images(message) %}{% if message['content'] is not string %}{% for part in message['content'] %}"
    "{% if part['type'] != 'text' %}{{ IMAGE }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
)
SLOTS = {
    "{content}": "{{ content(message) }}",
    "{images}": "{{ images(message) }}",
    "{system}": "{{ system }}",
    "{bos}": "{{ bos_token }}",
    "{eos}": "{{ eos_token }}",
}


def chat_template(name: str) -> str | None:
    """The Jinja form of a template, as its prompts are; None where text alone does not say how it is tokenised.

    An image is rendered as `<image>`; a BOS is left to the tokenizer. Raises UsageError for an unknown template.
    """
    shape = get_template(name)
    shape = shape.prompted or shape
    if shape.apart:
        return None
    image = json.dumps(shape.image.replace("{image}", PLACEHOLDER))
    first = shape.user if shape.first_user is None else shape.first_user
    return "".join(
        [
            CONTENT.replace("IMAGE", image),
            IMAGES.replace("IMAGE", image) if "{images}" in "".join(shape.user) else "",
            "{% if messages[0]['role'] == 'system' %}",
            "{% set system = content(messages[0]) %}{% set turns = messages[1:] %}",
            f"{{% else %}}{{% set system = {json.dumps(shape.system)} %}}{{% set turns = messages %}}{{% endif %}}",
            f"{{% if system %}}{_jinja(shape.begin)}{{% else %}}{_jinja(shape.bare)}{{% endif %}}",
            "{% for message in turns %}",
            f"{{% if message['role'] == 'assistant' %}}{_jinja(shape.assistant)}",
            f"{{% elif loop.first %}}{_jinja(first)}{{% else %}}{_jinja(shape.user)}{{% endif %}}",
            "{% endfor %}",
            f"{{% if add_generation_prompt %}}{_jinja([shape.prompt])}{{% else %}}{_jinja(shape.end)}{{% endif %}}",
        ]
    )


def template_of(jinja: str) -> str | None:
    """The name of the template whose Jinja form this is, as models that left this house carry it; None for others'."""
    return next((name for name in TEMPLATES if chat_template(name) == jinja.strip()), None)


def _jinja(pieces: Iterable[str]) -> str:
    parts = re.split("(" + "|".join(map(re.escape, SLOTS)) + ")", "".join(pieces))
    return "".join(SLOTS.get(part, f"{{{{ {json.dumps(part)} }}}}" if part else "") for part in parts)
