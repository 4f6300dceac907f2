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
from sb3_polygrad.common.on_policy import action_autocorrelation, action_std, ks_distance
from sb3_polygrad.common.trajectory import Trajectory, mask_after_ending
from sb3_polygrad.world_models.base import Context, WorldModel
from sb3_polygrad.world_models.factory import BUILDERS, PAPER_SIZES, build_world_model
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
    assert {world_model for world_model, _ in MODELS.values()} == set(BUILDERS)


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
def test_a_context_is_taken(name: str) -> None:
    before = real_windows(5)
    context = Context(before.observations[:, :-1], before.actions)
    trajectory = fitted(name).imagine(before.observations[:, -1], policy, context)
    assert all(th.isfinite(tensor).all() for tensor in trajectory)
    assert th.equal(trajectory.observations[:, 0], before.observations[:, -1])


@every_model
def test_no_gradient_reaches_the_policy(name: str) -> None:
    gain = nn.Parameter(th.tensor(0.5))
    fitted(name).imagine(starts(3), lambda obs: Normal(gain * (obs[..., :1] - 100.0), 0.5))
    assert gain.grad is None


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
    model.adapt(th.tensor(1.3), th.tensor([0.7]))
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
LEARNING: dict[str, tuple[int, dict[str, Any], float, float, float]] = {
    "staggered": (1_500, dict(width=64, n_layers=2, learning_rate=2e-3), 0.03, 0.08, 0.95),
    "policy_guided": (1_500, dict(width=64, n_layers=2, learning_rate=2e-3, n_diffusion_steps=16), 0.03, 0.08, 0.95),
    "transformer staggered": (600, dict(width=64, n_layers=2, learning_rate=2e-3), 0.03, 0.08, 0.95),
    "autoregressive_diffusion": (1_000, dict(learning_rate=3e-3), 1e-3, 3e-3, 0.95),
    "transformer": (1_000, dict(learning_rate=3e-3), 1e-3, 2e-3, 0.97),
    "rssm": (300, dict(learning_rate=6e-3, width=32, n_variables=6, n_classes=6), 0.15, 0.2, 0.9),
    "ensemble": (1_000, dict(learning_rate=3e-3), 1e-3, 1e-3, 0.95),
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
    assert {MODELS[name][0] for name in LEARNING} == set(BUILDERS)


# ---------------------------------------------------------------------- names and sizes


@pytest.mark.parametrize("world_model", PAPER_SIZES)
def test_paper_size_is_a_setting(world_model: str) -> None:
    def n_weights(**kwargs: Any) -> int:
        model: WorldModel = build_world_model(world_model, 17, th.full((6,), -1.0), th.ones(6), 10, kwargs)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    assert n_weights(size="paper") > n_weights() == n_weights(size="default")
    some_width = next(key for key in PAPER_SIZES[world_model] if key.endswith("width"))
    assert n_weights(size="paper", **{some_width: 16}) < n_weights(size="paper"), "what is given beside it wins"


def test_size_is_refused_where_it_means_nothing() -> None:
    with pytest.raises(ValueError, match="polygrad-paper"):
        build_world_model("diffusion", 2, LOW, HIGH, HORIZON, {"size": "paper"})
    with pytest.raises(ValueError, match="did you mean 'paper'"):
        build_world_model("ensemble", 2, LOW, HIGH, HORIZON, {"size": "papr"})


# ---------------------------------------------------------------------- in the algorithm


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name][0] != "diffusion"])
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
        imagined.append(each.imagine(8, th.zeros(8, 1)))
    assert all(th.equal(a, b) for a, b in zip(*imagined, strict=True))
    loaded.learn(100)


def test_windows_are_not_touched_by_fit() -> None:
    for name in MODELS:
        model = fitted(name)
        batch = cut(real_windows(16), model.window)
        before = Trajectory(*(tensor.clone() for tensor in batch))
        model.fit(batch)
        assert all(th.equal(a, b) for a, b in zip(batch, before, strict=True)), name
