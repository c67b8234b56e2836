"""What of a compiled program is not XLA's own: the custom calls in it, by name."""

from __future__ import annotations

import re
from collections import Counter

import jax

_CALL = re.compile(r'^ *(?:ROOT )?%?(\S+?)(?:\.\d+)? = .*custom-call\(.*custom_call_target="([^"]*)"(.*)', re.MULTILINE)
_PALLAS = ("tpu_custom_call", "mosaic_gpu", "__gpu$xla.gpu.triton")
_SCOPE = re.compile(r'op_name="[^"]*?([^"/]+)/[^"/]+"')  # what encloses the operation that made the call


def custom_calls(program: jax.stages.Compiled | jax.stages.Lowered) -> Counter[str]:
    """How often each custom call stands in a program (one in a loop may run more often): a Pallas kernel under its own
    name, any other under that of its target."""
    lowered = isinstance(program, jax.stages.Lowered)
    text = program.as_text(dialect="hlo", debug_info=True) if lowered else program.as_text()
    return Counter(_name(*call) for call in _CALL.findall(text or ""))


def _name(instruction: str, target: str, rest: str) -> str:
    scope = _SCOPE.search(rest)
    if target.startswith("mosaic_gpu") and scope:  # the instruction has another name there
        return scope[1]
    return instruction if target.startswith(_PALLAS) else target
