"""Updates of policy and critic from one imagined batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch as th
from torch import nn

from sb3_polygrad.core.optimizing import step_if
from sb3_polygrad.policy.samples import ImaginedRolloutBufferSamples

Evaluate = Callable[[th.Tensor, th.Tensor], tuple[th.Tensor, th.Tensor, th.Tensor | None]]
"""Observations and actions to values ``(batch, n_critics)``, log-probabilities ``(batch,)`` and entropies ``(batch,)``."""


Minibatches = Callable[[int | None], Iterator[ImaginedRolloutBufferSamples]]
"""All steps of an imagined batch: in minibatches of the given size in random order, or (None) at once."""


@dataclass
class Learner:
    """
    What an update changes.

    :param evaluate: the policy's ``evaluate_actions``
    :param values: observations to values ``(batch, n_critics)``
    :param entropies: observations to entropies of the policy ``(batch,)``
    :param actor: parameters of the actor
    :param critic: parameters of the critic
    :param optimizer: of both
    """

    evaluate: Evaluate
    values: Callable[[th.Tensor], th.Tensor]
    entropies: Callable[[th.Tensor], th.Tensor | None]
    actor: Sequence[nn.Parameter]
    critic: Sequence[nn.Parameter]
    optimizer: th.optim.Optimizer


@dataclass
class LossSettings:
    """
    :param ent_coef: weight of the entropy bonus
    :param vf_coef: weight of the value loss
    :param max_grad_norm: bound on the gradient's norm, for actor and critic each
    :param normalize_advantage: standardise advantages over each minibatch (pathwise: divide returns by their spread)
    """

    ent_coef: float
    vf_coef: float
    max_grad_norm: float
    normalize_advantage: bool


def masked_mean(values: th.Tensor, mask: th.Tensor) -> th.Tensor:
    """Mean over the steps that happened."""
    return (values * mask).sum() / mask.sum().clamp(min=1.0)


def standard_deviation(values: th.Tensor, mask: th.Tensor) -> th.Tensor:
    """Standard deviation over the steps that happened."""
    return masked_mean((values - masked_mean(values, mask)).square(), mask).sqrt()


def standardized(advantages: th.Tensor, mask: th.Tensor) -> th.Tensor:
    """Advantages with mean 0 and standard deviation 1 over the steps that happened."""
    return (advantages - masked_mean(advantages, mask)) / (standard_deviation(advantages, mask) + 1e-8)


def scale_step(
    parameters: Sequence[nn.Parameter],
    origin: Sequence[th.Tensor],
    measure: Callable[[], th.Tensor],
    target: float,
    tolerance: float = 0.2,
    max_trials: int = 1,
    max_scale: float = 3.0,
) -> tuple[th.Tensor, th.Tensor]:
    """
    Scale a step that was just taken so that its measured size meets a target; the paper's line search.

    To first order the size is proportional to the step, so each trial corrects the scale by target / measured: one trial
    is the first-order rule, more of them a search that ends within the tolerance. The paper's release instead shrinks or
    grows by a fixed ratio and lets the optimiser advance at every trial. Here every trial starts from the same saved
    parameters and the optimiser is not touched, so that the search leaves no trace. The first-order rule is reckoned on the
    device; between the trials of a search the host waits for the measure, to know whether to go on.

    :param parameters: they hold origin + step when called, origin + scale * step on return
    :param origin: their values before the step
    :param measure: size of the change for the current parameters, a scalar
    :param target: size that is wanted
    :param tolerance: accepted deviation as a share of the target
    :param max_trials: measurements of the size at most
    :param max_scale: the scale never exceeds this
    :return: scalars: the scale (0 if the step was undone because its size was not finite), and the size last measured: with
        one trial that of the step before it was scaled
    """
    steps = [parameter.detach() - start for parameter, start in zip(parameters, origin, strict=True)]
    scale = th.ones((), dtype=th.float64, device=steps[0].device)
    for trials_left in reversed(range(max_trials)):
        size = measure().double()
        close = (size - target).abs() <= tolerance * target
        corrected = th.where(close, scale, (scale * target / size.clamp(min=1e-12)).clamp(max=max_scale))
        corrected = th.where(size < th.inf, corrected, 0.0)  # NaN or infinite: no step at all
        # At its limit, too, it stays what it is: measuring again would say the same.
        settled = corrected == scale
        for parameter, start, step in zip(parameters, origin, steps, strict=True):
            scaled = th.where(corrected == 0.0, start, start + corrected.to(step.dtype) * step)
            parameter.detach().copy_(th.where(settled, parameter.detach(), scaled))
        scale = corrected
        if trials_left and (settled | (scale == 0.0)):
            break
    return scale, size


def follow(
    optimizer: th.optim.Optimizer, total: th.Tensor, max_grad_norm: float, *groups: Sequence[nn.Parameter]
) -> th.Tensor:
    """
    One step of an optimiser.

    :param optimizer: of all groups, and maybe of parameters that are to stay
    :param total: the loss
    :param max_grad_norm: bound on the norm of each group's gradient
    :param groups: what to change; the loss depends on some of each
    :return: 1 if the step was skipped since the gradient was not finite, else 0
    """
    optimizer.zero_grad(set_to_none=True)
    total.backward(inputs=[parameter for group in groups for parameter in group])
    norms = [nn.utils.clip_grad_norm_(group, max_grad_norm) for group in groups]
    usable = th.isfinite(th.stack(norms)).all()
    step_if(usable, optimizer)  # else no trace is left in parameters or optimiser
    return 1.0 - usable.float()


def gradient_step(
    learner: Learner,
    policy_loss: th.Tensor,
    values: th.Tensor,
    entropy: th.Tensor | None,
    samples: ImaginedRolloutBufferSamples,
    loss: LossSettings,
) -> dict[str, th.Tensor]:
    """
    One step of the optimiser on policy loss, value loss and entropy bonus.

    :param learner: what to change
    :param policy_loss: scalar
    :param values: ``(batch, n_critics)`` predictions
    :param entropy: ``(batch,)`` of the policy
    :param samples: the minibatch
    :param loss: weights of the loss
    :return: the losses, and whether the step was skipped since the gradient was not finite
    """
    value_loss = masked_mean((values - samples.returns[:, None]).square().mean(dim=1), samples.mask)
    assert entropy is not None, "imagination needs a policy whose entropy is known"
    entropy_loss = -masked_mean(entropy, samples.mask)
    total = policy_loss + loss.vf_coef * value_loss + loss.ent_coef * entropy_loss
    skipped = follow(learner.optimizer, total, loss.max_grad_norm, learner.actor, learner.critic)
    losses = {"loss": total, "policy_loss": policy_loss, "value_loss": value_loss, "entropy_loss": entropy_loss}
    return {**{name: value.detach() for name, value in losses.items()}, "skipped": skipped}


class PolicyUpdate(Protocol):
    """One update of policy and critic from one imagined batch."""

    def __call__(self, learner: Learner, minibatches: Minibatches, loss: LossSettings) -> dict[str, th.Tensor]:
        """
        :param learner: what to change
        :param minibatches: the imagined batch
        :param loss: weights of the loss
        :return: what there is to log
        """
        ...


@dataclass
class A2CUpdate:
    """
    The paper's update: one A2C gradient step whose size in policy space is held at a target (Table 1).

    The size is the mean of ``|log π_new(a|s) - log π_old(a|s)|`` over the imagined batch (Appendix A).

    :param target_update: wanted size; None to take the optimiser's step as it is
    :param max_trials: 1 scales the step once (first order; ``update_size`` is then that of the step before scaling), more
        search until within 20 % of the target (50 in the release)
    :param max_scale: the optimiser's step is never scaled by more than this
    """

    target_update: float | None = 0.02
    max_trials: int = 1
    max_scale: float = 3.0

    def __call__(self, learner: Learner, minibatches: Minibatches, loss: LossSettings) -> dict[str, th.Tensor]:
        """See :class:`PolicyUpdate`."""
        samples = next(minibatches(None))
        origin = [parameter.detach().clone() for parameter in learner.actor]
        advantages = standardized(samples.advantages, samples.mask) if loss.normalize_advantage else samples.advantages
        values, log_prob, entropy = learner.evaluate(samples.observations, samples.actions)
        policy_loss = -masked_mean(advantages * log_prob, samples.mask)
        metrics = gradient_step(learner, policy_loss, values, entropy, samples, loss)

        @th.no_grad()
        def size() -> th.Tensor:
            log_prob = learner.evaluate(samples.observations, samples.actions)[1]
            return masked_mean((log_prob - samples.old_log_prob).abs(), samples.mask)

        if self.target_update is None:
            return {**metrics, "update_size": size()}
        scale, measured = scale_step(
            learner.actor, origin, size, self.target_update, max_trials=self.max_trials, max_scale=self.max_scale
        )
        return {**metrics, "update_size": measured, "step_scale": scale}


@dataclass
class PPOUpdate:
    """
    Several clipped epochs over one imagined batch (Schulman et al., 2017).

    Departs from the paper, which takes one A2C step per imagined batch and throws it away.

    :param clip_range: bound on the change of the probability ratio
    :param n_epochs: passes over the batch
    :param n_minibatches: gradient steps per pass
    :param target_kl: stop after the step before which the policy had moved more than 1.5 times this; None for no limit
    """

    clip_range: float = 0.1
    n_epochs: int = 4
    n_minibatches: int = 2
    target_kl: float | None = None

    def __call__(self, learner: Learner, minibatches: Minibatches, loss: LossSettings) -> dict[str, th.Tensor]:
        """See :class:`PolicyUpdate`."""
        n_steps = next(minibatches(None)).mask.numel()
        minibatch_size = -(-n_steps // self.n_minibatches)
        metrics: dict[str, th.Tensor] = {}
        skipped: list[th.Tensor] = []
        for _ in range(self.n_epochs):
            for samples in minibatches(minibatch_size):
                mask = samples.mask
                advantages = standardized(samples.advantages, mask) if loss.normalize_advantage else samples.advantages
                values, log_prob, entropy = learner.evaluate(samples.observations, samples.actions)
                log_ratio = log_prob - samples.old_log_prob
                ratio = log_ratio.exp()
                clipped = ratio.clamp(1.0 - self.clip_range, 1.0 + self.clip_range)
                policy_loss = -masked_mean(th.minimum(advantages * ratio, advantages * clipped), mask)
                metrics = gradient_step(learner, policy_loss, values, entropy, samples, loss)
                skipped.append(metrics["skipped"])
                metrics["skipped"] = th.stack(skipped).mean()  # of all steps; the rest is about the last one
                with th.no_grad():
                    metrics["approx_kl"] = masked_mean(ratio - 1.0 - log_ratio, mask)
                    metrics["clip_fraction"] = masked_mean(((ratio - 1.0).abs() > self.clip_range).float(), mask)
                    metrics["update_size"] = masked_mean(log_ratio.abs(), mask)
                if self.target_kl is not None and metrics["approx_kl"] > 1.5 * self.target_kl:
                    return metrics
        return metrics


@dataclass
class PathwiseUpdate:
    """
    One step of the actor along the gradient of the imagined returns, through the world model; then several of the critic.

    Departs from the paper, whose sampler has no such gradient: here every action is a function of state and noise, and what it
    causes a function of the action (:meth:`~sb3_polygrad.world_models.base.WorldModel.imagine_expected`). The gradient of one
    batch says far more than the A2C estimate made of the same batch: docs/tuning.md. (As in Dreamer, Hafner et al., 2020,
    and SVG, Heess et al., 2015.)

    The minibatches' ``returns`` are differentiable, λ-returns of every imagined step; each counts with its probability, which
    is held fixed.

    :param n_epochs: passes of the critic over the batch
    :param n_minibatches: gradient steps of the critic per pass
    """

    n_epochs: int = 2
    n_minibatches: int = 2

    def __call__(self, learner: Learner, minibatches: Minibatches, loss: LossSettings) -> dict[str, th.Tensor]:
        """See :class:`PolicyUpdate`."""
        optimizer, samples = learner.optimizer, next(minibatches(None))
        mask, returns = samples.mask.detach(), samples.returns
        if loss.normalize_advantage:
            returns = returns / (standard_deviation(returns.detach(), mask) + 1e-8)
        entropy = learner.entropies(samples.observations.detach())
        assert entropy is not None, "imagination needs a policy whose entropy is known"
        policy_loss, entropy_loss = -masked_mean(returns, mask), -masked_mean(entropy, mask)
        actor_loss = policy_loss + loss.ent_coef * entropy_loss
        skipped_actor = follow(optimizer, actor_loss, loss.max_grad_norm, learner.actor)
        skipped = []
        minibatch_size = -(-mask.numel() // self.n_minibatches)
        for _ in range(self.n_epochs):
            for samples in minibatches(minibatch_size):
                errors = learner.values(samples.observations.detach()) - samples.returns.detach()[:, None]
                value_loss = masked_mean(errors.square().mean(dim=1), samples.mask.detach())
                skipped.append(follow(optimizer, loss.vf_coef * value_loss, loss.max_grad_norm, learner.critic))
        losses = {"policy_loss": policy_loss, "entropy_loss": entropy_loss, "value_loss": value_loss}
        losses["loss"] = actor_loss + loss.vf_coef * value_loss
        # An actor that never learns is not made up for by a critic that does.
        faulty = th.maximum(skipped_actor, th.stack(skipped).mean())
        return {**{name: value.detach() for name, value in losses.items()}, "skipped": faulty}
