"""Actions as a function of distribution and noise."""

from __future__ import annotations

import pytest
import torch as th
from torch.distributions import AffineTransform, Independent, Laplace, Normal, TanhTransform, TransformedDistribution

from sb3_polygrad.common.draws import draw

NOISE = th.tensor([[0.5, -2.0], [0.0, 1.0]])
GAUSSIAN = Normal(th.tensor([1.0, -1.0]), th.tensor([0.1, 0.5]))
DRAWS = th.tensor([[1.05, -2.0], [1.0, -0.5]])


def test_gaussian() -> None:
    assert th.allclose(draw(GAUSSIAN, NOISE), DRAWS)


def test_squashed_gaussian_scaled_to_a_box() -> None:
    squashed = TransformedDistribution(GAUSSIAN, [TanhTransform(), AffineTransform(3.0, 2.0)])
    assert th.allclose(draw(squashed, NOISE), 3.0 + 2.0 * DRAWS.tanh())


def test_independent_is_its_base() -> None:
    assert th.allclose(draw(Independent(GAUSSIAN, 1), NOISE), DRAWS)


def test_draws_have_the_distribution() -> None:
    squashed = TransformedDistribution(Normal(0.3, 0.8), [TanhTransform()])
    th.manual_seed(0)
    drawn, sampled = draw(squashed, th.randn(100_000)), squashed.sample((100_000,))
    levels = th.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    assert th.allclose(drawn.quantile(levels), sampled.quantile(levels), atol=0.01)


def test_unknown_distributions_are_refused_until_they_are_registered() -> None:
    class Uncommon(Laplace):
        pass

    with pytest.raises(TypeError, match=r"no function of state and noise is known for Uncommon.*draw\.register"):
        draw(Uncommon(0.0, 1.0), NOISE)
    draw.register(Uncommon)(lambda policy, noise: policy.icdf(th.special.ndtr(noise)))
    assert th.allclose(draw(Uncommon(2.0, 1.0), th.zeros(3)), th.tensor(2.0))
