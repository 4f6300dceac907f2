"""How actions follow the policy while the trajectory is denoised: the paper's rule and its ablations (Appendix C.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch as th
from torch import nn
from torch.distributions import Normal

from sb3_polygrad.diffusion.controllers import DeltaController


class DiffusionStep(NamedTuple):
    """
    A diffusion step as guidance finds it. Actions are in the environment's units, states are standardised.

    :param actions: ``(batch, horizon, action_dim)``
    :param clean: ``(batch, horizon + 1, channels)`` predicted clean states, the start among them
    :param noisy: the states before the step, like ``clean``
    :param policy: states ``(batch, horizon, channels)`` to the policy's distribution there
    :param noise: for the actions, already scaled to this diffusion step
    """

    actions: th.Tensor
    clean: th.Tensor
    noisy: th.Tensor
    policy: Callable[[th.Tensor], Normal]
    noise: th.Tensor


class Guidance(Protocol):
    """Rule by which a trajectory follows the policy; the sampler knows only this."""

    def guide(self, step: DiffusionStep) -> tuple[th.Tensor, th.Tensor]:
        """
        One diffusion step (Algorithm 2, line 10).

        :param step: as it is before
        :return: new actions, and the clean states that the states are to move to, as they were or moved
        """
        ...

    def finish(self, actions: th.Tensor, policy: Normal) -> th.Tensor:
        """
        Clip the actions to where the policy would put them; the last thing that happens to them.

        :param actions: ``(batch, horizon, action_dim)``
        :param policy: distribution of the policy at the returned states
        """
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

    def guide(self, step: DiffusionStep) -> tuple[th.Tensor, th.Tensor]:
        """See :class:`Guidance`; the policy is asked about the predicted clean states (line 9)."""
        return self.update(step.actions, step.policy(step.clean[:, :-1]), step.noise), step.clean

    def update(self, actions: th.Tensor, policy: Normal, noise: th.Tensor) -> th.Tensor:
        """
        The rule itself.

        :param actions: ``(batch, horizon, action_dim)``
        :param policy: distribution of the policy, of the same shape
        :param noise: like ``actions``
        :return: new actions
        """
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


class NoisyStatesGuidance(PolicyScoreGuidance):
    """
    Ablation: the paper's rule, but the policy is asked about the noisy states instead of the predicted clean ones.

    (The release asks it about the posterior mean, which lies between the two.)
    """

    def guide(self, step: DiffusionStep) -> tuple[th.Tensor, th.Tensor]:
        """See :class:`Guidance`."""
        return self.update(step.actions, step.policy(step.noisy[:, :-1]), step.noise), step.clean


class StateUpdateGuidance(PolicyScoreGuidance):
    r"""
    Ablation: states follow the policy too, :math:`\hat s \leftarrow \hat s + \delta \nabla_s \log \pi(a|\hat s)` (Eq. 8
    and 12), and then the actions follow the policy at the states so moved.

    δ is the one of the actions; the gradient is that of the standardised states. It goes through the policy, by autograd,
    and ends there: nothing lands in the ``.grad`` of the policy's parameters.
    """

    def guide(self, step: DiffusionStep) -> tuple[th.Tensor, th.Tensor]:
        """See :class:`Guidance`."""
        with th.enable_grad():  # imagination runs without
            states = step.clean[:, :-1].clone().requires_grad_()
            policy = step.policy(states)
            (score,) = th.autograd.grad(policy.log_prob(step.actions).sum(), states)
        score[:, 0] = 0.0  # the start is given
        delta = self.controller.bounded((policy.stddev.detach() / self.half_range).square())
        # No action is taken in the last state, so that nothing moves it.
        moved = th.cat([step.clean[:, :-1] + delta * score, step.clean[:, -1:]], dim=1)
        return super().guide(step._replace(clean=moved))


class RandomActions(nn.Module):
    """Ablation: no guidance. The actions stay the noise that they were to begin with."""

    def guide(self, step: DiffusionStep) -> tuple[th.Tensor, th.Tensor]:
        """See :class:`Guidance`."""
        return step.actions, step.clean

    def finish(self, actions: th.Tensor, policy: Normal) -> th.Tensor:
        """See :class:`Guidance`."""
        return actions

    def adapt(self, standardized_std: th.Tensor, policy_std: th.Tensor) -> dict[str, th.Tensor]:
        """See :class:`Guidance`; nothing to tune."""
        return {}


class PolicySampling(RandomActions):
    """Ablation: at every diffusion step new actions are drawn from the policy at the predicted clean states."""

    def guide(self, step: DiffusionStep) -> tuple[th.Tensor, th.Tensor]:
        """See :class:`Guidance`."""
        return step.policy(step.clean[:, :-1]).sample(), step.clean
