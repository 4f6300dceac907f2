"""What world models in standardised units decode, and how they learn; the contract is in test_world_model_contract.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch as th
from torch import nn
from torch.distributions import Normal

from sb3_polygrad.common.trajectory import Trajectory
from sb3_polygrad.diffusion.denoiser import Denoiser
from sb3_polygrad.diffusion.staggered import StaggeredSampler
from sb3_polygrad.world_models.diffusion import DiffusionWorldModel
from sb3_polygrad.world_models.standardized import StandardizedWorldModel
from tests.known_system import HIGH, HORIZON, LOW, build, cut, fitted, observe, policy, real_windows


def imagined_with(noise: th.Tensor, std: float) -> Trajectory:
    """A batch whose standardised actions, under N(0, std²), are the given ones, ``(batch, horizon, 1)``."""
    ones = th.ones(noise.shape[:2])
    return Trajectory(th.zeros(len(noise), noise.shape[1] + 1, 2), std * noise, ones, 0.0 * ones, ones)


def test_the_controller_of_delta_learns_from_an_imagined_batch() -> None:
    model = build("policy_guided", sampler=dict(n_diffusion_steps=4, delta=0.01, delta_lr=0.1))
    noise = th.randn(50, HORIZON, 1)
    noise = 2.0 * (noise - noise.mean()) / noise.std(correction=0)
    metrics = model.adapt(imagined_with(noise, 0.7), lambda obs: Normal(th.zeros_like(obs[..., :1]), 0.7))
    assert metrics["action_std"].item() == pytest.approx(2.0, rel=1e-5)
    assert metrics["delta"].item() == pytest.approx(0.01 * math.exp(0.1), rel=1e-5), "Eq. 10"
    assert metrics["delta_at_bound"].item() == 0.0
    assert abs(metrics["action_mean"]) < 1e-5 and metrics["action_ks"] > 0.1
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())


def test_where_actions_are_draws_there_is_nothing_to_tune() -> None:
    for name in ("staggered", "ensemble"):
        assert build(name).adapt(imagined_with(th.randn(5, HORIZON, 1), 0.7), policy) == {}


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


def show(model: DiffusionWorldModel, values: th.Tensor, terminals: th.Tensor) -> None:
    """Steps whose observations, successors, actions and rewards are all the given ones, ``(n, 1)``."""
    model.observe(Trajectory(th.stack([values, values], dim=1), values[:, None], values, terminals, th.ones_like(values)))


def pretend_fitted(model: DiffusionWorldModel) -> None:
    """As if it had been saved after a gradient step and loaded."""
    model.load_state_dict({**model.state_dict(), "fitted": th.tensor(1.0)})


def oracle_model(constant: float | None = None, endings_seen: bool = True) -> DiffusionWorldModel:
    """A world model of one observation whose standardised units are the environment's own."""
    model = DiffusionWorldModel(1, LOW, HIGH, HORIZON, Oracle(constant), sampler=StaggeredSampler(HORIZON, 1, 1.0))
    both = th.tensor([[-1.0], [1.0]])  # mean 0, standard deviation 1
    show(model, both, th.tensor([[0.0], [float(endings_seen)]]))
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


LEARNERS = ["staggered", "policy_guided", "ensemble", "transformer"]


def learn(model: StandardizedWorldModel, data: Trajectory) -> None:
    model.fit(cut(data, model.window))


@pytest.mark.parametrize("name", LEARNERS)
def test_the_average_that_imagines_is_an_ema(name: str) -> None:
    model = build(name, ema_decay=0.75, learning_rate=0.01)
    assert isinstance(model, StandardizedWorldModel)
    data = real_windows(32)
    observe(model, data)
    expected: dict[str, th.Tensor] = {}
    for step in range(7):
        learn(model, data)
        for key, parameter in model.network.named_parameters():
            expected[key] = parameter.detach().clone() if step == 0 else 0.75 * expected[key] + 0.25 * parameter.detach()
    for key, parameter in model.average.module.named_parameters():
        assert th.allclose(parameter, expected[key], atol=1e-6), key


@pytest.mark.parametrize("name", ["staggered", "policy_guided", "ensemble"])
def test_weight_decay_is_of_the_inner_matrices_alone(name: str) -> None:
    before, after = [], []
    for weight_decay in (0.0, 0.5):
        th.manual_seed(0)
        model = build(name, learning_rate=0.01, weight_decay=weight_decay)
        assert isinstance(model, StandardizedWorldModel)
        data = real_windows(32)
        observe(model, data)
        before.append({key: p.detach().clone() for key, p in model.network.named_parameters()})
        th.manual_seed(1)
        learn(model, data)
        after.append(dict(model.network.named_parameters()))
    decayed = []
    for key, start in before[0].items():
        decays = key.endswith("weight") and start.dim() > 1 and not key.startswith("head")
        decayed += [key] if decays else []
        fraction = 0.01 * 0.5 if decays else 0.0
        assert th.equal(start, before[1][key]) and th.allclose(after[1][key], after[0][key] - fraction * start, atol=1e-6), key
    assert "project.weight" in decayed and {"blocks.0.weight", "blocks.0.2.weight"} & set(decayed)


def test_weight_decay_is_not_negative() -> None:
    with pytest.raises(ValueError, match="weight_decay must be at least 0"):
        build(weight_decay=-0.1)
    with pytest.raises(ValueError, match="weight_decay times learning_rate must be less than 1"):
        build(weight_decay=2_000.0, learning_rate=1e-3)


@pytest.mark.parametrize("name", LEARNERS)
def test_imagines_with_the_average(name: str) -> None:
    model, start, imagined = fitted(name), real_windows(4).observations[:, 0], []
    assert isinstance(model, StandardizedWorldModel)
    for _ in range(2):
        th.manual_seed(1)
        imagined.append(model.imagine(start, policy).observations)
        for parameter in model.network.parameters():
            parameter.detach().zero_()
    assert th.equal(imagined[0], imagined[1])


@pytest.mark.parametrize("name", LEARNERS)
def test_fit_leaves_the_average_out_of_the_gradient(name: str) -> None:
    model = fitted(name)
    assert isinstance(model, StandardizedWorldModel)
    assert all(p.grad is None and not p.requires_grad for p in model.average.parameters())


@pytest.mark.parametrize("name", LEARNERS)
def test_gradient_norm_is_bounded(name: str) -> None:
    # SGD in place of Adam: the step is the learning rate times the clipped gradient.
    model = build(name)
    assert isinstance(model, StandardizedWorldModel)
    model.fit_settings = model.fit_settings._replace(max_grad_norm=1e-3)
    model.optimizer = th.optim.SGD(model.network.parameters(), lr=1.0)
    before = nn.utils.parameters_to_vector(model.network.parameters()).detach()
    learn(model, real_windows(16))
    step = nn.utils.parameters_to_vector(model.network.parameters()) - before
    assert step.norm().item() == pytest.approx(1e-3, rel=1e-2)


class Undecided(Denoiser):
    """Expects an ending with probability 0.3, whatever happens; terminals of mean 0.5 and standard deviation 0.5."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(th.zeros(1))

    def forward(self, noisy: th.Tensor, actions: th.Tensor, level: th.Tensor) -> th.Tensor:
        return th.zeros_like(noisy) + th.tensor([0.0, 0.0, (0.3 - 0.5) / 0.5])


def test_an_ending_that_was_sampled_is_cut_at_one_half() -> None:
    model = DiffusionWorldModel(1, LOW, HIGH, HORIZON, Undecided(), sampler=StaggeredSampler(HORIZON, 2, 2.0))
    show(model, th.tensor([[-1.0], [1.0]]), th.tensor([[0.0], [1.0]]))
    pretend_fitted(model)
    assert model.imagine(th.zeros(2_000, 1), constant_policy(0.0)).terminals.sum() == 0.0


@pytest.mark.parametrize("name", ["ensemble", "stochastic ensemble", "transformer"])
def test_a_probability_of_an_ending_is_drawn(name: str) -> None:
    model = fitted(name)
    assert isinstance(model, StandardizedWorldModel)
    head = model.average.module.head
    layer = head[-1] if isinstance(head, nn.Sequential) else head
    for parameter in layer.parameters():  # of shapes (..., outputs) but for nn.Linear's weight, whose outputs come first
        parameter.detach().zero_()
    layer.bias.detach()[..., -1] = math.log(0.3 / 0.7)
    survived = model.imagine(real_windows(20_000).observations[:, 0], policy).mask.mean(dim=0)
    assert survived.tolist() == pytest.approx((0.7 ** th.arange(HORIZON)).tolist(), abs=0.015)
