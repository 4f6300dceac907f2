"""The buffer of imagined trajectories, in SB3's form of a rollout buffer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer

if TYPE_CHECKING:
    from sb3_polygrad.imagination import ImaginedBatch
    from sb3_polygrad.policies import PolyGRADPolicy


class ImaginedSamples(NamedTuple):
    """
    SB3's ``RolloutBufferSamples`` plus ``mask``: 1.0 for steps that happened, 0.0 after an imagined ending.

    Without ``old_values``, which no update reads. ``old_log_prob`` is empty for a batch with gradients, where none is needed.
    """

    observations: th.Tensor
    actions: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    mask: th.Tensor


class ImaginedRolloutBuffer(RolloutBuffer):
    """
    One batch of imagined trajectories: ``buffer_size`` steps (the horizon) of ``n_envs`` trajectories.

    :meth:`fill` takes the whole batch at once, and everything stays a tensor on the device; the layout is
    ``(n_envs, buffer_size, ...)``. The constructor is SB3's.
    """

    samples: ImaginedSamples | None = None

    def reset(self) -> None:
        """Empty the buffer."""
        self.samples = None
        self.full = False

    def add(self, *args: object, **kwargs: object) -> None:
        """
        Not for this buffer: imagined trajectories arrive whole.

        :raises TypeError: always
        """
        raise TypeError("an imagined batch is not added step by step: use fill()")

    def fill(self, batch: ImaginedBatch, policy: PolyGRADPolicy) -> None:
        """
        Take a batch of imagined trajectories with its returns and advantages, GAE(λ) as SB3 defines it.

        A terminal cuts the bootstrap (a probability of one weighs it); the end of the horizon bootstraps.

        :param batch: of ``n_envs`` trajectories of ``buffer_size`` steps
        :param policy: the policy that acted; its target critics value the observations
        """
        trajectory, rewards = batch.trajectory, batch.rewards
        assert rewards.shape == (self.n_envs, self.buffer_size), f"expected (batch, horizon), got {tuple(rewards.shape)}"
        values = policy.target_values(batch.observations.flatten(0, 1)).view(self.n_envs, self.buffer_size + 1)
        advantages = gae(rewards, values, trajectory.terminals, self.gamma, self.gae_lambda)
        observations, actions = batch.observations[:, :-1].flatten(0, 1), trajectory.actions.flatten(0, 1)
        with th.no_grad():
            differentiable = rewards.requires_grad
            log_probs = rewards.new_zeros(len(actions), 0) if differentiable else _log_prob(policy, observations, actions)
        returns = (advantages + values[:, :-1]).flatten()
        self.samples = ImaginedSamples(
            observations, actions, log_probs, advantages.flatten(), returns, trajectory.mask.flatten()
        )
        self.full = True

    def detach(self) -> None:
        """Drop the gradients of what was imagined; the values stay."""
        assert self.samples is not None
        self.samples = ImaginedSamples(*(tensor.detach() for tensor in self.samples))

    def all_steps(self) -> ImaginedSamples:
        """
        All steps as one batch, in order.

        :return: tensors of ``n_envs * buffer_size`` rows
        """
        assert self.samples is not None, "the buffer is empty: fill() it first"
        return self.samples

    def minibatches(self, n_epochs: int, n_minibatches: int) -> Iterator[ImaginedSamples]:
        """
        All steps in random order, cut into minibatches, several times.

        :param n_epochs: passes over all steps
        :param n_minibatches: minibatches per pass
        """
        samples = self.all_steps()
        for _ in range(n_epochs):
            order = th.randperm(len(samples.mask), device=samples.mask.device)
            for indices in order.split(-(-len(order) // n_minibatches)):
                yield ImaginedSamples(*(tensor[indices] for tensor in samples))


def _log_prob(policy: PolyGRADPolicy, observations: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """``(batch,)``, of the actions at the observations."""
    return policy.get_distribution(observations).log_prob(actions)


def gae(rewards: th.Tensor, values: th.Tensor, terminals: th.Tensor, gamma: float, gae_lambda: float) -> th.Tensor:
    """
    Generalised advantage estimates (Schulman et al., 2016), with gradients where the arguments have some.

    :param rewards: ``(batch, horizon)``
    :param values: ``(batch, horizon + 1)`` of all observations, the one after the last action included
    :param terminals: ``(batch, horizon)``, whether a step ended the episode, or the probability of it
    :param gamma: discount factor
    :param gae_lambda: λ
    :return: ``(batch, horizon)``
    """
    alive = 1.0 - terminals
    deltas = rewards + gamma * alive * values[:, 1:] - values[:, :-1]
    weights = gamma * gae_lambda * alive
    running = th.zeros_like(deltas[:, 0])
    backwards = []
    for delta, weight in zip(reversed(deltas.unbind(dim=1)), reversed(weights.unbind(dim=1)), strict=True):
        running = th.addcmul(delta, weight, running)
        backwards.append(running)
    return th.stack(backwards[::-1], dim=1)
