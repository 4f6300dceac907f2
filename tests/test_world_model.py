"""What the diffusion world model decodes, and how it learns; the contract is in test_world_model_contract.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch as th
from torch import nn
from torch.distributions import Normal

from sb3_polygrad.denoisers.base import Denoiser
from sb3_polygrad.diffusion.staggered import StaggeredSampler
from sb3_polygrad.world_models.diffusion import DiffusionWorldModel
from tests.known_system import HIGH, HORIZON, LOW, build, fitted, observe, policy, real_windows


@pytest.mark.parametrize("name", ["staggered", "policy_guided"])
def test_adapt_reports_what_there_is_to_log(name: str) -> None:
    metrics = build(name, delta=0.01, delta_lr=0.1).adapt(th.tensor(2.0), th.tensor([0.7]))
    if name == "staggered":
        assert metrics == {}, "nothing to tune"
    else:
        assert metrics["delta"].item() == pytest.approx(0.01 * math.exp(0.1)), "Eq. 10"
        assert metrics["delta_at_bound"].item() == 0.0


# ---------------------------------------------------------------------- an oracle in place of the network


class Oracle(Denoiser):
    """
    Knows s' = 0.5 s + a, reward 0.25 s and the ending s' > 0.8, all in standardised units.

    :param constant: put this out instead, whatever comes in
    """

    def __init__(self, constant: float | None = None) -> None:
        super().__init__()
        self.constant = constant
        self.unused = nn.Parameter(th.zeros(1))

    def forward(self, noisy: th.Tensor, actions: th.Tensor, level: th.Tensor) -> th.Tensor:
        if self.constant is not None:
            return th.full_like(noisy, self.constant)
        states = [noisy[:, 0]]
        for t in range(actions.shape[1]):
            now = states[-1][:, :1]
            after = 0.5 * now + actions[:, t]
            # An ending is 1 and none -1: terminals of mean 0.5 and standard deviation 0.5.
            states.append(th.cat([after, 0.25 * now, (after > 0.8).float() * 2 - 1], dim=1))
        return th.stack(states, dim=1)


def pretend_fitted(model: DiffusionWorldModel) -> None:
    """As if it had been saved after a gradient step and loaded."""
    model.load_state_dict({**model.state_dict(), "fitted": th.tensor(1.0)})


def oracle_model(constant: float | None = None, endings_seen: bool = True) -> DiffusionWorldModel:
    """A world model of one observation whose standardised units are the environment's own."""
    model = DiffusionWorldModel(1, LOW, HIGH, HORIZON, Oracle(constant), StaggeredSampler(HORIZON, 1, 1.0))
    both = th.tensor([[-1.0], [1.0]])  # mean 0, standard deviation 1
    model.observe(both, both, both, th.cat([both, th.tensor([[0.0], [float(endings_seen)]])], dim=1))
    pretend_fitted(model)
    return model


def constant_policy(action: float) -> Any:
    return lambda observations: Normal(th.full_like(observations, action), 1e-6)


def test_decodes_observations_rewards_and_endings() -> None:
    trajectory = oracle_model().imagine(th.tensor([[0.0]]), constant_policy(0.5))
    assert trajectory.observations[0, :, 0].tolist() == pytest.approx([0.0, 0.5, 0.75, 0.875, 0.9375], abs=1e-4)
    assert trajectory.rewards[0].tolist() == pytest.approx([0.0, 0.125, 0.1875, 0.21875], abs=1e-4)
    assert trajectory.terminals[0].tolist() == [0.0, 0.0, 1.0, 1.0]
    assert trajectory.mask[0].tolist() == [1.0, 1.0, 1.0, 0.0], "the ending step itself counts"


def test_an_environment_without_endings_has_none_to_imagine() -> None:
    trajectory = oracle_model(endings_seen=False).imagine(th.tensor([[0.0]]), constant_policy(0.5))
    assert trajectory.terminals.sum() == 0.0


def test_the_model_sees_what_the_environment_would_do() -> None:
    # Actions beyond the box move the world as its edge does, and are returned as drawn.
    at_edge, beyond = (oracle_model().imagine(th.tensor([[0.0]]), constant_policy(a)) for a in (1.0, 7.0))
    assert th.allclose(beyond.observations, at_edge.observations, atol=1e-4)
    assert th.allclose(beyond.actions, th.tensor(7.0), atol=1e-4)


@pytest.mark.parametrize("constant", [1e9, -1e9])
def test_imagined_values_stay_near_what_was_seen(constant: float) -> None:
    trajectory = oracle_model(constant).imagine(th.zeros(3, 1), constant_policy(0.0))
    # Seen in [-1, 1], scale 1: half the width and one scale more on each side.
    assert trajectory.observations[:, 1:].abs().max().item() == pytest.approx(3.0)
    assert trajectory.rewards.abs().max().item() == pytest.approx(3.0)


# ---------------------------------------------------------------------- learning


@pytest.mark.parametrize("ema_every", [1, 3])
def test_the_average_that_imagines_is_an_ema(ema_every: int) -> None:
    model = build(ema_decay=0.75, ema_every=ema_every, learning_rate=0.01)
    assert isinstance(model, DiffusionWorldModel)
    data = real_windows(32)
    observe(model, data)
    expected = None
    for step in range(7):
        model.fit(data)
        if step % ema_every == 0:
            weight = model.denoiser.head.weight.detach()  # type: ignore[union-attr]
            expected = weight.clone() if expected is None else 0.75 * expected + 0.25 * weight
    assert th.allclose(model.average.module.head.weight, expected, atol=1e-6)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("name", ["staggered", "policy_guided"])
def test_weight_decay_is_of_the_inner_matrices_alone(name: str) -> None:
    before, after = [], []
    for weight_decay in (0.0, 0.5):
        th.manual_seed(0)
        model = build(name, learning_rate=0.01, weight_decay=weight_decay)
        assert isinstance(model, DiffusionWorldModel)
        data = real_windows(32)
        observe(model, data)
        before.append({key: p.detach().clone() for key, p in model.denoiser.named_parameters()})
        th.manual_seed(1)
        model.fit(data)
        after.append(dict(model.denoiser.named_parameters()))
    for key, start in before[0].items():
        share = 0.01 * 0.5 if start.dim() > 1 and not key.startswith("head") else 0.0
        assert th.equal(start, before[1][key]) and th.allclose(after[1][key], after[0][key] - share * start, atol=1e-6), key


def test_weight_decay_is_not_negative() -> None:
    with pytest.raises(ValueError, match="weight_decay must not be negative"):
        build(weight_decay=-0.1)
    with pytest.raises(ValueError, match="weight_decay times learning_rate must be less than 1"):
        build(weight_decay=2_000.0, learning_rate=1e-3)


def test_imagines_with_the_average() -> None:
    model, start, imagined = fitted(), real_windows(4).observations[:, 0], []
    for _ in range(2):
        th.manual_seed(1)
        imagined.append(model.imagine(start, policy).observations)
        for parameter in model.denoiser.parameters():  # type: ignore[union-attr, operator]
            parameter.detach().zero_()
    assert th.equal(imagined[0], imagined[1])


def test_fit_leaves_the_average_out_of_the_gradient() -> None:
    model = fitted()
    assert isinstance(model, DiffusionWorldModel)
    assert all(p.grad is None and not p.requires_grad for p in model.average.parameters())


def test_gradient_norm_is_bounded() -> None:
    # SGD in place of Adam: the step is the learning rate times the clipped gradient.
    model = build(max_grad_norm=1e-3)
    assert isinstance(model, DiffusionWorldModel)
    model.optimizer = th.optim.SGD(model.denoiser.parameters(), lr=1.0)
    before = nn.utils.parameters_to_vector(model.denoiser.parameters()).detach()
    model.fit(real_windows(16))
    step = nn.utils.parameters_to_vector(model.denoiser.parameters()) - before
    assert step.norm().item() == pytest.approx(1e-3, rel=1e-2)


class Undecided(Denoiser):
    """Expects an ending with probability 0.3, whatever happens; terminals of mean 0.5 and standard deviation 0.5."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(th.zeros(1))

    def forward(self, noisy: th.Tensor, actions: th.Tensor, level: th.Tensor) -> th.Tensor:
        return th.zeros_like(noisy) + th.tensor([0.0, 0.0, (0.3 - 0.5) / 0.5])


@pytest.mark.parametrize(("n_levels", "share"), [(1, 0.3), (2, 0.0)])
def test_an_expected_ending_is_drawn_and_a_drawn_one_cut(n_levels: int, share: float) -> None:
    model = DiffusionWorldModel(1, LOW, HIGH, HORIZON, Undecided(), StaggeredSampler(HORIZON, n_levels, float(n_levels)))
    both = th.tensor([[-1.0], [1.0]])
    model.observe(both, both, both, th.cat([both, th.tensor([[0.0], [1.0]])], dim=1))
    pretend_fitted(model)
    th.manual_seed(0)
    trajectory = model.imagine(th.zeros(20_000, 1), constant_policy(0.0))
    survived = trajectory.mask.mean(dim=0)
    expected = (1.0 - share) ** th.arange(HORIZON)
    assert survived.tolist() == pytest.approx(expected.tolist(), abs=0.015)
