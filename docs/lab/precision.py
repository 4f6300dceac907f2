"""
What imagining in bfloat16 changes: errors and on-policy diagnostics beside those in float32, by the same models.

    python -m sb3_polygrad.evaluation.precision --data DIR --store MODELS --out docs/results/precision_hopper

Models are fitted, or taken from ``MODELS``. Every one imagines from the same states with the same random numbers in both
precisions, ``--repeats`` times with other numbers, and the actions are replayed in the simulator. Writes ``<out>.csv``, a row
per model and precision with means over the repeats: median errors after one step and after the last, and what
:func:`~sb3_polygrad.core.on_policy.action_diagnostics` says.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3 import PPO

from sb3_polygrad.benchmark.provenance import provenance, write_json
from sb3_polygrad.core.arguments import json_object
from sb3_polygrad.core.on_policy import action_diagnostics, standardized_actions
from sb3_polygrad.evaluation import minari_files
from sb3_polygrad.evaluation.command import run_study, study_parser
from sb3_polygrad.evaluation.contestants import CONTESTANTS
from sb3_polygrad.evaluation.fitted_model import fitted_model
from sb3_polygrad.evaluation.policy_guidance import tune_delta
from sb3_polygrad.evaluation.results import beside, readable, write_csv
from sb3_polygrad.evaluation.sampler_study import policy_with_std
from sb3_polygrad.evaluation.simulator import Simulator
from sb3_polygrad.evaluation.trajectory_error import Problem, errors, pose
from sb3_polygrad.world_models.diffusion import DiffusionWorldModel

DTYPES = ("float32", "bfloat16")


def measure(model: DiffusionWorldModel, problem: Problem) -> dict[str, float]:
    """
    :param model: a fitted world model
    :param problem: where to imagine and to replay
    :return: median errors and diagnostics of one batch
    """
    imagined = model.imagine(problem.start, problem.policy)
    real = problem.simulator.replay(problem.states, imagined.actions)
    steps = errors(imagined, real, problem.start, model.state_normalizer.std, model.outcome_normalizer.std[0])
    normal = problem.policy(imagined.observations[:, :-1])
    diagnostics = action_diagnostics(standardized_actions(imagined, normal.mean, normal.stddev), imagined)
    medians = {"mse_median_first": steps[0]["mse_median"], "mse_median_last": steps[-1]["mse_median"]}
    return {**medians, **{name: float(value) for name, value in diagnostics.items()}}


def study(args: argparse.Namespace) -> None:
    """All models in both precisions."""
    data = minari_files.read(args.data)
    fit_data, held_out = data.steps.split(args.held_out)
    simulator = Simulator(data.env_id)
    policy = policy_with_std(PPO.load(data.folder / "policy.zip", device="cpu"), args.std)
    problem = pose(held_out, simulator, policy, args.trajectories, 0)
    box, rows = (simulator.action_low, simulator.action_high), []
    for name in args.models:
        settings = {**CONTESTANTS[name].settings["default"], **args.settings.get(name, {})}
        path = args.store / f"{data.env_id}_{name}_h{args.horizon}_{args.gradient_steps}.pt"
        model, _ = fitted_model(path, fit_data, *box, args.horizon, settings, args.gradient_steps)
        th.manual_seed(0)
        model = tune_delta(model, problem.start[:64], problem.policy, 8)
        for dtype in DTYPES:
            model.imagine_in(getattr(th, dtype))
            repeats = []
            for seed in range(args.repeats):
                th.manual_seed(seed)
                repeats.append(measure(model, problem))
            means = {key: float(np.mean([repeat[key] for repeat in repeats])) for key in repeats[0]}
            row: dict[str, Any] = {"env": data.env_id, "model": name, "dtype": dtype, **means}
            rows.append(row)
            print({key: readable(value) for key, value in row.items()}, flush=True)
            write_csv(beside(args.out, ".csv"), rows)
    write_json(beside(args.out, ".json"), provenance("sb3_polygrad.evaluation.precision", threads=args.threads))


def main() -> None:
    """Command line."""
    parser = study_parser(__doc__)
    parser.add_argument("--data", required=True, help="dataset's folder or Minari id, with simulator states and policy.zip")
    parser.add_argument("--store", type=Path, required=True, help="folder for fitted models, used again if they are there")
    parser.add_argument("--models", nargs="+", default=["staggered_markov", "staggered", "guided"])
    parser.add_argument("--settings", type=json_object, default={}, help="more world_model_kwargs by model, as json")
    parser.add_argument("--horizon", type=int, default=9)
    parser.add_argument("--gradient-steps", type=int, default=2_000)
    parser.add_argument("--std", type=float, default=0.5, help="σ of the policy")
    parser.add_argument("--trajectories", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=8, help="batches, each with other random numbers")
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the data that starts are drawn from")
    run_study(parser, study)


if __name__ == "__main__":
    main()
