"""Imagining with gradients: through the world model to the policy."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn
from torch.distributions import Normal

from sb3_polygrad import PolyGRAD
from sb3_polygrad.common.action_diagnostics import standardized_actions
from sb3_polygrad.common.gradients import clip_row_gradients
from sb3_polygrad.common.trajectory import Trajectory
from sb3_polygrad.imagination import ImaginedBatch
from sb3_polygrad.updates import PathwiseUpdate, PPOUpdate
from sb3_polygrad.world_models.base import PolicyFn, WorldModel
from tests.toys import PointEnv, tiny_model

SMALL: dict[str, Any] = dict(width=16, n_layers=1)
WITH_GRADIENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ensemble": ("ensemble", {}),
    "stochastic ensemble": ("ensemble", dict(stochastic=True)),
    "transformer": ("transformer", SMALL),
    "rssm": ("rssm", dict(width=16, n_variables=4, n_classes=4)),
}
WITHOUT: dict[str, tuple[str, dict[str, Any]]] = {
    "policy guided": ("diffusion", {}),
    "staggered": ("diffusion", dict(sampler=dict(name="staggered"))),
    "autoregressive diffusion": ("autoregressive_diffusion", SMALL),
}


def model_with(settings: tuple[str, dict[str, Any]], **changes: Any) -> PolyGRAD:
    """A small model, its world model fitted a little on a point that reaches its goal."""
    world_model, kwargs = settings
    return tiny_model(PointEnv(goal_ends=True), world_model, world_model_kwargs=kwargs, **changes).learn(200)


def mean_action(model: PolyGRAD, observations: th.Tensor) -> th.Tensor:
    with th.no_grad():
        return model.imagination.policy_at(observations).mean


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_the_same_trajectories_but_for_what_is_drawn(name: str) -> None:
    model = model_with(WITH_GRADIENTS[name])
    start = model.replay_buffer.sample_observations(64)
    th.manual_seed(1)
    drawn = model.imagination(start).trajectory
    th.manual_seed(1)
    expected = model.imagination(start, differentiable=True).trajectory
    assert th.allclose(drawn.observations, expected.observations, atol=1e-5)
    assert th.allclose(drawn.rewards, expected.rewards, atol=1e-5)
    assert th.allclose(drawn.actions, expected.actions, atol=1e-5)
    assert not any(tensor.requires_grad for tensor in drawn) and expected.rewards.requires_grad
    assert ((expected.terminals >= 0.0) & (expected.terminals <= 1.0)).all()
    alive = th.ones(64)
    for t in range(expected.horizon):
        assert th.allclose(expected.mask[:, t], alive)
        alive = alive * (1.0 - expected.terminals[:, t])


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_as_many_endings_as_are_drawn(name: str) -> None:
    model = model_with(WITH_GRADIENTS[name])
    start = model.replay_buffer.sample_observations(4_000)
    expected = model.imagination(start, differentiable=True).trajectory
    goes_on = (expected.mask[:, -1] * (1.0 - expected.terminals[:, -1])).mean()
    drawn = model.imagine(start).terminals[:, -1].mean()
    assert drawn == pytest.approx(1.0 - goes_on.item(), abs=0.03) and drawn > 0.0


@pytest.mark.parametrize("name", [name for name in WITH_GRADIENTS if name != "rssm"])
def test_gradient_is_that_of_finite_differences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_polygrad.common.gradients.MAX_NORM", math.inf)
    # (The RSSM's draws of classes have straight-through gradients, which are no derivatives.)
    model = model_with(WITH_GRADIENTS[name])
    world_model = model.world_model.double()
    start = model.replay_buffer.sample_observations(32).double()
    shift = th.zeros(1, dtype=th.float64, requires_grad=True)

    def rewards(shift: th.Tensor) -> th.Tensor:
        th.manual_seed(2)
        policy = lambda states: Normal(-0.1 * states + shift, 0.2)  # noqa: E731
        imagined = world_model.imagine(start, policy, differentiable=True)
        return (imagined.rewards * imagined.mask).sum(dim=1).mean()

    gradient = th.autograd.grad(rewards(shift), shift)[0].item()
    step = 1e-5
    with th.no_grad():
        difference = (rewards(shift + step) - rewards(shift - step)).item() / (2.0 * step)
    assert gradient == pytest.approx(difference, rel=1e-2, abs=1e-6) and abs(gradient) > 1e-4


def test_no_trajectory_outweighs_the_others() -> None:
    # Lengths 1, 1, 3, 1000: at most three times the median, which is 1, whatever the direction; the values stay.
    values = th.randn(4, 2, 3, requires_grad=True)
    weights = th.nn.functional.normalize(th.randn(4, 6), dim=1) * th.tensor([1.0, 1.0, 3.0, 1_000.0])[:, None]
    passed = clip_row_gradients(values * 1.0)
    (passed.flatten(1) * weights).sum().backward()
    assert th.equal(passed, values) and values.grad is not None
    assert th.allclose(values.grad.flatten(1).norm(dim=1), th.tensor([1.0, 1.0, 3.0, 3.0]))
    assert th.allclose(values.grad.flatten(1)[3], 3.0 * weights[3] / 1_000.0)


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_is_the_default_where_there_are_gradients(name: str) -> None:
    model = model_with(WITH_GRADIENTS[name])
    assert model.policy_update is None and isinstance(model.update, PathwiseUpdate)
    assert all(parameter.grad is None for parameter in model.world_model.average.parameters())  # type: ignore[union-attr]
    assert not any(tensor.requires_grad for tensor in model.rollout_buffer.all_steps()), "no graph is kept"


@pytest.mark.parametrize("name", WITHOUT)
def test_where_there_are_none_ppo_is_the_default_and_pathwise_an_error(name: str) -> None:
    model = model_with(WITHOUT[name])
    assert isinstance(model.update, PPOUpdate) and not model.world_model.differentiable
    with pytest.raises(ValueError, match=r"policy_update='pathwise' needs gradients.*'ppo'"):
        model_with(WITHOUT[name], policy_update="pathwise")
    with pytest.raises(ValueError, match="is not differentiable"):
        model.imagination(model.replay_buffer.sample_observations(4), differentiable=True)


class KnownPoint(WorldModel):
    """``x' = x + a``, reward ``-x'^2``, never ends; nothing to fit."""

    differentiable = True

    def __init__(self, obs_dim: int, action_low: th.Tensor, action_high: th.Tensor, horizon: int) -> None:
        super().__init__(obs_dim, len(action_low), horizon)
        self.unused = nn.Parameter(th.zeros(()))
        self.optimizer = th.optim.Adam([self.unused])

    def observe(self, steps: Trajectory) -> None:
        pass

    def fit(self, segments: Trajectory) -> dict[str, th.Tensor]:
        return {"loss": th.zeros(())}

    def imagine(self, start: th.Tensor, policy: PolicyFn, *, differentiable: bool = False) -> Trajectory:
        states, actions = [start], []
        with th.set_grad_enabled(differentiable):
            for _ in range(self.horizon):
                actions.append(policy(states[-1]).rsample())
                states.append(states[-1] + actions[-1])
            observations = th.stack(states, dim=1)
            rewards = -observations[:, 1:].square().sum(dim=-1)
        return Trajectory(observations, th.stack(actions, dim=1), rewards, th.zeros_like(rewards), th.ones_like(rewards))


def known_point(env: gym.Env, **changes: Any) -> PolyGRAD:
    nothing_to_fit = dict(batch_size=1, gradient_steps=1)
    settings = dict(n_steps=4, n_imagined=64, learning_starts=40, learning_rate=3e-3, seed=0, device="cpu")
    return PolyGRAD("MlpPolicy", env, world_model=KnownPoint, **{**nothing_to_fit, **settings, **changes})


def test_returns_reach_the_policy_through_a_known_model() -> None:
    """The policy that brings the point to 0 in one step is ``a = -x``."""
    model = known_point(PointEnv(scale=4.0), horizon=3, gamma=0.9, policy_kwargs=dict(net_arch=[32], min_std=0.01))
    model.learn(2_000)
    points = th.linspace(-1.5, 1.5, 7)[:, None]
    assert th.allclose(mean_action(model, points), -points, atol=0.25)


def test_values_at_the_end_of_the_horizon_reach_the_policy() -> None:
    """Where rewards are the same everywhere, the policy goes where the target critic says that more will come."""
    model = known_point(PointEnv(), horizon=2).learn(48)

    class Rightwards(nn.Module):
        def forward(self, observations: th.Tensor) -> th.Tensor:
            return observations[:, :1]

    model.policy.critic_target = Rightwards()  # type: ignore[assignment]
    points = th.linspace(-1.5, 1.5, 7)[:, None]
    before = mean_action(model, points)
    for _ in range(10):
        batch = model.imagination(model.replay_buffer.sample_observations(64), differentiable=True)
        model.rollout_buffer.fill(ImaginedBatch(batch.trajectory, batch.observations, 0.0 * batch.rewards), model.policy)
        assert model.update(model.policy, model.rollout_buffer)["skipped"] == 0.0
    assert (mean_action(model, points) > before).all()


def test_a_probable_ending_keeps_the_policy_from_what_comes_after() -> None:
    """Where an ending is certain the target critic has no say, and the policy does not go where it points."""

    class Over(KnownPoint):
        def imagine(self, *args: Any, **kwargs: Any) -> Trajectory:
            imagined = super().imagine(*args, **kwargs)
            return imagined._replace(terminals=th.ones_like(imagined.terminals), rewards=0.0 * imagined.rewards)

    model = known_point(PointEnv(), horizon=2).learn(48)
    model.imagination.world_model = Over(1, -th.ones(1), th.ones(1), 2)
    batch = model.imagination(model.replay_buffer.sample_observations(64), differentiable=True)
    model.rollout_buffer.fill(batch, model.policy)
    assert th.equal(model.rollout_buffer.all_steps().returns, th.zeros(128))


def test_the_example_of_a_world_model_of_ones_own_knows_the_pendulum() -> None:
    example = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "own_world_model.py"))
    settings = dict(n_steps=5, learning_starts=50, n_imagined=16, seed=0, device="cpu", policy_kwargs=dict(net_arch=[8]))
    model = PolyGRAD("MlpPolicy", "Pendulum-v1", world_model=example["KnownPendulum"], **settings).learn(100)
    assert isinstance(model.update, PathwiseUpdate) and model._n_updates > 0
    # One imagined step is one real step.
    real = model.replay_buffer.sample(200, 1)
    model.world_model.horizon = 1
    imagined = model.world_model.imagine(
        real.observations[:, 0], lambda observations: Normal(real.actions[:, 0], th.full_like(real.actions[:, 0], 1e-9))
    )
    assert th.allclose(imagined.observations, real.observations, atol=1e-4)
    assert th.allclose(imagined.rewards, real.rewards, atol=1e-3) and (imagined.mask == 1.0).all()
    assert len(np.unique(real.rewards)) > 50


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_gradients_are_bounded_where_they_are_imagined(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with(WITH_GRADIENTS[name])
    start = model.replay_buffer.sample_observations(8)

    def gradient() -> th.Tensor:
        shift = th.zeros(1, requires_grad=True)
        imagined = model.world_model.imagine(start, lambda x: Normal(-0.1 * x + shift, 0.2), differentiable=True)
        return th.autograd.grad(imagined.rewards.sum(), shift)[0]

    assert gradient() != 0.0
    monkeypatch.setattr("sb3_polygrad.common.gradients.MAX_NORM", 0.0)
    assert gradient() == 0.0


class Features(BaseFeaturesExtractor):
    """With parameters, and with layers that act otherwise in training."""

    def __init__(self, observation_space: gym.spaces.Box) -> None:
        super().__init__(observation_space, 8)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(1, 8), nn.Dropout(0.5))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.net(observations)


@pytest.mark.parametrize("share", [True, False])
def test_features_belong_to_the_actor_and_imagination_is_no_training(share: bool) -> None:
    env = VecNormalize(DummyVecEnv([lambda: PointEnv(goal_ends=True)]))
    kwargs = dict(net_arch=[8], features_extractor_class=Features, share_features_extractor=share)
    model = tiny_model(env, policy_kwargs=kwargs, policy_update_kwargs=dict(n_epochs=3))
    before = [parameter.clone() for parameter in model.policy.actor_parameters()]
    model.learn(200)
    assert all(not th.equal(a, b) for a, b in zip(before, model.policy.actor_parameters(), strict=True))
    steps = {int(model.policy.actor_optimizer.state[p]["step"]) for p in model.policy.actor_parameters()}
    assert steps == {model._n_updates}, "the steps of the critics leave it alone"
    with th.no_grad():
        model.policy.action_net.weight *= 100.0  # so that one feature less would be another action
        batch = model.imagination(model.replay_buffer.sample_observations(64))
        normal = model.imagination.policy_at(batch.trajectory.observations[:, :-1])
    standardized = standardized_actions(batch.trajectory, normal.mean, normal.stddev)
    assert standardized.std().item() == pytest.approx(1.0, abs=0.3), "the policy that imagined is the one that acts"


def test_an_actor_that_never_learns_is_a_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sb3_polygrad.common.faults.MAX_FAULTY_UPDATES", 5)
    model = tiny_model(PointEnv())
    model.policy.action_net.bias.register_hook(lambda gradient: gradient * th.nan)
    with pytest.raises(ValueError, match="gradients of policy and critics were not finite"):
        model.learn(400)


def test_deterministic_actions_are_of_the_average_whoever_asks() -> None:
    model = tiny_model(PointEnv(), learning_rate=0.01)
    model.learn(200)
    observations = th.linspace(-2.0, 2.0, 5)[:, None]
    with th.no_grad():
        average = model.policy._mean(model.policy.actor_average(observations))
        actions, values, log_probs = model.policy(observations, deterministic=True)
    mean = mean_action(model, observations)
    assert th.equal(actions, average) and not th.allclose(actions, mean, atol=1e-4)
    assert th.allclose(th.as_tensor(model.predict(observations.numpy(), deterministic=True)[0]), average.clamp(-1.0, 1.0))
    expected = model.policy.evaluate_actions(observations, actions)
    assert th.allclose(values, expected[0]) and th.allclose(log_probs, expected[1])
