"""The noise schedule against its formula."""

import math

import pytest
import torch as th

from sb3_polygrad.diffusion.schedules import cosine_schedule


@pytest.mark.parametrize("n_steps", [1, 2, 7, 128])
@pytest.mark.parametrize("tau", [0.1, 1.0, 2.0])
def test_signal_is_the_cosine_formula(n_steps: int, tau: float) -> None:
    signal = cosine_schedule(n_steps, tau)
    expected = [math.cos(math.pi / 2 * i / n_steps) ** (2 * tau) for i in range(n_steps)]
    assert signal.dtype == th.float64, "coefficients are differences of numbers near 1"
    assert signal.tolist()[:-1] == pytest.approx(expected, rel=1e-12)


def test_last_step_keeps_a_thousandth_of_the_signal() -> None:
    # The formula says 0, from which no posterior can be formed; β_N = 0.999 instead.
    signal = cosine_schedule(128)
    assert signal[-1] == pytest.approx(0.001 * math.cos(math.pi / 2 * 127 / 128) ** 2)
    assert cosine_schedule(128, max_beta=0.5)[-1] == pytest.approx(0.5 * cosine_schedule(128, max_beta=0.5)[-2])


@pytest.mark.parametrize("tau", [0.1, 1.0, 5.0])
def test_no_step_destroys_more_than_allowed(tau: float) -> None:
    signal = cosine_schedule(64, tau)
    betas = 1.0 - signal[1:] / signal[:-1]
    assert betas.min() > 0.0, "every step adds noise"
    assert betas.max() <= 0.999 + 1e-12


def test_smaller_tau_keeps_more_signal() -> None:
    assert (cosine_schedule(32, 0.1)[1:] > cosine_schedule(32, 1.0)[1:]).all()


def test_rejects_what_makes_no_schedule() -> None:
    with pytest.raises(ValueError, match="n_diffusion_steps must be at least 1"):
        cosine_schedule(0)
    with pytest.raises(ValueError, match="noise_tau must be positive"):
        cosine_schedule(8, tau=0.0)
