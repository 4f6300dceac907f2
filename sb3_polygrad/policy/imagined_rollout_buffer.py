"""SB3's rollout buffer for imagined trajectories, on the device from filling to sampling."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_polygrad.core.trajectory import Trajectory
from sb3_polygrad.policy.samples import ImaginedRolloutBufferSamples


class ImaginedRolloutBuffer(RolloutBuffer):
    """
    Holds one batch of imagined trajectories: ``buffer_size`` steps (the horizon) of ``n_envs`` trajectories.

    It is filled at once (:meth:`fill`) instead of step by step, and everything stays a tensor on the device; layout is
    ``(n_envs, buffer_size, ...)``. The constructor is SB3's.
    """

    terminals: th.Tensor
    mask: th.Tensor

    def reset(self) -> None:
        """Empty the buffer."""
        self.pos = 0
        self.full = False

    def add(self, *args: object, **kwargs: object) -> None:
        """Not for this buffer: imagined trajectories arrive whole."""
        raise TypeError("an imagined batch is not added step by step: use fill()")

    def fill(self, trajectory: Trajectory, policy_observations: th.Tensor, values: th.Tensor, log_probs: th.Tensor) -> None:
        """
        Take a batch of imagined trajectories and compute its advantages and returns.

        :param trajectory: the trajectories, with rewards in the units that values are in
        :param policy_observations: ``(batch, horizon, *observation_shape)`` as the policy sees them
        :param values: ``(batch, horizon + 1)`` of all observations, the one after the last action included
        :param log_probs: ``(batch, horizon)`` of the actions under the policy that acted
        """
        expected = (self.n_envs, self.buffer_size)
        assert trajectory.rewards.shape == expected, (
            f"expected (batch, horizon) = {expected}, got {tuple(trajectory.rewards.shape)}"
        )
        tensors = {
            "observations": policy_observations,
            "actions": trajectory.actions,
            "rewards": trajectory.rewards,
            "terminals": trajectory.terminals,
            "mask": trajectory.mask,
            "values": values[:, :-1],
            "log_probs": log_probs,
        }
        for name, tensor in tensors.items():
            setattr(self, name, tensor)
        self.compute_returns_and_advantage(values[:, -1], self.terminals[:, -1])
        self.pos, self.full = self.buffer_size, True

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: th.Tensor | np.ndarray) -> None:
        """
        GAE(λ) and TD(λ) returns, as SB3 defines them; an imagined ending cuts both (or weighs them, where
        terminals are probabilities), the end of the horizon bootstraps.

        :param last_values: ``(batch,)`` values after the last action
        :param dones: ``(batch,)`` whether the last step ended the episode; unused, the terminals say it
        """
        values, rewards, terminals = (th.as_tensor(x) for x in (self.values, self.rewards, self.terminals))
        alive = 1.0 - terminals
        next_values = th.cat([values[:, 1:], last_values[:, None]], dim=1)
        deltas = rewards + self.gamma * alive * next_values - values
        going_on = self.gamma * self.gae_lambda * alive
        running = th.zeros_like(last_values)
        backwards = []
        for delta, weight in zip(reversed(deltas.unbind(dim=1)), reversed(going_on.unbind(dim=1)), strict=True):
            running = th.addcmul(delta, weight, running)
            backwards.append(running)
        advantages = th.stack(backwards[::-1], dim=1)
        self.advantages = advantages  # type: ignore[assignment]
        self.returns = advantages + values  # type: ignore[assignment]

    def detach(self) -> None:
        """Let go of the gradients of what was imagined; the values stay."""
        for name in ("observations", "actions", "rewards", "terminals", "mask", "values", "advantages", "returns"):
            setattr(self, name, getattr(self, name).detach())

    def get(self, batch_size: int | None = None) -> Generator[ImaginedRolloutBufferSamples, None, None]:  # type: ignore[override]
        """
        All steps in random order, in minibatches.

        :param batch_size: steps per minibatch; None for one batch of all of them, in order
        """
        assert self.full, "the buffer is empty: fill() it first"
        names = ("observations", "actions", "values", "log_probs", "advantages", "returns", "mask")
        flat = ImaginedRolloutBufferSamples(*(getattr(self, name).flatten(0, 1) for name in names))
        if batch_size is None:
            yield flat
            return
        for indices in th.randperm(self.buffer_size * self.n_envs, device=flat.mask.device).split(batch_size):
            yield ImaginedRolloutBufferSamples(*(tensor[indices] for tensor in flat))
