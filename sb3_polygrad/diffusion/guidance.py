"""How actions are moved towards the policy while the trajectory is denoised."""

from __future__ import annotations

from typing import Protocol

import torch as th
from torch import nn
from torch.distributions import Normal

from sb3_polygrad.core.controllers import DeltaController


class Guidance(Protocol):
    """
    Rule by which actions follow the policy; the sampler knows only this.

    All actions are in the environment's units, ``(batch, horizon, action_dim)``.
    """

    def update(self, actions: th.Tensor, policy: Normal, noise: th.Tensor) -> th.Tensor:
        """
        One diffusion step for the actions.

        :param actions: current actions
        :param policy: distribution of the policy at the predicted clean states, of the same shape
        :param noise: the noise to add, already scaled to this diffusion step
        :return: new actions
        """
        ...

    def finish(self, actions: th.Tensor, policy: Normal) -> th.Tensor:
        """The actions returned, after the last diffusion step."""
        ...

    def adapt(self, standardized_std: th.Tensor, policy_std: th.Tensor) -> dict[str, th.Tensor]:
        """
        Learn from an imagined batch (Algorithm 3, line 9).

        :param standardized_std: σ_ā of the batch, scalar
        :param policy_std: standard deviations of the policy, ``(..., action_dim)``
        :return: what there is to log
        """
        ...


class PolicyScoreGuidance(nn.Module):
    r"""
    The paper's rule: a step along the policy's score, clipped, plus noise (Algorithm 2, line 10; Eq. 11).

    The score of a Gaussian is known in closed form, :math:`\nabla_a \log \pi(a|s) = (\mu(s) - a) / \sigma^2`, so nothing is
    differentiated and no gradient can reach the policy. Order of operations as in the authors' release: the actions are
    clipped to μ ± 3σ of the policy at the *new* clean states, then moved, then noise is added.

    δ is in squared half-ranges of the action box, per dimension; for the paper's boxes, [-1, 1], that is the paper's unit.

    :param controller: tunes δ
    :param half_range: ``(action_dim,)`` half the width of the action box
    :param clip_std: actions stay within this many standard deviations of the mean before a step; None for no clipping
    """

    half_range: th.Tensor

    def __init__(self, controller: DeltaController, half_range: th.Tensor, clip_std: float | None = 3.0) -> None:
        super().__init__()
        if clip_std is not None and clip_std <= 0.0:
            raise ValueError(f"clip_std must be positive, or None for no clipping, got {clip_std}")
        self.controller = controller
        self.clip_std = clip_std
        self.register_buffer("half_range", half_range.float(), persistent=False)

    def update(self, actions: th.Tensor, policy: Normal, noise: th.Tensor) -> th.Tensor:
        """See :class:`Guidance`."""
        variance = (policy.stddev / self.half_range).square()
        rate = self.controller.bounded(variance) / variance
        # a + δ (μ - a) / σ²
        return th.lerp(self.finish(actions, policy), policy.mean, rate) + noise

    def finish(self, actions: th.Tensor, policy: Normal) -> th.Tensor:
        """See :class:`Guidance`; the last step only clips."""
        if self.clip_std is None:
            return actions
        reach = self.clip_std * policy.stddev
        return th.clamp(actions, policy.mean - reach, policy.mean + reach)

    def adapt(self, standardized_std: th.Tensor, policy_std: th.Tensor) -> dict[str, th.Tensor]:
        """See :class:`Guidance`; Eq. 10."""
        delta = self.controller.update(standardized_std, (policy_std / self.half_range).square())
        return {"delta": delta, "delta_at_bound": self.controller.bound_active}
