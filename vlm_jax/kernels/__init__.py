"""Operations with a memory or speed problem of their own: each has a definition and faster implementations of it.

Every operation is a folder: `api.py` (the public function), `reference.py` (plain jnp: the definition), `xla.py`
(chunked, runs anywhere), kernels per platform, and `shapes.py` (argument shapes shared by tests and benchmarks). Sizes
of tiles that are free stand in `tiles.json`, by device; `tune.py` searches for them.
"""

from vlm_jax.kernels.attention.api import attention
from vlm_jax.kernels.contrastive.api import sigmoid_contrastive_loss, softmax_contrastive_loss
from vlm_jax.kernels.cross_entropy.api import linear_cross_entropy
from vlm_jax.kernels.custom_calls import custom_calls

__all__ = ["attention", "custom_calls", "linear_cross_entropy", "sigmoid_contrastive_loss", "softmax_contrastive_loss"]
