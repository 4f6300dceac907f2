"""Imports go one way, and the package is light."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "sb3_polygrad"
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
MAX_FILE, MAX_PACKAGE = 330, 7_500  # lines

# What each part may import of the package, from the bottom.
WORLD = {"common", "diffusion", "world_models"}
SHELL = {*WORLD, "policies", "episode_buffer", "imagined_buffer", "imagination", "updates", "checks", "real_steps"}
BELOW = {
    "common": {"common"},
    "diffusion": {"common", "diffusion"},
    "world_models": WORLD,
    "policies": {"common"},
    "episode_buffer": {"common"},
    "imagined_buffer": {"common"},
    "real_steps": set(),
    "imagination": {"common", "world_models", "policies", "episode_buffer"},
    "updates": {"common", "policies", "imagined_buffer"},
    "checks": {"common", "policies"},
    "diagnostics": {"common"},
    "hyperparams_loader": {"common"},
    "checkpoint": {"common", "episode_buffer", "checkpoint"},
    "polygrad": {*SHELL, "checkpoint"},
}
# What stands above: nothing below imports these, and they may import everything below and each other.
ABOVE = {"study", "benchmark", "zoo", "train", "__init__"}
KNOW_SB3 = {
    "policies",
    "imagined_buffer",
    "real_steps",
    "imagination",
    "checks",
    "checkpoint",
    "polygrad",
    "diagnostics",
    "hyperparams_loader",
    *ABOVE,
}


def part_of(path: Path) -> str:
    """``core`` for ``sb3_polygrad/core/trajectory.py``, ``polygrad`` for ``sb3_polygrad/polygrad.py``."""
    return path.relative_to(ROOT / PACKAGE).with_suffix("").parts[0]


def imported(source: str, package: str = PACKAGE) -> set[str]:
    """Dotted names of all modules that a source imports at run time, wherever in the file; ``package`` is its own."""
    names: set[str] = set()
    tree = ast.parse(source)
    type_checking = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    ]
    for_types_only = {id(child) for block in type_checking for child in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in for_types_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def imports_of(path: Path) -> set[str]:
    return imported(path.read_text(encoding="utf-8"), ".".join(path.relative_to(ROOT).parent.parts))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in FILES}


def modules_of(path: Path) -> set[str]:
    """
    The modules of the package that a file imports.

    ``from sb3_polygrad import checks`` imports the module ``sb3_polygrad.checks``, and ``from sb3_polygrad import PolyGRAD``
    imports the package's public face, ``sb3_polygrad``.
    """
    found = set()
    for name in imports_of(path):
        if name in MODULES and name != PACKAGE:
            found.add(name)
        elif name.startswith(f"{PACKAGE}.") and name.rpartition(".")[0] == PACKAGE:
            found.add(PACKAGE)
    return found


def test_the_guard_sees_every_kind_of_import() -> None:
    source = "import a.b\ndef f():\n    from sb3_polygrad import common\n    from ..a import b\n    from . import x"
    names = imported(source, "sb3_polygrad.common")
    assert {"a.b", "sb3_polygrad.common", "sb3_polygrad.a.b", "sb3_polygrad.common.x"} <= names
    assert imported("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a") == {"typing", "typing.TYPE_CHECKING"}


def test_every_part_has_its_place() -> None:
    parts = {part_of(path) for path in FILES}
    assert parts == {*BELOW, *ABOVE}
    assert set(BELOW) >= set().union(*BELOW.values())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    inside, own = modules_of(path), part_of(path)
    assert own == "__init__" or PACKAGE not in inside, "from the module itself, not from the public face"
    if own in BELOW:
        parts = {name.split(".")[1] for name in inside if name != PACKAGE}
        assert parts <= BELOW[own], f"{own} must not import {parts - BELOW[own]}"


def test_imports_have_no_circles() -> None:
    graph = {module_of(path): modules_of(path) for path in FILES}
    assert sum(map(len, graph.values())) > 100, "there are imports to look at"
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_shell_knows_sb3(path: Path) -> None:
    knows = any(name.split(".")[0] == "stable_baselines3" for name in imports_of(path))
    assert part_of(path) in KNOW_SB3 or not knows, f"{part_of(path)} must not import stable_baselines3"


def n_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_short_enough_to_be_read(path: Path) -> None:
    assert n_lines(path) <= MAX_FILE


def test_the_package_is_short_enough_to_be_read() -> None:
    assert sum(map(n_lines, FILES)) <= MAX_PACKAGE


def test_import_needs_no_extra() -> None:
    extras = ["matplotlib", "pandas", "rl_zoo3", "mujoco", "rliable", "minari", "tqdm", "rich"]
    program = f"import sys; import stable_baselines3; sb3 = set(sys.modules); import {PACKAGE};"
    program += f"print(sorted((set(sys.modules) - sb3) & set({extras})))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"
