"""The protocol of all learning curves: how a policy is evaluated while it learns, and what its training takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

CLOCKS = ("seconds", "cpu_seconds", "training_seconds", "training_cpu_seconds")
"""Wall-clock and processor time (of all threads) since training began, then both without evaluations."""

MEASURES = ("timesteps", "mean_reward", "std_reward", *CLOCKS)
"""What is known after an evaluation: real steps, mean and standard deviation of the returns of its episodes, times."""

EVALUATION_SEED = 10_000
"""Added to a run's seed, so that no evaluation repeats what the policy was trained on."""


def _now() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


class Stopwatch:
    """
    Wall-clock and processor time since training began, with and without the breaks.

    :param earlier: the row of the evaluation after which the run was interrupted; it goes on from there
    """

    def __init__(self, earlier: Mapping[str, float | str] | None = None) -> None:
        shown = np.zeros(4) if earlier is None else np.array([float(earlier[clock]) for clock in CLOCKS])
        self._begin = _now() - shown[:2]
        self._breaks = shown[:2] - shown[2:]

    @contextmanager
    def taking_a_break(self) -> Iterator[None]:
        """What happens meanwhile is not training."""
        begin = _now()
        yield
        self._breaks += _now() - begin

    def read(self) -> dict[str, float]:
        """Seconds, by the names of :data:`CLOCKS`."""
        spent = _now() - self._begin
        return {clock: round(float(value), 2) for clock, value in zip(CLOCKS, [*spent, *spent - self._breaks], strict=True)}


class Evaluations(BaseCallback):
    """
    Deterministic evaluations in an environment of their own, each a row of :data:`MEASURES`.

    The episodes of an evaluation depend on nothing but the run's seed and the real step: they are the same for all
    algorithms, and the same in a run that was interrupted.

    :param env_id: environment
    :param seed: seed of the run
    :param every: real steps between evaluations (its multiples, wherever the run began)
    :param n_episodes: episodes per evaluation
    :param take: is given each row
    :param stopwatch: tells the times
    """

    def __init__(
        self, env_id: str, seed: int, every: int, n_episodes: int, take: Callable[[dict[str, Any]], None], stopwatch: Stopwatch
    ) -> None:
        super().__init__()
        self.env = make_vec_env(env_id, n_envs=1)
        self.seed, self.every, self.n_episodes, self.take, self.stopwatch = seed, every, n_episodes, take, stopwatch

    def _on_step(self) -> bool:
        if self.num_timesteps // self.every == (self.num_timesteps - self.training_env.num_envs) // self.every:
            return True
        with self.stopwatch.taking_a_break():
            seed = np.random.SeedSequence((EVALUATION_SEED + self.seed, self.num_timesteps)).generate_state(1)[0]
            self.env.seed(int(seed))
            returns, _ = evaluate_policy(self.model, self.env, self.n_episodes, return_episode_rewards=True)
        mean, std = round(float(np.mean(returns)), 4), round(float(np.std(returns)), 4)
        clocks = self.stopwatch.read()
        self.take({"timesteps": self.num_timesteps, "mean_reward": mean, "std_reward": std, **clocks})
        return True

    def _on_training_end(self) -> None:
        self.env.close()
