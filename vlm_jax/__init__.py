"""vlm_jax: training vision-language models in JAX. `vlm_jax.load(path)` opens a trained one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from vlm_jax.inference.load import load


def __getattr__(name: str) -> Any:
    # Lazy, so that `import vlm_jax` costs nothing and chooses no jax backend.
    if name == "load":
        from vlm_jax.inference.load import load

        return load
    raise AttributeError(f"module 'vlm_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
