"""The host does not wait for the device where it need not, and what it leaves to the device comes out the same."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch as th
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_polygrad import PolyGRAD
from sb3_polygrad.core.on_policy import action_diagnostics
from sb3_polygrad.core.optimizing import step_if
from sb3_polygrad.policy import deferred_means
from sb3_polygrad.policy.deferred_means import DeferredMeans
from sb3_polygrad.policy.update import A2CUpdate, LossSettings, PathwiseUpdate, PolicyUpdate, PPOUpdate
from sb3_polygrad.world_models.factory import BUILDERS
from tests.graphs import asking_is_an_error
from tests.test_polygrad import VARIANTS, recorded
from tests.test_update import Bandit, pathwise_batch
from tests.toys import PointEnv, equal_trees, tiny_model

# ---------------------------------------------------------------------- steps that the device skips

FUSED: list[type[th.optim.Optimizer]] = [th.optim.Adam, th.optim.AdamW]


def network_and_optimizer(kind: type[th.optim.Optimizer], **kwargs: Any) -> tuple[nn.Module, th.optim.Optimizer]:
    th.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 33), nn.Tanh(), nn.Linear(33, 2))
    return network, kind(network.parameters(), **{"lr": 1e-2, **kwargs})


def learn_from(value: float, network: nn.Module, optimizer: th.optim.Optimizer) -> None:
    """One step, if the gradient is finite."""
    optimizer.zero_grad(set_to_none=True)
    (network(th.linspace(-1.0, 1.0, 20).view(4, 5)) * value).square().mean().backward()
    norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    step_if(th.isfinite(norm), optimizer)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("kind", FUSED)
def test_a_step_skipped_on_the_device_leaves_no_trace(kind: type[th.optim.Optimizer], value: float) -> None:
    network, optimizer = network_and_optimizer(kind, fused=True)
    learn_from(1.0, network, optimizer)
    before = copy.deepcopy((network.state_dict(), optimizer.state_dict()))
    learn_from(value, network, optimizer)
    assert equal_trees((network.state_dict(), optimizer.state_dict()), before)
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("kind", FUSED)
def test_steps_that_the_device_takes_are_those_of_the_optimiser(kind: type[th.optim.Optimizer]) -> None:
    guarded, plain = (network_and_optimizer(kind, fused=True) for _ in range(2))
    for value in (1.0, math.nan, 3.0, math.inf, 2.0):
        learn_from(value, *guarded)
        if math.isfinite(value):
            network, optimizer = plain
            optimizer.zero_grad()
            (network(th.linspace(-1.0, 1.0, 20).view(4, 5)) * value).square().mean().backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
    assert equal_trees(*((network.state_dict(), optimizer.state_dict()) for network, optimizer in (guarded, plain)))


def test_the_very_first_step_can_be_skipped() -> None:
    network, optimizer = network_and_optimizer(th.optim.Adam, fused=True)
    before = copy.deepcopy(network.state_dict())
    learn_from(math.nan, network, optimizer)
    assert equal_trees(network.state_dict(), before)
    assert all(not value.any() for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("kind", [th.optim.SGD, th.optim.RMSprop, th.optim.Adam])
def test_other_optimisers_skip_as_well(kind: type[th.optim.Optimizer]) -> None:
    network, optimizer = network_and_optimizer(kind)
    learn_from(1.0, network, optimizer)
    before = copy.deepcopy((network.state_dict(), optimizer.state_dict()))
    learn_from(math.nan, network, optimizer)
    assert equal_trees((network.state_dict(), optimizer.state_dict()), before)


# ---------------------------------------------------------------------- what is asked of the device


@pytest.mark.parametrize("world_model", BUILDERS)
def test_fitting_asks_nothing(world_model: str) -> None:
    model = PolyGRAD("MlpPolicy", PointEnv(length=50), world_model=world_model, horizon=4, learning_starts=64, device="cpu")
    model.learn(64, log_interval=10**9)
    batch = model.replay_buffer.sample(16)
    with asking_is_an_error():
        model.world_model.fit(batch)


@pytest.mark.parametrize("name", VARIANTS)
def test_imagining_asks_nothing(name: str) -> None:
    model = tiny_model(VecNormalize(make_vec_env(PointEnv, 1)), **VARIANTS[name]).learn(80)
    start = model.replay_buffer.sample_observations(8)
    with asking_is_an_error():
        trajectory = model.imagine(8, start)
        standardized = model.standardized_actions(trajectory)
        action_diagnostics(standardized, trajectory)
        if model.world_model.imagine_expected is not None:
            model.world_model.imagine_expected(start, model._distribution).rewards.sum().backward()


def bandit() -> Bandit:
    each = Bandit()
    each.optimizer = th.optim.Adam([{"params": [each.mean]}, {"params": [each.value]}], lr=0.1, fused=True)
    return each


@pytest.mark.parametrize(
    "update", [A2CUpdate(target_update=0.02), A2CUpdate(target_update=None), PPOUpdate(), PathwiseUpdate()]
)
def test_updates_ask_nothing(update: PolicyUpdate) -> None:
    each = bandit()
    batch = pathwise_batch(each) if isinstance(update, PathwiseUpdate) else each.batch([1.0, 2.0, 3.0], [1.0, -1.0, 1.0])
    with asking_is_an_error():
        update(each.learner(), batch, LossSettings(0.0, 0.5, 1.0, True))


def test_addresses_stay() -> None:
    """A captured graph reads and writes where things were when it was captured."""
    model = tiny_model(VecNormalize(make_vec_env(PointEnv, 1)), **VARIANTS["a2c, policy guided"]).learn(80)

    def addresses() -> dict[str, int]:
        parts = {"policy": model.policy, "world model": model.world_model}
        tensors = {
            f"{part} {name}": tensor
            for part, module in parts.items()
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
        }
        for name, optimizer in (("policy", model.policy.optimizer), ("world model", model.world_model.optimizer)):
            for k, state in enumerate(optimizer.state.values()):
                tensors.update({f"{name} optimiser {k} {key}": value for key, value in state.items()})
        view = model._view
        tensors.update(view_mean=view.mean, view_std=view.std, view_reward=view.reward_scale)
        return {name: tensor.data_ptr() for name, tensor in tensors.items()}

    before, view_mean = addresses(), model._view.mean.clone()
    values = {name: value.clone() for name, value in model.world_model.state_dict().items()}
    model.learn(80, reset_num_timesteps=False)
    assert addresses() == before
    assert not th.equal(model._view.mean, view_mean), "the statistics did move"
    after = model.world_model.state_dict()
    for name in ("denoiser.head.weight", "average.module.head.weight", "state_normalizer.mean", "change_normalizer.mean"):
        assert not th.equal(after[name], values[name]), f"{name} did move"


# ---------------------------------------------------------------------- the log


def dumps_of(model: PolyGRAD, **kwargs: Any) -> list[dict[str, Any]]:
    record = recorded(model)
    model.learn(160, **kwargs)
    return [{name: value for name, value in dump.items() if not name.startswith("time/")} for dump in record.dumps]


@pytest.mark.parametrize("name", VARIANTS)
def test_logged_means_are_those_of_values_logged_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate() -> EvalCallback:  # which dumps the log between two updates
        return EvalCallback(make_vec_env(PointEnv, 1), eval_freq=24, n_eval_episodes=1, verbose=0, warn=False)

    deferred = dumps_of(tiny_model(PointEnv(), **VARIANTS[name]), callback=evaluate(), log_interval=4)
    monkeypatch.setattr(deferred_means, "MAX_PENDING", 1)  # nothing is put off
    at_once = dumps_of(tiny_model(PointEnv(), **VARIANTS[name]), callback=evaluate(), log_interval=4)
    assert any("train/loss" in dump and "eval/mean_reward" in dump for dump in deferred)
    assert deferred == at_once


def test_means_are_those_of_record_mean() -> None:
    values = th.rand(7).tolist()
    plain, logger = Logger(None, []), Logger(None, [])
    for value in values:
        plain.record_mean("a/b", value)
        DeferredMeans.of(logger).record("a", {"b": th.tensor(value, dtype=th.float64), "c": 2.0})
    assert "a/b" not in logger.name_to_value
    DeferredMeans.of(logger).write(logger.name_to_value, logger.name_to_excluded)
    assert logger.name_to_value == {"a/b": plain.name_to_value["a/b"], "a/c": 2.0}


def test_values_are_taken_as_they_are_when_recorded() -> None:
    logger, value = Logger(None, []), th.tensor(1.0)
    DeferredMeans.of(logger).record("a", {"b": value})
    value.fill_(5.0)
    DeferredMeans.of(logger).flush()
    assert logger.name_to_value["a/b"] == 1.0


def test_only_what_may_be_unknown_leaves_out_nan() -> None:
    logger = Logger(None, [])
    means = DeferredMeans.of(logger)
    for value in (1.0, math.nan):
        means.record("known", {"a": th.tensor(value)})
        means.record("unknown", {"a": th.tensor(value)}, leave_out_nan=True)
    means.flush()
    assert math.isnan(logger.name_to_value["known/a"]) and logger.name_to_value["unknown/a"] == 1.0


def test_what_is_never_dumped_does_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred_means, "MAX_PENDING", 3)
    means = DeferredMeans.of(Logger(None, []))
    for _ in range(10):
        means.record("a", {"b": th.tensor(1.0)})
        assert len(means._pending) < 3


def test_a_logger_has_one_of_them() -> None:
    model = tiny_model(PointEnv())
    record = recorded(model)
    model.learn(80).learn(16, reset_num_timesteps=False)
    formats = model.logger.output_formats
    assert len(formats) == 2 and isinstance(formats[0], DeferredMeans) and formats[1] is record
    assert "train/loss" in model.logger.name_to_value, "handed over at the end of learn"
