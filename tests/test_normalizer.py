"""Running mean and standard deviation against numpy over all data at once."""

import numpy as np
import pytest
import torch as th

from sb3_polygrad.common.normalizer import RunningNormalizer


@pytest.mark.parametrize("sizes", [[100], [1, 99], [10] * 10, [97, 0, 2, 1]])
def test_moments_do_not_depend_on_the_cuts(sizes: list[int]) -> None:
    rng = np.random.default_rng(0)
    data = (rng.normal(size=(100, 3)) * [1.0, 50.0, 0.01] + [0.0, 1e4, -3.0]).astype(np.float32)
    normalizer = RunningNormalizer(3)
    for batch in np.split(data, np.cumsum(sizes)[:-1]):
        normalizer.update(th.as_tensor(batch))
    assert normalizer.mean.numpy() == pytest.approx(data.mean(axis=0, dtype=np.float64), rel=1e-10)
    assert normalizer.std.numpy() == pytest.approx(data.std(axis=0, dtype=np.float64), rel=1e-5)


def test_leading_dimensions_are_flattened() -> None:
    data = th.randn(4, 5, 2)
    flat, folded = RunningNormalizer(2), RunningNormalizer(2)
    flat.update(data.reshape(20, 2))
    folded.update(data)
    assert th.equal(flat.std, folded.std)


def test_normalize_and_back() -> None:
    normalizer, data = RunningNormalizer(2), th.randn(500, 2) * th.tensor([3.0, 0.2]) + th.tensor([5.0, -1.0])
    normalizer.update(data)
    standardized = normalizer.normalize(data)
    assert th.allclose(standardized.mean(dim=0), th.zeros(2), atol=1e-5)
    assert th.allclose(standardized.std(dim=0, correction=0), th.ones(2), atol=1e-5)
    assert th.allclose(normalizer.denormalize(standardized), data, atol=1e-5)


def test_a_dimension_that_never_varied_is_only_centred() -> None:
    normalizer = RunningNormalizer(2)
    for _ in range(10):
        normalizer.update(th.tensor([[12345.678, 0.1]]).expand(7, 2))
    assert normalizer.std.tolist() == [1.0, 1.0], "rounding is not variation"
    assert th.allclose(normalizer.normalize(th.tensor([12346.678, 1.1])), th.ones(2), atol=1e-2)


def test_a_dimension_that_hardly_varies_is_not_blown_up() -> None:
    normalizer = RunningNormalizer(1, min_std=0.05)
    normalizer.update(th.tensor([[0.0], [1e-3]]))
    assert normalizer.std.item() == pytest.approx(0.05)


def test_before_any_data_nothing_is_changed() -> None:
    data = th.randn(3, 2)
    assert th.equal(RunningNormalizer(2).normalize(data), data)


def test_bounds_hold_all_data_and_a_margin() -> None:
    normalizer = RunningNormalizer(1)
    normalizer.update(th.tensor([[-1.0], [1.0]]))
    normalizer.update(th.tensor([[0.0], [3.0]]))
    # Data in [-1, 3], mean 0.75; half the width, 2, and one scale are added on each side.
    scale = np.std([-1.0, 1.0, 0.0, 3.0])
    low, high = normalizer.normalized_bounds(0.5)
    assert normalizer.denormalize(low).item() == pytest.approx(-1.0 - 2.0 - scale)
    assert normalizer.denormalize(high).item() == pytest.approx(3.0 + 2.0 + scale)


def test_state_dict_restores_it_and_it_goes_on() -> None:
    first, second = th.randn(50, 2) * 7.0, th.randn(30, 2) + 5.0
    whole, restored = RunningNormalizer(2), RunningNormalizer(2)
    whole.update(first)
    restored.load_state_dict(whole.state_dict())
    assert th.equal(restored.normalize(second), whole.normalize(second))
    whole.update(second)
    restored.update(second)
    assert th.equal(restored.std, whole.std)
    assert all(th.equal(a, b) for a, b in zip(restored.normalized_bounds(0.5), whole.normalized_bounds(0.5), strict=True))
