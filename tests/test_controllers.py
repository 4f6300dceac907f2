"""The δ controller on measures whose answer is known."""

import math

import pytest
import torch as th

from sb3_polygrad.diffusion.controllers import DeltaController

UNIT_VARIANCE = th.ones(1)


@pytest.mark.parametrize("start", [0.0005, 0.2])
def test_converges_from_both_sides(start: float) -> None:
    # A spread that falls with δ and is 1 at δ = 0.01.
    controller = DeltaController(start, learning_rate=0.05)
    for _ in range(500):
        controller.update((0.01 / controller.log_delta.exp()).sqrt(), UNIT_VARIANCE)
    assert controller.log_delta.exp().item() == pytest.approx(0.01, rel=1e-3)


def test_one_step_is_eq_10_on_log_delta() -> None:
    controller = DeltaController(0.01, learning_rate=0.03)
    assert controller.update(th.tensor(1.5), UNIT_VARIANCE).item() == pytest.approx(0.01 * math.exp(0.03 * 0.5))


def test_never_passes_its_bound_and_says_when_it_holds() -> None:
    controller, variance = DeltaController(0.005, learning_rate=0.5), th.tensor([0.09, 0.04])
    for _ in range(50):
        delta = controller.update(th.tensor(3.0), variance)  # always asks for more
        assert delta <= 0.04 * (1 + 1e-6), "the smallest variance over action dimensions is the bound"
    assert delta.item() == pytest.approx(0.04)
    assert controller.bound_active == 1.0
    controller.update(th.tensor(0.5), variance)
    assert controller.bound_active == 0.0, "δ went down by itself"


def test_follows_a_shrinking_bound_at_once() -> None:
    controller = DeltaController(0.04)
    shrunk = th.tensor(0.01)
    assert controller.bounded(shrunk).item() == pytest.approx(0.01), "the next imagination already keeps to it"
    assert controller.update(th.tensor(1.0), shrunk).item() == pytest.approx(0.01)


def test_does_not_run_away_where_the_published_rule_does() -> None:
    # Spread of a ← (1 - δ/σ²) a + s ε: it falls with δ up to δ = σ² and rises beyond, where Eq. 10 alone would diverge.
    policy_variance, noise = 0.01, 0.15
    controller = DeltaController(0.005, learning_rate=0.3)
    for _ in range(200):
        left = 1.0 - controller.log_delta.exp() / policy_variance
        spread = noise / (1.0 - left.square()).sqrt() / math.sqrt(policy_variance)
        controller.update(spread, th.tensor(policy_variance))
    assert controller.log_delta.exp().item() == pytest.approx(policy_variance), "no smaller spread can be had"


@pytest.mark.parametrize("measure", [math.nan, math.inf])
def test_a_diverged_imagination_leaves_delta_unchanged(measure: float) -> None:
    controller = DeltaController(0.02)
    before = controller.log_delta.clone()
    controller.update(th.tensor(measure), UNIT_VARIANCE)
    assert th.equal(controller.log_delta, before)


def test_no_learning_rate_keeps_delta() -> None:
    controller = DeltaController(0.02, learning_rate=0.0)
    assert controller.update(th.tensor(9.0), UNIT_VARIANCE).item() == pytest.approx(0.02)


def test_state_dict_carries_delta() -> None:
    tuned, fresh = DeltaController(0.02), DeltaController(0.005)
    fresh.load_state_dict(tuned.state_dict())
    assert th.equal(fresh.log_delta, tuned.log_delta)


def test_rejects_bad_settings() -> None:
    with pytest.raises(ValueError, match="delta must be positive"):
        DeltaController(0.0)
    with pytest.raises(ValueError, match="delta_lr must not be negative"):
        DeltaController(learning_rate=-0.1)
