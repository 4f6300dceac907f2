"""Real transitions with the simulator states they began in."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sb3_polygrad.common.trajectory_buffer import TrajectoryBuffer


class Dataset(NamedTuple):
    """
    Steps in the order in which they happened, episode after episode. The last step of an episode is terminated or truncated.

    :param observations: ``(n, obs_dim)``
    :param actions: ``(n, action_dim)`` as the environment received them
    :param rewards: ``(n,)``
    :param next_observations: ``(n, obs_dim)`` true successors
    :param terminated: ``(n,)`` bool
    :param truncated: ``(n,)`` bool
    :param simulator_states: ``(n, state_dim)`` positions and velocities before the step, float64; ``(n, 0)`` if not known
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    next_observations: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    simulator_states: np.ndarray

    def steps(self, begin: int, end: int) -> Dataset:
        """Consecutive steps, ``begin`` among them, ``end`` not."""
        return Dataset(*(array[begin:end] for array in self._asdict().values()))

    def split(self, share: float) -> tuple[Dataset, Dataset]:
        """
        Cut in two where an episode ends.

        :param share: of the steps that the second part holds, at least
        :return: the steps before and after the cut
        """
        ends = np.flatnonzero(self.terminated | self.truncated) + 1
        before = ends[ends <= (1.0 - share) * len(self.rewards)]
        if len(before) == 0:
            raise ValueError(f"no episode ends within the first {1.0 - share:.0%} of the {len(self.rewards)} steps")
        cut = int(before[-1])
        return self.steps(0, cut), self.steps(cut, len(self.rewards))

    def starts(self, n_before: int = 0) -> np.ndarray:
        """
        Steps that have at least ``n_before`` steps of the same episode before them.

        :param n_before: how many
        :return: their indices, rising
        """
        ends = self.terminated | self.truncated
        first = np.r_[True, ends[:-1]]
        index = np.arange(len(ends))
        begin = np.maximum.accumulate(np.where(first, index, 0))
        return index[index - begin >= n_before]

    def to_buffer(self, horizon: int) -> TrajectoryBuffer:
        """
        Parts of the data are put in side by side, as if they came from so many environments: much faster than one step after
        the other. No window crosses from one part to the next, and at most one step per part is left out.

        :param horizon: steps of the windows that the buffer is to give
        :return: a buffer that holds the steps
        """
        n, obs_dim = self.observations.shape
        n_parts = max(1, n // 1_000)
        length = n // n_parts
        parts = Dataset(*(array[: n_parts * length].reshape(n_parts, length, *array.shape[1:]) for array in self))
        buffer = TrajectoryBuffer(n_parts * length, obs_dim, self.actions.shape[1], horizon, n_envs=n_parts)
        for step in range(length):
            truncated = parts.truncated[:, step] | (~parts.terminated[:, step] & (step == length - 1))
            buffer.add(
                parts.observations[:, step],
                parts.actions[:, step],
                parts.rewards[:, step],
                parts.next_observations[:, step],
                parts.terminated[:, step],
                truncated,
            )
        return buffer
