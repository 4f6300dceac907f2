"""The Gaussian diffusion process: forward noising, parametrisation, posterior."""

from __future__ import annotations

from typing import Literal

import torch as th
from torch import nn

Prediction = Literal["x0", "epsilon"]


class GaussianDiffusion(nn.Module):
    """
    Forward process and its posterior for a given schedule. Index ``i`` runs from 0 (clean) to N (noise).

    The one place where the parametrisation is resolved: the paper lets the network predict the noise ε, the runs of the
    authors' release let it predict the clean trajectory x₀. Both are here; callers only see clean predictions.

    :param alpha_bar: ``(N + 1,)`` cumulative signal, float64, from :func:`~sb3_polygrad.diffusion.schedules.cosine_schedule`
    :param prediction: what the network's output means, ``"x0"`` or ``"epsilon"``
    """

    alpha_bar: th.Tensor
    signal: th.Tensor
    noise: th.Tensor
    clean_weight: th.Tensor
    noisy_weight: th.Tensor
    posterior_std: th.Tensor

    def __init__(self, alpha_bar: th.Tensor, prediction: Prediction = "x0") -> None:
        super().__init__()
        if prediction not in ("x0", "epsilon"):
            raise ValueError(f"prediction must be 'x0' or 'epsilon', got {prediction!r}")
        self.prediction = prediction
        self.n_steps = len(alpha_bar) - 1
        alpha_bar = alpha_bar.double()
        # Entry i of the posterior's coefficients belongs to the step i -> i - 1; entry 0 is never used.
        previous = th.cat([th.ones(1, dtype=th.float64), alpha_bar[:-1]])
        alpha = alpha_bar / previous
        remaining = (1.0 - alpha_bar).clamp(min=1e-20)
        coefficients = {
            "alpha_bar": alpha_bar,
            "signal": alpha_bar.sqrt(),
            "noise": (1.0 - alpha_bar).sqrt(),
            "clean_weight": previous.sqrt() * (1.0 - alpha) / remaining,
            "noisy_weight": alpha.sqrt() * (1.0 - previous) / remaining,
            "posterior_std": ((1.0 - alpha) * (1.0 - previous) / remaining).clamp(min=0.0).sqrt(),
        }
        for name, values in coefficients.items():
            # Not part of the state dict: they follow from the schedule, which is a constructor argument.
            self.register_buffer(name, values.float(), persistent=False)

    def add_noise(self, clean: th.Tensor, i: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """
        Forward process: ``sqrt(ᾱ_i) x₀ + sqrt(1 - ᾱ_i) ε`` (Algorithm 1, line 6).

        :param clean: x₀, ``(batch, ...)``
        :param i: ``(batch,)`` diffusion steps
        :param noise: ε, like ``clean``
        """
        return _per_sample(self.signal, i, clean) * clean + _per_sample(self.noise, i, clean) * noise

    def target(self, clean: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """What the network is trained to put out."""
        return clean if self.prediction == "x0" else noise

    def predict_clean(self, output: th.Tensor, noisy: th.Tensor, i: int) -> th.Tensor:
        """
        The clean trajectory that an output of the network stands for (Algorithm 2, line 9).

        :param output: the network's output
        :param noisy: what the network saw
        :param i: diffusion step, 1 … N
        """
        if self.prediction == "x0":
            return output
        return (noisy - self.noise[i] * output) / self.signal[i]

    def posterior_mean(self, clean: th.Tensor, noisy: th.Tensor, i: int) -> th.Tensor:
        """
        Mean of the trajectory one diffusion step cleaner, given its clean estimate (DDPM, Eq. 7).

        Equals the mean in Algorithm 2, line 13, with ε̂ rewritten in terms of the clean estimate.
        """
        return self.clean_weight[i] * clean + self.noisy_weight[i] * noisy


def _per_sample(values: th.Tensor, i: th.Tensor, like: th.Tensor) -> th.Tensor:
    return values[i].view(-1, *([1] * (like.dim() - 1)))
