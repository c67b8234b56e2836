"""The rules of the house: which way imports run, what is never imported, how long a file may be."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vlm_jax import compat
from vlm_jax.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vlm_jax"

# docs/design.md, from the ground up. A part may import those below it and those beside it, but not in a circle.
LEVELS = (
    ("kernels", "sharding", "topologies"),
    ("layers",),
    ("models", "objectives", "data"),
    ("training", "evaluation", "interop", "families", "inference", "recipe", "requirements", "inputs"),
    ("train", "evaluate", "generate", "convert", "plan", "data.show", "data.audit", "data.prepare"),
)
# May be imported from anywhere, and import nothing but one another.
EVERYWHERE = ("errors", "compat", "config", "values", "coming_from")
FORBIDDEN = (("data", "models"),)  # beside each other, yet never

LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}


def modules() -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of everything we ship."""
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def imports(name: str, file: Path) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every import of a file, those within functions and TYPE_CHECKING included."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            # `from vlm_jax import sharding` imports vlm_jax.sharding
            yield from ((f"{base}.{alias.name}" if base == "vlm_jax" else base, node.lineno) for alias in node.names)


def part(name: str) -> str:
    """`vlm_jax.training.metrics` → `training`; a command within a part stays whole, as `data.show`; the package itself
    is ``."""
    inner = name.partition(".")[2]
    return inner if inner in LEVELS[-1] else inner.partition(".")[0]


def arrows() -> list[tuple[str, str, str]]:
    """(importing part, imported part, place) of all imports between parts; vlm_jax/__init__.py, the door, is free."""
    found = []
    for name, file in modules():
        for target, line in imports(name, file):
            if target.split(".")[0] == "vlm_jax" and part(name) and part(target) not in ("", part(name)):
                found.append((part(name), part(target), f"{file.relative_to(ROOT)}:{line}"))
    return found


def wrong(arrow: tuple[str, str, str]) -> bool:
    source, target, _ = arrow
    if source in EVERYWHERE:
        return target not in EVERYWHERE
    if target in EVERYWHERE:
        return False
    top = len(LEVELS)  # a new file at the top is a command, until LEVELS says otherwise
    return (source, target) in FORBIDDEN or LEVEL.get(source, top) < LEVEL.get(target, top)


def test_imports_run_one_way() -> None:
    bad = [f"{place}: {source} imports {target}" for source, target, place in filter(wrong, arrows())]
    assert not bad, "these imports point upwards:\n" + "\n".join(bad)


def test_no_parts_import_each_other_in_a_circle() -> None:
    graph: dict[str, dict[str, str]] = {}
    for source, target, place in arrows():
        graph.setdefault(source, {})[target] = place

    def walk(trail: list[str]) -> None:
        for target, place in graph.get(trail[-1], {}).items():
            assert target not in trail, f"a circle: {' -> '.join([*trail, target])} ({place})"
            walk([*trail, target])

    for source in graph:
        walk([source])


def test_the_rule_sees_a_wrong_arrow() -> None:
    assert wrong(("layers", "models", "")) and wrong(("data", "models", "")) and wrong(("config", "data", ""))
    assert not wrong(("models", "layers", "")) and not wrong(("kernels", "errors", ""))
    assert part("vlm_jax.data.show") == "data.show" and part("vlm_jax.data.rows") == "data"
    assert wrong(("data", "data.show", "")) and not wrong(("data.show", "families", ""))


def test_nothing_private_of_a_dependency() -> None:
    bad = []
    for name, file in modules():
        for target, line in imports(name, file):
            if any(piece.startswith("_") and piece != "__future__" for piece in target.split(".")):
                bad.append(f"{file.relative_to(ROOT)}:{line}: {target}")
        for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(r"\b(jax|flax|grain|optax|orbax)\._\w+|importlib\.import_module", text):
                bad.append(f"{file.relative_to(ROOT)}:{number}: {text.strip()}")
    assert not bad, "\n".join(bad)


def test_every_public_function_is_annotated() -> None:
    bad = []
    for _, file in modules():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            methods = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else [node]
            for method in methods:
                if isinstance(method, ast.FunctionDef) and (method.name == "__call__" or method.name[0] != "_"):
                    a = method.args
                    named = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
                    bare = [arg.arg for arg in named if arg.annotation is None and arg.arg not in ("self", "cls")]
                    if bare or method.returns is None:
                        what = ", ".join(bare) or "what it returns"
                        bad.append(f"{file.relative_to(ROOT)}:{method.lineno}: {method.name} does not annotate {what}")
    assert not bad, "\n".join(bad)


def test_no_file_is_too_long() -> None:
    long = {str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines()) for _, file in modules()}
    assert not {file: lines for file, lines in long.items() if lines > 800}


def test_a_plain_import_is_light(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    heavy = ("torch", "tensorflow", "jax", "flax", "transformers", "numpy")
    code = f"import vlm_jax, sys; print(vlm_jax.__version__, [name for name in {heavy} if name in sys.modules])"
    done = run_python("-c", code)
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr


def test_no_module_of_ours_pulls_in_torch_or_tensorflow(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    names = [name for name, _ in modules()]
    code = (
        f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
        "print([name for name in ('torch', 'tensorflow') if name in sys.modules])"
    )
    done = run_python("-c", code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------------ packaging


def dependencies() -> list[str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


@pytest.mark.parametrize("requirement", dependencies())
def test_every_dependency_is_bounded_on_both_sides(requirement: str) -> None:
    name, lower, upper = re.fullmatch(r"([\w.-]+)(?:\[\w+\])?>=([\d.]+),<([\d.]+)(?:; .*)?", requirement).groups()  # type: ignore[union-attr]
    marker = requirement.partition(";")[2]
    if marker and not _holds(marker):
        return
    present = compat.version(name)
    numbers = [tuple(int(n) for n in bound.split(".")) for bound in (lower, upper)]
    assert numbers[0] <= present < numbers[1], f"{name} {present} is installed, outside its bounds"


def _holds(marker: str) -> bool:
    operator, wanted = re.fullmatch(r"\s*python_version (<|>=) '([\d.]+)'", marker).groups()  # type: ignore[union-attr]
    older = sys.version_info[:2] < tuple(int(n) for n in wanted.split("."))
    return older if operator == "<" else not older


@pytest.mark.parametrize(
    ("jax", "flax", "says"),
    [
        ("0.10.2", "0.12.8", None),
        ("0.11.1", "0.12.12", None),
        ("0.12.0.1", "0.12.12", None),
        ("0.12.0", "0.12.9", "flax 0.12.9 does not import with jax 0.12.0: pip install"),
        ("0.13.0", "0.13.0", "jax 0.13.0 is not supported"),
        ("0.9.2", "0.12.8", "jax 0.9.2 is not supported"),
    ],
)
def test_versions_that_do_not_fit_are_named(monkeypatch, jax: str, flax: str, says: str | None) -> None:
    monkeypatch.setattr(compat.metadata, "version", {"jax": jax, "flax": flax}.__getitem__)
    if says is None:
        compat.check_versions()
    else:
        with pytest.raises(UsageError, match=re.escape(says)):
            compat.check_versions()


# ------------------------------------------------------------------------------------------------------------- the text


def tracked() -> list[Path]:
    """The files of the checkout, as git knows them; all but the environments and outputs where there is no git."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, capture_output=True, text=True)
    if listing.returncode == 0:
        return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]
    skipped = (".git", ".venv", "runs", "build", "dist")
    inside = [(file, file.relative_to(ROOT).parts) for file in ROOT.rglob("*") if file.is_file()]
    return [file for file, parts in inside if not any(p.startswith(skipped) or p == "__pycache__" for p in parts)]


def test_no_path_of_one_machine() -> None:
    bad = []
    for file in tracked():
        if file == Path(__file__) or file.stat().st_size > 1_000_000:
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if re.search(r"(?<![\w.])/(work|root|home|Users|opt)/\w+|/tmp/envs", line):
                bad.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not bad, "\n".join(bad)


def test_the_readme_holds_the_present_table_of_systems(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = run_python("docs/print_systems.py", "--check", "README.md")
    assert done.returncode == 0, done.stderr


def test_every_system_says_what_works() -> None:
    systems = json.loads((ROOT / "docs/systems.json").read_text())
    names = [system["name"] for system in systems]
    assert len(names) == len(set(names))
    for system in systems:
        assert set(system) == {"name", "family", "works", "what", "command"}, system["name"]
        assert system["works"] in ("yes", "partial", "no"), system["name"]
        shown = bool(system["command"])
        assert shown == (system["works"] != "no"), f"{system['name']}: a command shows what works, and only that"
        for file in re.findall(r"configs/\w+\.py", system["command"]):
            assert (ROOT / file).is_file(), f"{system['name']}: {file} does not exist"
