"""Imagining with gradients: through the world model to the policy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch as th
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn
from torch.distributions import Normal

from sb3_polygrad import PolyGRAD
from sb3_polygrad.common.gradients import limited
from sb3_polygrad.common.trajectory import Trajectory
from sb3_polygrad.world_models.base import Context, PolicyFn, WorldModel
from tests.toys import PointEnv, tiny_model

WITH_GRADIENTS: dict[str, dict[str, Any]] = {
    "diffusion": dict(world_model="diffusion", world_model_kwargs=dict(n_levels=1)),
    "ensemble": dict(world_model="ensemble", world_model_kwargs=dict(width=16, n_layers=1)),
    "transformer": dict(world_model="transformer", world_model_kwargs=dict(width=16, n_layers=1)),
    "rssm": dict(world_model="rssm", world_model_kwargs=dict(width=16, n_variables=4, n_classes=4)),
}
WITHOUT: dict[str, dict[str, Any]] = {
    "policy guided": dict(world_model_kwargs=dict(sampler="policy_guided", n_diffusion_steps=4)),
    "two levels": dict(world_model_kwargs=dict(n_levels=2)),
    "autoregressive diffusion": dict(world_model="autoregressive_diffusion", world_model_kwargs=dict(width=16)),
}


def model_with(settings: dict[str, Any], **changes: Any) -> PolyGRAD:
    """A small model, its world model fitted a little on a point that reaches its goal."""
    kwargs = dict(settings.get("world_model_kwargs", {}))
    tiny = dict(
        n_steps=8, batch_size=16, horizon=4, n_imagined=16, learning_starts=64, policy_kwargs=dict(net_arch=[16]), seed=0
    )
    arguments = {**tiny, **settings, "world_model_kwargs": kwargs, **changes}
    model = PolyGRAD("MlpPolicy", PointEnv(goal_ends=True), device="cpu", **arguments)
    return model.learn(200)


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_the_same_trajectories_but_for_what_is_drawn(name: str) -> None:
    model = model_with(WITH_GRADIENTS[name])
    start = model.replay_buffer.sample_observations(64)
    th.manual_seed(1)
    drawn = model.imagine(64, start)
    th.manual_seed(1)
    expected = model.world_model.imagine_expected(start, model._distribution)
    assert th.allclose(drawn.observations, expected.observations, atol=1e-5)
    assert th.allclose(drawn.rewards, expected.rewards, atol=1e-5)
    assert th.allclose(drawn.actions, expected.actions, atol=1e-5)
    assert ((expected.terminals >= 0.0) & (expected.terminals <= 1.0)).all()
    alive = th.ones(64)
    for t in range(expected.horizon):
        assert th.allclose(expected.mask[:, t], alive)
        alive = alive * (1.0 - expected.terminals[:, t])


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_as_many_endings_as_are_drawn(name: str) -> None:
    model = model_with(WITH_GRADIENTS[name])
    start = model.replay_buffer.sample_observations(4_000)
    expected = model.world_model.imagine_expected(start, model._distribution)
    goes_on = (expected.mask[:, -1] * (1.0 - expected.terminals[:, -1])).mean()
    drawn = model.imagine(4_000, start).terminals[:, -1].mean()
    assert drawn == pytest.approx(1.0 - goes_on.item(), abs=0.03) and drawn > 0.0


@pytest.mark.parametrize("name", [name for name in WITH_GRADIENTS if name != "rssm"])
def test_gradient_is_that_of_finite_differences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_polygrad.common.gradients.MAX_LENGTH", math.inf)
    # (The RSSM's draws of classes have straight-through gradients, which are no derivatives.)
    model = model_with(WITH_GRADIENTS[name])
    world_model = model.world_model.double()
    start = model.replay_buffer.sample_observations(32).double()
    shift = th.zeros(1, dtype=th.float64, requires_grad=True)

    def rewards(shift: th.Tensor) -> th.Tensor:
        th.manual_seed(2)
        policy = lambda states: Normal(-0.1 * states + shift, 0.2)  # noqa: E731
        imagined = world_model.imagine_expected(start, policy)
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
    passed = limited(values * 1.0)
    (passed.flatten(1) * weights).sum().backward()
    assert th.equal(passed, values) and values.grad is not None
    assert th.allclose(values.grad.flatten(1).norm(dim=1), th.tensor([1.0, 1.0, 3.0, 3.0]))
    assert th.allclose(values.grad.flatten(1)[3], 3.0 * weights[3] / 1_000.0)


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_is_the_default_where_there_are_gradients(name: str) -> None:
    model = model_with(WITH_GRADIENTS[name])
    assert model.policy_update is None and model._update_name == "pathwise"
    assert all(parameter.grad is None for parameter in model.world_model.average.parameters())  # type: ignore[attr-defined]
    assert not model.rollout_buffer.returns.requires_grad, "no graph is kept"  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", WITHOUT)
def test_where_there_are_none_ppo_is_the_default_and_pathwise_an_error(name: str) -> None:
    model = model_with(WITHOUT[name])
    assert model._update_name == "ppo"
    with pytest.raises(ValueError, match=r"policy_update='pathwise' needs gradients.*'ppo'"):
        model_with(WITHOUT[name], policy_update="pathwise")
    assert model.world_model.imagine_expected is None


class KnownPoint(WorldModel):
    """``x' = x + a``, reward ``-x'^2``, never ends; nothing to fit."""

    def __init__(self, obs_dim: int, action_low: th.Tensor, action_high: th.Tensor, horizon: int) -> None:
        super().__init__(obs_dim, len(action_low), horizon)
        self.unused = nn.Parameter(th.zeros(()))
        self.optimizer = th.optim.Adam([self.unused])

    def observe(self, *steps: th.Tensor) -> None:
        pass

    def fit(self, batch: Trajectory) -> dict[str, th.Tensor]:
        return {"loss": th.zeros(())}

    def imagine_expected(self, start: th.Tensor, policy: PolicyFn, context: Context | None = None) -> Trajectory:
        states, actions = [start], []
        for _ in range(self.horizon):
            actions.append(policy(states[-1]).rsample())
            states.append(states[-1] + actions[-1])
        observations = th.stack(states, dim=1)
        rewards = -observations[:, 1:].square().sum(dim=-1)
        return Trajectory(observations, th.stack(actions, dim=1), rewards, th.zeros_like(rewards), th.ones_like(rewards))

    def imagine(self, start: th.Tensor, policy: PolicyFn, context: Context | None = None) -> Trajectory:
        with th.no_grad():
            return self.imagine_expected(start, policy, context)


@pytest.mark.parametrize("normalize", [True, False])
def test_returns_reach_the_policy_through_a_known_model(normalize: bool) -> None:
    """The policy that brings the point to 0 in one step is ``a = -x``."""
    model = PolyGRAD(
        "MlpPolicy",
        PointEnv(scale=4.0),
        world_model=KnownPoint,
        **dict(n_steps=4, horizon=3, n_imagined=64, learning_starts=40, learning_rate=3e-3, gamma=0.9, seed=0, device="cpu"),
        normalize_advantage=normalize,
        policy_kwargs=dict(net_arch=[32], min_std=0.01),
    )
    model.learn(1_600)
    points = th.linspace(-1.5, 1.5, 7)[:, None]
    with th.no_grad():
        actions = model._distribution(points).mean
    assert th.allclose(actions, -points, atol=0.25)


def test_values_at_the_end_of_the_horizon_reach_the_policy() -> None:
    """Where rewards are the same everywhere, the policy goes where the target critic says that more will come."""
    model = PolyGRAD(
        "MlpPolicy",
        PointEnv(),
        world_model=KnownPoint,
        **dict(n_steps=4, horizon=2, n_imagined=64, learning_starts=40, learning_rate=3e-3, seed=0, device="cpu"),
    ).learn(48)

    class Rightwards(nn.Module):
        def forward(self, observations: th.Tensor) -> th.Tensor:
            return observations[:, :1]

    model.policy.critic_target = Rightwards()  # type: ignore[assignment]
    points = th.linspace(-1.5, 1.5, 7)[:, None]
    before = model._distribution(points).mean.detach()
    model.policy.update_averages = lambda: None  # type: ignore[method-assign]
    for _ in range(10):
        imagined = model._imagine_to_learn()
        assert model._learn_from(imagined._replace(rewards=0.0 * imagined.rewards)) is None
    assert (model._distribution(points).mean > before).all()


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_gradients_are_bounded_where_they_are_imagined(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with(WITH_GRADIENTS[name])
    start = model.replay_buffer.sample_observations(8)

    def gradient() -> th.Tensor:
        shift = th.zeros(1, requires_grad=True)
        imagined = model.world_model.imagine_expected(start, lambda states: Normal(-0.1 * states + shift, 0.2))
        return th.autograd.grad(imagined.rewards.sum(), shift)[0]

    assert gradient() != 0.0
    monkeypatch.setattr("sb3_polygrad.common.gradients.MAX_LENGTH", 0.0)
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
    model = tiny_model(env, policy_update="pathwise", world_model_kwargs=dict(n_levels=1), policy_kwargs=kwargs, n_epochs=3)
    before = [parameter.clone() for parameter in model.policy.actor_parameters()]
    model.learn(200)
    assert all(not th.equal(a, b) for a, b in zip(before, model.policy.actor_parameters(), strict=True))
    steps = {int(model.policy.optimizer.state[p]["step"]) for p in model.policy.actor_parameters()}
    assert steps == {model._n_updates}, "the critic's steps leave it alone"
    with th.no_grad():
        model.policy.action_net.weight *= 100.0  # so that one feature less would be another action
    standardized = model.standardized_actions(model._imagine_to_learn())
    assert standardized.std().item() == pytest.approx(1.0, abs=0.3), "the policy that imagined is the one that acts"


def test_an_actor_that_never_learns_is_a_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sb3_polygrad.learning.MAX_FAULTY_UPDATES", 5)
    model = tiny_model(PointEnv(), policy_update="pathwise", world_model_kwargs=dict(n_levels=1))
    model.policy.action_net.bias.register_hook(lambda gradient: gradient * th.nan)
    with pytest.raises(ValueError, match="gradients of policy and critic were not finite"):
        model.learn(400)


def test_deterministic_actions_are_of_the_average_whoever_asks() -> None:
    model = tiny_model(PointEnv(), policy_update="pathwise", world_model_kwargs=dict(n_levels=1), learning_rate=0.01)
    model.learn(200)
    observations = th.linspace(-2.0, 2.0, 5)[:, None]
    with th.no_grad():
        average = model.policy._mean(model.policy.actor_average(observations))
        actions, values, log_probs = model.policy(observations, deterministic=True)
        mean = model._distribution(observations).mean
    assert th.equal(actions, average) and not th.allclose(actions, mean, atol=1e-4)
    assert th.allclose(th.as_tensor(model.predict(observations.numpy(), deterministic=True)[0]), average.clamp(-1.0, 1.0))
    expected = model.policy.evaluate_actions(observations, actions)
    assert th.allclose(values, expected[0]) and th.allclose(log_probs, expected[1])
