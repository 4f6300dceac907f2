"""Policy updates on a Gaussian bandit whose gradients are known, and the line search alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch import nn

from sb3_polygrad.common.line_search import scale_step
from sb3_polygrad.imagined_buffer import ImaginedRolloutBuffer, ImaginedSamples
from sb3_polygrad.updates import (
    UPDATES,
    A2CUpdate,
    PathwiseUpdate,
    PPOUpdate,
    make_update,
    masked_mean,
    standardized,
)
from tests.toys import equal_trees

ONE_STEP = dict(n_epochs=1, n_minibatches=1)
PLAIN: dict[str, Any] = dict(ent_coef=0.0, max_grad_norm=1e9)
RETURN = 2.0


class Bandit(nn.Module):
    """Policy N(mean, 1) of one action and a constant value, behind what an update asks of a policy."""

    def __init__(self, optimizer: type[th.optim.Optimizer] = th.optim.SGD, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.mean, self.value = nn.Parameter(th.zeros(1)), nn.Parameter(th.zeros(1))
        self.actor_optimizer = optimizer([self.mean], lr=learning_rate)  # type: ignore[call-arg]
        self.critic_optimizer = optimizer([self.value], lr=learning_rate)  # type: ignore[call-arg]
        self.entropy_slope = 0.0

    def actor_parameters(self) -> list[nn.Parameter]:
        return [self.mean]

    def critic_parameters(self) -> list[nn.Parameter]:
        return [self.value]

    def get_distribution(self, observations: th.Tensor) -> Bandit:
        return self

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        return -0.5 * (actions[:, 0] - self.mean) ** 2 - 0.5 * math.log(2 * math.pi)

    def entropy(self) -> th.Tensor:
        return 1.0 + self.entropy_slope * self.mean

    def predict_values(self, observations: th.Tensor) -> th.Tensor:
        return self.value.expand(len(observations), 1)

    def evaluate_actions(self, observations: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        return self.predict_values(observations), self.log_prob(actions), self.entropy().expand(len(actions))

    def state(self) -> Any:
        """All that an update may change."""
        return copy.deepcopy((self.state_dict(), self.actor_optimizer.state_dict(), self.critic_optimizer.state_dict()))

    def batch(
        self, actions: list[float], advantages: list[float], mask: list[float] | None = None, **changes: list[float]
    ) -> ImaginedRolloutBuffer:
        columns = th.tensor(actions)[:, None]
        samples = ImaginedSamples(
            columns,
            columns,
            self.log_prob(columns).detach(),
            th.tensor(advantages),
            th.full((len(actions),), RETURN),
            th.tensor(mask or [1.0] * len(actions)),
        )
        return buffer_of(samples._replace(**{name: th.tensor(values) for name, values in changes.items()}))


def buffer_of(samples: ImaginedSamples) -> ImaginedRolloutBuffer:
    box = spaces.Box(-np.inf, np.inf, (1,))
    buffer = ImaginedRolloutBuffer(len(samples.mask), box, box, "cpu")
    buffer.samples = samples
    return buffer


def apply(update: Any, bandit: Bandit, batch: ImaginedRolloutBuffer) -> dict[str, float]:
    return {name: float(value) for name, value in update(bandit, batch).items()}


def standard(advantages: list[float]) -> list[float]:
    mean = sum(advantages) / len(advantages)
    std = math.sqrt(sum((a - mean) ** 2 for a in advantages) / len(advantages))
    return [(a - mean) / std for a in advantages]


LIKELIHOOD_RATIO = {
    "a2c": lambda **settings: A2CUpdate(target_step_size=None, **settings),
    "ppo": lambda **settings: PPOUpdate(**ONE_STEP, **settings),
}
every_update = pytest.mark.parametrize("make", LIKELIHOOD_RATIO.values(), ids=LIKELIHOOD_RATIO)


# ---------------------------------------------------------------------- scale_step


def step_of(*values: float) -> tuple[list[nn.Parameter], list[th.Tensor]]:
    """Parameters that were at 1, 2, ... and made a step of these sizes."""
    origin = [th.full((2,), float(k + 1)) for k in range(len(values))]
    return [nn.Parameter(start + value) for start, value in zip(origin, values, strict=True)], origin


def length(parameters: list[nn.Parameter], origin: list[th.Tensor]) -> th.Tensor:
    """Sum of absolute changes: proportional to the step."""
    return sum((p - start).abs().sum() for p, start in zip(parameters, origin, strict=True)).detach()  # type: ignore[union-attr]


@pytest.mark.parametrize("target", [0.3, 3.0, 14.0])
def test_one_trial_is_right_for_a_linear_size(target: float) -> None:
    parameters, origin = step_of(1.0, -2.0)  # size 6
    scale, _ = scale_step(parameters, origin, lambda: length(parameters, origin), target)
    assert scale == pytest.approx(target / 6.0)
    assert length(parameters, origin).item() == pytest.approx(target, rel=1e-5)
    assert th.allclose(parameters[1].detach(), origin[1] - 2.0 * scale), "the direction is kept"


def test_scale_has_an_upper_bound() -> None:
    parameters, origin = step_of(1.0)
    scale, _ = scale_step(parameters, origin, lambda: length(parameters, origin), target=1e6, max_scale=3.0, max_trials=5)
    assert scale == 3.0
    assert th.allclose(parameters[0].detach(), origin[0] + 3.0)


def test_a_search_does_not_go_on_at_its_limit() -> None:
    parameters, origin = step_of(1.0)
    measured = []

    def size() -> th.Tensor:
        measured.append(length(parameters, origin))
        return measured[-1]

    scale, _ = scale_step(parameters, origin, size, target=1e6, max_scale=1.0, max_trials=50)
    assert scale == 1.0 and len(measured) == 1


def test_a_step_within_the_tolerance_is_left_alone() -> None:
    parameters, origin = step_of(1.0)
    before = parameters[0].detach().clone()
    assert scale_step(parameters, origin, lambda: length(parameters, origin), target=2.2, tolerance=0.2) == (1.0, 2.0)
    assert th.equal(parameters[0], before)


@pytest.mark.parametrize("n_good_trials", [0, 1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_size_that_is_not_finite_restores_everything_exactly(n_good_trials: int, value: float) -> None:
    # 0.1 and 0.2 are no sums of powers of two: adding and subtracting a step would not restore them.
    origin = [th.tensor([0.1, 0.2]), th.tensor([1e-8])]
    parameters = [nn.Parameter(start + 1.0 / 3.0) for start in origin]
    sizes = iter([100.0] * n_good_trials + [value])
    scale, _ = scale_step(parameters, origin, lambda: th.tensor(next(sizes)), target=1.0, max_trials=10)
    assert scale == 0.0
    assert all(th.equal(p, start) for p, start in zip(parameters, origin, strict=True))


@pytest.mark.parametrize("target", [0.05, 0.3, 4.0])
@pytest.mark.parametrize("bend", [lambda x: x.sqrt(), lambda x: x + x.square()])
def test_a_search_ends_within_the_tolerance(bend: Callable[[th.Tensor], th.Tensor], target: float) -> None:
    parameters, origin = step_of(1.0)  # length 2

    def size() -> th.Tensor:
        return bend(length(parameters, origin))

    _, measured = scale_step(parameters, origin, size, target, tolerance=0.05, max_trials=50, max_scale=100.0)
    assert abs(measured - target) <= 0.05 * target
    assert size().item() == pytest.approx(measured.item(), rel=1e-6), "what was measured is what is left behind"


# ---------------------------------------------------------------------- one gradient step


@every_update
def test_gradient_of_a_gaussian_policy(make: Any) -> None:
    # ∇ mean E[A log π] = mean(A (a - μ)); ∇ of the squared error at 0 with returns 2: 2 * (0 - 2) = -4.
    bandit, actions, advantages = Bandit(), [1.0, -2.0, 0.5], [1.0, 2.0, -4.0]
    apply(make(**PLAIN), bandit, bandit.batch(actions, advantages))
    expected = sum(a * advantage for a, advantage in zip(actions, standard(advantages), strict=True)) / 3
    assert bandit.mean.item() == pytest.approx(0.1 * expected)
    assert bandit.value.item() == pytest.approx(0.1 * 2.0 * RETURN)


@every_update
def test_steps_after_an_ending_have_no_weight(make: Any) -> None:
    clean, padded, settings = Bandit(), Bandit(), dict(ent_coef=0.01, max_grad_norm=1e9)
    metrics = apply(make(**settings), clean, clean.batch([1.0, -2.0], [1.0, 3.0]))
    batch = padded.batch([1.0, -2.0, 5.0], [1.0, 3.0, 70.0], mask=[1.0, 1.0, 0.0], returns=[2.0, 2.0, -60.0])
    padded_metrics = apply(make(**settings), padded, batch)
    assert padded.mean.item() == pytest.approx(clean.mean.item()) and clean.mean.item() != 0.0
    assert padded.value.item() == pytest.approx(clean.value.item())
    assert padded_metrics == pytest.approx(metrics)


def test_advantages_are_standardised_over_what_happened() -> None:
    result = standardized(th.tensor([1.0, 3.0, 5.0, 99.0]), th.tensor([1.0, 1.0, 1.0, 0.0]))[:3]
    assert result.tolist() == pytest.approx([-math.sqrt(1.5), 0.0, math.sqrt(1.5)])


def test_masked_mean() -> None:
    assert masked_mean(th.tensor([1.0, 3.0, 99.0]), th.tensor([1.0, 1.0, 0.0])).item() == 2.0
    assert masked_mean(th.tensor([5.0]), th.tensor([0.0])).item() == 0.0, "nothing happened: no division by zero"


@every_update
def test_gradients_of_actor_and_critic_are_clipped_apart(make: Any) -> None:
    bandit = Bandit()
    apply(make(ent_coef=0.0, max_grad_norm=0.01), bandit, bandit.batch([1.0, -1.0], [5.0, -5.0], returns=[1e6, 1e6]))
    assert bandit.mean.item() == pytest.approx(0.1 * 0.01), "a huge value loss does not shrink the actor's step"
    assert bandit.value.item() == pytest.approx(0.1 * 0.01)


@pytest.mark.parametrize("name", UPDATES)
def test_the_entropy_bonus_is_paid_for(name: str) -> None:
    bandit = Bandit()
    bandit.entropy_slope = 2.0
    update = make_update(name, {}, ent_coef=0.3, max_grad_norm=1e9, differentiable=name == "pathwise")
    if isinstance(update, A2CUpdate):
        update.target_step_size = None
    if isinstance(update, PPOUpdate):
        update.n_epochs = update.n_minibatches = 1
    metrics = apply(update, bandit, bandit.batch([0.0, 0.0], [0.0, 0.0]))
    assert metrics["entropy_loss"] == pytest.approx(-1.0)
    # (The returns of this batch do not depend on the actor.)
    assert bandit.mean.item() == pytest.approx(0.1 * 0.3 * 2.0), "learning rate times weight times slope"


# ---------------------------------------------------------------------- A2C with a target


@pytest.mark.parametrize("max_trials", [1, 20])
def test_a2c_step_has_the_target_size(max_trials: int) -> None:
    bandit = Bandit(th.optim.Adam, learning_rate=0.5)
    batch = bandit.batch([1.0, -2.0, 0.5], [1.0, 2.0, -4.0])
    apply(A2CUpdate(target_step_size=0.02, line_search_max_iter=max_trials, **PLAIN), bandit, batch)
    samples = batch.all_steps()
    after = bandit.log_prob(samples.actions)
    assert (after - samples.old_log_prob).abs().mean().item() == pytest.approx(0.02, rel=0.2)


def test_a2c_target_leaves_critic_and_optimiser_as_one_plain_step_does() -> None:
    plain, searched = Bandit(th.optim.Adam, 0.5), Bandit(th.optim.Adam, 0.5)
    for bandit, target in ((plain, None), (searched, 0.02)):
        update = A2CUpdate(target_step_size=target, line_search_max_iter=20, **PLAIN)
        apply(update, bandit, bandit.batch([1.0, -2.0], [1.0, 2.0]))
    assert not th.equal(searched.mean, plain.mean) and th.equal(searched.value, plain.value), "only the actor's step is scaled"
    assert equal_trees(searched.state()[1:], plain.state()[1:]), "the optimisers advance once"
    assert searched.actor_optimizer.state[searched.mean]["step"] == 1


def adaptive(bandit: Bandit, target: float, adaptation: float, actions: list[float]) -> tuple[float, float]:
    """One update of a bandit whose schedule says 0.1, from mean 0; the scale of its step, and the fraction afterwards."""
    bandit.mean.detach().zero_()
    bandit.actor_optimizer.param_groups[0]["lr"] = 0.1
    update = A2CUpdate(target_step_size=target, learning_rate_adaptation=adaptation, **PLAIN)
    scale = apply(update, bandit, bandit.batch(actions, actions))["step_scale"]
    return scale, bandit.actor_optimizer.param_groups[0]["schedule_fraction"]


def test_the_learning_rate_goes_where_the_target_is_met() -> None:
    # Advantages ±1 at actions ±1: the gradient is 1, and a step of learning rate 0.1 has the size 0.1, four times too much.
    bandit = Bandit()
    scale, fraction = adaptive(bandit, target=0.025, adaptation=0.2, actions=[1.0, -1.0])
    assert scale == pytest.approx(0.25) and fraction == pytest.approx(0.25**0.2), "a fifth of the way in log space"
    scale, _ = adaptive(bandit, target=0.025, adaptation=0.2, actions=[1.0, -1.0])
    assert scale == pytest.approx(0.25 ** (1 - 0.2)), "the next step is taken with it"
    for _ in range(60):
        scale, fraction = adaptive(bandit, target=0.025, adaptation=0.2, actions=[1.0, -1.0])
    # A step within the tolerance is left as it is, and with it the learning rate.
    assert scale == 1.0 and 0.25 < fraction <= 0.25 * 1.2


def test_the_learning_rate_keeps_to_its_schedule() -> None:
    bandit = Bandit()
    assert adaptive(bandit, target=1.0, adaptation=0.5, actions=[1.0, -1.0]) == (1.0, 1.0), "the schedule is the limit"
    assert bandit.mean.item() == pytest.approx(0.1)
    scale, fraction = adaptive(bandit, target=0.025, adaptation=0.0, actions=[1.0, -1.0])
    assert scale == pytest.approx(0.25) and fraction == 1.0, "no adaptation"
    scale, fraction = adaptive(bandit, target=1.0, adaptation=0.0, actions=[1.0, -1.0])
    assert scale == pytest.approx(3.0), "without adaptation a step may be longer than the schedule says"


def test_a_step_that_was_undone_or_skipped_does_not_change_the_learning_rate() -> None:
    bandit = Bandit()
    _, fraction = adaptive(bandit, target=0.025, adaptation=0.5, actions=[1.0, -1.0])
    assert fraction == pytest.approx(0.5)
    assert adaptive(bandit, target=0.025, adaptation=0.5, actions=[math.nan, -1.0])[1] == fraction
    assert bandit.mean.item() == 0.0
    # A policy whose log-probabilities are infinite after the step.
    bandit.log_prob = lambda actions: Bandit.log_prob(bandit, actions) / (bandit.mean == 0.0)  # type: ignore[method-assign]
    assert adaptive(bandit, target=0.025, adaptation=0.5, actions=[1.0, -1.0]) == (0.0, fraction)
    assert bandit.mean.item() == 0.0


@pytest.mark.parametrize(
    "update",
    [
        A2CUpdate(target_step_size=0.02, **PLAIN),
        A2CUpdate(target_step_size=0.02, learning_rate_adaptation=0.2, **PLAIN),
        PPOUpdate(n_minibatches=1, **PLAIN),
    ],
)
def test_a_batch_that_is_not_finite_leaves_no_trace(update: A2CUpdate | PPOUpdate) -> None:
    bandit = Bandit(th.optim.Adam)
    apply(update, bandit, bandit.batch([1.0, 2.0], [1.0, 0.0]))
    bandit.actor_optimizer.param_groups[0]["lr"] = 0.1  # as the schedule says before every update
    before = bandit.state()
    metrics = apply(update, bandit, bandit.batch([1.0, 2.0], [math.nan, 1.0], returns=[math.inf, 1.0]))
    bandit.actor_optimizer.param_groups[0]["lr"] = 0.1
    assert metrics["skipped"] == 1.0 and equal_trees(bandit.state(), before)


@every_update
def test_a_value_that_is_not_finite_is_the_critics_own_affair(make: Any) -> None:
    bandit = Bandit()
    metrics = apply(make(**PLAIN), bandit, bandit.batch([1.0, -1.0], [1.0, -1.0], returns=[math.inf, 1.0]))
    assert metrics["skipped"] == 1.0, "the worse of the two is reported"
    assert bandit.value.item() == 0.0 and bandit.mean.item() == pytest.approx(0.1)


# ---------------------------------------------------------------------- PPO


def test_ppo_takes_its_epochs_of_minibatches() -> None:
    bandit = Bandit(th.optim.Adam)
    apply(PPOUpdate(n_epochs=3, n_minibatches=2, **PLAIN), bandit, bandit.batch([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]))
    assert bandit.actor_optimizer.state[bandit.mean]["step"] == bandit.critic_optimizer.state[bandit.value]["step"] == 6


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "moves"), [(1.0, 0.5, False), (1.0, -0.5, True), (-1.0, -0.5, False), (-1.0, 0.5, True)]
)
def test_ppo_clips_what_already_moved_far_enough(advantage: float, log_ratio: float, moves: bool) -> None:
    # The second action, of the opposite advantage, has always moved far enough.
    bandit = Bandit()
    log_ratios = th.tensor([log_ratio, -0.5 * advantage])
    samples = bandit.batch([1.0, -1.0], [advantage, -advantage]).all_steps()
    batch = buffer_of(samples._replace(old_log_prob=samples.old_log_prob - log_ratios))
    metrics = apply(PPOUpdate(clip_range=0.1, **ONE_STEP, **PLAIN), bandit, batch)
    # ∇ of -A r log π / 2 at action 1
    assert bandit.mean.item() == pytest.approx(0.1 * advantage * math.exp(log_ratio) / 2 if moves else 0.0, rel=1e-4)
    assert metrics["clip_fraction"] == 1.0
    assert metrics["update_size"] == pytest.approx(0.5, rel=1e-5)
    assert metrics["approx_kl"] == pytest.approx((log_ratios.exp() - 1.0 - log_ratios).mean().item(), rel=1e-4)


# ---------------------------------------------------------------------- pathwise

NOISE = [0.5, -1.0, 2.0]
RETURNS = [-((z - 1.0) ** 2) for z in NOISE]
SPREAD = math.sqrt(sum((r - sum(RETURNS) / 3) ** 2 for r in RETURNS) / 3)


def pathwise_batch(bandit: Bandit, mask: list[float] | None = None, scale: float = 1.0) -> ImaginedRolloutBuffer:
    """Actions ``mean + noise`` whose return is ``-scale (a - 1)^2``, differentiable."""
    actions = bandit.mean + th.tensor(NOISE)
    samples = bandit.batch(NOISE, [0.0] * 3, mask).all_steps()
    return buffer_of(samples._replace(actions=actions[:, None], returns=-scale * (actions - 1.0).square()))


def test_pathwise_follows_the_gradient_of_the_returns() -> None:
    # d/dμ mean(-(μ + z - 1)^2) at μ = 0 is -2 mean(z - 1), in units of the spread; the value at 0 moves towards the mean.
    bandit = Bandit()
    metrics = apply(PathwiseUpdate(**ONE_STEP, **PLAIN), bandit, pathwise_batch(bandit))
    assert bandit.mean.item() == pytest.approx(-0.1 * 2.0 * sum(z - 1.0 for z in NOISE) / 3 / SPREAD)
    assert bandit.value.item() == pytest.approx(0.1 * 2.0 * sum(RETURNS) / 3), "in units of the returns themselves"
    assert metrics["policy_loss"] == pytest.approx(-sum(RETURNS) / 3 / SPREAD) and metrics["skipped"] == 0.0


def test_pathwise_counts_each_step_with_its_probability() -> None:
    bandit, mask = Bandit(), [1.0, 0.5, 0.0]
    apply(PathwiseUpdate(**ONE_STEP, **PLAIN), bandit, pathwise_batch(bandit, mask))
    weights = [w / sum(mask) for w in mask]
    mean = sum(w * r for w, r in zip(weights, RETURNS, strict=True))
    spread = math.sqrt(sum(w * (r - mean) ** 2 for w, r in zip(weights, RETURNS, strict=True)))
    gradient = sum(w * -2.0 * (z - 1.0) for w, z in zip(weights, NOISE, strict=True)) / spread
    assert bandit.mean.item() == pytest.approx(0.1 * gradient)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_pathwise_does_not_depend_on_the_units_of_rewards(scale: float) -> None:
    means = []
    for factor in (1.0, scale):
        bandit = Bandit()
        apply(PathwiseUpdate(**PLAIN), bandit, pathwise_batch(bandit, scale=factor))
        means.append(bandit.mean.item())
    assert means[0] == pytest.approx(means[1], rel=1e-4) and means[0] != 0.0


def test_pathwise_fits_the_critic_in_minibatches_and_leaves_the_actor_alone() -> None:
    bandit, one = Bandit(th.optim.Adam), Bandit(th.optim.Adam)
    apply(PathwiseUpdate(**ONE_STEP, **PLAIN), one, pathwise_batch(one))
    batch = pathwise_batch(bandit)
    apply(PathwiseUpdate(n_epochs=3, n_minibatches=2, **PLAIN), bandit, batch)
    assert bandit.actor_optimizer.state[bandit.mean]["step"] == 1 and bandit.mean.item() == one.mean.item()
    assert bandit.critic_optimizer.state[bandit.value]["step"] == 6
    assert bandit.value.item() < one.value.item() < 0.0, "more steps towards the returns, which are negative"
    assert not batch.all_steps().returns.requires_grad, "no graph is kept"


def test_pathwise_steps_over_a_gradient_that_is_not_finite() -> None:
    bandit = Bandit()
    samples = pathwise_batch(bandit).all_steps()
    metrics = apply(PathwiseUpdate(**PLAIN), bandit, buffer_of(samples._replace(returns=samples.returns / 0.0)))
    assert metrics["skipped"] == 1.0 and bandit.mean.item() == 0.0 and bandit.value.item() == 0.0


# ---------------------------------------------------------------------- by name


def test_the_default_follows_the_world_model() -> None:
    assert isinstance(make_update(None, None, 0.0, 1.0, differentiable=True), PathwiseUpdate)
    assert isinstance(make_update(None, None, 0.0, 1.0, differentiable=False), PPOUpdate)
    assert isinstance(make_update("a2c", None, 0.0, 1.0, differentiable=True), A2CUpdate)
    with pytest.raises(ValueError, match=r"policy_update='pathwise' needs gradients.*'ppo'"):
        make_update("pathwise", None, 0.0, 1.0, differentiable=False)


def test_settings_are_those_of_the_update() -> None:
    update = make_update("ppo", dict(clip_range=0.3, n_epochs=7), 0.25, 2.0, differentiable=False)
    assert update == PPOUpdate(clip_range=0.3, n_epochs=7, n_minibatches=2, ent_coef=0.25, max_grad_norm=2.0)
    with pytest.raises(ValueError, match=r"policy_update_kwargs: 'clip_rang' is not known; did you mean 'clip_range'"):
        make_update("ppo", dict(clip_rang=0.3), 0.0, 1.0, differentiable=False)
    with pytest.raises(ValueError, match="policy_update_kwargs: 'ent_coef' is not known"):
        make_update("ppo", dict(ent_coef=0.3), 0.0, 1.0, differentiable=False)
    with pytest.raises(ValueError, match="policy_update: 'pop' is not known; did you mean 'ppo'"):
        make_update("pop", None, 0.0, 1.0, differentiable=False)
