"""python -m vlm_jax.train --config=FILE[:ARGS] [--workdir=DIR] [--config.KEY=VALUE ...]

Trains what a config describes, stage after stage. Repeating the command goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_jax.compat import check_versions
from vlm_jax.config import check_resume, default_workdir, load_config, parse_command, plain, split_spec, to_json
from vlm_jax.errors import UsageError, run_command

MOVED = "moved.json"  # beside the checkpoints of a stage: what it changed


def main(argv: Sequence[str]) -> None:
    began = time.monotonic()
    flags = {"workdir": (str, None, "folder of the run (default runs/<config>[-<args>])")}
    given = parse_command(argv, flags, config=True, usage=__doc__ or "")
    config, _ = load_config(given.config, given.overrides)
    workdir = Path(given.workdir or default_workdir(*split_spec(given.config)))
    check_versions()

    # The heavy imports come after the command line has been understood.
    import jax

    from vlm_jax.requirements import check
    from vlm_jax.training.loop import StopSignal

    command = shlex.join(["python", "-m", "vlm_jax.train", f"--config={given.config}", *given.overrides])
    with StopSignal().listening() as stop:
        with jax.set_mesh(_mesh(config)):
            check(config, given.config)
            Run(config, workdir, command).train(stop, began)


def _mesh(config: Any) -> Any:
    from vlm_jax.sharding import make_mesh

    return make_mesh(**config.mesh)


class Run:
    """A run of all stages of a config in one workdir. Making it checks everything that needs no compilation."""

    def __init__(self, config: Any, workdir: Path, command: str):
        from vlm_jax.data import open_source
        from vlm_jax.families import dtype_of, make_family
        from vlm_jax.inputs import run_tokenizer
        from vlm_jax.interop.starting import open_start
        from vlm_jax.recipe import stages

        self.config, self.workdir = config, workdir
        self.family = make_family(plain(config.model), dtype=config.dtype, remat=config.remat)
        self.frozen_dtype = dtype_of(config.frozen_dtype)
        self.stages = stages(config)
        self.images = [self.family.images(stage.images) for stage in self.stages]
        self.folders = [workdir / "checkpoints" / f"{i}-{stage.name}" for i, stage in enumerate(self.stages)]
        changes = self._changes(command)
        model = plain(config.model)
        self.start = open_start(config.init_from, plain(config.parts), model, self.family.bound.abstract)
        self.tokenizer = run_tokenizer(config, self.family.vocab_size)
        for number in range(len(self.stages)):
            self._try_data(number)
        self.notes = list(self.start.notes if self.start else ())
        if config.packing.fit == "auto":
            self._choose_packing()
        self.loaders = [self._loader(i, index=self._kept_index(i)) for i in range(len(self.stages))]
        self.eval_sources = [
            open_source(s.eval.path, s.eval.images, confined=s.eval.confined) if s.eval else None for s in self.stages
        ]
        for number in range(len(self.stages)):
            self._optimizer(number)
            self._try_weights(number)
        self._prepare_workdir(changes)

    def _try_weights(self, number: int) -> None:
        """Raises UsageError where the rows of a step do not suit the way in which the loss is averaged."""
        import jax
        from jax.sharding import NamedSharding
        from jax.sharding import PartitionSpec as P

        from vlm_jax.sharding import RULES

        loader, spread = self.loaders[number], NamedSharding(jax.sharding.get_mesh(), P(None, RULES.batch))
        row = jax.ShapeDtypeStruct((loader.micro_batches, loader.rows, 1), "int32", sharding=spread)
        jax.eval_shape(self._weigh, {"labels": row, "segment_ids": row})
        rows, ranks = loader.micro_batches * loader.rows, self.config.loss_ranks
        if self.config.loss_norm == "rank_mean" and loader.index is None and rows % ranks:
            raise UsageError(f"loss_ranks {ranks} does not divide the {rows} rows of a step")

    def _try_data(self, number: int) -> None:
        """Reads a few samples of all data of a stage: a wrong folder shows now, not after the stages before it."""
        stage = self.stages[number]
        for sources in (stage.train, (stage.eval,)):
            if sources[0] is not None:
                changes = {"sources": sources, "samples": 16, "steps": 1, "packing": None}
                few = self._loader(number, **changes, bad_records=None, workers=0)
                with contextlib.closing(iter(few)) as batches:
                    next(batches)

    def _changes(self, command: str) -> Sequence[Any]:
        """The workdir is new, or holds a run of the same config but for what may change, which is returned."""
        file = self.workdir / "config.json"
        if not file.exists():
            return ()
        try:
            before = json.loads(file.read_text())
        except ValueError as error:
            raise UsageError(f"{file} is damaged ({error}); choose another --workdir") from error
        if not isinstance(before, dict) or "stages" not in before:
            raise UsageError(f"{self.workdir} holds something else, not a run ({file}); choose another --workdir")
        if self._has_begun and self.config.packing.fit == "auto":
            self._set_fit(before["packing"]["fit"])  # what was chosen then
        return check_resume(before, self.config, workdir=str(self.workdir), command=command) if self._has_begun else ()

    def _choose_packing(self) -> None:
        """Puts what suits the data and the devices in the place of `packing.fit=auto`."""
        from vlm_jax.training.packing_fit import choose_fit, of_stages

        fit, note = choose_fit(of_stages(self.stages, self.family, self._loader))
        self._set_fit(fit)
        self.notes.append(note)

    def _set_fit(self, fit: str | None) -> None:
        from vlm_jax.recipe import stages

        self.config.packing.fit = fit
        self.stages = stages(self.config)

    def _prepare_workdir(self, changes: Sequence[Any]) -> None:
        """The first that is written, once everything has been checked."""
        for change in changes:
            print(f"changed since the run began: {change}")
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
            if changes:
                self.summary_file.unlink(missing_ok=True)
            _write(self.workdir / "config.json", to_json(self.config))
            for number, loader in enumerate(self.loaders):
                if loader.index is not None:
                    loader.index.save(self._index_file(number))
        except OSError as error:
            raise UsageError(f"cannot write to --workdir={self.workdir}: {error.strerror}") from error

    @property
    def _has_begun(self) -> bool:
        """A run that never came to a step, for an error in its settings, may have them corrected."""
        return (self.workdir / "metrics.jsonl").exists() or any(_last_step(f) is not None for f in self.folders)

    def _index_file(self, number: int) -> Path:
        """What the records of a packed stage took when the run began: it decides which share a row."""
        return self.workdir / f"index-{number}-{self.stages[number].name}.npz"

    def _kept_index(self, number: int) -> Any:
        """A run that goes on keeps its rows, whatever has been mended or cached since."""
        from vlm_jax.data.index import Index

        file = self._index_file(number)
        if self.stages[number].packing.fit is None or not self._has_begun:
            return None
        index = Index.load(file)
        if index is None:
            raise UsageError(
                f"{file} is missing or damaged; it says which records share a row, without which the run cannot go on "
                "as it began: start anew in another --workdir"
            )
        return index

    @property
    def summary_file(self) -> Path:
        """Written last, and removed when the settings change: its presence says that the run is done."""
        return self.workdir / "summary.json"

    def _optimizer(self, number: int) -> tuple[Any, Any, Any]:
        """Learning-rate multipliers, schedule and optimizer of a stage."""
        from vlm_jax.training.optimizer import make_optimizer, make_schedule, multipliers

        stage = self.stages[number]
        rates = multipliers(list(self.family.bound.abstract), stage.groups)
        steps = self.loaders[number].steps
        schedule = make_schedule(stage.schedule, peak=stage.lr, total_steps=steps, warmup=stage.warmup)
        return rates, schedule, make_optimizer(schedule, rates, **self.config.optimizer)

    def _loader(self, number: int, **changes: Any) -> Any:
        """The training data of a stage; with `changes`, other data read the same way."""
        from vlm_jax.inputs import stage_loader

        own: dict[str, Any] = {"tokenizer": self.tokenizer, "images": self.images[number], "bad_records": self.workdir}
        return stage_loader(self.config, self.stages[number], number, **{**own, **changes})

    def train(self, stop: Any, began: float) -> None:
        """Runs what is left of every stage, then evaluates and writes the model."""
        import jax

        from vlm_jax.training.metrics import MetricWriter
        from vlm_jax.training.plots import plot_curves

        config, first = self.config, jax.process_index() == 0
        begun = [i for i, folder in enumerate(self.folders) if _last_step(folder) is not None]
        if self.summary_file.exists() and begun and begun[-1] == len(self.stages) - 1:
            if first:
                print(f"{self.workdir} is done; raise --config.steps to go on from here")
                self._report(json.loads(self.summary_file.read_text()))
            return
        params = None
        with MetricWriter(
            self.workdir,
            enabled=first,
            tensorboard=config.log.tensorboard,
            wandb=config.log.wandb,
            config=plain(config),
        ) as writer:
            for note in self.notes:
                writer.say(f"note: {note}")
            for number, stage in enumerate(self.stages):
                if begun and number < begun[-1]:
                    writer.say(f"stage {stage.name} is done, with {_last_step(self.folders[number]):,} steps")
                    continue
                if params is None and number not in begun:
                    params = self._initial_params()
                params = self._run_stage(number, params, writer, stop)
                self._save_model(number, params)
            assert params is not None
            results = self._final_evaluation(params, writer, stop)
        if first:
            plot_curves(self.workdir / "metrics.jsonl", self.workdir / "curves.png")
            summary = {
                "stages": {s.name: _last_step(folder) for s, folder in zip(self.stages, self.folders, strict=True)},
                "parameters": sum(math.prod(a.shape) for a in self.family.bound.abstract.values()),
                "seconds": round(time.monotonic() - began, 1),
                "moved": {
                    s.name: json.loads((folder / MOVED).read_text())
                    for s, folder in zip(self.stages, self.folders, strict=True)
                    if (folder / MOVED).exists()  # not of a stage that was stopped just before it was written
                },
                **results,
            }
            _write(self.summary_file, json.dumps(summary, indent=1) + "\n")
            self._report(summary)

    def _initial_params(self) -> dict[str, Any]:
        bound, seed = self.family.bound, self.config.seed
        if self.start is None:
            return bound.init(seed)
        loaded = self.start.load()
        return bound.init(seed, bound.abstract.keys() - loaded.keys()) | loaded

    def _run_stage(self, number: int, params: dict[str, Any] | None, writer: Any, stop: Any) -> dict[str, Any]:
        """Trains a stage from `params`, or from its newest checkpoint, and returns what it ends with."""
        import jax

        from vlm_jax.training.checkpoint import Checkpoints
        from vlm_jax.training.loop import StageRun, run_stage
        from vlm_jax.training.optimizer import group_table, learning_rates
        from vlm_jax.training.report import as_json, compare
        from vlm_jax.training.report import table as moved_table
        from vlm_jax.training.state import init_state, make_train_step

        config, stage, loader, family = self.config, self.stages[number], self.loaders[number], self.family
        rates, schedule, optimizer = self._optimizer(number)
        traces: list[float] = []
        step = make_train_step(
            functools.partial(family.loss, packed=stage.packing.fit is not None),
            self._weigh,
            optimizer,
            seed=config.seed + number,
            ema_decay=config.ema,
            on_trace=lambda: traces.append(time.monotonic()),
        )
        begin = functools.partial(
            init_state, rates=rates, optimizer=optimizer, frozen_dtype=self.frozen_dtype, ema=config.ema is not None
        )
        checkpoints = Checkpoints(str(self.folders[number]), keep=config.checkpoint.keep)
        latest = checkpoints.latest()
        if latest is None:
            assert params is not None
            state = jax.jit(begin, donate_argnums=0)(params)
            checkpoints.save_start(state)
        else:
            state = checkpoints.restore(latest, jax.eval_shape(begin, family.bound.abstract))
        writer.say(f"\nstage {stage.name}: {loader.num_samples:,} samples, {loader.steps:,} steps of {stage.samples}")
        for note in loader.notes:
            writer.say(note)
        writer.say(group_table(family.bound.abstract, stage.groups, stage.lr))
        if latest is not None:
            writer.say(f"going on from step {latest:,}")
            if (drawn := checkpoints.meta(latest)["steps"]) != loader.steps:
                writer.say(f"the schedule is redrawn from {drawn:,} to {loader.steps:,} steps")

        def evaluate(state: Any, step: int) -> Mapping[str, Any]:
            return self._evaluate(number, _evaluated(state), stop, config.eval.max_samples)[0]

        run = StageRun(
            name=stage.name,
            steps=loader.steps,
            batches=lambda start: iter(self._loader(number, start_step=start, index=loader.index)),
            place=self._place,
            step=step,
            learning_rates=lambda at: (
                {"learning_rate": float(schedule(at))}
                | {f"learning_rate/{name}": float(v) for name, v in learning_rates(schedule, stage.groups, at).items()}
            ),
            samples=loader.order.seen,
            flops=family.costs(rates).of_batch,
            evaluate=evaluate,
            log_every=config.log.every,
            eval_every=config.eval.every if self.eval_sources[number] is not None else 0,
            save_every=config.checkpoint.every,
        )
        state = run_stage(run, state, checkpoints, writer, stop)
        if traces:
            writer.say(f"stage {stage.name} done: the train step was compiled {len(traces)} time(s)")
        result, trained = _evaluated(state), state.trained
        del state  # the optimizer's makes room for the weights of the start
        moved = compare(checkpoints.start(trained), trained)
        checkpoints.close()
        writer.say(moved_table(moved, {p: a for p, a in family.bound.abstract.items() if p not in trained}))
        if jax.process_index() == 0:
            _write(self.folders[number] / MOVED, json.dumps(as_json(moved)))
        return result

    @functools.cached_property
    def _weigh(self) -> Any:
        return functools.partial(self.family.weigh, norm=self.config.loss_norm, ranks=self.config.loss_ranks)

    @functools.cached_property
    def _eval_step(self) -> Any:
        """Whatever the loss of training is: held-out loss is the mean over the trained tokens."""
        from vlm_jax.training.state import make_eval_step

        loss = functools.partial(self.family.loss, packed=False)
        return make_eval_step(loss, functools.partial(self.family.weigh, norm="global_tokens", ranks=1))

    @staticmethod
    def _place(arrays: Mapping[str, Any]) -> dict[str, Any]:
        import jax
        from jax.sharding import PartitionSpec as P

        from vlm_jax.sharding import RULES, place

        return {name: place(a, jax.sharding.get_mesh(), P(None, RULES.batch)) for name, a in arrays.items()}

    @functools.cached_property
    def _vlm(self) -> Any:
        from vlm_jax.inference.vlm import VLM

        return VLM(self.family, {}, tokenizer=self.tokenizer, template="plain", images=self.images[0])

    def _evaluate(
        self, number: int, params: dict[str, Any], stop: Any, limit: int
    ) -> tuple[dict[str, float], list[Any]]:
        """Held-out loss and exact match of a stage's evaluation data, and the predictions.

        Raises Interrupted when asked to stop.
        """
        from vlm_jax.data.loader import Loader
        from vlm_jax.evaluation.exact_match import accuracy, exact_match
        from vlm_jax.inference.vlm import Request

        config, stage, source = self.config, self.stages[number], self.eval_sources[number]
        assert stage.eval is not None and source is not None
        loader: Loader = self._loader(
            number,
            sources=(stage.eval,),
            samples=min(config.eval.batch, len(source)),
            packing=None,
            shuffle=False,
            epochs=1.0,
            steps=None,
            bad_records=None,
            workers=0,
            compat_drop_mismatch=False,
        )
        steps = min(loader.steps, math.ceil(limit / loader.order.samples))
        summed = weight = 0.0
        with contextlib.closing(iter(loader)) as batches:
            for batch in itertools.islice(batches, steps):
                stop.check()
                one, weighed = self._eval_step(params, {}, self._place(batch.arrays))
                summed, weight = summed + float(one), weight + float(weighed)
        vlm = self._vlm.with_params(params)
        vlm.template, vlm.images = stage.template, self.images[number]
        vlm.image_placement = stage.image_placement

        def answer(records: Sequence[Any]) -> list[str]:
            stop.check()
            requests = [Request(record, record.images, str(source.images)) for record in records]
            return vlm.answer(requests, max_new_tokens=config.eval.max_new_tokens)

        predictions = exact_match(source, answer, batch=config.eval.batch, limit=limit)
        return {"loss": summed / max(weight, 1e-9), "exact_match": accuracy(predictions)}, predictions

    def _final_evaluation(self, params: dict[str, Any], writer: Any, stop: Any) -> dict[str, Any]:
        """Evaluates the last stage that has held-out data on all of it."""
        import jax

        from vlm_jax.data import open_image
        from vlm_jax.evaluation.exact_match import write_predictions
        from vlm_jax.training.plots import plot_samples

        held_out = [i for i, source in enumerate(self.eval_sources) if source is not None]
        if not held_out:
            return {}
        number = held_out[-1]
        source = self.eval_sources[number]
        assert source is not None
        results, predictions = self._evaluate(number, params, stop, len(source))
        writer.evaluation(_last_step(self.folders[-1]) or 0, results)
        if jax.process_index() == 0:
            write_predictions(predictions, source.images, self.workdir / "predictions.jsonl")
            wrong_first = sorted(predictions, key=lambda one: one.correct)
            shown = predictions[:12] + [one for one in wrong_first if not one.correct][:4]
            samples = [
                dataclasses.asdict(dataclasses.replace(one, extra={}))
                | {"images": [open_image(image, source.images) for image in one.images]}
                for one in shown
            ]
            plot_samples(samples, self.workdir / "samples.png")
        by = tuple(self.config.eval.by)
        groups: dict[str, list[bool]] = {}
        for one in predictions if by else []:
            groups.setdefault("/".join(str(one.extra.get(key, "-")) for key in by), []).append(one.correct)
        return {
            "eval": {
                "stage": self.stages[number].name,
                **{name: (value if math.isfinite(value) else None) for name, value in results.items()},
                "questions": len(predictions),
                **({"groups": {k: sum(v) / len(v) for k, v in sorted(groups.items())}} if groups else {}),
            }
        }

    def _save_model(self, number: int, params: dict[str, Any]) -> None:
        from vlm_jax.inference.load import MODEL, save

        save(
            self.workdir / MODEL,
            params,
            model=plain(self.config.model),
            images=self.stages[number].images,
            template=self.stages[number].template,
            image_placement=self.stages[number].image_placement,
            tokenizer=self.tokenizer,
            extra=self.start.extra if self.start else {},
            files=self.start.files if self.start else {},
        )

    def _report(self, summary: Mapping[str, Any]) -> None:
        """Prints how good the model is, by kind of question, some of its answers, and where everything is."""
        from vlm_jax.evaluation.exact_match import read_predictions, table

        places = {"model": "model", "checkpoints": "checkpoints", "curves": "curves.png", "metrics": "metrics.jsonl"}
        if summary.get("eval", {}).get("questions"):
            predictions = read_predictions(self.workdir / "predictions.jsonl")
            accuracy = summary["eval"]["exact_match"]
            print(f"\nheld-out accuracy: {accuracy:.1%} of {len(predictions):,} questions, exact match")
            print(table(predictions, tuple(self.config.eval.by)))
            print("\nfive of them:")
            for one in predictions[:5]:
                note = "" if one.correct else f"   (truth: {one.truth})"
                print(f"  {' '.join(one.images)}\n    {one.question}  ->  {one.answer}{note}")
            places |= {"samples": "samples.png", "answers": "predictions.jsonl"}
        print(f"\ndone in {summary['seconds']:.0f} s")
        for name, file in places.items():
            print(f"  {name:<12}{self.workdir / file}")
        print(f"talk to it:  python -m vlm_jax.generate --model={self.workdir} --image=FILE --prompt=TEXT")


def _evaluated(state: Any) -> dict[str, Any]:
    """The weights that evaluation and export use: the average, where one is kept."""
    return {**(state.trained if state.ema is None else state.ema), **state.frozen}


def _write(file: Path, text: str) -> None:
    """Wholly or not at all."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(file)


def _last_step(folder: Path) -> int | None:
    """The newest step in a folder of checkpoints."""
    steps = [int(child.name) for child in folder.iterdir() if child.name.isdecimal()] if folder.is_dir() else []
    return max(steps, default=None)


if __name__ == "__main__":
    run_command(main)
