"""Updates of policy and critics from one imagined batch: the paper's A2C step, PPO, and pathwise gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol

import torch as th

from sb3_polygrad.common.line_search import scale_step
from sb3_polygrad.common.optimizing import gradient_step
from sb3_polygrad.common.validation import Count, Fraction, Positive, Range, check_settings, choose
from sb3_polygrad.imagined_buffer import ImaginedRolloutBuffer, ImaginedSamples
from sb3_polygrad.policies import PolyGRADPolicy

Metrics = dict[str, th.Tensor]


class PolicyUpdate(Protocol):
    """One update of policy and critics (Algorithm 3, line 8). It is made once and owns its settings."""

    differentiable: ClassVar[bool]
    """Whether the imagined batch must have gradients with respect to the actions."""

    @property
    def n_continuations(self) -> int:
        """Times that imagined trajectories are continued, see :class:`~sb3_polygrad.imagination.StartStates`."""

    def __call__(self, policy: PolyGRADPolicy, buffer: ImaginedRolloutBuffer) -> Metrics:
        """
        :param policy: what to change; the learning rates of its optimisers are those of their schedules
        :param buffer: the imagined batch, with returns and advantages
        :return: scalars to log; ``"skipped"`` is the fraction of the gradient steps that were not finite, and not taken
        """
        ...


def masked_mean(values: th.Tensor, mask: th.Tensor) -> th.Tensor:
    """Mean over the steps that happened."""
    return (values * mask).sum() / mask.sum().clamp(min=1.0)


def masked_std(values: th.Tensor, mask: th.Tensor) -> th.Tensor:
    """Standard deviation over the steps that happened."""
    return masked_mean((values - masked_mean(values, mask)).square(), mask).sqrt()


def standardized(advantages: th.Tensor, mask: th.Tensor) -> th.Tensor:
    """Advantages with mean 0 and standard deviation 1 over the steps that happened."""
    return (advantages - masked_mean(advantages, mask)) / (masked_std(advantages, mask) + 1e-8)


def value_loss(values: th.Tensor, returns: th.Tensor, mask: th.Tensor) -> th.Tensor:
    """
    Squared error of all critics.

    :param values: ``(batch, n_critics)``
    :param returns: ``(batch,)`` their common target
    :param mask: ``(batch,)``
    """
    return masked_mean((values - returns[:, None]).square().mean(dim=1), mask)


@dataclass
class PathwiseUpdate:
    """
    One actor step up the gradient of the imagined returns, through the world model; then several steps of the critics.

    Departs from the paper, whose sampler has no such gradient: here every action is a function of state and noise, and every
    next state a function of the action. (As in SVG, Heess et al., 2015, and Dreamer, Hafner et al., 2020.) The returns are
    λ-returns of every imagined step in units of their standard deviation; each counts with the probability that it happens,
    which is held fixed.

    :param n_epochs: passes of the critics over the batch
    :param n_minibatches: gradient steps of the critics per pass
    :param n_continuations: times that an imagined trajectory is continued in the batches after
    :param ent_coef: weight of the entropy bonus
    :param max_grad_norm: bound on the gradient's norm, for actor and critics each
    """

    differentiable: ClassVar[bool] = True

    n_epochs: Count = 2
    n_minibatches: Count = 2
    n_continuations: Annotated[int, Range(0)] = 3
    ent_coef: float = 1e-5
    max_grad_norm: Positive = 0.5

    def __call__(self, policy: PolyGRADPolicy, buffer: ImaginedRolloutBuffer) -> Metrics:
        """See :class:`PolicyUpdate`."""
        # Actor: up the gradient of the returns
        samples = buffer.all_steps()
        mask = samples.mask.detach()
        returns = samples.returns / (masked_std(samples.returns.detach(), mask) + 1e-8)
        entropy = policy.get_distribution(samples.observations.detach()).entropy()
        assert entropy is not None, "imagination needs a policy whose entropy is known"
        policy_loss, entropy_loss = -masked_mean(returns, mask), -masked_mean(entropy, mask)
        actor_loss = policy_loss + self.ent_coef * entropy_loss
        skipped = gradient_step(policy.actor_optimizer, actor_loss, policy.actor_parameters(), self.max_grad_norm)
        buffer.detach()

        # Critics: towards the same returns
        critic_skipped = []
        for samples in buffer.minibatches(self.n_epochs, self.n_minibatches):
            critic_loss = value_loss(policy.predict_values(samples.observations), samples.returns, samples.mask)
            critic_skipped.append(
                gradient_step(policy.critic_optimizer, critic_loss, policy.critic_parameters(), self.max_grad_norm)
            )
        return {
            "policy_loss": policy_loss.detach(),
            "entropy_loss": entropy_loss.detach(),
            "value_loss": critic_loss.detach(),
            # The worse of the two: critics that learn do not make up for an actor that never does.
            "skipped": th.maximum(skipped, th.stack(critic_skipped).mean()),
        }


def _likelihood_ratio_step(
    policy: PolyGRADPolicy,
    policy_loss: th.Tensor,
    values: th.Tensor,
    entropy: th.Tensor | None,
    samples: ImaginedSamples,
    ent_coef: float,
    max_grad_norm: float,
) -> Metrics:
    """One step of actor and critics each, on policy loss, entropy bonus and value loss."""
    assert entropy is not None, "imagination needs a policy whose entropy is known"
    entropy_loss = -masked_mean(entropy, samples.mask)
    critic_loss = value_loss(values, samples.returns, samples.mask)
    actor_loss = policy_loss + ent_coef * entropy_loss
    skipped = [
        gradient_step(policy.critic_optimizer, critic_loss, policy.critic_parameters(), max_grad_norm),
        gradient_step(policy.actor_optimizer, actor_loss, policy.actor_parameters(), max_grad_norm),
    ]
    return {
        "policy_loss": policy_loss.detach(),
        "entropy_loss": entropy_loss.detach(),
        "value_loss": critic_loss.detach(),
        "skipped": th.maximum(*skipped),
    }


@dataclass
class PPOUpdate:
    """
    Several clipped epochs over one imagined batch (Schulman et al., 2017).

    Departs from the paper, which takes one A2C step per imagined batch.

    :param clip_range: bound on the change of the probability ratio
    :param n_epochs: passes over the batch
    :param n_minibatches: gradient steps per pass
    :param ent_coef: weight of the entropy bonus
    :param max_grad_norm: bound on the gradient's norm, for actor and critics each
    """

    differentiable: ClassVar[bool] = False
    n_continuations: ClassVar[int] = 0

    clip_range: Positive = 0.1
    n_epochs: Count = 2
    n_minibatches: Count = 2
    ent_coef: float = 1e-5
    max_grad_norm: Positive = 0.5

    def __call__(self, policy: PolyGRADPolicy, buffer: ImaginedRolloutBuffer) -> Metrics:
        """See :class:`PolicyUpdate`."""
        skipped = []
        for samples in buffer.minibatches(self.n_epochs, self.n_minibatches):
            mask, advantages = samples.mask, standardized(samples.advantages, samples.mask)
            values, log_prob, entropy = policy.evaluate_actions(samples.observations, samples.actions)
            log_ratio = log_prob - samples.old_log_prob
            ratio = log_ratio.exp()
            clipped = ratio.clamp(1.0 - self.clip_range, 1.0 + self.clip_range)
            policy_loss = -masked_mean(th.minimum(advantages * ratio, advantages * clipped), mask)
            metrics = _likelihood_ratio_step(policy, policy_loss, values, entropy, samples, self.ent_coef, self.max_grad_norm)
            skipped.append(metrics["skipped"])
        with th.no_grad():  # of the last minibatch
            metrics["approx_kl"] = masked_mean(ratio - 1.0 - log_ratio, mask)
            metrics["clip_fraction"] = masked_mean(((ratio - 1.0).abs() > self.clip_range).float(), mask)
            metrics["update_size"] = masked_mean(log_ratio.abs(), mask)
        return {**metrics, "skipped": th.stack(skipped).mean()}


@dataclass
class A2CUpdate:
    """
    The paper's update: one A2C gradient step whose size in policy space is held at a target (Table 1).

    The size is the mean of ``|log π_new(a|s) - log π_old(a|s)|`` over the imagined batch (Appendix A). As in the release, the
    actor's learning rate may adapt to the corrections of the step; the schedule is its upper limit. The fraction of the
    schedule is a field of the actor's optimiser, and is saved with it.

    :param target_step_size: size that is wanted; None takes the optimiser's step as it is
    :param line_search_max_iter: 1 scales the step once, to first order (``update_size`` is then that of the step before
        scaling); more search until the size is within 20 % of the target (50 in the release)
    :param learning_rate_adaptation: part of each correction that the learning rate keeps, in log space; 0 leaves it to the
        schedule alone
    :param ent_coef: weight of the entropy bonus
    :param max_grad_norm: bound on the gradient's norm, for actor and critics each
    """

    differentiable: ClassVar[bool] = False
    n_continuations: ClassVar[int] = 0
    max_scale: ClassVar[float] = 3.0

    target_step_size: Positive | None = 0.02
    line_search_max_iter: Count = 1
    learning_rate_adaptation: Fraction = 0.0
    ent_coef: float = 1e-5
    max_grad_norm: Positive = 0.5

    def __call__(self, policy: PolyGRADPolicy, buffer: ImaginedRolloutBuffer) -> Metrics:
        """See :class:`PolicyUpdate`."""
        samples = buffer.all_steps()
        groups = policy.actor_optimizer.param_groups
        fraction = groups[0].setdefault("schedule_fraction", 1.0)
        for group in groups:
            group["lr"] *= fraction
        parameters = policy.actor_parameters()
        origin = [parameter.detach().clone() for parameter in parameters]
        advantages = standardized(samples.advantages, samples.mask)
        values, log_prob, entropy = policy.evaluate_actions(samples.observations, samples.actions)
        policy_loss = -masked_mean(advantages * log_prob, samples.mask)
        metrics = _likelihood_ratio_step(policy, policy_loss, values, entropy, samples, self.ent_coef, self.max_grad_norm)

        @th.no_grad()
        def step_size() -> th.Tensor:
            log_prob = policy.get_distribution(samples.observations).log_prob(samples.actions)
            return masked_mean((log_prob - samples.old_log_prob).abs(), samples.mask)

        if self.target_step_size is None:
            return {**metrics, "update_size": step_size()}
        # The learning rate never exceeds its schedule, neither by adaptation nor by the search.
        max_scale = min(self.max_scale, 1.0 / fraction) if self.learning_rate_adaptation > 0.0 else self.max_scale
        scale, measured = scale_step(
            parameters, origin, step_size, self.target_step_size, max_trials=self.line_search_max_iter, max_scale=max_scale
        )
        # A step that was undone or not taken says nothing.
        if self.learning_rate_adaptation > 0.0 and scale > 0.0 and metrics["skipped"] == 0.0:
            groups[0]["schedule_fraction"] = min(1.0, fraction * float(scale) ** self.learning_rate_adaptation)
        return {**metrics, "update_size": measured, "step_scale": scale}


UPDATES: dict[str, Any] = {
    "pathwise": PathwiseUpdate,
    "ppo": PPOUpdate,
    "a2c": A2CUpdate,
}
"""Updates by name. ``ent_coef`` and ``max_grad_norm`` are PolyGRAD's arguments, the rest are its ``policy_update_kwargs``."""


def make_update(
    name: str | None, kwargs: Mapping[str, Any] | None, ent_coef: float, max_grad_norm: float, differentiable: bool
) -> PolicyUpdate:
    """
    :param name: of the update; None for pathwise where the world model is differentiable, else PPO
    :param kwargs: its settings; None for the defaults
    :param ent_coef: weight of the entropy bonus
    :param max_grad_norm: bound on the gradient's norm
    :param differentiable: whether the world model is
    :raises ValueError: for an unknown name or setting, or pathwise gradients through a world model that has none
    :raises TypeError: for a setting of another type
    """
    kwargs = kwargs or {}
    name = choose("policy_update", name or ("pathwise" if differentiable else "ppo"), UPDATES)
    update = UPDATES[name]
    if update.differentiable and not differentiable:
        raise ValueError(
            "policy_update='pathwise' needs gradients, and this world model is not differentiable: choose "
            "policy_update='ppo', or leave it to the default"
        )
    check_settings("policy_update_kwargs", update, kwargs, not_settings=("ent_coef", "max_grad_norm"))
    return update(**kwargs, ent_coef=ent_coef, max_grad_norm=max_grad_norm)
