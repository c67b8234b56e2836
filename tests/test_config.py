"""The config language says what is wrong in one sentence, and reads every value as its field means it."""

from __future__ import annotations

import json
from pathlib import Path

import ml_collections
import pytest

from vlm_jax.config import (
    MISSING,
    REQUIRED,
    apply_overrides,
    check_resume,
    default_workdir,
    diff_configs,
    load_config,
    parse_command,
    plain,
    split_changes,
    to_json,
    variants,
)
from vlm_jax.errors import UsageError

CONFIG = """
import ml_collections
from vlm_jax.config import variants

def get_config(args=""):
    v = variants(args, "tiny", "lora")
    c = ml_collections.ConfigDict()
    c.seed = 1
    c.steps = None
    c.lr = 1e-3
    c.remat = "full"
    c.resume = True
    c.quiet = False
    c.init_from = None
    c.tiny = v.tiny
    c.lora = v.lora
    c.limit = ml_collections.config_dict.placeholder(int)
    c.mesh = ml_collections.ConfigDict(dict(fsdp=1, tensor=1))
    c.batch = ml_collections.ConfigDict(dict(samples=128, per_device=None))
    c.buckets = ml_collections.ConfigDict(dict(lengths=(128, 256), names=["a", "b"], rates=(0.5, 1.0), empty=()))
    c.stages = [
        ml_collections.ConfigDict(dict(name="pretrain", lr=1e-3, steps=10)),
        ml_collections.ConfigDict(dict(name="finetune", lr=2e-5, steps=20, train=[("vision/.*", 0.1), (".*", None)])),
    ]
    c.loss = len
    return c
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "toy.py"
    path.write_text(CONFIG)
    return str(path)


def load(file: str, *words: str) -> ml_collections.ConfigDict:
    return load_config(file, words)[0]


def refused(file: str, *words: str) -> str:
    with pytest.raises(UsageError) as error:
        load(file, *words)
    assert error.value.exit_status == 2
    assert "\n" not in str(error.value), "one line"
    return str(error.value)


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("seed=7", 7),
        ("seed=1e3", 1000),
        ("seed=10_000", 10000),
        ("seed=-2", -2),
        ("seed=none", None),
        ("lr=3", 3.0),
        ("lr=1e-4", 1e-4),
        ("lr=inf", float("inf")),
        ("lr=none", None),
        ("remat=none", "none"),  # a word that policies are named by
        ("remat=None", None),
        ("remat=", ""),
        ("resume=false", False),
        ("resume=No", False),
        ("quiet=1", True),
        ("steps=1e3", 1000),
        ("steps=2.5", 2.5),
        ("init_from=runs/x", "runs/x"),
        ("init_from=none", None),
        ("init_from=true", True),
        ("init_from=(1, 'a')", (1, "a")),
        ("limit=5", 5),
        ("mesh.fsdp=8", 8),
        ("batch.per_device=4", 4),
        ("buckets.lengths=64,128", (64, 128)),
        ("buckets.lengths=64", (64,)),
        ("buckets.lengths=(1e3)", None),
        ("buckets.lengths=[64, 128]", (64, 128)),
        ("buckets.lengths=", ()),
        ("buckets.names=x, y", ["x", "y"]),
        ("buckets.rates=1,0.25", (1.0, 0.25)),
        ("buckets.rates=[1]", (1.0,)),
        ("buckets.empty=1,x", (1, "x")),
        ("stages.finetune.lr=1e-4", 1e-4),
        ("stages.0.lr=5", 5.0),
        ("stages.finetune.train=[('.*', 1.0)]", [(".*", 1.0)]),
    ],
)
def test_a_value_is_read_as_its_field_means_it(file: str, word: str, value: object) -> None:
    key = word.partition("=")[0]
    if value is None and "(" in word:
        assert "a list such as" in refused(file, f"--config.{word}")
        return
    config = plain(load(file, f"--config.{word}"))
    for part in key.split("."):
        config = config[int(part)] if part.isdigit() else _member(config, part)
    assert config == plain(value)
    assert type(config) is type(plain(value))


def _member(group, name: str):
    return group[name] if isinstance(group, dict) else next(item for item in group if item["name"] == name)


def test_two_words_and_a_bare_flag_are_values(file: str) -> None:
    config = load(
        file, "--config.resume", "false", "--config.quiet", "--config.lr", "-1e-3", "--config.batch.samples", "8"
    )
    assert (config.resume, config.quiet, config.lr, config.batch.samples) == (False, True, -1e-3, 8)


def test_the_last_override_wins(file: str) -> None:
    assert load(file, "--config.seed=2", "--config.seed=3").seed == 3


def test_containers_keep_their_type(file: str) -> None:
    config = load(file, "--config.buckets.lengths=[1]", "--config.buckets.names=(  'x',)")
    assert config.buckets.lengths == (1,)
    assert config.buckets.names == ["x"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--config.seed=1.5"], "config.seed expects a whole number, got '1.5' (now 1)"),
        (["--config.seed=1e99"], "whole number"),
        (["--config.seed=true"], "whole number"),
        (["--config.seed"], "config.seed needs a value: --config.seed=VALUE (now 1)"),
        (["--config.seed", "--config.lr=1"], "config.seed needs a value"),
        (["--config.lr=fast"], "config.lr expects a number, got 'fast'"),
        (["--config.lr=nan"], "expects a number"),
        (["--config.resume=maybe"], "config.resume expects true or false, got 'maybe'"),
        (["--config.resume", "runs/x"], "expects true or false, got 'runs/x'"),
        (["--config.resume=none"], "expects true or false"),
        (["--config.buckets.lengths=none"], "cannot be unset"),
        (["--config.buckets.lengths=1,x"], "expects a list of int, got '1,x'"),
        (["--config.buckets.lengths=[1, 'x']"], "a list of int"),
        (["--config.buckets.lengths=[1"], "a list such as 1,2 or [1, 2]"),
        (["--config.stages.finetune.train=a,b"], "a list such as [('vision/.*', 0.1)"),
        (["--config.stages.finetune.train=3"], "a list such as"),
        (["--config.loss=mean"], "cannot be set on the command line"),
        (["--config.sede=1"], "config.sede does not exist (did you mean 'config.seed'?)"),
        (["--config.batch.sample=1"], "(did you mean 'config.batch.samples'?)"),
        (["--config.stages.fintune.lr=1"], "(did you mean 'config.stages.finetune.lr'?)"),
        (["--config.fsdp=1"], "(did you mean 'config.mesh.fsdp'?)"),
        (["--config.qqqq=1"], "config has batch, buckets"),
        (["--config.mesh.zzzz=1"], "config.mesh has fsdp, tensor"),
        (["--config.stages.2.lr=1"], "config.stages.2 does not exist"),
        (["--config.seed.x=1"], "config.seed is 1 and has no key 'x'"),
        (["--config.init_from.x=1"], "config.init_from is not set (None)"),
        (["--config.mesh=8"], "config.mesh is a group: set one of its keys (config.mesh.fsdp, config.mesh.tensor)"),
        (["--config.stages=1"], "set one of its keys (config.stages.pretrain, config.stages.finetune)"),
        (["--config.stages.finetune=1"], "config.stages.finetune.lr"),
        (["seed=1"], "left-over word 'seed=1'"),
        (["--config.seed=1", "2"], "left-over word '2'"),
    ],
)
def test_a_bad_override_is_one_line(file: str, words: list[str], says: str) -> None:
    assert says in refused(file, *words)


# -------------------------------------------------------------------------------------------------------------- files


def test_variants_are_words_after_the_colon(file: str) -> None:
    config, name = load_config(f"{file}:tiny", [])
    assert (config.tiny, config.lora, name) == (True, False, "toy-tiny")
    assert load_config(f"{file}:tiny,lora", [])[1] == "toy-tiny-lora"
    assert load_config(f"{file}:", [])[1] == "toy"
    v = variants("tiny", "tiny", "lora")
    assert (v.tiny, v.lora, v.args) == (True, False, "tiny")


def test_the_workdir_follows_from_the_command() -> None:
    assert default_workdir("configs/llava.py", "tiny,lora") == "runs/llava-tiny-lora"
    assert default_workdir("configs/llava.py", "") == "runs/llava"


def test_an_unknown_variant_names_the_nearest(file: str) -> None:
    assert "no variant 'tinny' (did you mean 'tiny'?); its variants: tiny, lora" in refused(f"{file}:tinny")


@pytest.mark.parametrize(
    ("body", "spec", "says"),
    [
        (None, "", "config file {file} does not exist"),
        ("x = 1", "", "has no function `get_config"),
        ("def get_config(args=''):\n    return {}", "", "returned dict, expected a ml_collections.ConfigDict"),
        ("def get_config(:\n", "", "config file {file} line 1: SyntaxError"),
        ("import os\n\ndef get_config(args=''):\n    return os.nothing", "", "{file} line 4: AttributeError"),
        ("import not_a_module_of_anyone", "", "{file} line 1: ModuleNotFoundError"),
        (
            "from vlm_jax.recipe import experiment\ndef get_config():\n    experiment().optimiser = 1",
            "",
            '{file} line 3: AttributeError: Key "optimiser" does not exist and cannot be added since the config is '
            'locked. Did you mean "optimizer"',
        ),
        (
            "import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict()",
            ":tiny",
            "takes no arguments",
        ),
    ],
)
def test_a_broken_config_file_names_file_and_line(tmp_path: Path, body: str | None, spec: str, says: str) -> None:
    file = tmp_path / "broken.py"
    if body is not None:
        file.write_text(body)
    assert says.format(file=file) in refused(f"{file}{spec}")


def test_a_missing_config_suggests_its_neighbour(file: str) -> None:
    assert "(did you mean" in refused(file.replace("toy.py", "toyy.py"))


def test_no_config_and_no_python_file_are_named() -> None:
    with pytest.raises(UsageError, match="no config was given"):
        load_config(None, [])
    with pytest.raises(UsageError, match="is not a Python file"):
        load_config("configs/quickstart", [])


def test_an_error_of_ours_inside_a_config_stays_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "c.py"
    file.write_text(
        "from vlm_jax.errors import UsageError\ndef get_config(args=''):\n    raise UsageError('no such tower')"
    )
    assert refused(str(file)) == "no such tower"


# ------------------------------------------------------------------------------------------------------------ resuming


def test_the_diff_survives_json_and_names_list_members(file: str) -> None:
    old, new = (
        load(file),
        load(file, "--config.stages.finetune.lr=1", "--config.buckets.lengths=1,2", "--config.seed=2"),
    )
    assert diff_configs(json.loads(to_json(old)), old) == []
    assert [str(change) for change in diff_configs(json.loads(to_json(old)), new)] == [
        "buckets.lengths: [128, 256] -> [1, 2]",
        "seed: 1 -> 2",
        "stages.finetune.lr: 2e-05 -> 1.0",
    ]


def test_added_and_removed_keys_are_in_the_diff() -> None:
    changes = diff_configs({"a": 1, "s": [{"name": "x", "k": 1}]}, {"b": 2, "s": [{"name": "y", "k": 1}]})
    assert [(c.path, c.old is MISSING, c.new is MISSING) for c in changes] == [
        ("a", False, True),
        ("b", True, False),
        ("s.x", False, True),
        ("s.y", True, False),
    ]


def test_stages_in_another_order_are_another_experiment() -> None:
    a, b = {"name": "a"}, {"name": "b"}
    assert [c.path for c in diff_configs({"stages": [a, b]}, {"stages": [b, a]})] == ["stages"]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("steps", True),
        ("stages.finetune.steps", True),
        ("log.every", True),
        ("eval.max_samples", True),
        ("data.eval", True),
        ("data.workers", True),
        ("checkpoint.every", True),
        ("profile.steps", True),
        ("mesh.fsdp", True),
        ("workers", True),
        ("lr", False),
        ("seed", False),
        ("stages.finetune.lr", False),
        ("data.train", False),
        ("data.truncate", False),
        ("model.mesh", False),
        ("warmup_steps", False),
        ("evaluate", False),
    ],
)
def test_what_may_change_on_resume(path: str, allowed: bool) -> None:
    old: dict = {}
    new: dict = {}
    for root, value in ((old, 1), (new, 2)):
        *parents, last = path.split(".")
        for part in parents:
            root = root.setdefault(part, {})
        root[last] = value
    changes = diff_configs(old, new)
    assert [c.path for c in changes] == [path]
    assert split_changes(changes) == ((changes, []) if allowed else ([], changes))


def test_another_experiment_in_the_workdir_is_refused_with_the_way_out(file: str) -> None:
    old, new = load(file), load(file, "--config.seed=2", "--config.stages.finetune.steps=40")
    with pytest.raises(UsageError) as error:
        check_resume(old, new, workdir="runs/toy", command="python -m vlm_jax.train --config=toy.py --config.seed=2")
    assert str(error.value).splitlines() == [
        "runs/toy holds a run of another configuration:",
        "  seed: 1 -> 2",
        "Take these back to go on with it, or start anew from its weights:",
        "  python -m vlm_jax.train --config=toy.py --config.seed=2 --workdir=runs/toy-2 --config.init_from=runs/toy",
    ]
    changes = check_resume(old, load(file, "--config.stages.finetune.steps=40"), workdir="runs/toy", command="")
    assert [c.path for c in changes] == ["stages.finetune.steps"]


# ---------------------------------------------------------------------------------------------------- the command line

FLAGS = {
    "workdir": (str, None, "where everything is written"),
    "steps": (int, 10, "how many"),
    "quiet": (bool, False, "say less"),
    "image": (str, [], "a picture"),
    "format": (("hf", "llava"), "hf", "layout"),
}


def test_a_command_line_is_read_whole() -> None:
    options = parse_command(
        "--config=c.py:tiny --config.a=1 --config.flag false --config.b --workdir runs/x --steps=1e3 --quiet "
        "--image=a.png --image b.png --format llava".split(),
        FLAGS,
        config=True,
    )
    assert options.config == "c.py:tiny"
    assert options.overrides == ["--config.a=1", "--config.flag", "false", "--config.b"]
    assert (options.workdir, options.steps, options.quiet, options.format) == ("runs/x", 1000, True, "llava")
    assert options.image == ["a.png", "b.png"]


def test_defaults_are_not_shared_between_calls() -> None:
    parse_command(["--image=x"], FLAGS)
    assert parse_command([], FLAGS).image == []


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--wokdir=x", "unknown flag --wokdir (did you mean '--workdir'?)"),
        ("--work=x", "unknown flag --work"),
        ("-workdir x", "unknown flag -workdir (did you mean '--workdir'?)"),
        ("--quiet false true", "left-over word 'true'"),
        ("false", "left-over word 'false': a value belongs to a flag"),
        ("--steps=1.5", "--steps expects a whole number, got '1.5'"),
        ("--steps", "--steps needs a value: --steps=VALUE"),
        ("--steps --quiet", "--steps needs a value"),
        ("--quiet=perhaps", "--quiet expects true or false, got 'perhaps'"),
        ("--format=lava", "--format expects one of hf, llava, got 'lava' (did you mean 'llava'?)"),
        ("--config.a=1", "unknown flag --config.a"),
        ("--image=", None),
    ],
)
def test_a_bad_command_line_is_one_line(argv: str, says: str | None) -> None:
    if says is None:
        assert parse_command(argv.split(), FLAGS).image == [""]
        return
    with pytest.raises(UsageError) as error:
        parse_command(argv.split(), FLAGS)
    assert says in str(error.value)


def test_words_and_required_flags_must_be_there() -> None:
    flags = {"model": (str, REQUIRED, "a workdir or a checkpoint")}
    with pytest.raises(UsageError, match="--model is missing: a workdir or a checkpoint"):
        parse_command([], flags)
    words = {"source": "what to read", "target": "where to write"}
    with pytest.raises(UsageError, match="target is missing: where to write"):
        parse_command(["--model=x", "a"], flags, words=words)
    options = parse_command(["a", "--model=x", "b"], flags, words=words)
    assert (options.source, options.target) == ("a", "b")


def test_help_lists_every_flag_and_leaves_with_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        parse_command(["--help"], FLAGS, config=True, usage="python -m vlm_jax.train --config=FILE")
    assert leave.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("python -m vlm_jax.train")
    assert all(f"--{name}=" in shown for name in [*FLAGS, "config"])


def test_overrides_leave_a_locked_config_locked(file: str) -> None:
    config = load(file).lock()
    apply_overrides(config, ["--config.seed=3"])
    assert (config.seed, config.is_locked) == (3, True)
