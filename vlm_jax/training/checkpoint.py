"""Saving and resuming a stage of a run: a small facade over Orbax.

    checkpoints/<stage>/frozen/     what the stage does not train, written once
    checkpoints/<stage>/start/      what it trains, as it was at the start: for the report of what moved
    checkpoints/<stage>/<step>/     state (trained parameters, optimizer, ...) and meta (JSON)

What a step needs to go on is the state and its number: data order and random keys are functions of the step.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from vlm_jax.errors import UsageError
from vlm_jax.sharding import concrete
from vlm_jax.training.state import Params, TrainState


class Checkpoints:
    """Checkpoints of one stage. Saving is asynchronous; a step counts once Orbax has committed it."""

    def __init__(self, directory: str, *, keep: int = 2):
        self._directory = epath.Path(directory).absolute() if "://" not in directory else epath.Path(directory)
        # What a killed run has half written would fill the disk. Orbax can remove it too, but does so beside what comes
        # next, and took the folder of `save_frozen` away while it was being written.
        if jax.process_index() == 0 and self._directory.exists():
            for half_written in self._directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                half_written.rmtree()
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, step_prefix=None),
            item_names=("state", "meta"),
        )
        self._frozen, self._start = self._directory / "frozen", self._directory / "start"

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def meta(self, step: int) -> dict[str, Any]:
        with _readable(self._directory / str(step)):
            return dict(self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"])

    def save_start(self, state: TrainState) -> None:
        """Writes what the stage does not train, and what it starts from; in place of what a run that never saved a
        step has left."""
        with ocp.StandardCheckpointer() as checkpointer:
            if state.frozen:
                checkpointer.save(self._frozen, state.frozen, force=True)
            checkpointer.save(self._start, state.trained, force=True)

    def start(self, like: Params) -> Params:
        """The trained parameters as the stage found them, in the shapes, dtypes and shardings of `like`."""
        with _readable(self._start), ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(self._start, jax.tree.map(concrete, like))

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Begins to save `state`; its arrays may be donated as soon as this returns."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        moving = dataclasses.replace(state, frozen={})
        if jax.default_backend() == "cpu":  # there the host copy would be the very buffer that the next step reuses
            moving = jax.tree.map(jnp.copy, moving)
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(moving), meta=ocp.args.JsonSave(meta))
        )

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of `step`, in the shapes, dtypes and shardings of `like` (which may be abstract)."""
        moving = dataclasses.replace(like, frozen={})
        with _readable(self._directory / str(step)):
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(jax.tree.map(concrete, moving)))
            )["state"]
        frozen: dict[str, jax.Array] = {}
        if like.frozen:
            with _readable(self._frozen), ocp.StandardCheckpointer() as checkpointer:
                frozen = checkpointer.restore(self._frozen, jax.tree.map(concrete, like.frozen))
        return dataclasses.replace(restored, frozen=frozen)

    def wait(self) -> None:
        """Returns when everything that was saved is on disk; raises what went wrong."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


@functools.cache
def _ignore_closed_loops() -> None:
    """The other reads of a restore that has failed report to an event loop that is gone, with a traceback each."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


class _readable:
    """Turns what Orbax raises for a damaged or foreign checkpoint into one sentence."""

    def __init__(self, folder: epath.Path):
        self._folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # Orbax raises a bare Exception for data that is cut short, with what is wrong as its cause.
        if isinstance(error, Exception) and "RESOURCE_EXHAUSTED" not in str(error):
            _ignore_closed_loops()
            reason = error.__cause__ or error
            first = (str(reason).splitlines() or [repr(reason)])[0]
            way_out = (
                "delete that folder to go on from the one before it"
                if self._folder.name.isdecimal()
                else f"all steps need it: delete {self._folder.parent} to train this stage anew"
            )
            raise UsageError(
                f"cannot read the checkpoint {self._folder}: {first[:300]}; {way_out}, or choose another --workdir"
            ) from error
