"""
Whether imagined trajectories end as often as real ones, while a policy learns from them.

    python -m sb3_polygrad.evaluation.endings --env Hopper-v5 --steps 6000 --out docs/results/endings_hopper

Every ``--every`` real steps the present policy (with its noise) acts for some episodes in an environment of its own. From
states of these, trajectories are imagined under the same policy. Writes ``<out>.csv`` with the share of trajectories that end
within the horizon: ``real``, in those episodes; ``drawn``, imagined, each ending drawn with its probability in the model;
``cut``, imagined, an ending wherever that probability is above one half.
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th

from sb3_polygrad.benchmark.provenance import provenance, write_json
from sb3_polygrad.core.arguments import at_least_one
from sb3_polygrad.evaluation.command import run_study, study_parser
from sb3_polygrad.evaluation.real_episodes import real_episodes
from sb3_polygrad.evaluation.results import beside, readable, write_csv
from sb3_polygrad.polygrad import PolyGRAD
from sb3_polygrad.world_models.standardized import StandardizedWorldModel


def real_steps(model: PolyGRAD, env: gym.Env, n_episodes: int) -> tuple[np.ndarray, np.ndarray]:
    """
    :param model: whose policy acts
    :param env: where
    :param n_episodes: how many
    :return: observations ``(n, obs_dim)`` acted in, and how many steps later their episode ended by a terminal, ``(n,)``
    """
    episodes = list(real_episodes(model, env, n_episodes))
    until_ending = [
        np.arange(len(episode.rewards), 0.0, -1.0) if episode.terminated else np.full(len(episode.rewards), np.inf)
        for episode in episodes
    ]
    return np.concatenate([episode.observations for episode in episodes]), np.concatenate(until_ending)


def measure(model: PolyGRAD, env: gym.Env, n_episodes: int, n_trajectories: int) -> dict[str, float]:
    """
    :param model: past its random steps
    :param env: an environment of its own
    :param n_episodes: real ones
    :param n_trajectories: imagined ones
    :return: shares of trajectories that end within the horizon
    """
    world_model = model.world_model
    assert isinstance(world_model, StandardizedWorldModel) and world_model.ending_is_probability
    observations, until_ending = real_steps(model, env, n_episodes)
    chosen = np.random.default_rng(0).integers(len(observations), size=n_trajectories)
    start = th.as_tensor(observations[chosen]).float()
    shares = {"real": float((until_ending[chosen] <= model.horizon).mean())}
    for name, drawn in {"drawn": True, "cut": False}.items():
        world_model.ending_is_probability = drawn
        shares[name] = float(model.imagine(n_trajectories, start).terminals[:, -1].mean())
    world_model.ending_is_probability = True
    return shares


def study(args: argparse.Namespace) -> None:
    """All measurements of all seeds."""
    env, rows = gym.make(args.env), []
    for seed in args.seeds:
        model = PolyGRAD("MlpPolicy", args.env, seed=seed, device="cpu")
        begin = model.learning_starts + model.n_steps
        if args.steps <= begin:
            raise ValueError(f"--steps {args.steps} must be more than {begin}: nothing is imagined before")
        model.learn(begin)
        while model.num_timesteps < args.steps:
            model.learn(args.every, reset_num_timesteps=False)
            row: dict[str, Any] = {"env": args.env, "seed": seed, "timesteps": model.num_timesteps}
            rows.append(row | measure(model, env, args.episodes, args.trajectories))
            print({key: readable(value) for key, value in rows[-1].items()}, flush=True)
            write_csv(beside(args.out, ".csv"), rows)
    write_json(beside(args.out, ".json"), provenance("sb3_polygrad.evaluation.endings", threads=args.threads))


def main() -> None:
    """Command line."""
    parser = study_parser(__doc__)
    parser.add_argument("--env", default="Hopper-v5")
    parser.add_argument("--steps", type=at_least_one, default=6_000, help="real steps to learn for")
    parser.add_argument("--every", type=at_least_one, default=1_000, help="real steps between measurements")
    parser.add_argument("--episodes", type=at_least_one, default=20, help="real episodes per measurement")
    parser.add_argument("--trajectories", type=at_least_one, default=1_000, help="imagined ones per measurement")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    run_study(parser, study)


if __name__ == "__main__":
    main()
