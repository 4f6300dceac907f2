"""
How far imagined trajectories are from what really happens, model against model (Figures 5 and 8).

    python -m sb3_polygrad.evaluation.trajectory_error --data DIR --store MODELS --out docs/results/error_hopper

Each world model is fitted to the same dataset (the folder of one that ``make_dataset`` wrote) for the same number of
gradient steps, or taken from ``MODELS``. Then 500 trajectories are imagined from held-out states under one policy (the
agent's mean, its standard deviation replaced) and their actions replayed in the simulator. PolyGRAD is fitted anew for each
horizon; the others are fitted once and imagine the longest one. Models with a memory are shown the five real steps before
each start.

Writes ``<out>.csv``, a row per model, seed and step, ``<out>_summary.csv``, the errors after 1, 5, 9 and 49 steps over seeds
with what they cost, and ``<out>.json``. Draw them with ``python -m sb3_polygrad.plots.trajectory_error``. Of the columns

- ``mse_...`` are squared errors of the observation, standardised by the data's standard deviation and averaged over
  dimensions; mean, median and quantiles are over trajectories. ``mse_raw_...`` are in the environment's units,
- ``reward_mse`` is the squared error of the reward, standardised,
- ``no_change_mean`` and ``no_change_median`` are ``mse_mean`` and ``mse_median`` of the prediction that the state stays
  what it was at the start; in the summary ``better_mean`` and ``better_median`` say how many times smaller the model's are,
- ``ending_error`` is the share of trajectories that have ended in one of imagination and simulator only.

A step counts if it happened both in imagination and in the simulator; ``n`` says how many did.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch as th
from stable_baselines3 import PPO

from sb3_polygrad.benchmark.provenance import provenance, write_json
from sb3_polygrad.common.arguments import json_object
from sb3_polygrad.common.trajectory import Trajectory
from sb3_polygrad.evaluation import minari_files
from sb3_polygrad.evaluation.command import run_study, study_parser
from sb3_polygrad.evaluation.contestants import CONTESTANTS
from sb3_polygrad.evaluation.dataset import Dataset
from sb3_polygrad.evaluation.fitted_model import kept_or_fitted
from sb3_polygrad.evaluation.policy_guidance import tune_delta
from sb3_polygrad.evaluation.results import beside, readable, write_csv
from sb3_polygrad.evaluation.sampler_study import policy_with_std
from sb3_polygrad.evaluation.simulator import Simulator
from sb3_polygrad.world_models.base import Context, PolicyFn
from sb3_polygrad.world_models.diffusion import DiffusionWorldModel
from sb3_polygrad.world_models.standardized import StandardizedWorldModel

WARM_UP = 5
"""Real steps that a model with a memory is shown before it is on its own (Appendix C.2)."""
SUMMARY_STEPS = (1, 5, 9, 49)


class Problem(NamedTuple):
    """
    :param simulator: the environment
    :param policy: whose actions are imagined
    :param start: ``(batch, obs_dim)`` observations to imagine from
    :param states: ``(batch, state_dim)`` their simulator states
    :param context: the real steps before
    """

    simulator: Simulator
    policy: PolicyFn
    start: th.Tensor
    states: np.ndarray
    context: Context


def pose(data: Dataset, simulator: Simulator, policy: PolicyFn, n: int, seed: int) -> Problem:
    """
    Draw states to imagine from.

    :param data: real steps that no model was fitted to
    :param simulator: the environment
    :param policy: whose actions are to be imagined
    :param n: how many
    :param seed: of the draw
    :raises ValueError: if the data has no simulator states
    """
    if data.simulator_states.shape[1] == 0:
        raise ValueError(
            "the dataset has no simulator states to replay from: make one with sb3_polygrad.evaluation.make_dataset"
        )
    chosen = np.random.default_rng(seed).choice(data.starts(WARM_UP), n, replace=False)
    before = chosen[:, None] + np.arange(-WARM_UP, 0)
    context = Context(th.as_tensor(data.observations[before]).float(), th.as_tensor(data.actions[before]).float())
    start = th.as_tensor(data.observations[chosen]).float()
    return Problem(simulator, policy, start, data.simulator_states[chosen], context)


def errors(
    imagined: Trajectory, real: Trajectory, start: th.Tensor, std: th.Tensor, reward_std: th.Tensor
) -> list[dict[str, Any]]:
    """
    :param imagined: trajectories
    :param real: the same actions in the simulator
    :param start: ``(batch, obs_dim)`` where they began
    :param std: ``(obs_dim,)`` that observations are standardised by
    :param reward_std: scalar that rewards are standardised by
    :return: a row per step that happened, see the head of this file
    """
    rows: list[dict[str, Any]] = []
    for t in range(imagined.horizon):
        both = (imagined.mask[:, t] * real.mask[:, t]) > 0.0
        if not both.any():
            break
        truth = real.observations[both, t + 1]
        difference = imagined.observations[both, t + 1] - truth
        raw, standardized = difference.square().mean(dim=1), (difference / std).square().mean(dim=1)
        unchanged = ((start[both] - truth) / std).square().mean(dim=1)
        low, high = th.quantile(standardized, th.tensor([0.1, 0.9]))
        rows.append(
            {
                "step": t + 1,
                "n": int(both.sum()),
                "mse_mean": float(standardized.mean()),
                "mse_median": float(standardized.median()),
                "mse_q10": float(low),
                "mse_q90": float(high),
                "mse_raw_mean": float(raw.mean()),
                "mse_raw_median": float(raw.median()),
                "no_change_mean": float(unchanged.mean()),
                "no_change_median": float(unchanged.median()),
                "reward_mse": float(((imagined.rewards - real.rewards)[both, t] / reward_std).square().mean()),
                "ending_error": float((imagined.terminals[:, t] != real.terminals[:, t]).float().mean()),
            }
        )
    return rows


def measure(model: StandardizedWorldModel, problem: Problem) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """
    :param model: a fitted world model
    :param problem: where to imagine and to replay
    :return: a row per step, and what imagining cost
    """
    calls: list[None] = []
    counter = model.average.register_forward_hook(lambda *_: calls.append(None))
    clock, processor = time.perf_counter(), time.process_time()
    imagined = model.imagine(problem.start, problem.policy, problem.context)
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    counter.remove()
    real = problem.simulator.replay(problem.states, imagined.actions)
    rows = errors(imagined, real, problem.start, model.state_normalizer.std, model.outcome_normalizer.std[0])
    per_step = len(problem.start) * model.horizon
    cost = {"calls": len(calls), "seconds_per_step": clock / per_step, "cpu_seconds_per_step": processor / per_step}
    return rows, cost


def summary(rows: list[dict[str, Any]], costs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Means over seeds, and the standard deviation of the mean errors over them.

    :param rows: of all models, seeds and steps
    :param costs: of all models and seeds
    :return: a row per model, horizon and step of :data:`SUMMARY_STEPS`
    """
    which = ["env", "model", "horizon"]
    steps = pd.DataFrame(rows)
    steps = steps[steps["step"].isin(SUMMARY_STEPS)]
    for kind in ("mean", "median"):
        steps = steps.assign(**{f"better_{kind}": steps[f"no_change_{kind}"] / steps[f"mse_{kind}"]})
    grouped = steps.groupby([*which, "step"], sort=False)
    names = ["mse_mean", "mse_median", "reward_mse", "ending_error", "better_mean", "better_median"]
    table = grouped[names].mean()
    table.insert(1, "mse_mean_std", grouped["mse_mean"].std(ddof=0))
    table.insert(0, "seeds", grouped["seed"].nunique())
    spent = pd.DataFrame(costs).drop(columns="seed").groupby(which, sort=False).mean(numeric_only=True)
    return [dict(row) for row in table.reset_index().join(spent, on=which).to_dict("records")]


def study(args: argparse.Namespace) -> None:
    """All models, horizons and seeds on one dataset."""
    data = minari_files.read(args.data)
    fit_data, held_out = data.steps.split(args.held_out)
    simulator = Simulator(data.env_id)
    policy = policy_with_std(PPO.load(args.agent or data.folder / "policy.zip", device="cpu"), args.std)
    problem = pose(held_out, simulator, policy, args.trajectories, args.problem_seed)
    rows: list[dict[str, Any]] = []
    costs: list[dict[str, Any]] = []
    for seed in args.seeds:
        for name in args.models:
            contestant = CONTESTANTS[name]
            settings = {**contestant.settings[args.size], **args.settings.get(name, {})}
            for horizon in args.horizons if contestant.whole else [max(args.horizons)]:
                fit_horizon = f"_h{horizon}" if contestant.whole else ""
                path = args.store / f"{data.env_id}_{args.size}_{name}{fit_horizon}_{args.gradient_steps}_seed{seed}.pt"
                model, training = kept_or_fitted(
                    path,
                    lambda c=contestant, h=horizon, s=settings: c.build(  # type: ignore[misc]
                        problem.start.shape[1], simulator.action_low, simulator.action_high, h, s
                    ),
                    {"model": name, "settings": settings, **({"horizon": horizon} if contestant.whole else {})},
                    fit_data,
                    args.gradient_steps,
                    args.batch_size,
                    seed,
                )
                th.manual_seed(seed)
                if isinstance(model, DiffusionWorldModel):
                    model = tune_delta(model, problem.start[: args.delta_batch], policy, args.delta_rounds)
                labels = {"env": data.env_id, "model": name, "horizon": horizon, "seed": seed}
                steps, cost = measure(model, problem)
                rows += [{**labels, **row} for row in steps]
                costs.append(
                    {
                        **labels,
                        "gradient_steps": args.gradient_steps,
                        "fit_seconds": training["seconds"],
                        "fit_cpu_seconds": training["cpu_seconds"],
                        **cost,
                    }
                )
                print(
                    labels,
                    {key: readable(value) for key, value in {**steps[min(9, len(steps)) - 1], **cost}.items()},
                    flush=True,
                )
                # After every model, so that a study cut short leaves what it has measured.
                write_csv(beside(args.out, ".csv"), rows)
                write_csv(beside(args.out, "_summary.csv"), summary(rows, costs))
    facts = provenance(
        "sb3_polygrad.evaluation.trajectory_error",
        threads=args.threads,
        dataset=json.loads((data.folder / "dataset.json").read_text())
        if (data.folder / "dataset.json").exists()
        else args.data,
        settings={name: {**CONTESTANTS[name].settings[args.size], **args.settings.get(name, {})} for name in args.models},
        cost=costs,
    )
    write_json(beside(args.out, ".json"), facts)


def main() -> None:
    """Command line."""
    parser = study_parser(__doc__)
    parser.add_argument("--data", required=True, help="dataset's folder or Minari id, with simulator states")
    parser.add_argument("--agent", type=Path, help="zip of an SB3 PPO agent; the dataset's own if not given")
    parser.add_argument("--store", type=Path, required=True, help="folder for fitted models, used again if they are there")
    parser.add_argument("--models", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--horizons", type=int, nargs="+", default=[10], help="10 50 200 in the paper")
    parser.add_argument("--size", choices=["default", "paper"], default="default")
    parser.add_argument("--settings", type=json_object, default={}, help="more world_model_kwargs by model, as json")
    parser.add_argument("--gradient-steps", type=int, default=5_000)
    parser.add_argument("--batch-size", type=int, default=256, help="windows per gradient step")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--std", type=float, default=0.5, help="σ of the policy")
    parser.add_argument("--trajectories", type=int, default=500)
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the data that starts are drawn from")
    parser.add_argument("--problem-seed", type=int, default=0, help="of the starts")
    parser.add_argument(
        "--delta-rounds", type=int, default=8, help="updates of δ before the policy-guided sampler is measured"
    )
    parser.add_argument("--delta-batch", type=int, default=64, help="trajectories per update of δ")
    run_study(parser, study)


if __name__ == "__main__":
    main()
