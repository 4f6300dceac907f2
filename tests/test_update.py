"""Policy updates on a Gaussian bandit whose gradients are known, and the line search alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch as th
from torch import nn

from sb3_polygrad.policy.samples import ImaginedRolloutBufferSamples
from sb3_polygrad.policy.update import (
    A2CUpdate,
    Learner,
    LossSettings,
    PathwiseUpdate,
    PPOUpdate,
    masked_mean,
    scale_step,
    standardized,
)
from tests.toys import equal_trees

LOSS = LossSettings(ent_coef=0.0, vf_coef=0.5, max_grad_norm=1e9, normalize_advantage=False)


class Batch:
    """All steps of an imagined batch, in minibatches that are cut in order."""

    def __init__(self, samples: ImaginedRolloutBufferSamples) -> None:
        self.samples = samples

    def __call__(self, batch_size: int | None) -> Iterator[ImaginedRolloutBufferSamples]:
        n_steps = len(self.samples.mask)
        for rows in th.arange(n_steps).split(batch_size or n_steps):
            yield ImaginedRolloutBufferSamples(*(tensor[rows] for tensor in self.samples))


class Bandit(nn.Module):
    """Policy N(mean, 1) of one action and a constant value."""

    def __init__(self, optimizer: type[th.optim.Optimizer] = th.optim.SGD, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.mean, self.value = nn.Parameter(th.zeros(1)), nn.Parameter(th.zeros(1))
        self.optimizer = optimizer([{"params": [self.mean]}, {"params": [self.value]}], lr=learning_rate)

    def evaluate(self, observations: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        log_prob = -0.5 * (actions[:, 0] - self.mean) ** 2 - 0.5 * math.log(2 * math.pi)
        return self.values(observations), log_prob, self.entropies(observations)

    def learner(self) -> Learner:
        return Learner(self.evaluate, self.values, self.entropies, [self.mean], [self.value], self.optimizer)

    def values(self, observations: th.Tensor) -> th.Tensor:
        return self.value.expand(len(observations), 1)

    def entropies(self, observations: th.Tensor) -> th.Tensor:
        return (self.mean * 0.0 + 1.0).expand(len(observations))

    def batch(
        self, actions: list[float], advantages: list[float], mask: list[float] | None = None, **changes: list[float]
    ) -> Batch:
        columns = th.tensor(actions)[:, None]
        samples = ImaginedRolloutBufferSamples(
            columns,
            columns,
            th.zeros(len(actions)),
            self.evaluate(columns, columns)[1].detach(),
            th.tensor(advantages),
            th.full((len(actions),), 2.0),
            th.tensor(mask or [1.0] * len(actions)),
        )
        return Batch(samples._replace(**{name: th.tensor(values) for name, values in changes.items()}))


UPDATES = [A2CUpdate(target_update=None), PPOUpdate(n_epochs=1, n_minibatches=1)]


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


@pytest.mark.parametrize("update", UPDATES)
def test_gradient_of_a_gaussian_policy(update: A2CUpdate | PPOUpdate) -> None:
    # ∇ mean E[A log π] = mean(A (a - μ)); ∇ of the value loss at 0 with returns 2: 0.5 * 2 * (0 - 2) = -2.
    bandit = Bandit()
    update(bandit.learner(), bandit.batch([1.0, -2.0, 0.5], [1.0, 2.0, -4.0]), LOSS)
    assert bandit.mean.item() == pytest.approx(0.1 * (1.0 - 4.0 - 2.0) / 3)
    assert bandit.value.item() == pytest.approx(0.1 * 2.0)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("normalize", [True, False])
def test_steps_after_an_ending_have_no_weight(update: A2CUpdate | PPOUpdate, normalize: bool) -> None:
    loss = LossSettings(0.01, 0.5, 1e9, normalize)
    clean, padded = Bandit(), Bandit()
    metrics = update(clean.learner(), clean.batch([1.0, -2.0], [1.0, 3.0]), loss)
    batch = padded.batch([1.0, -2.0, 5.0], [1.0, 3.0, 70.0], mask=[1.0, 1.0, 0.0], returns=[2.0, 2.0, -60.0])
    padded_metrics = update(padded.learner(), batch, loss)
    assert padded.mean.item() == pytest.approx(clean.mean.item())
    assert padded.value.item() == pytest.approx(clean.value.item())
    assert {k: float(v) for k, v in padded_metrics.items()} == pytest.approx({k: float(v) for k, v in metrics.items()})


def test_advantages_are_standardised_over_what_happened() -> None:
    result = standardized(th.tensor([1.0, 3.0, 5.0, 99.0]), th.tensor([1.0, 1.0, 1.0, 0.0]))[:3]
    assert result.tolist() == pytest.approx([-math.sqrt(1.5), 0.0, math.sqrt(1.5)])


def test_masked_mean() -> None:
    assert masked_mean(th.tensor([1.0, 3.0, 99.0]), th.tensor([1.0, 1.0, 0.0])).item() == 2.0
    assert masked_mean(th.tensor([5.0]), th.tensor([0.0])).item() == 0.0, "nothing happened: no division by zero"


def test_gradients_of_actor_and_critic_are_clipped_apart() -> None:
    bandit = Bandit()
    loss = LossSettings(ent_coef=0.0, vf_coef=1000.0, max_grad_norm=0.01, normalize_advantage=False)
    UPDATES[0](bandit.learner(), bandit.batch([1.0], [5.0]), loss)
    assert bandit.mean.item() == pytest.approx(0.1 * 0.01), "a huge value loss does not shrink the actor's step"
    assert bandit.value.item() == pytest.approx(0.1 * 0.01)


def test_the_entropy_bonus_is_paid_for() -> None:
    metrics = UPDATES[0](Bandit().learner(), Bandit().batch([1.0], [0.0]), LossSettings(0.3, 0.0, 1.0, False))
    assert float(metrics["loss"]) == pytest.approx(-0.3), "entropy 1, weight 0.3"


# ---------------------------------------------------------------------- A2C with a target


@pytest.mark.parametrize("max_trials", [1, 20])
def test_a2c_step_has_the_target_size(max_trials: int) -> None:
    bandit = Bandit(th.optim.Adam, learning_rate=0.5)
    batch = bandit.batch([1.0, -2.0, 0.5], [1.0, 2.0, -4.0])
    A2CUpdate(target_update=0.02, max_trials=max_trials)(bandit.learner(), batch, LOSS)
    after = bandit.evaluate(batch.samples.observations, batch.samples.actions)[1]
    assert (after - batch.samples.old_log_prob).abs().mean().item() == pytest.approx(0.02, rel=0.2)


def test_a2c_target_leaves_critic_and_optimiser_as_one_plain_step_does() -> None:
    plain, searched = Bandit(th.optim.Adam, 0.5), Bandit(th.optim.Adam, 0.5)
    for bandit, target in ((plain, None), (searched, 0.02)):
        A2CUpdate(target, max_trials=20)(bandit.learner(), bandit.batch([1.0, -2.0], [1.0, 2.0]), LOSS)
    assert th.equal(searched.value, plain.value), "only the actor's step is scaled"
    assert equal_trees(searched.optimizer.state_dict(), plain.optimizer.state_dict()), "its state advances once"
    assert searched.optimizer.state[searched.mean]["step"] == 1


@pytest.mark.parametrize("update", [A2CUpdate(target_update=0.02), PPOUpdate(n_minibatches=1)])
def test_a_batch_that_is_not_finite_leaves_no_trace(update: A2CUpdate | PPOUpdate) -> None:
    bandit = Bandit(th.optim.Adam)
    update(bandit.learner(), bandit.batch([1.0, 2.0], [1.0, 1.0]), LOSS)
    before = copy.deepcopy((bandit.state_dict(), bandit.optimizer.state_dict()))
    update(bandit.learner(), bandit.batch([1.0, 2.0], [math.nan, 1.0]), LOSS)
    update(bandit.learner(), bandit.batch([1.0, 2.0], [1.0, 1.0], returns=[math.inf, 1.0]), LOSS)
    assert equal_trees((bandit.state_dict(), bandit.optimizer.state_dict()), before)


# ---------------------------------------------------------------------- PPO


def test_ppo_takes_its_epochs_of_minibatches() -> None:
    bandit = Bandit(th.optim.Adam)
    PPOUpdate(n_epochs=3, n_minibatches=2)(bandit.learner(), bandit.batch([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]), LOSS)
    assert bandit.optimizer.state[bandit.mean]["step"] == 6


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "moves"), [(1.0, 0.5, False), (1.0, -0.5, True), (-1.0, -0.5, False), (-1.0, 0.5, True)]
)
def test_ppo_clips_what_already_moved_far_enough(advantage: float, log_ratio: float, moves: bool) -> None:
    bandit = Bandit()
    batch = bandit.batch([1.0], [advantage])
    batch.samples = batch.samples._replace(old_log_prob=batch.samples.old_log_prob - log_ratio)
    metrics = PPOUpdate(clip_range=0.1, n_epochs=1, n_minibatches=1)(bandit.learner(), batch, LOSS)
    assert (bandit.mean.item() != 0.0) == moves
    assert float(metrics["clip_fraction"]) == 1.0
    assert float(metrics["update_size"]) == pytest.approx(abs(log_ratio), rel=1e-5)
    assert float(metrics["approx_kl"]) == pytest.approx(math.exp(log_ratio) - 1.0 - log_ratio, rel=1e-4)


def test_ppo_stops_at_the_target_kl() -> None:
    bandit = Bandit(th.optim.Adam)
    batch = bandit.batch([1.0], [1.0])
    batch.samples = batch.samples._replace(old_log_prob=batch.samples.old_log_prob - 0.5)
    PPOUpdate(target_kl=0.01, n_epochs=10, n_minibatches=1)(bandit.learner(), batch, LOSS)
    assert bandit.optimizer.state[bandit.mean]["step"] == 1


# ---------------------------------------------------------------------- pathwise

NOISE = [0.5, -1.0, 2.0]


def pathwise_batch(bandit: Bandit, mask: list[float] | None = None) -> Batch:
    """Actions ``mean + noise`` whose return is ``-(a - 1)^2``, differentiable."""
    actions = bandit.mean + th.tensor(NOISE)
    batch = bandit.batch(NOISE, [0.0] * 3, mask)
    return Batch(batch.samples._replace(actions=actions[:, None], returns=-(actions - 1.0).square()))


def test_pathwise_follows_the_gradient_of_the_returns() -> None:
    # d/dμ mean(-(μ + z - 1)^2) at μ = 0 is -2 mean(z - 1), and the value at 0 moves towards the mean return.
    bandit = Bandit()
    metrics = PathwiseUpdate(n_epochs=1, n_minibatches=1)(bandit.learner(), pathwise_batch(bandit), LOSS)
    returns = [-((z - 1.0) ** 2) for z in NOISE]
    assert bandit.mean.item() == pytest.approx(-0.1 * 2.0 * sum(z - 1.0 for z in NOISE) / 3)
    assert bandit.value.item() == pytest.approx(0.1 * 0.5 * 2.0 * sum(returns) / 3)
    assert metrics["policy_loss"].item() == pytest.approx(-sum(returns) / 3) and metrics["skipped"] == 0.0


def test_pathwise_counts_each_step_with_its_probability() -> None:
    bandit, mask = Bandit(), [1.0, 0.5, 0.0]
    PathwiseUpdate(n_epochs=1, n_minibatches=1)(bandit.learner(), pathwise_batch(bandit, mask), LOSS)
    gradient = sum(w * -2.0 * (z - 1.0) for w, z in zip(mask, NOISE, strict=True)) / sum(mask)
    assert bandit.mean.item() == pytest.approx(0.1 * gradient)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_pathwise_does_not_depend_on_the_units_of_rewards(scale: float) -> None:
    means = []
    for factor in (1.0, scale):
        bandit = Bandit()
        samples = pathwise_batch(bandit).samples
        batch = Batch(samples._replace(returns=factor * samples.returns))
        PathwiseUpdate()(bandit.learner(), batch, replace(LOSS, normalize_advantage=True))
        means.append(bandit.mean.item())
    assert means[0] == pytest.approx(means[1], rel=1e-4)


def test_pathwise_fits_the_critic_in_minibatches_and_leaves_the_actor_alone() -> None:
    bandit, n_steps = Bandit(), 0
    batch = pathwise_batch(bandit)

    def minibatches(size: int | None) -> Iterator[ImaginedRolloutBufferSamples]:
        nonlocal n_steps
        n_steps += size is not None
        yield from batch(size)

    one = Bandit()
    PathwiseUpdate(n_epochs=1, n_minibatches=1)(one.learner(), pathwise_batch(one), LOSS)
    PathwiseUpdate(n_epochs=3, n_minibatches=2)(bandit.learner(), minibatches, LOSS)
    assert n_steps == 3 and bandit.mean.item() == one.mean.item()
    assert bandit.value.item() < one.value.item() < 0.0, "more steps towards the returns, which are negative"


def test_pathwise_steps_over_a_gradient_that_is_not_finite() -> None:
    bandit = Bandit()
    batch = pathwise_batch(bandit)
    batch.samples = batch.samples._replace(returns=batch.samples.returns / 0.0)
    metrics = PathwiseUpdate()(bandit.learner(), batch, LOSS)
    assert metrics["skipped"] == 1.0 and bandit.mean.item() == 0.0 and bandit.value.item() == 0.0
