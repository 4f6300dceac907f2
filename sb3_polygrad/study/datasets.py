"""
Real steps with simulator states, as Minari datasets (https://minari.farama.org).

    MINARI_DATASETS_PATH=data python -m sb3_polygrad.study.datasets --env Hopper-v5 --n-steps 100000

trains an agent, lets it act, and stores what happens as the dataset ``polygrad/hopper/ppo-v0``, with ``policy.zip`` (the
agent) and ``dataset.json`` (command, versions, returns) in its folder. The agent acts with its own mean and, episode by
episode, one of several standard deviations, so that a world model sees every amount of noise that a study asks it about.
Observations, actions and rewards are in the environment's units.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import torch as th
from minari.data_collector import EpisodeBuffer as MinariEpisode
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from torch.distributions import Normal

from sb3_polygrad.benchmark.provenance import provenance, write_json
from sb3_polygrad.episode_buffer import EpisodeBuffer
from sb3_polygrad.study.simulator import Starts
from sb3_polygrad.world_models.base import PolicyFn


def simulator_state(env: Any) -> dict[str, np.ndarray]:
    """What replays begin from, under the names that Minari's MuJoCo datasets have for it in their infos."""
    return {"qpos": env.data.qpos.copy(), "qvel": env.data.qvel.copy()}


def train_agent(name: str, env_id: str, n_steps: int, seed: int) -> BaseAlgorithm | None:
    """An agent with SB3's default settings; ``random`` has no network, its mean is the middle of the action box."""
    if name == "random":
        return None
    return {"ppo": PPO, "sac": SAC}[name]("MlpPolicy", env_id, seed=seed, device="cpu").learn(n_steps)  # type: ignore[abstract]


def policy_with_std(agent: BaseAlgorithm | None, std: float, low: th.Tensor, high: th.Tensor) -> PolicyFn:
    """The agent's mean with another standard deviation, for actions in a box ``(action_dim,)`` to ``(action_dim,)``."""

    def policy(observations: th.Tensor) -> Normal:
        batch = observations.shape[:-1]
        if agent is None:
            mean = (low + high) / 2 + 0.0 * observations.sum(dim=-1, keepdim=True)  # its gradient is 0, and not missing
        else:
            mean = agent.policy._predict(observations.flatten(0, -2), deterministic=True).view(*batch, -1)
            if agent.policy.squash_output:  # SAC's actions are in [-1, 1]
                mean = low + (mean + 1.0) / 2 * (high - low)
        return Normal(mean, th.full_like(mean, std), validate_args=False)

    return policy


def collect_episode(env: gym.Env, policy: PolicyFn, std: float, rng: np.random.Generator) -> MinariEpisode:
    """An episode of the policy's mean and Gaussian noise; the infos have the state of the simulator before every step."""
    box: Any = env.action_space
    observation, _ = env.reset(seed=int(rng.integers(2**31)))
    observations, steps, states, done = [observation], [], [simulator_state(env.unwrapped)], False
    while not done:
        with th.no_grad():
            mean = policy(th.as_tensor(observation).float()[None]).mean[0].numpy()
        action = (mean + std * rng.normal(size=mean.shape)).clip(box.low, box.high).astype(box.dtype)
        observation, reward, terminated, truncated, _ = env.step(action)
        observations.append(observation)
        steps.append((action, float(reward), terminated, truncated))
        states.append(simulator_state(env.unwrapped))
        done = terminated or truncated
    actions, *others = zip(*steps, strict=True)
    infos = {name: np.stack([state[name] for state in states]) for name in states[0]}
    return MinariEpisode(None, None, None, np.stack(observations), np.stack(actions), *map(list, others), infos)


def make_dataset(
    dataset_id: str, env_id: str, agent: BaseAlgorithm | None, n_steps: int, stds: Sequence[float], seed: int, name: str
) -> tuple[minari.MinariDataset, dict[str, float]]:
    """
    Let an agent act for whole episodes, each with the standard deviation that has had the fewest steps so far, and store them.

    :param n_steps: how many steps to store, at least
    :param stds: standard deviations of the actions, in the environment's units
    :param name: of the agent's algorithm
    :return: the dataset, and the mean return of the episodes with each standard deviation
    """
    env, rng = gym.make(env_id), np.random.default_rng(seed)
    box: Any = env.action_space
    policy = policy_with_std(agent, 1.0, *(th.as_tensor(bound).float() for bound in (box.low, box.high)))
    episodes: dict[float, list[MinariEpisode]] = {std: [] for std in stds}
    n_by_std = dict.fromkeys(stds, 0)
    while sum(n_by_std.values()) < n_steps:
        std = min(stds, key=n_by_std.__getitem__)
        episodes[std].append(collect_episode(env, policy, std, rng))
        n_by_std[std] += len(episodes[std][-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no author, no e-mail address, no permalink
        dataset = minari.create_dataset_from_buffers(
            dataset_id,
            [episode for same_std in episodes.values() for episode in same_std],
            env=env_id,
            algorithm_name=name,
            description=f"{name} with standard deviations of the actions by episode: {list(stds)}",
            requirements=[f"mujoco=={version('mujoco')}"],
        )
    means = {str(std): float(np.mean([sum(e.rewards) for e in same_std])) for std, same_std in episodes.items() if same_std}
    return dataset, means


def load(source: str) -> minari.MinariDataset:
    """A dataset in Minari's root folder (``MINARI_DATASETS_PATH``), whose observations and actions must be vectors."""
    dataset = minari.load_dataset(source)
    for name in ("observation", "action"):
        space = getattr(dataset, f"{name}_space")
        if space.shape is None or len(space.shape) != 1:
            raise ValueError(f"{source} has {name}s {space}, but only vectors can be used: flatten them when it is collected")
    mujoco = f"mujoco=={version('mujoco')}"
    others = {name for name in dataset.storage.metadata.get("requirements", []) if name.startswith("mujoco==")} - {mujoco}
    if others:
        warnings.warn(f"{source} was made with {others.pop()}, this is {mujoco}: replayed steps will differ")
    return dataset


def folder_of(dataset: minari.MinariDataset) -> Path:
    """Where a dataset lies; ``policy.zip``, if there is one, is in this folder."""
    return Path(dataset.storage.data_path).parent


def load_agent(dataset: minari.MinariDataset) -> BaseAlgorithm | None:
    """The agent that a dataset was made with; None if its folder has no ``policy.zip``."""
    path, kind = folder_of(dataset) / "policy.zip", SAC if dataset.storage.metadata["algorithm_name"] == "sac" else PPO
    return kind.load(path, device="cpu") if path.exists() else None


def split(dataset: minari.MinariDataset, held_out: float, seed: int = 0) -> list[minari.MinariDataset]:
    """A dataset cut in two by whole, randomly chosen episodes; the second part has the share ``held_out``, at least one."""
    n, n_held_out = dataset.total_episodes, max(1, round(held_out * dataset.total_episodes))
    if n_held_out >= n:
        raise ValueError(f"of {n} episodes, {n_held_out} cannot be held out: collect more, or lower held_out")
    return minari.split_dataset(dataset, [n - n_held_out, n_held_out], seed)


def to_buffer(dataset: minari.MinariDataset) -> EpisodeBuffer:
    """The steps of a dataset, to draw segments from."""
    obs_dim, action_dim = dataset.observation_space.shape[0], dataset.action_space.shape[0]  # type: ignore[index]
    buffer = EpisodeBuffer(int(dataset.total_steps), obs_dim, action_dim)
    for e in dataset:
        steps = (e.observations[:-1], e.actions, e.rewards, e.observations[1:], e.terminations, e.truncations)
        for obs, action, reward, next_obs, terminated, truncated in zip(*steps, strict=True):
            buffer.add(obs[None], action[None], reward[None], next_obs[None], terminated[None], truncated[None])
        buffer.end_episodes()  # an episode's last step ends it, whatever the dataset says
    return buffer


def draw_starts(dataset: minari.MinariDataset, n: int, seed: int) -> Starts:
    """Draw ``n`` states to imagine from; its infos must have simulator states, see :func:`simulator_state`."""
    episodes = list(dataset)
    if any("qpos" not in (episode.infos or {}) or "qvel" not in episode.infos for episode in episodes):
        raise ValueError("the dataset has no simulator states to replay from: make one with sb3_polygrad.study.datasets")
    observations, qpos, qvel = (
        np.concatenate([values[: len(episode.rewards)] for episode, values in zip(episodes, column, strict=True)])
        for column in zip(*((e.observations, e.infos["qpos"], e.infos["qvel"]) for e in episodes), strict=True)
    )
    if n > len(observations):
        raise ValueError(f"n_trajectories={n}, but the held-out episodes have {len(observations)} states: raise held_out")
    chosen = np.random.default_rng(seed).choice(len(observations), n, replace=False)
    return Starts(th.as_tensor(observations).float(), qpos, qvel).take(chosen)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Hopper-v5")
    parser.add_argument("--n-steps", type=int, default=100_000, help="steps to store")
    parser.add_argument("--agent", choices=["ppo", "sac", "random"], default="ppo")
    parser.add_argument("--agent-steps", type=int, default=120_000, help="real steps that the agent learns from first")
    parser.add_argument("--stds", type=float, nargs="+", default=[0.02, 0.1, 0.5, 1.0], help="of the actions, each in turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--id", help="of the dataset; polygrad/<environment>/<agent>-v0 if not given")
    args = parser.parse_args()

    dataset_id = args.id or f"polygrad/{args.env.split('-')[0].lower()}/{args.agent}-v0"
    if dataset_id in minari.list_local_datasets():  # said before the agent is trained
        parser.error(f"{dataset_id} exists in {os.environ.get('MINARI_DATASETS_PATH', 'the root folder')}: pass another --id")
    th.set_num_threads(1)
    begin = time.perf_counter()
    agent = train_agent(args.agent, args.env, args.agent_steps, args.seed)
    dataset, returns = make_dataset(dataset_id, args.env, agent, args.n_steps, args.stds, args.seed + 1, args.agent)
    if agent is not None:
        agent.save(folder_of(dataset) / "policy.zip")
    facts = {"env": args.env, "n_steps": int(dataset.total_steps), "mean_return_by_std": returns}
    facts["seconds"] = round(time.perf_counter() - begin, 1)
    write_json(folder_of(dataset) / "dataset.json", provenance("sb3_polygrad.study.datasets", **facts))
    print(f"{folder_of(dataset)}: {facts}")


if __name__ == "__main__":
    main()
