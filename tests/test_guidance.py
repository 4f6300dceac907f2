"""The paper's guidance against the gradient of the policy's log-density, by autograd; its ablations on known policies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from torch import nn
from torch.distributions import Normal

from sb3_polygrad.diffusion.controllers import DeltaController
from sb3_polygrad.diffusion.guidance import DiffusionStep, Guidance, PolicyScoreGuidance
from sb3_polygrad.world_models.diffusion import policy_guided

DELTA = 0.005
MEAN, STD = th.tensor([[0.3, -0.2]]), th.tensor([[0.4, 0.2]])
NO_NOISE = th.zeros(1, 2)


def guidance(half_range: th.Tensor, clip_std: float | None = None, delta: float = DELTA) -> PolicyScoreGuidance:
    return PolicyScoreGuidance(DeltaController(delta), half_range, clip_std)


def rule_of(name: Any, half_range: th.Tensor, delta: float = DELTA) -> Guidance:
    """A rule by its name, as the sampler of a world model has it."""
    return policy_guided(half_range, guidance=name, delta=delta).guidance


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


# ---------------------------------------------------------------------- ablations

STATES = th.tensor([[[0.4], [-0.7], [0.1]]])  # a start, two more states


def diffusion_step(policy: Callable[[th.Tensor], Normal], **changes: th.Tensor) -> DiffusionStep:
    actions = th.tensor([[[0.3], [-0.5]]])
    return DiffusionStep(actions, STATES, STATES + 1.0, policy, th.zeros(1, 2, 1))._replace(**changes)


def linear(states: th.Tensor) -> Normal:
    return Normal(0.5 * states, 0.2)


def test_noisy_states_are_what_the_policy_is_asked_about() -> None:
    step = diffusion_step(linear)
    on_noisy, states = rule_of("noisy_states", th.ones(1)).guide(step)
    assert states is step.clean
    expected = rule_of("policy_score", th.ones(1)).guide(step._replace(clean=step.noisy))[0]
    assert th.equal(on_noisy, expected)
    assert not th.allclose(on_noisy, rule_of("policy_score", th.ones(1)).guide(step)[0])


def test_state_update_moves_states_along_the_policys_score() -> None:
    step = diffusion_step(linear)
    with th.no_grad():
        actions, states = rule_of("state_update", th.ones(1), DELTA).guide(step)
    # ∇_s log N(a; s/2, 0.2²) = (a - s/2) / 0.2² * 1/2, for the one state that is neither given nor without an action.
    moved = STATES.clone()
    moved[0, 1] += DELTA * 0.5 * (-0.5 - 0.5 * -0.7) / 0.2**2
    assert th.allclose(states, moved)
    expected = rule_of("policy_score", th.ones(1), DELTA).guide(step._replace(clean=moved))[0]
    assert th.allclose(actions, expected), "the actions follow the policy at the moved states"


def test_state_update_leaves_nothing_behind_in_the_policy() -> None:
    net = nn.Linear(1, 1)
    with th.no_grad():
        actions, states = rule_of("state_update", th.ones(1)).guide(diffusion_step(lambda s: Normal(net(s), 0.2)))
    assert not actions.requires_grad and not states.requires_grad
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not th.equal(states, STATES), "the gradient did go through"


def test_policy_sampling_draws_anew_at_every_step() -> None:
    def policy(states: th.Tensor) -> Normal:
        return Normal(th.full((*states.shape[:-1], 1), 5.0), 0.1)

    rule, step = rule_of("policy_sampling", th.ones(1)), diffusion_step(policy, clean=th.zeros(20_000, 3, 1))
    first, second = rule.guide(step)[0], rule.guide(step)[0]
    for drawn in (first, second):
        assert drawn.mean().item() == pytest.approx(5.0, abs=0.003) and drawn.std().item() == pytest.approx(0.1, abs=0.002)
    assert abs(float(th.corrcoef(th.stack([first.flatten(), second.flatten()]))[0, 1])) < 0.03
    assert th.equal(rule.finish(first, policy(step.clean[:, :-1])), first), "line 12: the last draw stays"


def test_random_actions_stay_as_they_were() -> None:
    rule, step = rule_of("random_actions", th.ones(1)), diffusion_step(linear, noise=th.ones(1, 2, 1))
    assert rule.guide(step)[0] is step.actions
    assert rule.finish(step.actions, linear(STATES[:, :-1])) is step.actions


@pytest.mark.parametrize("name", ["policy_sampling", "random_actions"])
def test_without_a_scale_there_is_nothing_to_adapt(name: str) -> None:
    assert rule_of(name, th.ones(1)).adapt(th.tensor(2.0), th.ones(1)) == {}
