"""What of a compiled program is not XLA's own: the custom calls in it, by name."""

from __future__ import annotations

import re
from collections import Counter

import jax

_CALL = re.compile(r'%(\S+?)(?:\.\d+)? = [^\n]*custom-call\([^\n]*custom_call_target="([^"]*)"')
_PALLAS = ("tpu_custom_call", "mosaic_gpu", "__gpu$xla.gpu.triton")


def custom_calls(compiled: jax.stages.Compiled) -> Counter[str]:
    """How often each custom call stands in a program (one in a loop may run more often): a Pallas kernel under its own
    name, any other under that of its target."""
    found = _CALL.findall(compiled.as_text() or "")
    return Counter(name if target.startswith(_PALLAS) else target for name, target in found)
