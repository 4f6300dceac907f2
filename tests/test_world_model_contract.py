"""The contract of a world model, held by every one of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch as th
import yaml
from torch import nn
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from sb3_polygrad import PolyGRAD
from sb3_polygrad.common.action_diagnostics import action_autocorrelation, action_std, ks_distance
from sb3_polygrad.common.trajectory import Trajectory, mask_after_ending
from sb3_polygrad.world_models.ensemble import EnsembleWorldModel
from sb3_polygrad.world_models.make import WORLD_MODELS, make_world_model
from tests.known_system import (
    ACTION_DIM,
    HIGH,
    HORIZON,
    LOW,
    MODELS,
    OBS_DIM,
    build,
    cut,
    fitted,
    observe,
    policy,
    real_windows,
)
from tests.toys import TINY, PointEnv, equal_trees

every_model = pytest.mark.parametrize("name", MODELS)
EXACT = [name for name in MODELS if "policy_guided" not in name]  # whose actions are draws from the policy


def starts(batch: int) -> th.Tensor:
    return real_windows(batch).observations[:, 0]


def test_every_kind_is_here() -> None:
    assert {world_model for world_model, _ in MODELS.values()} == set(WORLD_MODELS)


# ---------------------------------------------------------------------- what it imagines


@every_model
def test_imagines_trajectories_of_its_shape(name: str) -> None:
    start = starts(6)
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


@every_model
@pytest.mark.parametrize("batch", [1, 3])
def test_any_number_of_starts_will_do(name: str, batch: int) -> None:
    assert len(fitted(name).imagine(starts(batch), policy).rewards) == batch


@every_model
def test_its_horizon_may_be_changed_where_steps_follow_each_other(name: str) -> None:
    model = fitted(name)
    if MODELS[name][0] == "diffusion":
        pytest.skip("imagines whole trajectories of the length it was fitted to")
    model.horizon = 3 * HORIZON
    assert model.imagine(starts(5), policy).horizon == 3 * HORIZON


@every_model
def test_actions_beyond_the_box_do_what_its_edge_does(name: str) -> None:
    model, imagined = fitted(name), []
    for action in (3.0, 7.0):
        th.manual_seed(1)
        imagined.append(model.imagine(starts(5), lambda obs, a=action: Normal(th.full_like(obs[..., :1], a), 1e-4)))
    assert th.equal(imagined[0].observations, imagined[1].observations)
    assert th.allclose(imagined[1].actions, th.tensor(7.0), atol=1e-2), "returned as drawn"


@every_model
def test_imagined_values_stay_near_what_was_seen(name: str) -> None:
    data = real_windows(500)
    model = build(name)
    observe(model, data)
    model.fit(cut(data, model.window))
    for parameter in model.parameters():
        parameter.detach().mul_(100.0)
    trajectory = model.eval().imagine(starts(50), policy)
    seen = {"observations": data.observations.flatten(0, 1), "rewards": data.rewards.flatten()[:, None]}
    for field, values in seen.items():
        imagined = getattr(trajectory, field)[:, -HORIZON:].reshape(50 * HORIZON, -1)
        low, high = values.amin(dim=0), values.amax(dim=0)
        # Half the width and one standard deviation more on each side.
        reach = 0.5 * (high - low) + values.std(dim=0) * 1.05
        assert (imagined >= low - reach).all() and (imagined <= high + reach).all(), field


@pytest.mark.parametrize("name", EXACT)
def test_actions_are_draws_from_the_policy_at_the_returned_states(name: str) -> None:
    trajectory = fitted(name).imagine(starts(2_000), policy)
    normal = policy(trajectory.observations[:, :-1])
    standardized, everywhere = (trajectory.actions - normal.mean) / normal.stddev, th.ones_like(trajectory.mask)
    assert action_std(standardized, everywhere).item() == pytest.approx(1.0, abs=0.03)
    assert abs(action_autocorrelation(standardized, everywhere).item()) < 0.04
    assert ks_distance(standardized) < 0.02


@pytest.mark.parametrize("name", EXACT)
def test_any_policy_that_is_a_function_of_state_and_noise_will_do(name: str) -> None:
    def squashed(observations: th.Tensor) -> TransformedDistribution:
        return TransformedDistribution(Normal(th.zeros_like(observations[..., :1]), 1.0), TanhTransform())

    assert fitted(name).imagine(starts(5), squashed).actions.abs().max() < 1.0


@every_model
def test_no_gradient_reaches_the_policy_unless_it_is_asked_for(name: str) -> None:
    gain = nn.Parameter(th.tensor(0.5))
    model, pushes = fitted(name), lambda obs: Normal(gain * (obs[..., :1] - 100.0), 0.5)
    assert not any(tensor.requires_grad for tensor in model.imagine(starts(3), pushes))
    if not model.differentiable:
        with pytest.raises(ValueError, match=f"{type(model).__name__} is not differentiable"):
            model.imagine(starts(3), pushes, differentiable=True)
        return
    imagined = model.imagine(starts(3), pushes, differentiable=True)
    assert all(th.isfinite(tensor).all() for tensor in imagined)
    for field in ("actions", "rewards", "observations"):
        gradient = th.autograd.grad(getattr(imagined, field).sum(), gain, retain_graph=True)[0]
        assert th.isfinite(gradient) and gradient != 0.0, field
    model.zero_grad()
    imagined.rewards.sum().backward()
    assert gain.grad is not None and all(parameter.grad is None for parameter in model.parameters())


@every_model
def test_an_environment_without_endings_has_none_to_imagine(name: str) -> None:
    data = real_windows(200)
    data = data._replace(terminals=th.zeros_like(data.terminals), mask=th.ones_like(data.mask))
    model = build(name)
    observe(model, data)
    model.fit(cut(data, model.window))
    assert model.imagine(starts(50), policy).terminals.sum() == 0.0


# ---------------------------------------------------------------------- state and randomness


@every_model
def test_refuses_to_imagine_before_it_was_fitted(name: str) -> None:
    with pytest.raises(RuntimeError, match="never fitted"):
        build(name).imagine(th.zeros(2, OBS_DIM), policy)


@every_model
def test_same_seed_same_trajectories(name: str) -> None:
    model, start, drawn = fitted(name), starts(8), []
    for seed in (1, 1, 2):
        th.manual_seed(seed)
        drawn.append(model.imagine(start, policy).observations)
    assert th.equal(drawn[0], drawn[1])
    assert not th.equal(drawn[0], drawn[2])


@every_model
def test_state_dict_restores_what_it_imagines(name: str) -> None:
    model, other = fitted(name), build(name)
    model.adapt(model.imagine(starts(8), policy), policy)
    other.load_state_dict(model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(model.optimizer.state_dict()))  # torch would share the tensors
    start, batch = starts(8), real_windows(32)
    for _ in range(2):  # as it is, and after both learnt the same
        imagined = []
        for each in (model, other):
            th.manual_seed(1)
            imagined.append(each.imagine(start, policy))
            each.fit(cut(batch, each.window))
        assert all(th.equal(a, b) for a, b in zip(*imagined, strict=True))


@every_model
def test_all_of_its_state_is_floating_point(name: str) -> None:
    # SB3 randomises every tensor of a state dict in its contract tests.
    assert all(tensor.is_floating_point() for tensor in fitted(name).state_dict().values())


# ---------------------------------------------------------------------- faults


@every_model
def test_a_failing_network_gives_nan_to_the_caller_and_none_to_the_policy(name: str) -> None:
    def watchful(observations: th.Tensor) -> Normal:
        assert th.isfinite(observations).all()
        return policy(observations)

    healthy = fitted(name)
    for parameter_name, _ in healthy.named_parameters():
        model = copy.deepcopy(healthy)
        dict(model.named_parameters())[parameter_name].detach().fill_(th.nan)
        trajectory = model.imagine(starts(6), watchful)
        assert th.isfinite(trajectory.actions).all() and th.isfinite(trajectory.mask).all()
        imagined = trajectory.observations[:, 1:], trajectory.rewards
        if parameter_name.startswith("average."):
            assert all(tensor.isnan().all() for tensor in imagined), parameter_name
        else:
            assert all(th.isfinite(tensor).all() for tensor in imagined), "only the average imagines"


@every_model
def test_a_batch_that_is_not_finite_leaves_no_trace(name: str) -> None:
    model, batch = fitted(name), real_windows(16)

    def learner() -> Any:
        learning = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
        return learning, copy.deepcopy(model.optimizer.state_dict())

    before = learner()
    batch.rewards[:] = th.nan
    model.fit(cut(batch, model.window))
    assert equal_trees(learner(), before)
    assert all(th.isfinite(tensor).all() for tensor in model.imagine(starts(4), policy))


# ---------------------------------------------------------------------- learning


@every_model
def test_fit_reports_detached_scalars(name: str) -> None:
    model = fitted(name)
    metrics = model.fit(cut(real_windows(16), model.window))
    assert "loss" in metrics
    for key, value in metrics.items():
        assert value.shape == () and not value.requires_grad and th.isfinite(value), key
        assert len(key) <= 33


# name: (gradient steps, settings, largest squared error of states, of rewards, smallest share of endings told right)
WIDER: dict[str, Any] = dict(width=64, n_layers=2, learning_rate=2e-3)
LEARNING: dict[str, tuple[int, dict[str, Any], float, float, float]] = {
    "staggered": (1_500, WIDER, 0.03, 0.08, 0.95),
    "policy_guided": (1_500, dict(WIDER, sampler=dict(n_diffusion_steps=16)), 0.03, 0.08, 0.95),
    "transformer staggered": (600, WIDER, 0.03, 0.08, 0.95),
    "autoregressive_diffusion": (1_000, dict(learning_rate=3e-3), 1e-3, 3e-3, 0.95),
    "transformer": (600, dict(learning_rate=3e-3), 1e-3, 2e-3, 0.97),
    "rssm": (300, dict(learning_rate=6e-3, width=32, n_variables=6, n_classes=6), 0.15, 0.2, 0.9),
    "ensemble": (1_000, dict(learning_rate=3e-3), 1e-3, 1e-3, 0.95),
    "stochastic ensemble": (1_500, dict(learning_rate=3e-3), 3e-3, 5e-3, 0.95),
}


@pytest.mark.parametrize("name", LEARNING)
def test_learns_a_known_system(name: str) -> None:
    n_fits, settings, state_error, reward_error, ending_share = LEARNING[name]
    model = fitted(name, n_fits, **settings)
    imagined = model.imagine(starts(500), lambda obs: Normal(th.zeros_like(obs[..., :1]), 0.5))
    states, actions, alive = imagined.observations[..., 0] - 100.0, imagined.actions.clamp(-1, 1)[..., 0], imagined.mask > 0
    error = (states[:, 1:] - 0.9 * states[:, :-1] - 0.3 * actions)[alive]
    assert error.square().mean() < state_error, "of a variance of about 0.8"
    error = (imagined.rewards - states[:, :-1] + actions)[alive]
    assert error.square().mean() < reward_error, "of a variance of about 1.1"
    ended = states[:, 1:] > 1.5
    assert (imagined.terminals.bool() == ended)[alive].float().mean() > ending_share
    if name != "rssm":  # whose trajectories keep away from the edge for longer than a test can wait
        assert ended[alive].any(), "there is something to predict"


def test_every_kind_learns() -> None:
    assert {MODELS[name][0] for name in LEARNING} == set(WORLD_MODELS)


# ---------------------------------------------------------------------- the ensemble's members

MEMBERS = 3
kinds = pytest.mark.parametrize("stochastic", [False, True])
batches = pytest.mark.parametrize("batch", [1, 2, 3, 7, 12])


def ensemble(stochastic: bool, n_fits: int = 3) -> EnsembleWorldModel:
    model = fitted("ensemble", n_fits, stochastic=stochastic, n_members=MEMBERS)
    assert isinstance(model, EnsembleWorldModel)
    return model


@batches
@kinds
def test_each_row_of_a_batch_teaches_one_member(stochastic: bool, batch: int) -> None:
    # SGD in place of Adam: a member moves by the sum of the gradients of its rows, so that one row's reward moves one member.
    model, segments = ensemble(stochastic), cut(real_windows(batch), 1)
    model.fit_settings = model.fit_settings._replace(max_grad_norm=1e9)
    taught = []

    def head_after(rewards: th.Tensor) -> th.Tensor:
        learner = copy.deepcopy(model)
        learner.optimizer = th.optim.SGD(learner.network.parameters(), lr=0.1)
        learner.fit(segments._replace(rewards=rewards))
        return learner.network.head.bias.detach()  # type: ignore[union-attr, return-value]

    before = head_after(segments.rewards)
    for row in range(batch):
        rewards = segments.rewards.clone()
        rewards[row] += 5.0
        moved = (head_after(rewards) - before).flatten(1).abs().amax(dim=1) > 1e-6
        assert moved.sum() == 1, f"row {row} teaches {int(moved.sum())} members"
        taught.append(int(moved.nonzero()))
    if batch >= 7:
        assert set(taught) == set(range(MEMBERS)), "no member is left out"


@batches
@kinds
def test_each_row_of_a_batch_is_imagined_by_one_member(stochastic: bool, batch: int) -> None:
    # Member k predicts the reward k (in standardised units) in its first output after the observation, without any noise.
    model = ensemble(stochastic)
    for parameter in model.average.module.parameters():
        parameter.detach().zero_()
    bias = model.average.module.head.bias.detach()  # type: ignore[union-attr]
    bias[:, 0, OBS_DIM] = th.arange(MEMBERS) - 1.0  # type: ignore[index]
    if stochastic:
        model.average.module.max_log_variance_bias.detach().fill_(-30.0)  # type: ignore[union-attr, operator]
        model.average.module.min_log_variance_bias.detach().fill_(-60.0)  # type: ignore[union-attr, operator]
    model.horizon = 200
    rewards = model.imagine(starts(batch), policy).rewards
    normalizer = model.outcome_normalizer
    member = (rewards - normalizer.mean[0].float()) / normalizer.std[0] + 1.0
    assert th.allclose(member, member.round(), atol=1e-3), "a member, and no mixture of several"
    for row in member.round():
        counts = th.bincount(row.long(), minlength=MEMBERS)
        assert counts.min() > 200 / MEMBERS - 30, "every trajectory meets every member equally often"
    if batch > MEMBERS:
        assert (member.round().amax(dim=0) > member.round().amin(dim=0)).all(), "a batch is divided among the members"


def random_system(batch: int, horizon: int = 1) -> Trajectory:
    """``s' = 0.9 s + 0.3 a + σ(s) ε``, σ = 0.1 for s < 0 and else 0.4; reward ``s + 0.2 ε``; nothing ends."""
    states, rewards, actions = [th.randn(batch, 1)], [], th.rand(batch, horizon, 1) * 2 - 1
    for t in range(horizon):
        now = states[-1]
        states.append(0.9 * now + 0.3 * actions[:, t] + th.where(now < 0.0, 0.1, 0.4) * th.randn_like(now))
        rewards.append((now + 0.2 * th.randn_like(now))[:, 0])
    nothing = th.zeros(batch, horizon)
    return Trajectory(th.stack(states, dim=1), actions, th.stack(rewards, dim=1), nothing, nothing + 1.0)


@kinds
def test_a_stochastic_ensemble_learns_and_imagines_the_spread_of_a_random_system(stochastic: bool) -> None:
    kwargs = dict(width=32, n_layers=1, n_members=MEMBERS, learning_rate=3e-3, stochastic=stochastic)
    model, data = make_world_model("ensemble", 1, LOW, HIGH, 1, kwargs), random_system(20_000)
    model.observe(data)
    for _ in range(1_000):
        rows = th.randint(len(data.rewards), (256,))
        model.fit(Trajectory(*(tensor[rows] for tensor in data)))
    for state, std in ((-1.0, 0.1), (1.0, 0.4)):
        imagined = model.eval().imagine(th.full((20_000, 1), state), lambda obs: Normal(th.full_like(obs, 0.5), 1e-6))
        after, rewards = imagined.observations[:, 1, 0], imagined.rewards[:, 0]
        assert after.mean().item() == pytest.approx(0.9 * state + 0.3 * 0.5, abs=0.06)
        assert rewards.mean().item() == pytest.approx(state, abs=0.06)
        if stochastic:
            assert after.std().item() == pytest.approx(std, rel=0.2)
            assert rewards.std().item() == pytest.approx(0.2, rel=0.2)
            assert ks_distance((after - after.mean()) / after.std()) < 0.03, "a Gaussian"
        else:
            assert after.std() < 0.05 and rewards.std() < 0.05, "members that predict means differ by their errors alone"


# ---------------------------------------------------------------------- in the algorithm


@pytest.mark.parametrize("name", ["ensemble", "staggered", "autoregressive_diffusion", "transformer", "rssm"])
def test_polygrad_learns_with_it(name: str, tmp_path: Path) -> None:
    world_model, kwargs = MODELS[name]
    settings = yaml.safe_load(yaml.safe_dump({**TINY, "world_model": world_model, "world_model_kwargs": kwargs}))
    model = PolyGRAD("MlpPolicy", PointEnv(goal_ends=True), **settings)
    model.learn(120)
    assert model._n_updates > 0 and model.logger.name_to_value["imagination/skipped"] == 0.0
    model.save(tmp_path / "model")
    loaded = PolyGRAD.load(tmp_path / "model", env=PointEnv(goal_ends=True))
    imagined = []
    for each in (model, loaded):
        th.manual_seed(0)
        imagined.append(each.imagine(th.zeros(8, 1)))
    assert all(th.equal(a, b) for a, b in zip(*imagined, strict=True))
    loaded.learn(100)


def test_segments_are_not_touched_by_fit() -> None:
    for name in MODELS:
        model = fitted(name)
        batch = cut(real_windows(16), model.window)
        before = Trajectory(*(tensor.clone() for tensor in batch))
        model.fit(batch)
        assert all(th.equal(a, b) for a, b in zip(batch, before, strict=True)), name
