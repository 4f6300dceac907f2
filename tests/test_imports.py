"""Imports go one way, and the package is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "sb3_polygrad"
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))

# What each part may import of the package. Parts that stand above all these (zoo, train, benchmark, ...) may import anything.
BELOW = {
    "core": {"core"},
    "denoisers": {"core", "denoisers"},
    "diffusion": {"core", "diffusion"},
    "world_models": {"core", "denoisers", "diffusion", "world_models"},
    "policy": {"core", "policy"},
    "checks": {"core", "policy", "world_models"},
    "checkpoint": {"core"},
    "saving": {"core", "policy", "world_models", "checks", "checkpoint"},
    "collecting": {"core", "policy"},
    "imagining": {"core", "policy", "world_models"},
    "callbacks": {"saving"},
    "learning": {"core", "policy", "saving", "collecting", "imagining"},
    "polygrad": {"core", "policy", "world_models", "checks", "learning"},
}
KNOW_SB3 = {
    "policy",
    "checks",
    "saving",
    "collecting",
    "imagining",
    "learning",
    "callbacks",
    "polygrad",
    "hyperparams_loader",
    "zoo",
    "train",
    "benchmark",
    "evaluation",
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


def test_the_guard_sees_every_kind_of_import() -> None:
    source = "import a.b\ndef f():\n    from sb3_polygrad import core\n    from ..policy import update\n    from . import x"
    names = imported(source, "sb3_polygrad.common")
    assert {"a.b", "sb3_polygrad.common", "sb3_polygrad.policy.update", "sb3_polygrad.common.x"} <= names
    assert imported("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a") == {"typing", "typing.TYPE_CHECKING"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    allowed = BELOW.get(part_of(path))
    if allowed is None:
        return
    inside = {name.split(".")[1] for name in imports_of(path) if name.startswith(f"{PACKAGE}.")}
    assert inside <= allowed, f"{part_of(path)} must not import {inside - allowed}"
    assert PACKAGE not in imports_of(path), "from the module itself, not from the public face"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_shell_knows_sb3(path: Path) -> None:
    knows = any(name.split(".")[0] == "stable_baselines3" for name in imports_of(path))
    may_know = part_of(path) in KNOW_SB3 and path.name != "update.py"
    assert may_know or not knows, (
        "only policy/ (not update.py), PolyGRAD's own files and what stands above may import stable_baselines3"
    )


def test_import_needs_no_extra() -> None:
    extras = ["matplotlib", "pandas", "rl_zoo3", "mujoco", "rliable", "minari", "tqdm", "rich"]
    program = f"import sys; import stable_baselines3; sb3 = set(sys.modules); import {PACKAGE};"
    program += f"print(sorted((set(sys.modules) - sb3) & set({extras})))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"
