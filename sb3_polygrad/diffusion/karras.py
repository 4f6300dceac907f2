"""Diffusion as in "Elucidating the Design Space of Diffusion-Based Generative Models" (Karras et al., 2022), "EDM"."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch as th

# Table 1, for data of standard deviation 1: ln σ of the training noise has this mean and standard deviation.
TRAINING_MEAN, TRAINING_STD = -1.2, 1.2
# Table 5: stochastic sampling adds noise between these levels, a little more than it should.
CHURN_MIN, CHURN_MAX, CHURN_NOISE = 0.05, 50.0, 1.003

Network = Callable[[th.Tensor, th.Tensor], th.Tensor]
"""Inputs of unit variance ``(n, channels)`` and levels ¼ ln σ, ``(n, 1)`` or ``(1, 1)``, to outputs ``(n, channels)``."""


def noise_levels(n_steps: int, sigma_max: float, sigma_min: float = 0.002, rho: float = 7.0) -> list[float]:
    """
    σ_0 = ``sigma_max`` … σ_{N-1} = ``sigma_min``, σ_N = 0 (Eq. 5).

    :param n_steps: N, at least 1
    :param sigma_max: level that sampling starts from
    :param sigma_min: smallest level that is not zero
    :param rho: ρ; the larger, the more of the steps are at low noise
    """
    if n_steps < 1:
        raise ValueError(f"n_diffusion_steps must be at least 1, got {n_steps}")
    if not 0.0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_max must be greater than sigma_min, and both positive, got {sigma_max} and {sigma_min}")
    low, high = sigma_min ** (1.0 / rho), sigma_max ** (1.0 / rho)
    fractions = [i / max(n_steps - 1, 1) for i in range(n_steps)]
    return [(high + fraction * (low - high)) ** rho for fraction in fractions] + [0.0]


def training_levels(n: int, device: th.device) -> th.Tensor:
    """Draw a level for each of ``n`` examples, ``(n, 1)`` (Table 1)."""
    return (TRAINING_MEAN + TRAINING_STD * th.randn(n, 1, device=device)).exp()


def coefficients(sigma: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
    """c_skip, c_out, c_in and c_noise of Table 1, for data of standard deviation 1."""
    total = sigma.square() + 1.0
    return 1.0 / total, sigma / total.sqrt(), 1.0 / total.sqrt(), sigma.log() / 4.0


def loss(network: Network, clean: th.Tensor, sigma: th.Tensor) -> th.Tensor:
    """
    Eq. 2 with λ(σ) = 1 / c_out²: the network's own output is to have unit variance and error at every level.

    :param network: see :data:`Network`
    :param clean: ``(n, channels)``
    :param sigma: ``(n, 1)``
    """
    skip, out, scale, level = coefficients(sigma)
    noisy = clean + sigma * th.randn_like(clean)
    return (network(scale * noisy, level) - (clean - skip * noisy) / out).square().mean()


def denoise(network: Network, noisy: th.Tensor, sigma: float) -> th.Tensor:
    """The clean estimate D(x; σ) (Eq. 7)."""
    skip, out, scale, level = coefficients(th.full((1, 1), sigma, device=noisy.device))
    return skip * noisy + out * network(scale * noisy, level)


def sample(network: Network, noise: th.Tensor, levels: list[float], heun: bool = False, churn: float = 0.0) -> th.Tensor:
    """
    Algorithm 2; Algorithm 1 without churn.

    :param network: see :data:`Network`
    :param noise: ``(n, channels)`` standard normal
    :param levels: from :func:`noise_levels`
    :param heun: correct each step but the last by a second call (second order)
    :param churn: S_churn; 0 for deterministic sampling
    """
    noisy = levels[0] * noise
    largest = math.sqrt(2.0) - 1.0
    for sigma, after in itertools.pairwise(levels):
        if churn > 0.0 and CHURN_MIN <= sigma <= CHURN_MAX:
            raised = sigma * (1.0 + min(churn / (len(levels) - 1), largest))
            noisy = noisy + math.sqrt(raised**2 - sigma**2) * CHURN_NOISE * th.randn_like(noisy)
            sigma = raised
        slope = (noisy - denoise(network, noisy, sigma)) / sigma
        moved = noisy + (after - sigma) * slope
        if heun and after > 0.0:
            slope = (slope + (moved - denoise(network, moved, after)) / after) / 2.0
            moved = noisy + (after - sigma) * slope
        noisy = moved
    return noisy
