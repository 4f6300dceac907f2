"""One algorithm, one environment, one seed: skipped if it is complete, resumed if it was interrupted."""

from __future__ import annotations

import inspect
import json
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch as th
from filelock import FileLock, Timeout  # comes with torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from sb3_polygrad.benchmark.algorithms import algorithm_class
from sb3_polygrad.benchmark.curve_file import CurveFile, read_rows
from sb3_polygrad.benchmark.evaluations import Evaluations, Stopwatch
from sb3_polygrad.checkpoint.archive import NAME, checkpoints
from sb3_polygrad.checkpoint.callback import ResumableCheckpoints
from sb3_polygrad.checkpoint.files import fault_of_archive
from sb3_polygrad.common.validation import choose
from sb3_polygrad.policies import PolyGRADPolicy
from sb3_polygrad.polygrad import PolyGRAD
from sb3_polygrad.updates import UPDATES
from sb3_polygrad.world_models.make import WORLD_MODELS

NOT_SETTINGS = {"self", "policy", "env", "seed", "device", "verbose", "tensorboard_log", "_init_setup_model"}
"""Arguments of the constructors that decide nothing, or stand in a file of their own right."""


@dataclass(frozen=True)
class Run:
    """
    What is run.

    :param algorithm: one of :data:`~sb3_polygrad.benchmark.algorithms.NAMES`
    :param env: environment
    :param seed: of training; the evaluations have seeds of their own
    :param steps: real steps, with an evaluation of so many ``episodes`` after ``every`` so many
    :param settings: keyword arguments of the algorithm
    :param label: name of the variant; that of the algorithm if it is empty
    :param threads: of torch, on ``device``
    """

    algorithm: str
    env: str
    seed: int
    steps: int
    every: int = 1_000
    episodes: int = 10
    settings: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    threads: int = 1
    device: str = "cpu"

    @property
    def rows_begin(self) -> dict[str, Any]:
        """What all rows of its csv file have in common."""
        return {"label": self.label or self.algorithm, "algorithm": self.algorithm, "env": self.env, "seed": self.seed}

    @property
    def name(self) -> str:
        """Of its files."""
        return re.sub(r"[^\w.-]", "-", f"{self.label or self.algorithm}_{self.env}_{self.seed}")

    def identity(self) -> dict[str, Any]:
        """All that decides the returns but the number of steps, as json has it: rows of different identity are not mixed."""
        settings = {**_defaults(algorithm_class(self.algorithm)), **self.settings}
        if self.algorithm == "polygrad":
            settings["policy_kwargs"] = {**_defaults(PolyGRADPolicy), **(settings["policy_kwargs"] or {})}
            made_by = WORLD_MODELS[choose("world_model", settings["world_model"], WORLD_MODELS)]
            settings["world_model_kwargs"] = {**_defaults(made_by), **(settings["world_model_kwargs"] or {})}
            update = settings["policy_update"] or ("pathwise" if made_by.differentiable else "ppo")
            update_defaults = _defaults(UPDATES[choose("policy_update", update, UPDATES)])
            settings["policy_update_kwargs"] = {**update_defaults, **(settings["policy_update_kwargs"] or {})}
        identity = {
            **self.rows_begin,
            "every": self.every,
            "episodes": self.episodes,
            "device": self.device,
            "settings": settings,
        }
        return json.loads(json.dumps(identity, default=repr))


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """What a class or function takes for arguments that decide something and are not given."""
    parameters = inspect.signature(function).parameters
    decided = {name: parameter.default for name, parameter in parameters.items() if name not in NOT_SETTINGS}
    return {name: default for name, default in decided.items() if default is not inspect.Parameter.empty}


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """``{"policy_kwargs": {"n_critics": 2}}`` to ``{"policy_kwargs.n_critics": 2}``."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def execute(run: Run, out: Path, store: Path, facts: dict[str, Any]) -> str:
    """
    Finish a run.

    :param run: what to run
    :param out: folder of the csv and json files
    :param store: folder of PolyGRAD's checkpoints
    :param facts: what is written down about this call, see :func:`~sb3_polygrad.benchmark.provenance.provenance`
    :return: what was done: ``"skipped"``, ``"finished"``, or ``"resumed at N steps and finished"``
    :raises ValueError: if its files are of a run with other settings
    :raises RuntimeError: if another process works on it
    """
    file = CurveFile(out / f"{run.name}.csv", run.rows_begin)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / f".{run.name}.lock", timeout=0):
            return _execute(run, file, store, facts)
    except Timeout:
        raise RuntimeError(f"another process works on {file.path}: wait for it, or choose another --out") from None


def _execute(run: Run, file: CurveFile, store: Path, facts: dict[str, Any]) -> str:
    """:func:`execute`, while no other process works on the run."""
    notes, rows = file.read_notes(), read_rows(file.path)
    _require_same(run, file, notes, bool(rows))
    if {int(row["timesteps"]) for row in rows}.issuperset(range(run.every, run.steps + 1, run.every)):
        return "skipped"
    th.set_num_threads(run.threads)
    checkpoint = _checkpoint(run, store, notes, rows)
    if checkpoint is None:
        if rows:
            file.set_aside()
        rows, begin = [], 0
        notes = {**facts, "id": uuid.uuid4().hex[:12], "threads": run.threads, "run": run.identity(), "continued": []}
        model: BaseAlgorithm = algorithm_class(run.algorithm)(
            "MlpPolicy", run.env, seed=run.seed, device=run.device, **run.settings
        )
    else:
        assert notes is not None
        model = PolyGRAD.resume(checkpoint, run.env, device=run.device)
        begin = model.num_timesteps
        rows = [row for row in rows if int(row["timesteps"]) <= begin]
        notes["continued"].append({"from": begin, **facts})
    file.begin({**notes, "steps": run.steps}, rows)
    _learn(run, model, file, store / f"{run.name}_{notes['id']}", Stopwatch(rows[-1] if rows else None))
    return "finished" if begin == 0 else f"resumed at {begin} steps and finished"


def _require_same(run: Run, file: CurveFile, notes: dict[str, Any] | None, has_rows: bool) -> None:
    """:raises ValueError: if the rows are not this run's"""
    if not has_rows:
        return
    if notes is None:
        raise ValueError(f"{file.path} has no {file.notes_path.name} beside it, so no one knows what it is: move it away")
    ours, theirs = run.identity(), notes["run"]
    differing = [name for name in ours if name != "settings" and ours[name] != theirs[name]]
    # An argument that the algorithm did not have then had no value that could differ, unless one is given now.
    now, then = _flat(ours["settings"]), _flat(theirs["settings"])
    given = _flat({name: value for name, value in run.settings.items() if name not in NOT_SETTINGS})
    differing += [name for name in sorted(now.keys() & then.keys() | given.keys()) if now.get(name) != then.get(name)]
    if differing:
        raise ValueError(
            f"{file.path} was made with another {', '.join(differing)}: choose another --label or --out, or move it away"
        )


def _checkpoint(run: Run, store: Path, notes: dict[str, Any] | None, rows: list[dict[str, str]]) -> Path | None:
    """The latest checkpoint that is whole and lacks no row before it, if the run can go on from one."""
    if run.algorithm != "polygrad" or notes is None:
        return None
    if notes["steps"] != run.steps and any(callable(value) for value in run.settings.values()):
        return None  # schedules follow the number of steps: a longer run is another one from the first step on
    reached = {int(row["timesteps"]) for row in rows}
    for path in reversed(checkpoints(store / f"{run.name}_{notes['id']}")):
        steps = int(NAME.fullmatch(path.name)[2])  # type: ignore[index]
        if reached.issuperset(range(run.every, steps + 1, run.every)) and fault_of_archive(path) is None:
            return path
    return None


def _learn(run: Run, model: BaseAlgorithm, file: CurveFile, folder: Path, stopwatch: Stopwatch) -> None:
    """Train to the end; every evaluation is a row, and PolyGRAD saves checkpoints."""

    def take(row: dict[str, Any]) -> None:
        if row["timesteps"] <= run.steps:  # algorithms that collect many steps at once go a little further
            file.append(row)

    callbacks: list[BaseCallback] = [Evaluations(run.env, run.seed, run.every, run.episodes, take, stopwatch)]
    if isinstance(model, PolyGRAD):
        callbacks.append(ResumableCheckpoints(run.every, folder, keep=2))
    model.learn(run.steps - model.num_timesteps, callback=callbacks, reset_num_timesteps=model.num_timesteps == 0)
