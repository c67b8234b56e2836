"""A model as a function of a flat dict of parameters: `{"decoder/layers/mlp/up/kernel": array, ...}`.

The trainer, checkpoints, freezing and reports work on these dicts, whose keys are paths; NNX modules exist only while a
function is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from vlm_jax.errors import UsageError
from vlm_jax.layers.scope import LoRA, Scope
from vlm_jax.sharding import concrete

Params = dict[str, jax.Array]
M = TypeVar("M", bound=nnx.Module)


class Bound(Generic[M]):
    """The structure of a model, made without allocating it, under the mesh in use.

    `abstract` maps each path to its shape, dtype and sharding. Raises UsageError when `lora` is for nothing.
    """

    def __init__(self, make: Callable[[Scope], M], *, param_dtype: jnp.dtype = jnp.float32, lora: LoRA | None = None):
        self._make = lambda key: make(Scope(key=key, param_dtype=param_dtype, lora=lora))
        structure = {}

        def build(key: jax.Array) -> Params:
            structure["graph"], state = nnx.split(self._make(key))
            structure["variables"] = nnx.to_flat_state(state)
            return _flatten(state)

        shapes = jax.eval_shape(build, jax.random.key(0))
        self.abstract: dict[str, jax.ShapeDtypeStruct] = {path: concrete(a) for path, a in shapes.items()}
        if lora is not None and not any(path.endswith("/lora_a") for path in self.abstract):
            linear = [path.removesuffix("/kernel") for path in self.abstract if path.endswith("/kernel")]
            raise UsageError(f"lora.targets {lora.targets!r} matches none of {', '.join(linear)}")
        self._graph = structure["graph"]
        self._variables = [(path, variable) for path, variable in structure["variables"]]

    def init(self, seed: int, paths: Collection[str] | None = None) -> Params:
        """Allocates and initialises the parameters at `paths`, by default all, each directly in its sharding."""
        wanted = self.abstract if paths is None else paths

        def make(key: jax.Array) -> Params:
            values = _flatten(nnx.split(self._make(key))[1])
            return {path: value for path, value in values.items() if path in wanted}

        return jax.jit(make)(jax.random.key(seed)) if wanted else {}

    def bind(self, params: Mapping[str, jax.Array]) -> M:
        """The module with these parameters in place."""
        flat = [(path, variable.replace(params[_join(path)])) for path, variable in self._variables]
        return nnx.merge(self._graph, nnx.from_flat_state(flat))


def _join(path: tuple) -> str:
    return "/".join(str(part) for part in path)


def _flatten(state: nnx.State) -> Params:
    return {_join(path): variable[...] for path, variable in nnx.to_flat_state(state)}
