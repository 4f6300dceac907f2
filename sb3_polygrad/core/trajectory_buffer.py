"""Real episodes of any number of environments, and windows of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th

from sb3_polygrad.core.trajectory import Trajectory, mask_after_ending
from sb3_polygrad.core.transfer import to_device


def _zeros(*shape: int) -> th.Tensor:
    """Zeros whose memory is taken only as it is written to (numpy's are; torch's would be written at once)."""
    return th.from_numpy(np.zeros(shape, dtype=np.float32))


def _as_float32(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, and is refused as such
        return np.asarray(values, dtype=np.float32).reshape(shape)


class TrajectoryBuffer:
    """
    The last ``buffer_size`` real steps, in the order in which they happened, one ring per environment.

    From them windows of ``horizon`` consecutive steps are drawn uniformly. A window

    - may run past a terminal: the steps after it repeat the last observation and action, with reward 0 and terminal 1;
    - never runs past a time limit, nor past an interruption (see :meth:`interrupt`): what would have come next is unknown;
    - never runs past the newest step, nor across the seam of the ring.

    Which steps may start a window is kept up to date as steps arrive, so that drawing is a gather without a search.
    The tensors live on ``device``.

    :param buffer_size: capacity in steps, shared equally by the environments
    :param obs_dim: length of an observation
    :param action_dim: length of an action
    :param horizon: steps per window
    :param n_envs: number of environments that are stepped together
    :param device: where the steps are kept and windows are returned
    """

    def __init__(
        self,
        buffer_size: int,
        obs_dim: int,
        action_dim: int,
        horizon: int,
        n_envs: int = 1,
        device: th.device | str = "cpu",
    ) -> None:
        self.capacity = buffer_size // n_envs
        if self.capacity < horizon:
            raise ValueError(
                f"buffer_size={buffer_size} gives each of the {n_envs} environments {self.capacity} steps, which cannot hold "
                f"one window of horizon={horizon}: pass buffer_size >= {n_envs * horizon}"
            )
        self.obs_dim, self.action_dim, self.horizon, self.n_envs = obs_dim, action_dim, horizon, n_envs
        self.device = th.device(device)

        n_slots = self.capacity * n_envs  # slot = position * n_envs + environment
        self.observations = _zeros(n_slots, obs_dim).to(self.device)
        self.next_observations = _zeros(n_slots, obs_dim).to(self.device)
        self.actions = _zeros(n_slots, action_dim).to(self.device)
        self.rewards = _zeros(n_slots).to(self.device)
        self.terminals = _zeros(n_slots).to(self.device)
        self.simulator_states: np.ndarray | None = None  # (n_slots, state_dim), float64, allocated by the first one given

        self.position = 0
        self.full = False
        # Steps of the episode that is under way in each environment, counted since its beginning or since an interruption.
        self._episode_steps = np.zeros(n_envs, dtype=np.int64)
        # The slots that may start a window, as a set with O(1) insertion and removal: the first _n_starts entries of _starts;
        # _place[slot] is where slot stands in it, or -1.
        self._starts = np.zeros(n_slots, dtype=np.int64)
        self._place = np.full(n_slots, -1, dtype=np.int64)
        self._n_starts = 0

    def __len__(self) -> int:
        """Number of steps held."""
        return (self.capacity if self.full else self.position) * self.n_envs

    @property
    def n_windows(self) -> int:
        """Number of different windows that can be drawn now."""
        return self._n_starts

    def add(
        self,
        observations: np.ndarray,
        actions: np.ndarray,
        rewards: np.ndarray,
        next_observations: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        simulator_states: np.ndarray | None = None,
    ) -> None:
        """
        Add one step of every environment.

        :param observations: ``(n_envs, obs_dim)``, in the environment's units
        :param actions: ``(n_envs, action_dim)``, as the environment received them
        :param rewards: ``(n_envs,)``
        :param next_observations: ``(n_envs, obs_dim)``, the true successors (not the first observation after a reset)
        :param terminated: ``(n_envs,)``, the step ended the episode
        :param truncated: ``(n_envs,)``, the episode was cut by a time limit
        :param simulator_states: ``(n_envs, state_dim)``, the simulator's state in which the actions were taken
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

        slots = slice(self.position * self.n_envs, (self.position + 1) * self.n_envs)
        self.observations[slots] = to_device(steps["observation"], self.device)
        self.next_observations[slots] = to_device(steps["next observation"], self.device)
        self.actions[slots] = to_device(steps["action"], self.device)
        self.rewards[slots] = to_device(steps["reward"][:, 0], self.device)
        self.terminals[slots] = to_device(_as_float32(terminated, (self.n_envs,)), self.device)
        if simulator_states is not None:
            if self.simulator_states is None:
                self.simulator_states = np.full((self.capacity * self.n_envs, simulator_states.shape[1]), np.nan)
            self.simulator_states[slots] = simulator_states
        elif self.simulator_states is not None:
            self.simulator_states[slots] = np.nan

        self._episode_steps += 1
        for env_index in range(self.n_envs):
            self._forbid_start(self.position * self.n_envs + env_index)  # its old step is overwritten
            self._allow_starts(env_index, bool(terminated[env_index]))
            if terminated[env_index] or truncated[env_index]:
                self._episode_steps[env_index] = 0

        self.position += 1
        if self.position == self.capacity:
            self.position, self.full = 0, True

    def interrupt(self) -> None:
        """Say that the episodes under way will not go on (the environments are reset): no window crosses this moment."""
        self._episode_steps[:] = 0

    def _allow_starts(self, env_index: int, terminated: bool) -> None:
        """After a step of one environment: the starts whose window is now complete."""
        n_steps = int(self._episode_steps[env_index])
        # Ages (steps back from the newest) whose windows are complete: horizon - 1, and all younger ones at a terminal.
        oldest = min(n_steps, self.horizon) - 1
        youngest = 0 if terminated else self.horizon - 1
        for age in range(youngest, oldest + 1):
            slot = (self.position - age) % self.capacity * self.n_envs + env_index
            if self._place[slot] < 0:
                self._starts[self._n_starts] = slot
                self._place[slot] = self._n_starts
                self._n_starts += 1

    def _forbid_start(self, slot: int) -> None:
        place = self._place[slot]
        if place < 0:
            return
        self._n_starts -= 1
        last = self._starts[self._n_starts]
        self._starts[place] = last
        self._place[last] = place
        self._place[slot] = -1

    def sample(self, batch_size: int) -> Trajectory:
        """
        Draw windows uniformly, with replacement.

        :param batch_size: number of windows
        :return: windows of ``horizon`` steps
        :raises ValueError: if no window is complete yet
        """
        if self._n_starts == 0:
            raise ValueError(
                f"the buffer holds {len(self)} steps but no window of horizon={self.horizon} steps within one episode yet: "
                "collect more steps, or pass a smaller horizon (episodes cut by a time limit must be at least that long)"
            )
        chosen = th.randint(self._n_starts, (batch_size,)).numpy()
        return self.windows(to_device(self._starts[chosen], self.device))

    def windows(self, starts: th.Tensor) -> Trajectory:
        """
        The windows that begin at the given slots.

        :param starts: ``(batch,)`` slots that may start a window
        :return: the windows, padded after terminals
        """
        n_slots = self.capacity * self.n_envs
        steps = th.arange(self.horizon, device=self.device)
        slots = (starts[:, None] + steps * self.n_envs) % n_slots  # (batch, horizon)
        mask = mask_after_ending(self.terminals[slots])
        # Steps after a terminal read the step that ended the episode instead.
        last = mask.sum(dim=1, keepdim=True).long() - 1  # (batch, 1)
        slots = slots.gather(1, th.minimum(steps.expand_as(slots), last))
        observations = th.cat([self.observations[slots[:, :1]], self.next_observations[slots]], dim=1)
        rewards = self.rewards[slots] * mask
        return Trajectory(observations, self.actions[slots], rewards, self.terminals[slots], mask)

    def sample_observations(self, batch_size: int) -> th.Tensor:
        """
        Draw observations in which an action was taken, uniformly: start states for imagination.

        :param batch_size: how many
        :return: ``(batch_size, obs_dim)``
        """
        if len(self) == 0:
            raise ValueError("the buffer is empty: collect real steps before imagining from them")
        return self.observations[to_device(th.randint(len(self), (batch_size,)), self.device)]

    def latest(self, n_steps: int) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        """
        The newest steps of all environments, for running statistics.

        :param n_steps: steps per environment, at most what the buffer holds
        :return: observations ``(n, obs_dim)`` in which was acted, successors ``(n, obs_dim)``, actions ``(n, action_dim)``,
            and ``(n, 2)`` rewards and terminals, with ``n = n_steps * n_envs``
        """
        n_steps = min(n_steps, len(self) // self.n_envs)
        positions = (self.position - 1 - th.arange(n_steps)) % self.capacity
        slots = to_device((positions[:, None] * self.n_envs + th.arange(self.n_envs)).flatten(), self.device)
        outcomes = th.stack([self.rewards[slots], self.terminals[slots]], dim=1)
        return self.observations[slots], self.next_observations[slots], self.actions[slots], outcomes

    def to(self, device: th.device | str) -> TrajectoryBuffer:
        """Move the steps to a device, in place."""
        self.device = th.device(device)
        for name in self._tensor_names:
            setattr(self, name, getattr(self, name).to(self.device))
        return self

    _shape_names = ("capacity", "obs_dim", "action_dim", "horizon", "n_envs")
    _tensor_names = ("observations", "next_observations", "actions", "rewards", "terminals")

    def state_dict(self) -> dict[str, Any]:
        """The steps held (not the empty part of the ring) as tensors and numbers, which load with ``weights_only``."""
        held = slice(len(self))
        states = self.simulator_states
        return {
            **{name: getattr(self, name) for name in self._shape_names},
            **{name: getattr(self, name)[held].cpu().clone() for name in self._tensor_names},
            "simulator_states": None if states is None else th.tensor(states[held]),
            "position": self.position,
            "full": self.full,
            "episode_steps": th.tensor(self._episode_steps),
            # Their order decides what a random draw means.
            "starts": th.tensor(self._starts[: self._n_starts]),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> TrajectoryBuffer:
        """
        The buffer that a :meth:`state_dict` was made of, on the CPU.

        :param state: from :meth:`state_dict`
        """
        buffer = cls.__new__(cls)
        buffer.__setstate__(state)
        return buffer

    __getstate__ = state_dict

    def __setstate__(self, state: dict[str, Any]) -> None:
        shape = {name: state[name] for name in self._shape_names}
        TrajectoryBuffer.__init__(self, shape.pop("capacity") * state["n_envs"], **shape)
        self.position, self.full = state["position"], state["full"]
        held = slice(len(self))
        for name in self._tensor_names:
            getattr(self, name)[held] = state[name]
        if state["simulator_states"] is not None:
            self.simulator_states = np.full((self.capacity * self.n_envs, state["simulator_states"].shape[1]), np.nan)
            self.simulator_states[held] = state["simulator_states"].numpy()
        self._episode_steps = state["episode_steps"].numpy().copy()
        starts = state["starts"].numpy()
        self._n_starts = len(starts)
        self._starts[: len(starts)] = starts
        self._place[starts] = np.arange(len(starts))
