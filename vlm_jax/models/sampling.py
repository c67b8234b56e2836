"""How the next token is chosen. Without jax, so that a command checks its flags before the heavy imports."""

from __future__ import annotations

import dataclasses

from vlm_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy. `top_p` keeps the fewest tokens whose probability reaches it, at least one."""

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature is {self.temperature}; give 0 (greedy) or a positive number")
        if not 0 <= self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; give a number from 0 to 1")


GREEDY = Sampling()
