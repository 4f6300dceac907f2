"""The controller of δ, the action update scale."""

from __future__ import annotations

import math

import torch as th
from torch import nn


class DeltaController(nn.Module):
    r"""
    Tunes the action update scale δ until the standardised actions have standard deviation 1 (Eq. 9 and 10).

    As in the authors' release, Eq. 10 acts on log δ (plain gradient steps), which keeps δ positive.

    Departs from the paper: δ never exceeds σ², the smallest variance of the policy over action dimensions. One step of
    the guided sampler multiplies the distance to the mean by (1 - δ/σ²): from δ > σ² on it overshoots, σ_ā grows *with*
    δ, and Eq. 10 answers by raising δ further until the actions sit at the clipping bounds. At δ = σ² a step
    lands on the mean, so no smaller spread can be had from the rule, and a larger δ never helps.

    :param delta: start value, in the units of the variances it is compared with
    :param learning_rate: η of Eq. 10 for log δ
    """

    log_delta: th.Tensor
    bound_active: th.Tensor

    def __init__(self, delta: float = 0.005, learning_rate: float = 0.03) -> None:
        super().__init__()
        if delta <= 0.0:
            raise ValueError(
                f"delta must be positive, got {delta}: pass the start value of the action update scale, e.g. 0.005"
            )
        if learning_rate < 0.0:
            raise ValueError(f"delta_lr must not be negative, got {learning_rate}: pass 0 to keep delta fixed")
        self.learning_rate = learning_rate
        self.register_buffer("log_delta", th.tensor(math.log(delta)))
        self.register_buffer("bound_active", th.tensor(0.0))

    def bounded(self, policy_variance: th.Tensor) -> th.Tensor:
        """
        δ as the sampler may use it for a policy of this variance: no larger than the bound.

        :param policy_variance: variances of the policy, any shape
        :return: δ, a scalar tensor
        """
        return th.minimum(self.log_delta.exp(), policy_variance.amin())

    @th.no_grad()
    def update(self, action_std: th.Tensor, policy_variance: th.Tensor) -> th.Tensor:
        """
        One step of Eq. 10 on log δ, held at its bound.

        :param action_std: σ_ā, the standard deviation of the standardised actions, scalar
        :param policy_variance: variances of the policy that acted, any shape
        :return: the new δ, a scalar tensor
        """
        bound = policy_variance.amin().log().to(self.log_delta.dtype)
        proposal = self.log_delta + self.learning_rate * (action_std - 1.0)
        # A measure that is not finite (a diverged imagination) leaves everything as it was.
        usable = th.isfinite(proposal) & th.isfinite(bound)
        self.bound_active.copy_(th.where(usable, (proposal >= bound).float(), self.bound_active))
        self.log_delta.copy_(th.where(usable, th.minimum(proposal, bound), self.log_delta))
        return self.log_delta.exp()
