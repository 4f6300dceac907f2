"""The buffer of real steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th

from sb3_polygrad.common.trajectory import Trajectory, mask_after_ending
from sb3_polygrad.common.transfer import to_device

UNDER_WAY = -1
"""Reach of a step whose episode goes on: up to the newest step."""

ENDLESS = 2**62
"""Reach of a step whose episode terminated: what comes after the terminal step is known, nothing."""

MAX_REDRAWS = 8
"""Draws of a segment at random before all segments are listed."""


class EpisodeBuffer:
    """
    The latest real steps of every environment, in the order in which they happened.

    :meth:`sample` draws segments of consecutive steps uniformly. A segment

    - may run past a terminal step: the steps after it repeat the last observation and action, with reward 0 and terminal 1;
    - never runs past a time limit or past :meth:`end_episodes`: what would have come next is unknown;
    - never runs past the newest step.

    All tensors are on ``device``. The index of a step in them is called its slot: ``row % capacity * n_envs + environment``,
    where rows count the steps of each environment since the buffer was made.

    :param buffer_size: capacity in steps, shared equally by the environments
    :param obs_dim: length of an observation
    :param action_dim: length of an action
    :param n_envs: number of environments that are stepped together
    :param device: where the steps are kept and segments are returned
    :raises ValueError: if there is no room for one step of each environment
    """

    def __init__(
        self, buffer_size: int, obs_dim: int, action_dim: int, n_envs: int = 1, device: th.device | str = "cpu"
    ) -> None:
        self.capacity = buffer_size // n_envs
        if self.capacity < 1:
            raise ValueError(
                f"buffer_size={buffer_size} cannot hold one step of each of the {n_envs} environments: enlarge it"
            )
        self.obs_dim, self.action_dim, self.n_envs = obs_dim, action_dim, n_envs
        self.device = th.device(device)

        n_slots = self.capacity * n_envs
        self.observations = _zeros(n_slots, obs_dim).to(self.device)
        self.next_observations = _zeros(n_slots, obs_dim).to(self.device)
        self.actions = _zeros(n_slots, action_dim).to(self.device)
        self.rewards = _zeros(n_slots).to(self.device)
        self.terminals = _zeros(n_slots).to(self.device)

        self.n_rows = 0  # steps of each environment that were ever added
        self.n_new_rows = 0  # of these, the latest that take_new_steps() has not returned yet
        self._episode_begin = np.zeros(n_envs, dtype=np.int64)  # first row of the episode under way
        self._reach = np.full(n_slots, UNDER_WAY, dtype=np.int64)  # last row of a segment that begins at a slot

    def __len__(self) -> int:
        """Number of steps held."""
        return min(self.n_rows, self.capacity) * self.n_envs

    def add(
        self,
        observations: np.ndarray,
        actions: np.ndarray,
        rewards: np.ndarray,
        next_observations: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
    ) -> None:
        """
        Add one step of every environment.

        :param observations: ``(n_envs, obs_dim)``, in the environment's units
        :param actions: ``(n_envs, action_dim)``, as the environment received them
        :param rewards: ``(n_envs,)``
        :param next_observations: ``(n_envs, obs_dim)``, the true successors (not the first observation after a reset)
        :param terminated: ``(n_envs,)``, the step ended the episode
        :param truncated: ``(n_envs,)``, a time limit cut the episode after the step
        :raises ValueError: if an observation, action or reward is not finite; nothing is stored then
        """
        steps = {
            "observation": _as_float32(observations, (self.n_envs, self.obs_dim)),
            "next observation": _as_float32(next_observations, (self.n_envs, self.obs_dim)),
            "action": _as_float32(actions, (self.n_envs, self.action_dim)),
            "reward": _as_float32(rewards, (self.n_envs, 1)),
        }
        for name, values in steps.items():
            finite = np.isfinite(values).all(axis=1)
            if not finite.all():
                index = int(finite.argmin())
                raise ValueError(
                    f"the environment (index {index}) produced a {name} that is NaN or infinite: {values[index].tolist()}. "
                    "The step was not stored. Find its cause with stable_baselines3.common.vec_env.VecCheckNan."
                )
        begin = self.n_rows % self.capacity * self.n_envs
        slots = slice(begin, begin + self.n_envs)
        self.observations[slots] = to_device(steps["observation"], self.device)
        self.next_observations[slots] = to_device(steps["next observation"], self.device)
        self.actions[slots] = to_device(steps["action"], self.device)
        self.rewards[slots] = to_device(steps["reward"][:, 0], self.device)
        self.terminals[slots] = to_device(_as_float32(terminated, (self.n_envs,)), self.device)
        self._reach[slots] = UNDER_WAY
        self.n_rows += 1
        self.n_new_rows = min(self.n_new_rows + 1, self.capacity)
        for env in np.flatnonzero(np.logical_or(terminated, truncated)):
            self._end_episode(int(env), ENDLESS if terminated[env] else self.n_rows - 1)

    def end_episodes(self) -> None:
        """Say that the episodes under way will not go on: the environments are about to be reset."""
        for env in range(self.n_envs):
            self._end_episode(env, self.n_rows - 1)

    def _end_episode(self, env: int, reach: int) -> None:
        rows = np.arange(max(self._episode_begin[env], self.n_rows - self.capacity), self.n_rows)
        self._reach[rows % self.capacity * self.n_envs + env] = reach
        self._episode_begin[env] = self.n_rows

    # ------------------------------------------------------------------ drawing

    def sample(self, batch_size: int, length: int) -> Trajectory:
        """
        Draw segments uniformly, with replacement.

        :param batch_size: number of segments
        :param length: steps of each
        :return: the segments, padded after terminal steps
        :raises ValueError: if no episode has that many steps yet
        """
        slots = np.zeros(batch_size, dtype=np.int64)
        open_ = np.ones(batch_size, dtype=bool)  # rows that still need a draw
        for _ in range(MAX_REDRAWS if len(self) else 0):
            if not (n_open := int(open_.sum())):
                break
            slots[open_] = th.randint(len(self), (n_open,)).numpy()
            open_[open_] = ~self._may_begin(slots[open_], length)
        if open_.any():
            starts = self.segment_starts(length)
            if len(starts) == 0:
                raise ValueError(
                    f"the buffer holds {len(self)} steps but no segment of {length} steps within one episode: collect more "
                    "steps, or pass a smaller horizon (or, for world models that have one, context or window). Episodes that "
                    "a time limit cuts must be at least that long"
                )
            slots[open_] = starts[th.randint(len(starts), (int(open_.sum()),)).numpy()]
        return self.segments(to_device(slots, self.device), length)

    def segment_starts(self, length: int) -> np.ndarray:
        """All slots that a segment of ``length`` steps may begin at."""
        slots = np.arange(len(self))
        return slots[self._may_begin(slots, length)]

    def _may_begin(self, slots: np.ndarray, length: int) -> np.ndarray:
        newest = self.n_rows - 1
        rows = newest - (newest - slots // self.n_envs) % self.capacity
        reach = self._reach[slots]
        return rows + length - 1 <= np.where(reach == UNDER_WAY, newest, reach)

    def segments(self, slots: th.Tensor, length: int) -> Trajectory:
        """
        The segments that begin at given slots.

        :param slots: ``(batch,)`` of :meth:`segment_starts`
        :param length: steps of each
        :return: the segments, padded after terminal steps
        """
        steps = th.arange(length, device=self.device)
        slots = (slots[:, None] + steps * self.n_envs) % (self.capacity * self.n_envs)  # (batch, length)
        mask = mask_after_ending(self.terminals[slots])
        # Steps after a terminal read the step that ended the episode instead.
        last = mask.sum(dim=1, keepdim=True).long() - 1  # (batch, 1)
        slots = slots.gather(1, th.minimum(steps.expand_as(slots), last))
        observations = th.cat([self.observations[slots[:, :1]], self.next_observations[slots]], dim=1)
        return Trajectory(observations, self.actions[slots], self.rewards[slots] * mask, self.terminals[slots], mask)

    def take_new_steps(self) -> Trajectory:
        """The steps that were added since the last call, each a segment of one step."""
        rows = np.arange(self.n_rows - self.n_new_rows, self.n_rows)[:, None] % self.capacity
        self.n_new_rows = 0
        slots = (rows * self.n_envs + np.arange(self.n_envs)).flatten()
        return self.segments(to_device(slots, self.device), 1)

    def count_all_as_new(self) -> None:
        """Let :meth:`new_steps` return all steps that are held: for a world model that has seen none of them."""
        self.n_new_rows = len(self) // self.n_envs

    def sample_observations(self, batch_size: int) -> th.Tensor:
        """
        Draw observations in which an action was taken, uniformly: start states for imagination.

        :param batch_size: how many
        :return: ``(batch_size, obs_dim)``
        :raises ValueError: if the buffer is empty
        """
        if len(self) == 0:
            raise ValueError("the buffer is empty: collect real steps before imagining from them")
        return self.observations[to_device(th.randint(len(self), (batch_size,)), self.device)]

    # ------------------------------------------------------------------ saving

    _sizes = ("capacity", "obs_dim", "action_dim", "n_envs")
    _tensors = ("observations", "next_observations", "actions", "rewards", "terminals")

    def state_dict(self) -> dict[str, Any]:
        """The steps held as tensors and numbers, which ``torch.load(weights_only=True)`` reads."""
        held = slice(len(self))
        return {
            **{name: getattr(self, name) for name in (*self._sizes, "n_rows", "n_new_rows")},
            **{name: getattr(self, name)[held].cpu().clone() for name in self._tensors},
            "episode_begin": th.tensor(self._episode_begin),
            "reach": th.tensor(self._reach[held]),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: th.device | str = "cpu") -> EpisodeBuffer:
        """
        The buffer that a :meth:`state_dict` was made of.

        :param state: from :meth:`state_dict`
        :param device: where its tensors will be
        """
        size = state["capacity"] * state["n_envs"]
        buffer = cls(size, state["obs_dim"], state["action_dim"], state["n_envs"], device)
        buffer.n_rows, buffer.n_new_rows = state["n_rows"], state["n_new_rows"]
        held = slice(len(buffer))
        for name in cls._tensors:
            getattr(buffer, name)[held] = state[name].to(device)
        buffer._episode_begin[:] = state["episode_begin"].numpy()
        buffer._reach[held] = state["reach"].numpy()
        return buffer


def _zeros(*shape: int) -> th.Tensor:
    """Zeros whose memory is taken only as it is written to (numpy's are; torch's would be written at once)."""
    return th.from_numpy(np.zeros(shape, dtype=np.float32))


def _as_float32(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, and is refused as such
        return np.asarray(values, dtype=np.float32).reshape(shape)
