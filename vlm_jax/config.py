"""The language of experiments: a Python file that builds a `ConfigDict`, and words on the command line that change it.

    python -m vlm_jax.train --config=configs/quickstart.py:tiny --config.stages.finetune.lr=1e-4 --config.steps 100

We parse the words ourselves, because `ml_collections.config_flags` reads `--config.flag false` as true, refuses `1e3`
for an integer, cannot set lists or unset fields, and answers a typo with a traceback. Everything wrong here is a
`UsageError` of one sentence (exit status 2), raised before any device is touched.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FrozenConfigDict

from vlm_jax.coming_from import answer
from vlm_jax.errors import UsageError, suggest
from vlm_jax.values import READERS, parse_value

# What may differ between a run and its resumption: regular expressions over whole dotted paths.
RESUMABLE = (
    r"(stages\.[^.]+\.)?(steps|epochs)",
    r"(stages\.[^.]+\.)?(log|logging|log_every|quiet|tensorboard|wandb|profile|checkpoint|save|eval)(\..*)?",
    r"(stages\.[^.]+\.)?data\.(eval|workers|threads)(\..*)?",
    r"(mesh|hosts|workers)(\..*)?",
)


class Missing:
    """Stands in a diff for a key that one side does not have."""

    def __repr__(self) -> str:
        return "(absent)"


MISSING = Missing()


class Change(NamedTuple):
    """One difference between two configs: the dotted path, and both values as JSON would hold them."""

    path: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.path}: {self.old!r} -> {self.new!r}"


# ------------------------------------------------------------------------------------------------- files and variants


def load_config(spec: str | None, overrides: Sequence[str] = ()) -> tuple[ConfigDict, str]:
    """Runs the config file named by `spec` and applies `overrides` to what it returns.

    Args:
      spec: `FILE` or `FILE:ARGS`; FILE is Python with `get_config(args="") -> ConfigDict`, ARGS a comma list.
      overrides: words `--config.a.b=value`; `--config.a.b` followed by a word `value`; or, for a flag, bare. A member
        of a list of groups is named by its `name` or its index: `--config.stages.finetune.lr=1e-4`.

    Returns:
      The config, and the name of the experiment: `<file>[-<args>]`.

    Raises:
      UsageError: for a missing or broken file, a key that does not exist, a value of the wrong type.
    """
    file, args = split_spec(spec)
    config = _run_file(file, args)
    apply_overrides(config, overrides)
    return config, experiment_name(file, args)


def split_spec(spec: str | None) -> tuple[str, str]:
    """`configs/x.py:tiny,lora` → (`configs/x.py`, `tiny,lora`)."""
    if not spec:
        raise UsageError("no config was given: add --config=configs/quickstart.py, or another file of configs/")
    match = re.fullmatch(r"(.+?\.py)(?::(.*))?", spec)
    if match is None:
        hint = suggest(spec.partition(":")[0], [str(p.with_suffix("")) for p in Path("configs").glob("*.py")])
        raise UsageError(f"--config={spec} is not a Python file: write FILE.py or FILE.py:ARGS{hint}")
    return match[1], match[2] or ""


def experiment_name(file: str, args: str) -> str:
    """`<file>[-<args>]`, with the commas of `args` as dashes."""
    words = [word.strip() for word in args.split(",") if word.strip()]
    return "-".join([Path(file).stem, *words])


def default_workdir(file: str, args: str) -> str:
    """The folder of an experiment: the same for the same command, so that repeating the command resumes it."""
    return f"runs/{experiment_name(file, args)}"


def variants(args: str, *known: str) -> SimpleNamespace:
    """The words of `args` as flags: `variants("tiny,lora", "tiny", "lora", "task").task` is False.

    `.args` is the text itself. A word that is not `known` is a UsageError.
    """
    words = [word.strip() for word in args.split(",") if word.strip()]
    for word in words:
        if word not in known:
            choices = ", ".join(known) or "none"
            raise UsageError(f"this config has no variant {word!r}{suggest(word, known)}; its variants: {choices}")
    return SimpleNamespace(args=args, **{name: name in words for name in known})


def _run_file(file: str, args: str) -> ConfigDict:
    path = Path(file)
    if not path.is_file():
        near = suggest(file, [str(p) for p in path.parent.glob("*.py")])
        raise UsageError(f"config file {file} does not exist{near}")
    # Compiled here rather than imported: no stale bytecode, no name in sys.modules, and line numbers for our message.
    namespace: dict[str, Any] = {"__name__": f"config_{path.stem}", "__file__": str(path)}
    try:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), namespace)
        get_config = namespace.get("get_config")
        if not callable(get_config):
            raise UsageError(f'config file {file} has no function `get_config(args="")`')
        takes_args = bool(inspect.signature(get_config).parameters)
        if args and not takes_args:
            raise UsageError(f"config file {file} takes no arguments, got {args!r}")
        config = get_config(args) if takes_args else get_config()
    except UsageError:
        raise
    except SyntaxError as error:
        raise UsageError(f"config file {error.filename} line {error.lineno}: SyntaxError: {error.msg}") from error
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        place = f" line {lines[-1]}" if lines else ""
        # A locked ConfigDict puts its whole content between what is wrong and what may have been meant.
        text, _, rest = str(error).partition(" Other fields present:")
        hint = re.search(r'Did you mean "\S+" instead of "\S+"\?', rest)
        text = f"{text[1:]} {hint[0] if hint else ''}".rstrip() if rest else text
        reason = " ".join(f"{type(error).__name__}: {text}".split())
        raise UsageError(f"config file {file}{place}: {reason}") from error
    if not isinstance(config, ConfigDict) or isinstance(config, FrozenConfigDict):
        raise UsageError(f"get_config of {file} returned {type(config).__name__}, expected a ml_collections.ConfigDict")
    return config


# ---------------------------------------------------------------------------------------------------------- overrides


def apply_overrides(config: ConfigDict, words: Sequence[str]) -> None:
    """Changes `config` in place by the words of a command line (see `load_config`); the last one wins."""
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--config."):
            raise UsageError(f"left-over word {word!r}: an override is --config.KEY=VALUE")
        key, equals, text = word.removeprefix("--config.").partition("=")
        value = text if equals else None
        if value is None and queue and not queue[0].startswith("--"):
            value = queue.pop(0)
        _override(config, key, value)


def _override(config: ConfigDict, key: str, text: str | None) -> None:
    holder: Any = config
    *parents, last = key.split(".")
    walked: list[str] = []
    for part in parents:
        holder = _child(config, holder, walked, part, key)
        walked.append(part)
    present = _child(config, holder, walked, last, key)
    path = f"config.{key}"
    if _is_group(present):
        keys = [f"{path}.{name}" for name, _ in _members(present)]
        raise UsageError(f"{path} is a group: set one of its keys ({', '.join(keys) or 'it has none'})")
    if text is None:
        if not isinstance(present, bool):
            raise UsageError(f"{path} needs a value: --{path}=VALUE (now {present!r})")
        text = "true"
    field_type = holder.get_type(last) if isinstance(holder, ConfigDict) else type(present)
    value = parse_value(text, present, path, field_type=field_type)
    try:
        holder[last] = value
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from error


def _is_group(value: Any) -> bool:
    """True for what holds settings of its own: a dict, or a list that holds dicts."""
    return isinstance(value, Mapping | ConfigDict) or (
        isinstance(value, list | tuple) and any(isinstance(item, Mapping | ConfigDict) for item in value)
    )


def _members(group: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of a group; the members of a list are called by their `name`, or by their index."""
    if isinstance(group, ConfigDict):
        group = {key: group[key] for key in group}  # values with references resolved
    if isinstance(group, Mapping):
        yield from group.items()
        return
    names = [item.get("name") if isinstance(item, Mapping | ConfigDict) else None for item in group]
    for index, item in enumerate(group):
        name = names[index]
        yield (name if isinstance(name, str) and names.count(name) == 1 else str(index)), item


def _child(config: ConfigDict, holder: Any, walked: Sequence[str], part: str, key: str) -> Any:
    path = ".".join(["config", *walked])
    if not _is_group(holder):
        what = "is not set (None)" if holder is None else f"is {holder!r}"
        raise UsageError(f"{path} {what} and has no key {part!r}")
    members = dict(_members(holder))
    if part in members:
        return members[part]
    if not isinstance(holder, Mapping | ConfigDict) and part.isdigit() and int(part) < len(holder):
        return holder[int(part)]
    raise UsageError(f"{path}.{part} does not exist{_nearest(config, walked, members, part, key)}")


def _nearest(config: ConfigDict, walked: Sequence[str], members: Mapping[str, Any], part: str, key: str) -> str:
    """The most likely meant key: a sibling, else one of a similar name elsewhere."""
    prefix = ".".join(["config", *walked])
    everywhere = list(_paths(config))
    siblings = difflib.get_close_matches(part, members, n=1, cutoff=0.6)
    if siblings:
        # `stages.fintune.lr`: mend the wrong part and keep what follows, where that names something.
        mended = ".".join([*walked, siblings[0]])
        whole = ".".join([mended, *key.split(".")[len(walked) + 1 :]])
        return f" (did you mean 'config.{whole if whole in everywhere else mended}'?)"
    by_name = {path.split(".")[-1]: path for path in reversed(everywhere)}
    if near := difflib.get_close_matches(key.split(".")[-1], by_name, n=1, cutoff=0.6):
        return f" (did you mean 'config.{by_name[near[0]]}'?)"
    return f"; {prefix} has {', '.join(members) or 'no keys'}"


def _paths(group: Any) -> Iterator[str]:
    for name, value in _members(group):
        yield name
        if _is_group(value):
            yield from (f"{name}.{path}" for path in _paths(value))


# -------------------------------------------------------------------------------------------------- JSON and resuming


def plain(value: Any) -> Any:
    """`value` as JSON holds it: dicts, lists, and scalars. A function stands as its name."""
    if isinstance(value, Mapping | ConfigDict):
        return {str(name): plain(item) for name, item in _members(value)}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__name__", None) or str(value)


def to_json(config: ConfigDict | Mapping[str, Any]) -> str:
    """`config` as text, equal for equal configs; `json.loads` of it goes into `diff_configs`."""
    return json.dumps(plain(config), indent=2, sort_keys=True) + "\n"


def diff_configs(old: ConfigDict | Mapping[str, Any], new: ConfigDict | Mapping[str, Any]) -> list[Change]:
    """The leaves in which two configs (or the JSON of them) differ, in order of their dotted paths."""
    return sorted(_diff("", plain(old), plain(new)), key=lambda change: change.path)


def _diff(path: str, old: Any, new: Any) -> Iterator[Change]:
    if _is_group(old) and _is_group(new) and isinstance(old, Mapping) == isinstance(new, Mapping):
        olds, news = dict(_members(old)), dict(_members(new))
        for name in {**olds, **news}:
            inner = f"{path}.{name}" if path else name
            yield from _diff(inner, olds.get(name, MISSING), news.get(name, MISSING))
        same_members = olds.keys() == news.keys()
        if same_members and not isinstance(old, Mapping) and list(olds) != list(news):
            yield Change(path, list(olds), list(news))
    elif old != new and repr(old) != repr(new):
        yield Change(path, old, new)


def split_changes(changes: Sequence[Change]) -> tuple[list[Change], list[Change]]:
    """(what may change on resume, what may not), by `RESUMABLE`."""
    allowed = [change for change in changes if any(re.fullmatch(rule, change.path) for rule in RESUMABLE)]
    return allowed, [change for change in changes if change not in allowed]


def check_resume(
    old: ConfigDict | Mapping[str, Any], new: ConfigDict | Mapping[str, Any], *, workdir: str, command: str
) -> list[Change]:
    """What changed since the run in `workdir` began, where all of it may.

    Args:
      old: the config of the run (of its config.json). new: that of this command.
      command: the present command without its workdir, to be shown as the way to start anew.

    Raises:
      UsageError: something changed that would make it another experiment; it shows the differences.
    """
    allowed, refused = split_changes(diff_configs(old, new))
    if refused:
        shown = "\n".join(f"  {change}" for change in refused)
        raise UsageError(
            f"{workdir} holds a run of another configuration:\n{shown}\n"
            "Take these back to go on with it, or start anew from its weights:\n"
            f"  {command} --workdir={workdir.rstrip('/')}-2 --config.init_from={workdir}"
        )
    return allowed


# ---------------------------------------------------------------------------------------------------- the command line


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED: Any = _Required()  # the default of a flag that must be given

Flag = tuple[Any, Any, str]  # (type, default, help), see parse_command


def parse_command(
    argv: Sequence[str],
    flags: Mapping[str, Flag],
    *,
    config: bool = False,
    words: Mapping[str, str] | None = None,
    usage: str = "",
) -> SimpleNamespace:
    """The command line of every command: `--name=value` or `--name value`, nothing abbreviated, nothing left over.

    Args:
      argv: the words after the program's name.
      flags: name → (type, default, help). Types: str, int, float, bool, or a tuple of the words that are allowed. A
        default of REQUIRED must be given; a default that is a list makes the flag repeatable.
      config: whether the command takes `--config=FILE[:ARGS]` and `--config.KEY=VALUE`.
      words: name → help of words without a flag, all required, in this order.
      usage: what `--help` prints above the table of flags.

    Returns:
      A namespace of the flags and words; with `config`, also `.config` (the spec or None) and `.overrides`, both as
      `load_config` takes them.
    """
    flags = dict(flags)
    values: dict[str, Any] = {
        name: list(default) if isinstance(default, list) else default for name, (_, default, _) in flags.items()
    }
    if config:
        flags["config"] = (str, None, "FILE[:ARGS], a Python file; --config.KEY=VALUE changes one of its settings")
        values |= {"config": None, "overrides": []}
    names, loose, queue = dict(words or {}), [], list(argv)
    while queue:
        word = queue.pop(0)
        if word in ("--help", "-h"):
            print(_help(flags, names, usage))
            raise SystemExit(0)
        if not word.startswith("-") or word == "-":
            loose.append(word)
            continue
        if config and word.startswith("--config."):
            values["overrides"].append(word)
            if "=" not in word and queue and not queue[0].startswith("--"):
                values["overrides"].append(queue.pop(0))
            continue
        name, equals, text = word.partition("=")
        if not name.startswith("--") or name[2:] not in flags:
            following = text or (queue[0] if queue and not queue[0].startswith("--") else "")
            if config and (known := answer(name.lstrip("-").replace("-", "_"), following)):
                raise UsageError(known)
            raise UsageError(f"unknown flag {name}{suggest(name, [f'--{flag}' for flag in flags])}; --help lists them")
        name = name[2:]
        kind, default, _ = flags[name]
        if not equals:
            if queue and not queue[0].startswith("--"):
                text = queue.pop(0)
            elif kind is bool:
                text = "true"
            else:
                raise UsageError(f"--{name} needs a value: --{name}=VALUE")
        value = _flag_value(name, kind, text)
        if isinstance(default, list):
            values[name].append(value)
        else:
            values[name] = value
    if len(loose) > len(names):
        extra = loose[len(names)]
        raise UsageError(f"left-over word {extra!r}: a value belongs to a flag, as in --name=value; --help lists them")
    if len(loose) < len(names):
        missing = list(names)[len(loose)]
        raise UsageError(f"{missing} is missing: {names[missing]}")
    for name, value in values.items():
        if value is REQUIRED:
            raise UsageError(f"--{name} is missing: {flags[name][2]}")
    return SimpleNamespace(**values, **dict(zip(names, loose, strict=True)))


def _flag_value(name: str, kind: Any, text: str) -> Any:
    if isinstance(kind, tuple):
        if text not in kind:
            raise UsageError(f"--{name} expects one of {', '.join(kind)}, got {text!r}{suggest(text, kind)}")
        return text
    expected = {int: "a whole number", float: "a number", bool: "true or false"}
    value = READERS[kind](text)
    if value is None:
        raise UsageError(f"--{name} expects {expected[kind]}, got {text!r}")
    return value


def _help(flags: Mapping[str, Flag], words: Mapping[str, str], usage: str) -> str:
    rows = [(name, help_text) for name, help_text in words.items()]
    for name, (kind, default, help_text) in flags.items():
        shown = "|".join(kind) if isinstance(kind, tuple) else kind.__name__
        note = "required" if default is REQUIRED else "repeats" if isinstance(default, list) else f"default {default}"
        rows.append((f"--{name}={shown}", help_text if default is None else f"{help_text} ({note})"))
    width = max((len(left) for left, _ in rows), default=0)
    table = "\n".join(f"  {left:<{width}}  {right}" for left, right in rows)
    return f"{usage.strip()}\n\n{table}" if usage.strip() else table
