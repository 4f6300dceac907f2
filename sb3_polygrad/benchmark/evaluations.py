"""The protocol of all learning curves: how a policy is evaluated while it learns, and what its training takes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env

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


class Evaluations(EvalCallback):
    """
    Deterministic evaluations in an environment of their own, each a row of :data:`MEASURES`.

    The episodes of an evaluation depend on nothing but the run's seed and the real step: they are the same for all
    algorithms, and the same in a run that was interrupted.

    :param env_id: environment
    :param seed: seed of the run
    :param every: real steps between evaluations
    :param n_episodes: episodes per evaluation
    :param take: is given each row
    :param stopwatch: tells the times; one that begins now, if there is none
    :param kwargs: as in ``EvalCallback``
    """

    def __init__(
        self,
        env_id: str,
        seed: int,
        every: int,
        n_episodes: int,
        take: Callable[[dict[str, Any]], None],
        stopwatch: Stopwatch | None = None,
        **kwargs: Any,
    ) -> None:
        # EvalCallback keeps the single returns only where it may write them.
        self._folder = tempfile.TemporaryDirectory()
        kwargs = {"verbose": 0, "log_path": self._folder.name, **kwargs}
        super().__init__(make_vec_env(env_id, n_envs=1), n_eval_episodes=n_episodes, eval_freq=1, **kwargs)
        self.every, self.seed, self.take = every, seed, take
        self.stopwatch = stopwatch or Stopwatch()

    def _on_step(self) -> bool:
        # Multiples of `every`, wherever the run began.
        if self.num_timesteps // self.every == (self.num_timesteps - self.training_env.num_envs) // self.every:
            return True
        with self.stopwatch.taking_a_break():
            seed = np.random.SeedSequence((EVALUATION_SEED + self.seed, self.num_timesteps)).generate_state(1)[0]
            self.eval_env.seed(int(seed))
            going_on = super()._on_step()
        returns = self.evaluations_results[-1]
        self.take(
            {
                "timesteps": self.num_timesteps,
                "mean_reward": round(float(np.mean(returns)), 4),
                "std_reward": round(float(np.std(returns)), 4),
                **self.stopwatch.read(),
            }
        )
        return going_on

    def _on_training_end(self) -> None:
        self.eval_env.close()
        self._folder.cleanup()
