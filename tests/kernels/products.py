"""The matrix products of a program as traced. Compiled for a CPU they would not tell: XLA keeps more digits there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax


def products(function: Callable[..., Any], *args: Any) -> list[Any]:
    """The equations of every dot_general, those of inner functions and loops included."""
    return list(_within(jax.make_jaxpr(function)(*args)))


def _within(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jax.tree.leaves(equation.params):
            if hasattr(inner, "eqns"):
                yield from _within(inner)


def types(found: list[Any]) -> set[tuple[str, ...]]:
    """Of the factors and of the result, of each product."""
    return {tuple(str(x.aval.dtype) for x in (*equation.invars, *equation.outvars)) for equation in found}


IN_BF16_SUMMED_IN_FLOAT32 = {("bfloat16", "bfloat16", "float32")}
