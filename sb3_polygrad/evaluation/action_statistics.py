"""
Whether the actions that a saved model imagines are draws from its policy.

    python -m sb3_polygrad.evaluation.action_statistics MODEL.zip --buffer BUFFER.pkl --out actions

Trajectories are imagined from observations of the saved buffer (``model.save_replay_buffer``). Prints, and with ``--out``
writes as csv and json, over the steps that happened: standard deviation and mean of the standardised actions (a - μ) / σ,
their Kolmogorov-Smirnov distance to N(0, 1), their lag-1 autocorrelation, and how much of them a linear function of the
observation predicts on other trajectories (R²); draws from the policy have 1, 0, 0, 0, 0. A row per step has the standard
deviation there. A model that was trained under ``VecNormalize`` needs its statistics, as ``VecNormalize.save`` or the zoo
wrote them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_polygrad.benchmark.provenance import provenance, write_json
from sb3_polygrad.common.on_policy import action_statistics, per_step_std
from sb3_polygrad.evaluation.results import beside, readable, write_csv
from sb3_polygrad.polygrad import PolyGRAD


def measure(model: PolyGRAD, n_trajectories: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """
    :param model: with a fitted world model and real steps in its buffer
    :param n_trajectories: to imagine
    :return: a row on the whole and a row per step
    """
    trajectory = model.imagine(n_trajectories)
    standardized = model.standardized_actions(trajectory)
    statistics = action_statistics(standardized, trajectory.observations[:, :-1], trajectory.mask)
    spreads = per_step_std(standardized, trajectory.mask)
    counts = trajectory.mask.sum(dim=0)
    steps = [
        {"step": t + 1, "action_std": float(spread), "n": int(count)}
        for t, (spread, count) in enumerate(zip(spreads, counts, strict=True))
    ]
    return {"trajectories": n_trajectories, "steps": int(counts.sum()), **statistics}, steps


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="written by model.save")
    parser.add_argument("--buffer", type=Path, required=True, help="written by model.save_replay_buffer")
    parser.add_argument("--vec-normalize", type=Path, help="statistics of VecNormalize; needs --env")
    parser.add_argument("--env", help="environment, for --vec-normalize")
    parser.add_argument("--trajectories", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="path of the results, without suffix")
    args = parser.parse_args()
    if (args.vec_normalize is None) != (args.env is None):
        parser.error("--vec-normalize and --env belong together")

    th.set_num_threads(args.threads)
    env: VecEnv | None = None
    if args.env is not None:
        n_envs = PolyGRAD.load(args.model, device="cpu").n_envs
        env = VecNormalize.load(str(args.vec_normalize), make_vec_env(args.env, n_envs))
        env.training = False
    model = PolyGRAD.load(args.model, env=env, device="cpu")
    model.load_replay_buffer(args.buffer)
    th.manual_seed(args.seed)
    row, steps = measure(model, args.trajectories)
    for name, value in row.items():
        print(f"{name:16} {readable(value)}")
    for step in steps:
        print(f"step {step['step']:3}: action_std {step['action_std']:.3f} over {step['n']} trajectories")
    if args.out is not None:
        write_csv(beside(args.out, ".csv"), [row])
        write_csv(beside(args.out, "_steps.csv"), steps)
        facts = provenance(
            "sb3_polygrad.evaluation.action_statistics",
            threads=args.threads,
            world_model_kwargs=model.world_model_kwargs,
            real_steps=model.num_timesteps,
        )
        write_json(beside(args.out, ".json"), facts)


if __name__ == "__main__":
    main()
