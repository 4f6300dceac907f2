"""
A dataset of real transitions with simulator states, from a PPO agent trained on the spot.

    python -m sb3_polygrad.evaluation.make_dataset --env Hopper-v5 --steps 100000 --root DIR

makes the Minari dataset ``polygrad/hopper/ppo-v0`` in DIR (see :mod:`~sb3_polygrad.evaluation.minari_files`) and puts
``policy.zip`` (the agent) and ``dataset.json`` (command, versions, returns) into its folder. The agent acts with its own mean
and, episode by episode, one of several standard deviations, so that a world model meets every amount of noise it is later
asked about. The environment is not normalised: observations, actions and rewards are the environment's own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_polygrad.benchmark.provenance import provenance, write_json
from sb3_polygrad.evaluation import minari_files
from sb3_polygrad.evaluation.dataset import Dataset
from sb3_polygrad.policy.real_steps import simulator_states, true_successors


def train_agent(env_id: str, steps: int, seed: int) -> PPO:
    """SB3's PPO with SB3's defaults, over four environments stepped together."""
    env = make_vec_env(env_id, n_envs=4, seed=seed)
    agent = PPO("MlpPolicy", env, n_steps=512, batch_size=128, seed=seed, device="cpu")
    agent.learn(steps)
    env.close()
    return agent


def collect(
    agent: PPO, env: VecEnv, steps: int, stds: Sequence[float], seed: int
) -> tuple[Dataset, list[tuple[float, float]]]:
    """
    Let the agent act, with one standard deviation per episode: the one that has had the fewest steps so far.

    :param agent: its mean is used, its standard deviation is not
    :param env: environments with simulator states
    :param steps: how many to collect, at least
    :param stds: standard deviations of the actions, in the environment's units
    :param seed: of the noise
    :return: the episodes one after the other, those under way cut short, and ``(std, return)`` of those that came to an end
    """
    rng = np.random.default_rng(seed)
    low, high = env.action_space.low, env.action_space.high  # type: ignore[attr-defined]
    n_envs = env.num_envs
    chosen = np.arange(n_envs) % len(stds)
    steps_per_std = np.bincount(chosen, minlength=len(stds))
    open_steps: list[list[tuple[Any, ...]]] = [[] for _ in range(n_envs)]
    episodes: list[list[tuple[Any, ...]]] = []
    returns = []
    observations = np.asarray(env.reset())
    while steps_per_std.sum() < steps + n_envs:
        states = simulator_states(env)
        assert states is not None, "the environment has no simulator state"
        noise = rng.normal(size=(n_envs, len(low))) * np.take(stds, chosen)[:, None]
        actions = np.clip(agent.predict(observations, deterministic=True)[0] + noise, low, high).astype(np.float32)
        answers, rewards, dones, infos = env.step(actions)
        new_observations = np.asarray(answers)
        successors = true_successors(new_observations, dones, infos, None)
        for index in range(n_envs):
            truncated = bool(infos[index].get("TimeLimit.truncated", False))
            step = (
                observations[index],
                actions[index],
                rewards[index],
                successors[index],
                bool(dones[index]) and not truncated,
                truncated,
                states[index],
            )
            open_steps[index].append(step)
            steps_per_std[chosen[index]] += 1
            if dones[index]:
                returns.append((float(stds[chosen[index]]), float(sum(step[2] for step in open_steps[index]))))
                episodes.append(open_steps[index])
                open_steps[index] = []
                chosen[index] = int(steps_per_std.argmin())
        observations = new_observations
    for unfinished in filter(None, open_steps):
        unfinished[-1] = (*unfinished[-1][:5], not unfinished[-1][4], unfinished[-1][6])
        episodes.append(unfinished)
    columns = [np.array(column) for column in zip(*(step for episode in episodes for step in episode), strict=True)]
    return Dataset(*columns), returns


def mean_returns(returns: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Mean return for each standard deviation."""
    return {
        str(std): round(float(np.mean([value for other, value in returns if other == std])), 1)
        for std in sorted({std for std, _ in returns})
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Hopper-v5")
    parser.add_argument("--steps", type=int, default=100_000, help="transitions to store")
    parser.add_argument("--agent-steps", type=int, default=150_000, help="real steps that the agent learns from first")
    parser.add_argument("--stds", type=float, nargs="+", default=[0.02, 0.1, 0.5, 1.0], help="of the actions, each in turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--root", type=Path, required=True, help="folder of all datasets, outside the repository")
    parser.add_argument("--id", help="the dataset's name; polygrad/<environment>/ppo-v0 if not given")
    args = parser.parse_args()

    name = args.id or f"polygrad/{args.env.split('-')[0].lower()}/ppo-v0"
    if (args.root / name).exists():  # said before hours of work, not after
        parser.error(f"{args.root / name} exists: pass another --id, or delete it")
    th.set_num_threads(args.threads)
    begin = time.perf_counter()
    agent = train_agent(args.env, args.agent_steps, args.seed)
    trained = time.perf_counter()
    env = make_vec_env(args.env, n_envs=8, seed=args.seed + 1)
    dataset, returns = collect(agent, env, args.steps, args.stds, args.seed)
    description = f"SB3's PPO after {args.agent_steps} steps; standard deviation of the actions by episode: {args.stds}"
    folder = minari_files.write(dataset, args.env, args.root, name, description)
    agent.save(folder / "policy.zip")
    facts = provenance(
        "sb3_polygrad.evaluation.make_dataset",
        env=args.env,
        transitions=len(dataset.rewards),
        episodes=int((dataset.terminated | dataset.truncated).sum()),
        mean_return_by_std=mean_returns(returns),
        seconds={"agent": round(trained - begin, 1), "collection": round(time.perf_counter() - trained, 1)},
    )
    write_json(folder / "dataset.json", facts)
    print(f"{folder}: {len(dataset.rewards)} transitions, mean return by std {facts['mean_return_by_std']}")


if __name__ == "__main__":
    main()
