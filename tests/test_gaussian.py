"""The Gaussian diffusion process against textbook formulas and plain conditioning, in float64."""

import math

import pytest
import torch as th

from sb3_polygrad.diffusion.gaussian import GaussianDiffusion
from sb3_polygrad.diffusion.schedules import cosine_schedule

N = 16
# ᾱ_0 ... ᾱ_N written out, so that nothing here depends on the schedule's code.
ALPHA_BAR = [math.cos(math.pi / 2 * i / (N + 1)) ** 2 for i in range(N + 1)]


@pytest.fixture(params=["x0", "epsilon"])
def process(request: pytest.FixtureRequest) -> GaussianDiffusion:
    return GaussianDiffusion(th.tensor(ALPHA_BAR, dtype=th.float64), request.param)


def alpha(i: int) -> float:
    return ALPHA_BAR[i] / ALPHA_BAR[i - 1]


@pytest.mark.parametrize("i", range(1, N + 1))
def test_posterior_is_the_textbook_one(process: GaussianDiffusion, i: int) -> None:
    # Ho et al. 2020, Eq. 7.
    clean, noisy, beta = 0.7, -1.3, 1.0 - alpha(i)
    mean = math.sqrt(ALPHA_BAR[i - 1]) * beta / (1.0 - ALPHA_BAR[i]) * clean
    mean += math.sqrt(alpha(i)) * (1.0 - ALPHA_BAR[i - 1]) / (1.0 - ALPHA_BAR[i]) * noisy
    variance = beta * (1.0 - ALPHA_BAR[i - 1]) / (1.0 - ALPHA_BAR[i])
    assert process.posterior_mean(th.tensor(clean), th.tensor(noisy), i).item() == pytest.approx(mean, rel=1e-5)
    assert process.posterior_std[i].item() == pytest.approx(math.sqrt(variance), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("i", range(2, N + 1))
def test_posterior_is_gaussian_conditioning(process: GaussianDiffusion, i: int) -> None:
    # Given x₀, (x_{i-1}, x_i) is jointly Gaussian: condition the first on the second.
    clean, noisy = -0.4, 0.9
    variance_before, covariance = 1.0 - ALPHA_BAR[i - 1], math.sqrt(alpha(i)) * (1.0 - ALPHA_BAR[i - 1])
    variance_after = alpha(i) * variance_before + 1.0 - alpha(i)
    gain = covariance / variance_after
    mean = math.sqrt(ALPHA_BAR[i - 1]) * clean + gain * (noisy - math.sqrt(alpha(i) * ALPHA_BAR[i - 1]) * clean)
    variance = variance_before - gain * covariance
    assert process.posterior_mean(th.tensor(clean), th.tensor(noisy), i).item() == pytest.approx(mean, rel=1e-4)
    assert process.posterior_std[i].item() == pytest.approx(math.sqrt(variance), rel=1e-4)


def test_last_denoising_step_is_the_clean_estimate(process: GaussianDiffusion) -> None:
    clean, noisy = th.randn(5), th.randn(5)
    assert th.allclose(process.posterior_mean(clean, noisy, 1), clean)
    assert process.posterior_std[1] == 0.0


def test_adding_noise_is_the_chain_of_single_steps(process: GaussianDiffusion) -> None:
    # x_i = sqrt(1-β_i) x_{i-1} + sqrt(β_i) ε, started at x₀: its mean and variance after i steps.
    signal, variance = 1.0, 0.0
    for i in range(1, N + 1):
        signal, variance = math.sqrt(alpha(i)) * signal, alpha(i) * variance + 1.0 - alpha(i)
        at_i = th.tensor([i])
        assert process.add_noise(th.ones(1, 1), at_i, th.zeros(1, 1)).item() == pytest.approx(signal, rel=1e-5)
        assert process.add_noise(th.zeros(1, 1), at_i, th.ones(1, 1)).item() == pytest.approx(math.sqrt(variance), rel=1e-5)


def test_every_trajectory_has_its_own_diffusion_step(process: GaussianDiffusion) -> None:
    noisy = process.add_noise(th.ones(2, 3, 4), th.tensor([1, N]), th.zeros(2, 3, 4))
    assert th.allclose(noisy[0], th.tensor(math.sqrt(ALPHA_BAR[1]), dtype=th.float32))
    assert th.allclose(noisy[1], th.tensor(math.sqrt(ALPHA_BAR[N]), dtype=th.float32))


@pytest.mark.parametrize("i", [1, 5, N])
def test_a_perfect_network_predicts_the_clean_trajectory(process: GaussianDiffusion, i: int) -> None:
    clean, noise = th.randn(4, 3), th.randn(4, 3)
    noisy = process.add_noise(clean, th.full((4,), i), noise)
    assert th.allclose(process.predict_clean(process.target(clean, noise), noisy, i), clean, atol=1e-4)


def test_targets_differ_by_parametrisation() -> None:
    clean, noise, schedule = th.zeros(2), th.ones(2), cosine_schedule(4)
    assert GaussianDiffusion(schedule, "x0").target(clean, noise) is clean
    assert GaussianDiffusion(schedule, "epsilon").target(clean, noise) is noise


@pytest.mark.parametrize("i", [2, 9, N])
def test_epsilon_form_of_the_paper(i: int) -> None:
    # Algorithm 2, line 13: (x - β / sqrt(1-ᾱ) ε) / sqrt(α).
    process = GaussianDiffusion(th.tensor(ALPHA_BAR, dtype=th.float64), "epsilon")
    noisy, epsilon = 0.8, -0.5
    expected = (noisy - (1.0 - alpha(i)) / math.sqrt(1.0 - ALPHA_BAR[i]) * epsilon) / math.sqrt(alpha(i))
    clean = process.predict_clean(th.tensor(epsilon), th.tensor(noisy), i)
    assert process.posterior_mean(clean, th.tensor(noisy), i).item() == pytest.approx(expected, rel=1e-4)


def test_unknown_parametrisation_is_refused() -> None:
    with pytest.raises(ValueError, match="prediction must be 'x0' or 'epsilon'"):
        GaussianDiffusion(cosine_schedule(4), "v")  # type: ignore[arg-type]
