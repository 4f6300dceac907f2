"""The transformer denoiser: what each output may depend on, at any horizon and with either kind of noise level."""

from __future__ import annotations

import pytest
import torch as th

from sb3_polygrad.diffusion.transformer import Transformer
from sb3_polygrad.world_models.make import make_world_model

CHANNELS, ACTION_DIM, BATCH = 3, 2, 5


def transformer(horizon: int, n_layers: int = 3) -> Transformer:
    th.manual_seed(0)
    return Transformer(horizon, CHANNELS, ACTION_DIM, width=16, n_layers=n_layers)


def inputs(horizon: int, staggered: bool) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    levels = th.rand(BATCH, horizon) if staggered else th.rand(BATCH, 1)
    return th.randn(BATCH, horizon + 1, CHANNELS), th.randn(BATCH, horizon, ACTION_DIM), levels


def first_change(before: th.Tensor, after: th.Tensor) -> int:
    """The first state whose output differs."""
    return int((before != after).any(dim=2).any(dim=0).nonzero()[0])


@pytest.mark.parametrize("staggered", [False, True])
@pytest.mark.parametrize("horizon", [10, 50, 200])
def test_outputs_see_their_own_past_and_nothing_later(horizon: int, staggered: bool) -> None:
    network = transformer(horizon)
    noisy, actions, level = inputs(horizon, staggered)
    output = network(noisy, actions, level)
    assert output.shape == noisy.shape
    for t in (0, horizon // 2, horizon - 1):
        changed_state, changed_action = noisy.clone(), actions.clone()
        changed_state[:, t + 1] += 1.0
        changed_action[:, t] += 1.0
        for changed in (network(changed_state, actions, level), network(noisy, changed_action, level)):
            assert first_change(output, changed) == t + 1, "state t + 1 is what action t causes"
            assert (changed[:, t + 1 :] != output[:, t + 1 :]).any(dim=2).all(), "all that comes later can see it"
        if staggered:
            changed_level = level.clone()
            changed_level[:, t] = 1.0 - changed_level[:, t]
            assert first_change(output, network(noisy, actions, changed_level)) == t + 1, "each token has its own level"


def test_one_level_is_the_same_level_for_every_state() -> None:
    noisy, actions, _ = inputs(4, staggered=False)
    network = transformer(4)
    for rows in (1, BATCH):
        level = th.full((rows, 1), 0.3)
        assert th.allclose(network(noisy, actions, level), network(noisy, actions, level.expand(-1, 4)), atol=1e-6)
    assert not th.allclose(network(noisy, actions, th.tensor([[0.3]])), network(noisy, actions, th.tensor([[0.6]])), atol=1e-3)


def test_equal_tokens_at_different_steps_are_told_apart() -> None:
    noisy, actions = th.zeros(1, 5, CHANNELS), th.zeros(1, 4, ACTION_DIM)
    output = transformer(4)(noisy, actions, th.full((1, 1), 0.5))
    assert (output.diff(dim=1).abs().amax(dim=2) > 1e-4).all()


@pytest.mark.parametrize(("world_model", "kwargs"), [("diffusion", {"denoiser": "transformer"}), ("transformer", {})])
def test_width_must_be_shared_equally_by_the_heads(world_model: str, kwargs: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="world_model_kwargs: width=30 must be a multiple of the 4 attention heads"):
        make_world_model(world_model, 1, -th.ones(1), th.ones(1), 4, {"width": 30, **kwargs})
