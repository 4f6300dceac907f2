"""The contract of a world model, what it decodes, and that it learns a known system."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch as th
from torch import nn
from torch.distributions import Normal

from sb3_polygrad.core.trajectory import Trajectory, mask_after_ending
from sb3_polygrad.diffusion.staggered import StaggeredSampler
from sb3_polygrad.world_models.base import WorldModel
from sb3_polygrad.world_models.diffusion import DiffusionWorldModel
from sb3_polygrad.world_models.factory import build_world_model
from tests.toys import equal_trees

OBS_DIM, ACTION_DIM, HORIZON = 2, 1, 4
LOW, HIGH = th.tensor([-1.0]), th.tensor([1.0])
SETTINGS: dict[str, dict[str, Any]] = {
    "staggered": dict(sampler="staggered", n_levels=2, lag=1.0),
    "policy_guided": dict(sampler="policy_guided", n_diffusion_steps=4),
    "policy_guided epsilon": dict(sampler="policy_guided", n_diffusion_steps=4, prediction="epsilon"),
    "transformer staggered": dict(denoiser="transformer", sampler="staggered", n_levels=2, lag=1.0),
    "transformer policy_guided": dict(denoiser="transformer", sampler="policy_guided", n_diffusion_steps=4),
}


def build(name: str = "staggered", **changes: Any) -> WorldModel:
    kwargs = {"width": 32, "n_layers": 1, **SETTINGS[name], **changes}
    return build_world_model("diffusion", OBS_DIM, LOW, HIGH, HORIZON, kwargs)


def policy(observations: th.Tensor) -> Normal:
    """Pushes against the first observation, loudly enough to leave the box at times."""
    mean = -0.5 * observations[..., :1]
    return Normal(mean, th.full_like(mean, 0.7))


def real_windows(batch: int) -> Trajectory:
    """Windows of s' = (0.9 s_0 + 0.3 a, s_0), reward s_0 - a, over when s_0' > 1.5; units far from standard ones: +100."""
    first = th.randn(batch, 1)
    states, rewards, ends = [th.cat([first, th.randn(batch, 1)], dim=1)], [], []
    actions = th.rand(batch, HORIZON, ACTION_DIM) * 2 - 1
    for t in range(HORIZON):
        now = states[-1][:, :1]
        states.append(th.cat([0.9 * now + 0.3 * actions[:, t], now], dim=1))
        rewards.append((now - actions[:, t])[:, 0])
        ends.append((states[-1][:, 0] > 1.5).float())
    terminals = th.stack(ends, dim=1).cummax(dim=1).values
    return Trajectory(
        th.stack(states, dim=1) + 100.0, actions, th.stack(rewards, dim=1), terminals, mask_after_ending(terminals)
    )


def observe(model: WorldModel, data: Trajectory) -> None:
    flat = (tensor.flatten(0, 1) for tensor in (data.observations[:, :-1], data.observations[:, 1:], data.actions))
    model.observe(*flat, th.stack([data.rewards, data.terminals], dim=-1).flatten(0, 1))


def fitted(name: str = "staggered", n_fits: int = 3, **changes: Any) -> WorldModel:
    model = build(name, **changes)
    data = real_windows(2_000)
    observe(model, data)
    for _ in range(n_fits):
        rows = th.randint(len(data.rewards), (64,))
        model.fit(Trajectory(*(tensor[rows] for tensor in data)))
    return model


# ---------------------------------------------------------------------- the contract


@pytest.mark.parametrize("name", SETTINGS)
def test_imagines_trajectories_of_its_shape(name: str) -> None:
    start = real_windows(6).observations[:, 0]
    trajectory = fitted(name).imagine(start, policy)
    assert trajectory.horizon == HORIZON
    assert trajectory.observations.shape == (6, HORIZON + 1, OBS_DIM)
    assert trajectory.actions.shape == (6, HORIZON, ACTION_DIM)
    assert trajectory.rewards.shape == trajectory.terminals.shape == trajectory.mask.shape == (6, HORIZON)
    assert th.equal(trajectory.observations[:, 0], start), "to the last bit"
    assert all(th.isfinite(tensor).all() and not tensor.requires_grad for tensor in trajectory)
    assert set(trajectory.terminals.unique().tolist()) <= {0.0, 1.0}
    assert (trajectory.terminals.diff(dim=1) >= 0).all(), "once over, over"
    assert th.equal(trajectory.mask, mask_after_ending(trajectory.terminals))


@pytest.mark.parametrize("name", SETTINGS)
def test_refuses_to_imagine_before_it_was_fitted(name: str) -> None:
    with pytest.raises(RuntimeError, match="never fitted"):
        build(name).imagine(th.zeros(2, OBS_DIM), policy)


@pytest.mark.parametrize("name", SETTINGS)
def test_state_dict_restores_what_it_imagines(name: str) -> None:
    model, other = fitted(name), build(name)
    model.adapt(th.tensor(1.3), th.tensor([0.7]))
    other.load_state_dict(model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(model.optimizer.state_dict()))  # torch would share the tensors
    start, batch = real_windows(8).observations[:, 0], real_windows(32)
    for _ in range(2):  # as it is, and after both learnt the same
        imagined = []
        for each in (model, other):
            th.manual_seed(1)
            imagined.append(each.imagine(start, policy))
            each.fit(batch)
        assert all(th.equal(a, b) for a, b in zip(*imagined, strict=True))


@pytest.mark.parametrize("name", SETTINGS)
def test_same_seed_same_trajectories(name: str) -> None:
    model, start, drawn = fitted(name), real_windows(8).observations[:, 0], []
    for seed in (1, 1, 2):
        th.manual_seed(seed)
        drawn.append(model.imagine(start, policy).observations)
    assert th.equal(drawn[0], drawn[1])
    assert not th.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("name", SETTINGS)
def test_all_of_its_state_is_floating_point(name: str) -> None:
    # SB3 randomises every tensor of a state dict in its contract tests.
    assert all(tensor.is_floating_point() for tensor in fitted(name).state_dict().values())


@pytest.mark.parametrize("name", SETTINGS)
def test_adapt_reports_what_there_is_to_log(name: str) -> None:
    metrics = build(name, delta=0.01, delta_lr=0.1).adapt(th.tensor(2.0), th.tensor([0.7]))
    if name.endswith("staggered"):
        assert metrics == {}, "nothing to tune"
    else:
        assert metrics["delta"].item() == pytest.approx(0.01 * math.exp(0.1)), "Eq. 10"
        assert metrics["delta_at_bound"].item() == 0.0


# ---------------------------------------------------------------------- an oracle in place of the network


class Oracle(nn.Module):
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


def oracle_model(constant: float | None = None, endings_seen: bool = True) -> DiffusionWorldModel:
    """A world model of one observation whose standardised units are the environment's own."""
    model = DiffusionWorldModel(1, LOW, HIGH, HORIZON, Oracle(constant), StaggeredSampler(HORIZON, 1, 1.0))
    both = th.tensor([[-1.0], [1.0]])  # mean 0, standard deviation 1
    model.observe(both, both, both, th.cat([both, th.tensor([[0.0], [float(endings_seen)]])], dim=1))
    model.fitted += 1.0
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


def test_no_gradient_reaches_the_policy() -> None:
    gain = nn.Parameter(th.tensor(0.5))
    fitted("policy_guided").imagine(th.zeros(3, OBS_DIM), lambda obs: Normal(gain * obs[..., :1], 0.5))
    assert gain.grad is None


def test_gradient_norm_is_bounded() -> None:
    # SGD in place of Adam: the step is the learning rate times the clipped gradient.
    model = build(max_grad_norm=1e-3)
    assert isinstance(model, DiffusionWorldModel)
    model.optimizer = th.optim.SGD(model.denoiser.parameters(), lr=1.0)
    before = nn.utils.parameters_to_vector(model.denoiser.parameters()).detach()
    model.fit(real_windows(16))
    step = nn.utils.parameters_to_vector(model.denoiser.parameters()) - before
    assert step.norm().item() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_batch_that_is_not_finite_leaves_no_trace(name: str) -> None:
    model, batch = fitted(name), real_windows(16)
    before = copy.deepcopy((dict(model.denoiser.named_parameters()), model.optimizer.state_dict()))  # type: ignore[union-attr, operator]
    batch.rewards[3, 1] = th.inf
    model.fit(batch)
    assert equal_trees((dict(model.denoiser.named_parameters()), model.optimizer.state_dict()), before)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(("name", "n_fits"), [("staggered", 1_500), ("policy_guided", 1_500), ("transformer staggered", 600)])
def test_learns_a_known_system(name: str, n_fits: int) -> None:
    th.manual_seed(0)
    model = fitted(name, n_fits=n_fits, width=64, n_layers=2, learning_rate=2e-3, n_diffusion_steps=16)
    start = real_windows(500).observations[:, 0]
    imagined = model.imagine(start, lambda obs: Normal(th.zeros_like(obs[..., :1]), 0.5))
    states, actions, alive = imagined.observations[..., 0] - 100.0, imagined.actions.clamp(-1, 1)[..., 0], imagined.mask > 0
    error = (states[:, 1:] - 0.9 * states[:, :-1] - 0.3 * actions)[alive]
    assert error.square().mean() < 0.03, "of a variance of about 0.8"
    reward_error = (imagined.rewards - states[:, :-1] + actions)[alive]
    assert reward_error.square().mean() < 0.08, "of a variance of about 1.1"
    ended = states[:, 1:] > 1.5
    assert (imagined.terminals.bool() == ended)[alive].float().mean() > 0.95
    assert ended[alive].any(), "there is something to predict"
