"""`packing.fit=auto`: packed or padded rows, whichever takes the devices less time for the same samples.

Packed rows hold hardly any padding, but what serves their attention may be slower (docs/kernels.md), and all are as
long as the largest bucket. Which weighs more depends on the data, the buckets, the model and the device. It is foretold
from them: the sizes of all records are known, and so are the operations of a step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vlm_jax.data.index import Index
from vlm_jax.data.loader import Loader
from vlm_jax.data.packing import AUTO
from vlm_jax.families import LlavaFamily
from vlm_jax.models.flops import Costs
from vlm_jax.recipe import Stage
from vlm_jax.training.optimizer import multipliers

SAMPLED = 64  # steps of an epoch that are looked at

Pairs = Callable[[Sequence[Sequence[int]], int], float]  # rows and T, as `LlavaFamily.equal_pairs` takes them


def of_stages(stages: Sequence[Stage], family: LlavaFamily, loader: Callable[..., Loader]) -> dict[str | None, float]:
    """`operations` of all stages, by fit. loader: makes that of a stage by its number, with another `packing`."""
    total: dict[str | None, float] = {"best_fit": 0.0, None: 0.0}
    for number, stage in enumerate(stages):
        costs = family.costs(multipliers(list(family.bound.abstract), stage.groups))
        packed = loader(number, packing=dataclasses.replace(stage.packing, fit="best_fit"))
        assert packed.index is not None
        sizes = packed.index.limited(packed.encode)
        for fit, one in ("best_fit", packed), (None, loader(number, packing=None)):
            pairs = functools.partial(family.equal_pairs, packed=fit is not None)
            total[fit] += operations(one, sizes, costs, pairs)
    return total


def operations(loader: Loader, sizes: Index, costs: Costs, pairs: Pairs) -> float:
    """What the steps of a loader take, in operations of matrix products that would take as long; padding counts.

    Left out is what does not depend on the rows: the head, which is computed where there are labels, and the optimizer.

    sizes: of the records of the loader's sources (`Index.limited`).
    """
    order, total = loader.order, 0.0
    steps = np.unique(np.linspace(0, order.steps(1.0) - 1, SAMPLED).astype(int)).tolist()
    for step in steps:
        numbers = range(step * order.slots, min((step + 1) * order.slots, order.rows(0)))
        records = [[record for record in order.row(0, number) if sizes.usable[record]] for number in numbers]
        rows = [sizes.tokens[row].tolist() for row in records]
        length, tiles = loader.bucket(max(map(sum, rows)), max(int(sizes.tiles[row].sum()) for row in records))
        count = loader.micro_batches * loader.rows
        total += count * (length * costs.per_token + tiles * costs.per_tile) + pairs(rows, length) * costs.per_pair
    return total / len(steps) * loader.steps


def choose_fit(operations: Mapping[str | None, float]) -> tuple[str | None, str]:
    """The fit with the fewest operations, of None (padded rows) and another, and a sentence about it."""
    best, other = sorted(operations, key=operations.__getitem__)
    ratio, others = operations[other] / operations[best], "padded" if other is None else "packed"
    by = f"by a model of the device {others} rows take {ratio:.2f} times as long"
    return best, f"packing.fit={AUTO} chose {best}: {by}"
