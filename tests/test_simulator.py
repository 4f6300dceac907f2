"""Stored transitions and their replay in the simulator."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env

from sb3_polygrad.evaluation.dataset import Dataset
from sb3_polygrad.evaluation.make_dataset import collect
from sb3_polygrad.evaluation.simulator import Simulator

ENV = "Hopper-v5"
STDS = [0.1, 1.0]


@pytest.fixture(scope="module")
def collected() -> tuple[Dataset, list[tuple[float, float]]]:
    agent = SimpleNamespace(predict=lambda observations, deterministic: (np.zeros((len(observations), 3)), None))
    return collect(agent, make_vec_env(ENV, n_envs=3, seed=0), 300, STDS, seed=0)  # type: ignore[arg-type]


def test_episodes_are_whole_and_in_order(collected: tuple[Dataset, list[tuple[float, float]]]) -> None:
    data, returns = collected
    assert len(data.rewards) == 300 + 3 - 3
    ends = data.terminated | data.truncated
    assert ends[-1] and ends.sum() == len(returns) + data.truncated.sum()
    assert not (data.terminated & data.truncated).any()
    follows = ~ends[:-1]
    assert (data.observations[1:][follows] == data.next_observations[:-1][follows]).all()
    assert not np.allclose(data.observations[1:][~follows], data.next_observations[:-1][~follows])


def test_every_std_gets_its_share(collected: tuple[Dataset, list[tuple[float, float]]]) -> None:
    data, returns = collected
    assert {std for std, _ in returns} == set(STDS)
    small = np.abs(data.actions).max(axis=1) < 0.5  # of σ = 0.1 practically all, of σ = 1 every eighteenth
    assert 0.4 < small.mean() < 0.65


def test_replayed_real_actions_give_the_real_steps(collected: tuple[Dataset, list[tuple[float, float]]]) -> None:
    data, _ = collected
    replay = Simulator(ENV).replay(data.simulator_states, th.as_tensor(data.actions)[:, None])
    # The contact solver's warm start is not stored: steps with contacts agree to its tolerance.
    error = np.abs(replay.observations[:, 1].numpy() - data.next_observations)
    assert np.median(error) < 1e-5 and np.quantile(error, 0.99) < 1e-2
    assert (replay.terminals[:, 0].numpy() == data.terminated).mean() > 0.99


def test_replay_of_several_steps_goes_on_and_stops_at_an_ending(
    collected: tuple[Dataset, list[tuple[float, float]]],
) -> None:
    data, _ = collected
    last = int(np.flatnonzero(data.terminated)[0])
    steps = np.arange(last - 4, last + 1)
    actions = th.cat([th.as_tensor(data.actions[steps]), th.ones(3, 3)])[None]
    replay = Simulator(ENV).replay(data.simulator_states[steps[:1]], actions)
    assert np.allclose(replay.observations[0, 1:6], data.next_observations[steps], atol=0.05)
    assert replay.terminals[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert replay.mask[0].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert (replay.observations[0, 6:] == replay.observations[0, 5]).all() and (replay.rewards[0, 5:] == 0).all()


def test_actions_are_clipped_as_the_environment_would() -> None:
    simulator = Simulator(ENV)
    state = simulator.env.state_vector()[None]
    outside, clipped = (simulator.replay(state, th.full((1, 2, 3), value)) for value in (5.0, 1.0))
    assert th.equal(outside.observations, clipped.observations)


def test_split(collected: tuple[Dataset, list[tuple[float, float]]]) -> None:
    data, _ = collected
    first, second = data.split(0.2)
    assert len(second.rewards) >= 60 and len(first.rewards) + len(second.rewards) == 300
    assert first.terminated[-1] or first.truncated[-1]
    with pytest.raises(ValueError, match="no episode ends within the first"):
        data.split(0.999)


def test_starts_have_steps_of_their_episode_before_them(collected: tuple[Dataset, list[tuple[float, float]]]) -> None:
    data, _ = collected
    assert data.starts().tolist() == list(range(300))
    ends = data.terminated | data.truncated
    for n_before in (1, 5):
        expected = [i for i in range(n_before, 300) if not ends[i - n_before : i].any()]
        assert data.starts(n_before).tolist() == expected
