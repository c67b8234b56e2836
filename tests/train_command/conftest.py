"""One experiment and one finished run of it, for the tests of this folder and on all processes that run them.

The model has a few thousand parameters; what costs time is compiling it. So one run serves most tests, all run in the
test's own process on one of its devices where they can, and compiled programs are kept.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from filelock import FileLock
from jax.experimental.compilation_cache import compilation_cache

from tests.train_command.command import make_experiment, train


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this run of the tests have."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "train_command"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _keep_programs(shared: Path) -> Iterator[None]:
    """Keeps compiled programs, for the other processes too. Traces, which we count, stay."""
    settings = {  # with what they were before
        "jax_compilation_cache_dir": (str(shared / "programs"), jax.config.jax_compilation_cache_dir),
        "jax_persistent_cache_min_compile_time_secs": (0, jax.config.jax_persistent_cache_min_compile_time_secs),
        "jax_persistent_cache_min_entry_size_bytes": (-1, jax.config.jax_persistent_cache_min_entry_size_bytes),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, (value, _) in settings.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        compilation_cache.reset_cache()
        yield
        for name, (_, value) in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def config(shared: Path) -> str:
    """A config file beside its data."""
    with FileLock(shared / "experiment.lock"):
        file = shared / "experiment" / "small.py"
        return str(file) if file.exists() else make_experiment(file.parent)


@pytest.fixture
def data(config: str) -> Path:
    return Path(config).parent / "data"


@pytest.fixture(scope="module")
def finished(config: str, shared: Path, _keep_programs: None) -> SimpleNamespace:
    """An unbroken run of both stages on one device: what it printed, and its workdir. Copy that to change it."""
    workdir, printed = shared / "finished", shared / "finished.json"
    with FileLock(shared / "finished.lock"):
        if not printed.exists():
            done = train(config=config, workdir=workdir)
            assert done.status == 0, done.err
            printed.write_text(json.dumps(vars(done)))
    return SimpleNamespace(workdir=workdir, **json.loads(printed.read_text()))


@pytest.fixture
def copied(finished: SimpleNamespace, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.workdir, tmp_path / "copied"))
