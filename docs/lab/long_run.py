"""
Who is too optimistic, the critic or the world model? Both beside what really comes, while a policy goes on learning from a
model that learns nothing new.

    python -m sb3_polygrad.evaluation.long_run --checkpoint runs/.../checkpoint_00027_27000_steps.zip --env Walker2d-v5 \
        --out docs/results/long_run_walker2d

No real step is added to a checkpoint and its world model stays as it is; policy and critic are updated from imagined batches
as in :meth:`~sb3_polygrad.PolyGRAD.learn`. Every ``--every`` updates the policy (with its noise) acts for some real episodes.
Writes ``<out>.csv``, a row per measurement, about states of these:

- ``value``: mean of the target critic
- ``imagined``: mean discounted return in the world model, imagined for ``--steps`` steps from there under the present policy,
  horizon after horizon
- ``real``: mean discounted return that followed
- ``episode_return``, ``episode_length``: of the real episodes

``value`` far above ``imagined`` is the critic's doing, ``imagined`` far above ``real`` the world model's. (Not for runs under
``VecNormalize``, whose values have other units.)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.logger import Logger

from sb3_polygrad.benchmark.provenance import provenance, write_json
from sb3_polygrad.core.arguments import at_least_one
from sb3_polygrad.evaluation.command import run_study, study_parser
from sb3_polygrad.evaluation.real_episodes import Episode, real_episodes
from sb3_polygrad.evaluation.results import beside, readable, write_csv
from sb3_polygrad.polygrad import PolyGRAD


class Known(NamedTuple):
    """
    What is known of the returns of one real episode or several.

    :param observations: ``(n, obs_dim)`` that the policy acted in
    :param returns: ``(n,)`` discounted, from there to the end of the episode
    """

    observations: np.ndarray
    returns: np.ndarray


def known_returns(episode: Episode, gamma: float, unknown: float = 0.05) -> Known:
    """
    :param episode: a real one
    :param gamma: the discount
    :param unknown: of an episode that a time limit ended, last steps are left out for which more than this share of all that
        discounting leaves would still have come
    """
    n_steps = len(episode.rewards)
    after = gamma ** np.arange(n_steps, 0, -1)  # weight of what comes after the episode
    n_known = n_steps if episode.terminated else int((after <= unknown).sum())
    following = [0.0]
    for reward in episode.rewards[::-1]:
        following.append(float(reward) + gamma * following[-1])
    return Known(episode.observations[:n_known], np.array(following[:0:-1][:n_known]))


def imagined_returns(model: PolyGRAD, start: th.Tensor, n_steps: int) -> th.Tensor:
    """
    :param model: whose world model imagines
    :param start: ``(n, obs_dim)``
    :param n_steps: to imagine, rounded up to whole horizons; what comes after them is left out
    :return: ``(n,)`` discounted returns under the present policy
    """
    total, weight = th.zeros(len(start)), th.ones(len(start))
    discounts = model.gamma ** th.arange(model.horizon)
    for _ in range(-(-n_steps // model.horizon)):
        trajectory = model.imagine(len(start), start)
        total += weight * (trajectory.rewards * trajectory.mask * discounts).sum(dim=1)
        weight = weight * model.gamma**model.horizon * (1.0 - trajectory.terminals[:, -1])
        start = trajectory.observations[:, -1]
    return total


def measure(model: PolyGRAD, env: gym.Env, n_episodes: int, n_states: int, n_steps: int) -> dict[str, float]:
    """
    :param model: with a fitted world model
    :param env: an environment of its own
    :param n_episodes: real episodes
    :param n_states: states of them that are looked at
    :param n_steps: to imagine from each
    :return: the columns at the head of this file
    """
    episodes = list(real_episodes(model, env, n_episodes))
    known = [known_returns(episode, model.gamma) for episode in episodes]
    observations, returns = (np.concatenate(parts) for parts in zip(*known, strict=True))
    if len(returns) == 0:
        raise ValueError(f"no return is known: the time limit is too short for gamma={model.gamma} to make little of the rest")
    chosen = np.random.default_rng(0).integers(len(observations), size=n_states)
    start = th.as_tensor(observations[chosen]).float()
    with th.no_grad():
        values = model.policy.predict_target_values(model._view.observations(start))
    return {
        "value": float(values.mean()),
        "imagined": float(imagined_returns(model, start, n_steps).mean()),
        "real": float(returns[chosen].mean()),
        "episode_return": float(np.mean([episode.rewards.sum() for episode in episodes])),
        "episode_length": float(np.mean([len(episode.rewards) for episode in episodes])),
    }


def study(args: argparse.Namespace) -> None:
    """All measurements of all seeds."""
    env, rows = gym.make(args.env), []
    for seed in args.seeds:
        model = PolyGRAD.resume(args.checkpoint, args.env, device="cpu")
        model.set_logger(Logger(None, []))
        th.manual_seed(seed)
        for update in range(args.updates + 1):
            if update > 0:
                model._update_learning_rates()
                fault = model._learn_from(model._imagine_to_learn())
                if fault is not None:
                    raise ValueError(
                        f"update {update}: {fault} were not finite, nothing was learnt; take an earlier --checkpoint"
                    )
            if update % args.every == 0:
                facts: dict[str, Any] = {"env": args.env, "timesteps": model.num_timesteps, "seed": seed, "updates": update}
                with th.random.fork_rng():  # what is measured does not change what is learnt
                    rows.append(facts | measure(model, env, args.episodes, args.states, args.steps))
                print({key: readable(value) for key, value in rows[-1].items()}, flush=True)
                write_csv(beside(args.out, ".csv"), rows)
    write_json(beside(args.out, ".json"), provenance("sb3_polygrad.evaluation.long_run", threads=args.threads))


def main() -> None:
    """Command line."""
    parser = study_parser(__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="as PolyGRAD.save_checkpoint writes it, with its real steps"
    )
    parser.add_argument("--env", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of what is imagined")
    parser.add_argument("--updates", type=int, default=600, help="of policy and critic")
    parser.add_argument("--every", type=at_least_one, default=200, help="updates between measurements")
    parser.add_argument("--episodes", type=at_least_one, default=10, help="real episodes per measurement")
    parser.add_argument("--states", type=at_least_one, default=500, help="states of these that are looked at")
    parser.add_argument("--steps", type=at_least_one, default=600, help="imagined from each, in whole horizons")
    run_study(parser, study)


if __name__ == "__main__":
    main()
