"""Datasets in Minari's format, and their replay in the simulator."""

from __future__ import annotations

import sys
from pathlib import Path

import minari
import numpy as np
import pytest
import torch as th
from minari.data_collector import EpisodeBuffer
from stable_baselines3 import PPO, SAC

from sb3_polygrad.study import datasets
from sb3_polygrad.study.simulator import Simulator, Starts

ID = "test/hopper-v0"


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))


def hopper(n_steps: int = 200) -> minari.MinariDataset:
    datasets.make_dataset(ID, "Hopper-v5", None, n_steps, [0.1, 1.0], 0, "random")
    return datasets.load(ID)


def test_replayed_real_actions_give_the_real_steps() -> None:
    dataset = hopper()
    for episode in dataset:
        n = len(episode.rewards)
        starts = Starts(th.as_tensor(episode.observations[:n]).float(), episode.infos["qpos"][:n], episode.infos["qvel"][:n])
        replay = Simulator("Hopper-v5").replay(starts, th.as_tensor(episode.actions)[:, None])
        # The warm start of the contact solver is not stored: steps with contacts agree to its tolerance.
        assert np.median(np.abs(replay.observations[:, 1].numpy() - episode.observations[1:])) < 1e-5
        assert (replay.terminals[:, 0].numpy() == episode.terminations).all()
    # Actions beyond the end of an episode: the observation that it ended with is repeated.
    replay = Simulator("Hopper-v5").replay(
        starts.take(np.array([0])), th.cat([th.as_tensor(episode.actions), th.ones(9, 3)])[None]
    )
    end = int(replay.mask.sum())
    assert abs(end - n) <= 1 and (replay.observations[0, end:] == replay.observations[0, end]).all()
    assert (replay.rewards[0, end:] == 0.0).all() and (replay.terminals[0, end - 1 :] == 1.0).all()


def test_every_std_gets_its_share_and_no_segment_crosses_episodes() -> None:
    dataset = hopper(400)
    steps = [len(episode.rewards) for episode in dataset if np.abs(episode.actions).max() < 0.6]  # of σ = 0.1
    assert 0.3 < sum(steps) / dataset.total_steps < 0.7
    buffer = datasets.to_buffer(dataset)
    segments = buffer.sample(500, 4)
    pairs = [np.concatenate([e.observations[:-1], e.observations[1:]], axis=1).astype(np.float32) for e in dataset]
    known = {row.tobytes() for row in np.concatenate(pairs)}
    for observations, mask in zip(segments.observations.numpy(), segments.mask.numpy(), strict=True):
        assert all(np.concatenate(observations[t : t + 2]).tobytes() in known for t in np.flatnonzero(mask))


def test_split_and_starts() -> None:
    dataset = hopper()
    fit, held_out = datasets.split(dataset, 0.3)
    assert fit.total_episodes + held_out.total_episodes == dataset.total_episodes
    assert not set(fit.episode_indices) & set(held_out.episode_indices)
    starts = datasets.draw_starts(held_out, 10, seed=0)
    # A hopper's observation is its state but for where it is, with bounded velocities.
    state = np.concatenate([starts.qpos[:, 1:], np.clip(starts.qvel, -10, 10)], axis=1)
    assert np.allclose(starts.observations, state, atol=1e-6)
    with pytest.raises(ValueError, match="cannot be held out"):
        datasets.split(held_out, 1.0)


@pytest.mark.filterwarnings("ignore:`")
def test_a_dataset_of_others() -> None:
    episode = EpisodeBuffer(
        None, None, None, np.zeros((4, 11)), np.zeros((3, 3), np.float32), [1.0] * 3, [False] * 3, [False] * 3
    )
    minari.create_dataset_from_buffers(ID, [episode], env="Hopper-v5", requirements=["mujoco==1.0"])
    with pytest.warns(UserWarning, match=r"made with mujoco==1\.0"):
        dataset = datasets.load(ID)
    assert datasets.to_buffer(dataset).segment_starts(3).tolist() == [0], "an episode ends where it ends"
    with pytest.raises(ValueError, match="no simulator states"):
        datasets.draw_starts(dataset, 1, seed=0)


@pytest.mark.parametrize("kind", [PPO, SAC])
def test_the_mean_is_the_agents(kind: type[PPO] | type[SAC]) -> None:
    agent = kind("MlpPolicy", "Pendulum-v1", device="cpu")
    policy = datasets.policy_with_std(agent, 0.3, th.tensor([-2.0]), th.tensor([2.0]))
    observations = th.randn(5, 4, 3)
    expected, _ = agent.predict(observations.flatten(0, 1).numpy(), deterministic=True)
    normal = policy(observations)
    assert np.allclose(normal.mean.detach().clamp(-2, 2).flatten(0, 1), expected, atol=1e-5) and (normal.stddev == 0.3).all()


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    arguments = ["datasets", "--env", "LinearGaussian-v0", "--n-steps", "100", "--agent", "sac", "--agent-steps", "20"]
    monkeypatch.setattr(sys, "argv", arguments)
    datasets.main()
    dataset = datasets.load("polygrad/lineargaussian/sac-v0")
    assert dataset.total_steps == 100 and isinstance(datasets.load_agent(dataset), SAC)
    with pytest.raises(SystemExit):
        datasets.main()
    assert "pass another --id" in capsys.readouterr().err
