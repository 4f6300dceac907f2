"""Noise schedules."""

from __future__ import annotations

import math

import torch as th


def cosine_schedule(n_steps: int, tau: float = 1.0, max_beta: float = 0.999) -> th.Tensor:
    r"""
    Cumulative signal ᾱ_i of the cosine schedule, ``ᾱ_i = cos(π/2 · i/N)^(2τ)`` (Chen 2023, Algorithm 1; Table 4).

    A smaller τ keeps more signal in the early steps. As with Nichol and Dhariwal, β_i = 1 - ᾱ_i/ᾱ_{i-1} is held
    below ``max_beta``, so that ᾱ_N stays above zero.

    :param n_steps: N, number of diffusion steps
    :param tau: exponent τ
    :param max_beta: largest share of the signal that one step may destroy
    :return: ``(N + 1,)`` float64, ᾱ_0 = 1 (clean) to ᾱ_N (noise)
    """
    if n_steps < 1:
        raise ValueError(f"n_diffusion_steps must be at least 1, got {n_steps}")
    if tau <= 0.0:
        raise ValueError(f"noise_tau must be positive, got {tau}")
    fractions = th.arange(n_steps + 1, dtype=th.float64) / n_steps
    signal = th.cos(fractions * math.pi / 2).clamp(min=0.0) ** (2 * tau)
    keep = (signal[1:] / signal[:-1]).clamp(min=1.0 - max_beta)
    return th.cat([th.ones(1, dtype=th.float64), th.cumprod(keep, dim=0)])
