"""Environments, policies and settings that are small enough to know the answer."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from torch.distributions import Normal

from sb3_polygrad import PolyGRAD

# The default path, made small: seconds, not minutes.
TINY: dict[str, Any] = dict(
    n_steps=8,
    batch_size=16,
    gradient_steps=4,
    buffer_size=2_000,
    learning_starts=64,
    horizon=4,
    n_imagined=16,
    policy_kwargs=dict(net_arch=[16]),
    seed=0,
    device="cpu",
)
TINY_ENSEMBLE: dict[str, Any] = dict(n_members=2, width=16, n_layers=1)
# The paper's world model, made small.
TINY_DIFFUSION: dict[str, Any] = dict(width=16, n_layers=1, sampler=dict(name="policy_guided", n_diffusion_steps=4))


def tiny_model(env: Any, world_model: str = "ensemble", **changes: Any) -> PolyGRAD:
    """
    A PolyGRAD that learns in a second, by default the default made small; arguments change single settings.

    ``world_model="diffusion"`` is the paper's, made small; a given ``world_model_kwargs`` is added to the small one.
    """
    small = {"ensemble": TINY_ENSEMBLE, "diffusion": TINY_DIFFUSION}.get(world_model, {})
    kwargs = {**small, **changes.pop("world_model_kwargs", {})}
    return PolyGRAD("MlpPolicy", env, **{**TINY, "world_model": world_model, "world_model_kwargs": kwargs, **changes})


class PointEnv(gym.Env):
    """
    A point on a line, ``x' = clip(x + step * a, -2, 2)``, reward ``-x'^2``: the best policy drives it to 0 and keeps it there.

    :param length: steps until the time limit
    :param goal_ends: reaching ``|x'| < 0.1`` is a terminal, and info says ``is_success``
    :param scale: half-range of the action box, whose centre is ``center``; the point moves by ``(a - center) / scale / 2``
    :param dtype: of observations and actions
    """

    def __init__(
        self, length: int = 10, goal_ends: bool = False, scale: float = 1.0, center: float = 0.0, dtype: type = np.float32
    ) -> None:
        self.length, self.goal_ends, self.scale, self.center, self.dtype = length, goal_ends, scale, center, dtype
        self.observation_space = spaces.Box(-2.0, 2.0, (1,), dtype)
        self.action_space = spaces.Box(center - scale, center + scale, (1,), dtype)
        self.x, self.t = 0.0, 0

    def _observe(self) -> np.ndarray:
        return np.array([self.x], dtype=self.dtype)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.x, self.t = float(self.np_random.uniform(-2.0, 2.0)), 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert action.dtype == self.dtype, f"expected an action of {self.dtype}, got {action.dtype}"
        assert self.action_space.contains(action), f"{action} is not in {self.action_space}"
        self.x = float(np.clip(self.x + 0.5 * (float(action[0]) - self.center) / self.scale, -2.0, 2.0))
        self.t += 1
        reached = self.goal_ends and abs(self.x) < 0.1
        return self._observe(), -(self.x**2), reached, self.t >= self.length, {"is_success": reached}


class BrokenEnv(PointEnv):
    """
    A point whose environment breaks at one step: its observation or its reward takes a given value.

    :param field: ``"observation"``, ``"reset"`` (the next first observation of an episode) or ``"reward"``
    :param value: what it becomes
    :param at: the step, counted over all episodes (an episode ends at every tenth)
    """

    def __init__(self, field: str, value: float, at: int = 25, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.field, self.value, self.at, self.n_steps = field, value, at, 0

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        observation, info = super().reset(**kwargs)
        if self.field == "reset" and self.n_steps >= self.at:
            observation[:] = self.value
        return observation, info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        self.n_steps += 1
        if self.n_steps == self.at:
            if self.field == "observation":
                observation[:] = self.value
            elif self.field == "reward":
                reward = self.value
        return observation, reward, terminated, truncated, info


class SpacesEnv(gym.Env):
    """Random observations, reward 0, any spaces."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space, self.action_space, self.t = observation_space, action_space, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), f"{action} is not in {self.action_space}"
        self.t += 1
        return self.observation_space.sample(), 0.0, False, self.t >= 10, {}


class LinearPolicy:
    """
    ``a ~ N(gain s, std^2)``, for states ``(..., channels)`` of which only the first ones are seen.

    :param gain: ``(action_dim, obs_dim)``
    :param std: ``(action_dim,)``
    """

    def __init__(self, gain: th.Tensor, std: th.Tensor) -> None:
        self.gain, self.std = gain, std

    def __call__(self, states: th.Tensor) -> Normal:
        mean = states[..., : self.gain.shape[1]] @ self.gain.T
        return Normal(mean, self.std.expand_as(mean))


def equal_trees(a: Any, b: Any) -> bool:
    """Whether two nested dicts, lists or tuples of tensors and numbers (state dicts) are exactly equal."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal_trees(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal_trees(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, th.Tensor):
        return th.equal(a, b)
    return a == b
