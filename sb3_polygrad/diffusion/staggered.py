"""The staggered sampler: one noise level per environment step, early steps clean before later ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch as th
from torch import nn
from torch.distributions import Distribution

from sb3_polygrad.common.draws import draw
from sb3_polygrad.common.trajectory import Trajectory
from sb3_polygrad.common.validation import Count, NotNegative
from sb3_polygrad.diffusion.base import Corrupted, Sample, Task

FLAT_FRACTION = 0.15
"""Fraction of the training examples in which all states have the same level."""


def staggered_levels(horizon: int, n_levels: int, lag: float) -> th.Tensor:
    """
    Noise level of every state before and after each iteration.

    At iteration m state t + 1 has the level ``clip((K - m + L t) / K, 0, 1)``; state 0 is always clean.

    :param horizon: number of steps
    :param n_levels: K, iterations that a state takes from noise to clean
    :param lag: L, iterations by which each state is behind its predecessor
    :return: ``(iterations + 1, horizon + 1)``, iterations = K + ceil(L (horizon - 1))
    """
    # Rounded, since 1.1 * 10 is a little more than 11, which would cost a call in which everything is clean already.
    iterations = n_levels + math.ceil(round(lag * (horizon - 1), 9))
    m = th.arange(iterations + 1, dtype=th.float64)[:, None]
    t = th.arange(horizon, dtype=th.float64)
    levels = ((n_levels - m + lag * t) / n_levels).clamp(0.0, 1.0)
    levels[levels < 1e-9] = 0.0
    return nn.functional.pad(levels, (1, 0))


class StaggeredSampler(nn.Module):
    r"""
    Trajectory diffusion whose actions are exact draws from the policy; departs from the paper.

    Every action is a reparameterised draw, :math:`a^t = \mu(\hat s^t) + \sigma(\hat s^t) z^t`, with z drawn once per
    trajectory. As soon as state t is clean its action is final, while later states are still noise: no δ, no clipping, the
    right spread at any entropy. With level u the signal is ᾱ = cos²(πu/2); the denoiser predicts the clean states, and each
    iteration is a DDIM step. L = K is autoregressive diffusion, L = 0 has one noise level for all states.

    :param horizon: steps per trajectory
    :param n_levels: K, iterations that a state takes from noise to clean
    :param lag: L, iterations by which each state is behind its predecessor
    """

    levels: th.Tensor
    clean_weight: th.Tensor
    noisy_weight: th.Tensor

    def __init__(self, horizon: int, n_levels: Count = 2, lag: NotNegative = 1.0) -> None:
        super().__init__()
        lag = min(lag, n_levels)  # a longer lag only adds iterations in which nothing changes
        self.horizon = horizon
        self.n_levels = n_levels
        self.n_level_inputs = horizon
        levels = staggered_levels(horizon, n_levels, lag)
        signal, noise = th.cos(levels * math.pi / 2), th.sin(levels * math.pi / 2)
        # DDIM: next = signal' x̂ + noise' (x - signal x̂) / noise; what is clean stays as it is.
        noisy_weight = th.where(levels[:-1] > 0.0, noise[1:] / noise[:-1].clamp(min=1e-12), th.ones(()))
        clean_weight = signal[1:] - noisy_weight * signal[:-1]
        self.register_buffer("levels", levels.float(), persistent=False)
        self.register_buffer("noisy_weight", noisy_weight.float()[..., None], persistent=False)
        self.register_buffer("clean_weight", clean_weight.float()[..., None], persistent=False)
        # Which states change in an iteration: those not clean yet before it and not pure noise any more after it.
        changing = (levels[:-1] > 0.0) & (levels[1:] < 1.0)
        rows = [row.nonzero().flatten().tolist() for row in changing]
        self._changing = [(m, row[0], row[-1] + 1) for m, row in enumerate(rows)]

    def corrupt(self, clean: th.Tensor, actions: th.Tensor) -> Corrupted:
        """
        See :class:`~sb3_polygrad.diffusion.base.Sampler`. Levels are a ramp over the states with random slope (squared: flat
        ramps are favoured) and random position, cut to [0, 1]; some examples have one level for all states.
        """
        levels = nn.functional.pad(self._draw_levels(len(clean), clean.shape[1] - 1, clean.device), (1, 0))
        angle = levels[..., None] * (math.pi / 2)  # (batch, horizon + 1, 1)
        noisy = angle.cos() * clean + angle.sin() * th.randn_like(clean)
        return Corrupted(noisy, actions, levels[:, 1:], clean)

    def _draw_levels(self, batch: int, n_steps: int, device: th.device) -> th.Tensor:
        """Noise levels to train with, ``(batch, n_steps)``."""
        slope = th.rand(batch, 1, device=device).square() * (th.rand(batch, 1, device=device) >= FLAT_FRACTION)
        reach = slope * (n_steps - 1)
        start = th.rand(batch, 1, device=device) * (1.0 + reach) - reach
        return (start + slope * th.arange(n_steps, device=device)).clamp(0.0, 1.0)

    def sample(self, task: Task) -> Sample:
        """See :class:`~sb3_polygrad.diffusion.base.Sampler`."""
        states = th.randn(len(task.first), self.horizon + 1, task.first.shape[1], device=task.first.device)
        states[:, 0] = task.first
        # Before anything is known, every state is taken for the first one; the first action is final already.
        actions = draw(task.policy(task.first[:, None]), task.noise)
        for m, begin, end in self._changing:
            output = task.denoiser(states, task.condition(actions), self.levels[m : m + 1, 1:])
            clean = task.bound(output[:, begin:])
            states[:, begin:end] = (
                self.clean_weight[m, begin:end] * clean[:, : end - begin]
                + self.noisy_weight[m, begin:end] * states[:, begin:end]
            )
            # An action is drawn anew while its state still changes. (None is taken in the last state.)
            if begin < self.horizon:
                actions[:, begin:] = draw(task.policy(clean[:, : self.horizon - begin]), task.noise[:, begin:])
        return Sample(states, actions)

    def adapt(self, imagined: Trajectory, policy: Callable[[th.Tensor], Distribution]) -> dict[str, th.Tensor]:
        """Nothing to tune: actions are exact draws."""
        return {}
