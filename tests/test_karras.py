"""EDM's noise levels, preconditioning and samplers, where the answer is known: data N(m, s²) and its exact denoiser."""

from __future__ import annotations

import math

import pytest
import torch as th

from sb3_polygrad.diffusion import karras

MEAN, STD = 1.5, 0.5


def exact(scaled: th.Tensor, level: th.Tensor) -> th.Tensor:
    """The network whose preconditioned output is E[x | x + σ n] for x ~ N(1.5, 0.5²)."""
    sigma = (4.0 * level).exp()
    skip, out, scale, _ = karras.coefficients(sigma)
    noisy = scaled / scale
    clean = (sigma.square() * MEAN + STD**2 * noisy) / (sigma.square() + STD**2)
    return (clean - skip * noisy) / out


def test_levels_fall_from_the_largest_to_zero() -> None:
    levels = karras.noise_levels(5, 80.0)
    assert levels[0] == pytest.approx(80.0) and levels[-2] == pytest.approx(0.002) and levels[-1] == 0.0
    # Eq. 5 at i = 2 of N = 5.
    assert levels[2] == pytest.approx((80 ** (1 / 7) + 0.5 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7)
    assert karras.noise_levels(1, 80.0) == [pytest.approx(80.0), 0.0]


@pytest.mark.parametrize(("arguments", "named"), [((0, 1.0, 0.1), "n_diffusion_steps"), ((3, 1.0, 2.0), "sigma_max")])
def test_levels_that_make_no_sense_are_refused(arguments: tuple[int, float, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        karras.noise_levels(*arguments)


def test_inputs_and_targets_of_the_network_have_unit_variance() -> None:
    clean, seen = th.randn(100_000, 1), []

    def network(scaled: th.Tensor, level: th.Tensor) -> th.Tensor:
        seen.append(scaled)
        return th.zeros_like(scaled)

    for sigma in (0.01, 1.0, 50.0):
        # A network that says 0 has the variance of its target as loss.
        assert karras.loss(network, clean, th.full((100_000, 1), sigma)).item() == pytest.approx(1.0, abs=0.02)
        assert seen[-1].std().item() == pytest.approx(1.0, abs=0.02)


def test_training_levels_are_log_normal() -> None:
    logs = karras.training_levels(100_000, th.device("cpu")).log()
    assert logs.mean().item() == pytest.approx(-1.2, abs=0.02)
    assert logs.std().item() == pytest.approx(1.2, abs=0.02)


def test_denoising_undoes_the_preconditioning() -> None:
    noisy = th.tensor([[3.0]])
    expected = (4.0 * MEAN + STD**2 * 3.0) / (4.0 + STD**2)
    assert karras.denoise(exact, noisy, 2.0).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("heun", "churn"), [(False, 0.0), (True, 0.0), (True, 20.0)])
def test_samples_have_the_distribution_of_the_data(heun: bool, churn: float) -> None:
    samples = karras.sample(exact, th.randn(20_000, 1), karras.noise_levels(64, 80.0), heun, churn)
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.02)
    # First-order steps lose a little of the spread.
    assert samples.std().item() == pytest.approx(STD, abs=0.02 if heun else 0.05)


@pytest.mark.parametrize(("heun", "order"), [(False, 1), (True, 2)])
def test_order_and_number_of_calls(heun: bool, order: int) -> None:
    # The flow's exact end for Gaussian data: m + (x - m) s / sqrt(s² + σ²).
    noise, calls = th.linspace(-1.0, 1.0, 9, dtype=th.float64)[:, None], []

    def counted(scaled: th.Tensor, level: th.Tensor) -> th.Tensor:
        calls.append(level)
        return exact(scaled, level)

    truth = MEAN + (80.0 * noise - MEAN) * STD / math.sqrt(STD**2 + 80.0**2)
    errors = []
    for n_steps in (64, 128):
        calls.clear()
        samples = karras.sample(counted, noise, karras.noise_levels(n_steps, 80.0), heun)
        errors.append(float((samples - truth).abs().max()))
        assert len(calls) == (2 * n_steps - 1 if heun else n_steps)
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)
