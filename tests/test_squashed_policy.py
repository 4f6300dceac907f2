"""The samplers beyond Gaussian policies."""

from __future__ import annotations

from typing import Any

import pytest
import torch as th
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from sb3_polygrad.common.trajectory import Trajectory
from sb3_polygrad.diffusion.staggered import staggered_levels
from sb3_polygrad.world_models.base import WorldModel
from sb3_polygrad.world_models.make import make_world_model
from tests.linear_gaussian import LinearGaussianSystem

HORIZON = 4


def small_model(**sampler: Any) -> WorldModel:
    """A diffusion model of the linear system that has seen a few segments of it."""
    system = LinearGaussianSystem()
    kwargs = {"width": 16, "n_layers": 1, "sampler": sampler}
    model = make_world_model("diffusion", 2, system.action_low, system.action_high, HORIZON, kwargs)
    segments = system.imagine(th.randn(20, 2), HORIZON, std=0.5)
    model.observe(Trajectory(segments.observations[:, :2], *(values[:, :1] for values in segments[1:])))
    model.fit(segments)
    return model.eval()


def squashed(observations: th.Tensor) -> TransformedDistribution:
    mean = observations.sum(dim=-1, keepdim=True)
    return TransformedDistribution(Normal(mean, th.full_like(mean, 0.5)), [TanhTransform()])


@pytest.mark.parametrize(("n_levels", "lag"), [(2, 1.0), (3, 0.5), (2, 0.0), (2, 2.5)])
def test_actions_of_a_squashed_policy_are_its_draws(n_levels: int, lag: float) -> None:
    model, start = small_model(name="staggered", n_levels=n_levels, lag=lag), th.randn(500, 2)
    th.manual_seed(3)
    noise = th.randn(500, HORIZON, 1)  # the first numbers that imagining takes from the generator
    th.manual_seed(3)
    trajectory = model.imagine(start, squashed)
    base = squashed(trajectory.observations[:, :-1]).base_dist
    assert th.allclose(trajectory.actions, (base.mean + 0.5 * noise).tanh(), atol=1e-4)


def test_the_policy_guided_sampler_says_that_it_needs_a_gaussian() -> None:
    with pytest.raises(TypeError, match="follows the score of a Gaussian policy, got TransformedDistribution"):
        small_model(name="policy_guided", n_diffusion_steps=2).imagine(th.randn(3, 2), squashed)


@pytest.mark.parametrize(("lag", "calls"), [(1.1, 11), (0.7, 7), (0.3, 3), (0.55, 6)])
def test_no_call_is_lost_to_rounding(lag: float, calls: int) -> None:
    levels = staggered_levels(horizon=11, n_levels=4, lag=lag)  # 1.1 * 10 and 0.7 * 10 are a little too much in float64
    assert len(levels) - 1 == 4 + calls
    assert (levels[-1] == 0.0).all() and (levels[-2, -1] > 0.01)
