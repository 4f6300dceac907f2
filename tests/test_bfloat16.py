"""Imagining with the large matrix products in bfloat16."""

from __future__ import annotations

import copy

import pytest
import torch as th
from torch import nn

from sb3_polygrad.core.bfloat16 import SMALLEST, BFloat16Copy
from sb3_polygrad.denoisers.residual_mlp import residual_block
from sb3_polygrad.world_models.diffusion import DiffusionWorldModel
from sb3_polygrad.world_models.factory import build_diffusion
from tests.known_system import HIGH, HORIZON, LOW, cut, observe, policy, real_windows


def wide() -> nn.Module:
    th.manual_seed(0)
    return nn.Sequential(nn.Linear(3, SMALLEST), residual_block(SMALLEST), nn.Linear(SMALLEST, 2))


@th.no_grad()
def test_wide_layers_are_rounded_and_nothing_else_is() -> None:
    network, x = wide(), th.randn(64, 3)
    fast = BFloat16Copy(network)(x)
    rounded = copy.deepcopy(network)
    layer = rounded[1][2]
    layer.weight.copy_(layer.weight.bfloat16())
    layer.bias.copy_(layer.bias.bfloat16())
    assert fast.dtype == th.float32
    assert not th.equal(fast, network(x))
    # What is left beside rounded weights is the rounding of the layer's inputs and outputs: 8 bits each.
    assert (fast - rounded(x)).abs().max() < 3 * 2**-8 * rounded(x).abs().max()


@th.no_grad()
def test_small_networks_are_left_as_they_are() -> None:
    network, x = nn.Sequential(nn.Linear(3, SMALLEST - 1), nn.Linear(SMALLEST - 1, SMALLEST)), th.randn(4, 3)
    assert th.equal(BFloat16Copy(network)(x), network(x))


@th.no_grad()
def test_follows_the_network_when_refreshed() -> None:
    network, x = wide(), th.randn(16, 3)
    fast = BFloat16Copy(network)
    before = fast(x)
    for parameter in network.parameters():
        parameter.mul_(0.5)
    assert th.equal(fast(x), before)
    fast.refresh()
    assert th.equal(fast(x), BFloat16Copy(network)(x))
    assert all(parameter.dtype == th.float32 for parameter in network.parameters())


def build(dtype: str, sampler: str) -> DiffusionWorldModel:
    th.manual_seed(0)
    return build_diffusion(
        2, LOW, HIGH, HORIZON, sampler=sampler, n_diffusion_steps=8, width=SMALLEST, n_layers=2, dtype=dtype
    )


@pytest.mark.parametrize("sampler", ["staggered", "policy_guided"])
def test_imagines_what_float32_does_but_for_rounding(sampler: str) -> None:
    plain, fast = build("float32", sampler), build("bfloat16", sampler)
    batch = cut(real_windows(64), plain.window)
    for model in (plain, fast):
        observe(model, batch)
        for seed in range(20):
            th.manual_seed(seed)
            model.fit(batch)
    assert plain.state_dict().keys() == fast.state_dict().keys(), "either loads what the other saved"
    for name, tensor in plain.state_dict().items():
        assert th.equal(tensor, fast.state_dict()[name]), f"{name}: fitting is in float32"
    imagined = []
    for model in (plain, fast):
        th.manual_seed(0)
        imagined.append(model.eval().imagine(batch.observations[:, 0], policy))
    difference = (imagined[0].observations - imagined[1].observations).abs()
    assert 0.0 < difference.max() < 0.1, "observations have standard deviation 1"


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype.*'bfloat16'"):
        build("bfloat", "staggered")
