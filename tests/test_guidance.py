"""The paper's guidance against the gradient of the policy's log-density, by autograd."""

import pytest
import torch as th
from torch.distributions import Normal

from sb3_polygrad.core.controllers import DeltaController
from sb3_polygrad.diffusion.guidance import PolicyScoreGuidance

DELTA = 0.005
MEAN, STD = th.tensor([[0.3, -0.2]]), th.tensor([[0.4, 0.2]])
NO_NOISE = th.zeros(1, 2)


def guidance(half_range: th.Tensor, clip_std: float | None = None, delta: float = DELTA) -> PolicyScoreGuidance:
    return PolicyScoreGuidance(DeltaController(delta), half_range, clip_std)


def score(actions: th.Tensor, policy: Normal) -> th.Tensor:
    actions = actions.clone().requires_grad_()
    return th.autograd.grad(policy.log_prob(actions).sum(), actions)[0]


@pytest.mark.parametrize("half_range", [th.ones(2), th.tensor([3.0, 3.0]), th.tensor([0.4, 20.0])])
def test_a_step_is_delta_times_the_score(half_range: th.Tensor) -> None:
    policy = Normal(MEAN * half_range, STD * half_range)
    actions = th.tensor([[0.9, -0.3]]) * half_range
    # δ is in squared half-ranges of the box.
    expected = actions + DELTA * half_range.square() * score(actions, policy)
    assert th.allclose(guidance(half_range).update(actions, policy, NO_NOISE), expected)


def test_a_step_does_not_depend_on_the_units_of_the_box() -> None:
    half_range, center = th.tensor([5.0, 0.1]), th.tensor([10.0, -1.0])
    actions = th.tensor([[0.9, -0.3]])
    in_unit_box = guidance(th.ones(2)).update(actions, Normal(MEAN, STD), NO_NOISE)
    policy = Normal(center + half_range * MEAN, half_range * STD)
    in_box = guidance(half_range).update(center + half_range * actions, policy, NO_NOISE)
    assert th.allclose(in_box, center + half_range * in_unit_box, atol=1e-5)


def test_clips_then_moves_then_adds_noise() -> None:
    # The order of the release. 10 and 1 standard deviations away, clipped to 3.
    actions, noise = MEAN + th.tensor([[10.0, -1.0]]) * STD, th.tensor([[0.5, 0.25]])
    policy = Normal(MEAN, STD)
    clipped = MEAN + th.tensor([[3.0, -1.0]]) * STD
    expected = clipped + DELTA * score(clipped, policy) + noise
    assert th.allclose(guidance(th.ones(2), clip_std=3.0).update(actions, policy, noise), expected)


def test_the_last_step_only_clips() -> None:
    actions = MEAN + th.tensor([[10.0, -2.0]]) * STD
    policy = Normal(MEAN, STD)
    assert th.allclose(guidance(th.ones(2), clip_std=3.0).finish(actions, policy), MEAN + th.tensor([[3.0, -2.0]]) * STD)
    assert th.equal(guidance(th.ones(2), clip_std=None).finish(actions, policy), actions)


def test_a_large_delta_lands_on_the_mean_instead_of_overshooting() -> None:
    # δ = 0.5 is beyond both variances; the smaller one, 0.04, bounds it.
    actions = MEAN + STD
    moved = guidance(th.ones(2), delta=0.5).update(actions, Normal(MEAN, STD), NO_NOISE)
    assert th.allclose(moved[:, 1], MEAN[:, 1]), "δ = σ² lands on the mean"
    assert th.allclose(moved[:, 0], MEAN[:, 0] + STD[:, 0] * (1.0 - 0.04 / 0.16)), "the other dimension moves less"


def test_adapt_bounds_delta_in_half_ranges() -> None:
    half_range = th.tensor([10.0, 2.0])
    rule = PolicyScoreGuidance(DeltaController(0.05, learning_rate=1.0), half_range)
    # Relative standard deviations 0.3 and 0.2: the bound is 0.04.
    metrics = rule.adapt(th.tensor(4.0), th.tensor([[0.3, 0.2]]) * half_range)
    assert metrics["delta"].item() == pytest.approx(0.04)
    assert metrics["delta_at_bound"].item() == 1.0


def test_rejects_a_clip_that_leaves_nothing() -> None:
    with pytest.raises(ValueError, match="clip_std must be positive, or None"):
        guidance(th.ones(1), clip_std=0.0)
