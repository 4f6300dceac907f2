"""Numerical faults, and environments at the edge: neither ends a run without reason nor reaches policy and critic."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecNormalize

from sb3_polygrad import PolyGRAD
from sb3_polygrad.common import faults
from sb3_polygrad.common.trajectory import Trajectory
from sb3_polygrad.common.validation import check_settings
from tests.toys import PointEnv, equal_trees, tiny_model

VARIANTS: dict[str, dict[str, Any]] = {
    "default": dict(),
    "ppo, staggered": dict(
        world_model="diffusion", policy_update="ppo", world_model_kwargs=dict(sampler=dict(name="staggered"))
    ),
    "a2c, policy guided": dict(world_model="diffusion", policy_update="a2c"),
}
OPTIMIZERS = ("policy.actor_optimizer", "policy.critic_optimizer")


def all_finite(model: PolyGRAD) -> bool:
    """Whether policy, critics and their optimisers are."""

    def finite(tree: Any) -> bool:
        if isinstance(tree, dict):
            return all(finite(value) for value in tree.values())
        return bool(th.isfinite(tree).all()) if isinstance(tree, th.Tensor) else True

    parameters = model.get_parameters()
    return finite(parameters["policy"]) and all(finite(parameters[name]["state"]) for name in OPTIMIZERS)


def logged(model: PolyGRAD) -> dict[str, Any]:
    """Means over all updates since the log was written, or looked at here."""
    model._means.flush(model.logger)
    return dict(model.logger.name_to_value)


def imagine_instead(model: PolyGRAD, change: Callable[[Trajectory], Trajectory]) -> None:
    """From now on every imagined batch is changed before anybody sees it."""
    imagine = model.world_model.imagine
    model.world_model.imagine = lambda *args, **kwargs: change(imagine(*args, **kwargs))  # type: ignore[method-assign]


def trained(variant: dict[str, Any], **changes: Any) -> PolyGRAD:
    return tiny_model(PointEnv(), **{**variant, **changes}).learn(80)


# ---------------------------------------------------------------------- a world model that talks nonsense

WEIGHTS: dict[str, Callable[[th.Tensor], th.Tensor]] = {
    "random": lambda weight: th.randn_like(weight) * 10.0,
    "large": lambda weight: th.randn_like(weight) * 1e4,
    "huge": lambda weight: th.randn_like(weight) * 1e15,
    "near the limit": lambda weight: th.randn_like(weight).sign() * 1e38,
    "one infinite": lambda weight: weight.flatten().index_fill(0, th.tensor([0]), th.inf).view_as(weight),
    "one NaN": lambda weight: weight.flatten().index_fill(0, th.tensor([0]), th.nan).view_as(weight),
    "NaN": lambda weight: th.full_like(weight, th.nan),
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", VARIANTS)
def test_nonsense_never_reaches_the_policy(name: str, weights: str) -> None:
    model = trained(VARIANTS[name])
    with th.no_grad():
        for parameter in model.world_model.parameters():
            parameter.copy_(WEIGHTS[weights](parameter))
    model.learn(80)
    assert model.num_timesteps == 80 and all_finite(model)
    if weights == "NaN":
        return
    trajectory = model.imagine(64)
    assert within_bounds(model, trajectory.observations, trajectory.rewards) or not th.isfinite(trajectory.rewards).any()


def within_bounds(model: PolyGRAD, observations: th.Tensor, rewards: th.Tensor) -> bool:
    """No further outside of what was seen than that is wide."""
    held = model.replay_buffer
    seen = th.cat([held.observations[: len(held)], held.next_observations[: len(held)]])
    return all(
        bool((imagined >= 2 * real.amin() - real.amax()).all() and (imagined <= 2 * real.amax() - real.amin()).all())
        for imagined, real in ((observations, seen), (rewards, held.rewards[: len(held)]))
    )


@pytest.mark.parametrize("field", Trajectory._fields)
@pytest.mark.parametrize("value", [th.nan, th.inf, -th.inf])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_batch_with_one_value_that_is_not_finite_is_skipped(name: str, field: str, value: float) -> None:
    model = trained(VARIANTS[name])
    logged(model)

    def spoiled(trajectory: Trajectory) -> Trajectory:
        values = getattr(trajectory, field)
        mark = th.zeros(values.numel()).index_fill(0, th.tensor([3]), value).view_as(values)
        return trajectory._replace(**{field: values + mark})

    imagine_instead(model, spoiled)
    before, starts = deepcopy(model.get_parameters()), deepcopy(model.start_states.ends)
    model.train()
    for part in ("policy", *OPTIMIZERS):
        assert equal_trees(model.get_parameters()[part], before[part])
    assert th.equal(model.start_states.ends, starts), "nothing is continued from there"
    assert logged(model)["imagination/skipped"] == 1.0
    assert model._faults.n_faulty == 1


@pytest.mark.parametrize("rewards", [1e25, 3e38])
@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_that_overflow_are_skipped_and_counted(name: str, rewards: float) -> None:
    model = trained(VARIANTS[name])
    logged(model)
    imagine_instead(model, lambda trajectory: trajectory._replace(rewards=trajectory.rewards * 0.0 + rewards))
    before = deepcopy(model.get_parameters())
    model.train()
    after = model.get_parameters()
    assert equal_trees(after["policy.critic_optimizer"]["state"], before["policy.critic_optimizer"]["state"])
    assert all_finite(model)
    assert logged(model)["train/skipped"] == 1.0
    assert model._faults.n_faulty == 1


def test_skipped_steps_of_the_world_model_are_counted() -> None:
    model = trained({})
    logged(model)
    fit, calls = model.world_model.fit, []

    def sometimes(batch: Trajectory) -> dict[str, th.Tensor]:
        calls.append(1)
        return fit(batch if len(calls) % 2 else batch._replace(rewards=batch.rewards * th.nan))

    model.world_model.fit = sometimes  # type: ignore[method-assign]
    model.learn(40, reset_num_timesteps=False)
    assert len(calls) == 5 * 4 and logged(model)["world_model/skipped"] == pytest.approx(0.5)


# ---------------------------------------------------------------------- faults that stay


@pytest.mark.parametrize("where", ["world model", "policy"])
def test_a_fault_that_stays_ends_the_run_after_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setattr(faults, "MAX_FAULTY_UPDATES", 5)
    model = trained({})
    model.set_logger(Logger(str(tmp_path / "logs"), []))
    if where == "world model":
        with th.no_grad():
            next(model.world_model.parameters()).fill_(th.nan)
    else:
        monkeypatch.setattr(model.rollout_buffer, "fill", spoil(model))
    expected = "the gradients of the world model" if where == "world model" else "the gradients of policy and critics"
    with pytest.raises(ValueError, match=rf"^{expected} were not finite for 5 updates in a row") as error:
        model.learn(10_000, reset_num_timesteps=False)
    assert model.num_timesteps == 80 + 5 * 8
    file = next((tmp_path / "logs").iterdir())
    assert str(file) in str(error.value), "the message says where"
    with pytest.warns(UserWarning, match="begin new episodes"):
        assert PolyGRAD.resume(file, PointEnv()).num_timesteps == 120
    assert all_finite(model)


def spoil(model: PolyGRAD) -> Callable[..., None]:
    buffer, fill = model.rollout_buffer, model.rollout_buffer.fill

    def filled(*args: Any) -> None:
        fill(*args)
        assert buffer.samples is not None
        infinite = buffer.samples.returns + th.inf
        buffer.samples = buffer.samples._replace(returns=infinite, advantages=infinite)

    return filled


def test_imagined_trajectories_that_stay_faulty_end_the_run_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(faults, "MAX_FAULTY_UPDATES", 3)
    monkeypatch.chdir(tmp_path)
    model = trained({})
    imagine_instead(model, lambda trajectory: trajectory._replace(rewards=trajectory.rewards * th.nan))
    with pytest.raises(ValueError, match=r"^the imagined trajectories were not finite for 3 updates in a row"):
        model.learn(10_000, reset_num_timesteps=False)


def test_faults_that_pass_do_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "MAX_FAULTY_UPDATES", 3)
    model = trained({})
    calls = []

    def sometimes(trajectory: Trajectory) -> Trajectory:
        calls.append(1)
        return trajectory if len(calls) % 3 == 0 else trajectory._replace(rewards=trajectory.rewards * th.nan)

    imagine_instead(model, sometimes)
    model.learn(120, reset_num_timesteps=False)
    assert len(calls) == 15


def test_an_optimiser_that_makes_nan_is_named() -> None:
    model = tiny_model(PointEnv())
    model.policy.actor_optimizer.step = lambda: model.policy.log_std.data.fill_(th.nan)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="learning_rate"):
        model.learn(80)


# ---------------------------------------------------------------------- environments at the edge


class EdgeEnv(gym.Env):
    """
    Random observations of any size.

    :param observation_space: of them
    :param action_space: any box
    :param length: steps per episode
    :param ends: what ends it, ``"terminated"``, ``"truncated"`` or ``"never"``
    :param reward: of every step, a number or ``"random"``
    :param constant: this many observation dimensions never change
    :param size: the observations are multiplied by it
    """

    def __init__(
        self,
        observation_space: spaces.Box | None = None,
        action_space: spaces.Box | None = None,
        length: int = 10,
        ends: str = "truncated",
        reward: float | str = "random",
        constant: int = 0,
        size: float = 1.0,
    ) -> None:
        self.observation_space = observation_space or spaces.Box(-np.inf, np.inf, (3,))
        self.action_space = action_space or spaces.Box(-1.0, 1.0, (2,))
        self.length, self.ends, self.reward, self.constant, self.size, self.t = length, ends, reward, constant, size, 0

    def _observe(self) -> np.ndarray:
        observation = self.np_random.normal(size=self.observation_space.shape) * self.size
        observation.reshape(-1)[: self.constant] = 7.0
        return observation.astype(self.observation_space.dtype)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert action.dtype == self.action_space.dtype and self.action_space.contains(action), action
        self.t += 1
        over = self.t >= self.length and self.ends != "never"
        reward = float(self.np_random.normal()) if self.reward == "random" else float(self.reward)
        return self._observe(), reward, over and self.ends == "terminated", over and self.ends == "truncated", {}


SKEWED = spaces.Box(np.array([-3.0, 10.0, 1e-3], dtype=np.float32), np.array([1.0, 1000.0, 2e-3], dtype=np.float32))
EDGES: dict[str, dict[str, Any]] = {
    "a constant observation": dict(constant=1),
    "constant observations": dict(constant=3),
    "constant rewards": dict(reward=2.5),
    "no rewards": dict(reward=0.0),
    "rewards of any size": dict(reward=1e12),
    "episodes of one step": dict(length=1, ends="terminated"),
    "episodes of two steps": dict(length=2, ends="terminated"),
    "time limits only": dict(length=7),
    "episodes without an end": dict(ends="never"),
    "one observation dimension": dict(observation_space=spaces.Box(-np.inf, np.inf, (1,))),
    "a hundred observation dimensions": dict(observation_space=spaces.Box(-np.inf, np.inf, (100,))),
    "skewed actions": dict(action_space=SKEWED),
    "ten action dimensions": dict(action_space=spaces.Box(-1.0, 1.0, (10,))),
    "float64": dict(
        observation_space=spaces.Box(-np.inf, np.inf, (3,), np.float64), action_space=spaces.Box(2.0, 5.0, (2,), np.float64)
    ),
    "tiny observations": dict(size=1e-12),
    "large observations": dict(size=1e10),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", VARIANTS)
def test_environments_at_the_edge(edge: str, name: str) -> None:
    model = tiny_model(EdgeEnv(**EDGES[edge]), **VARIANTS[name])
    model.learn(120)
    assert model._n_updates == 8 and all_finite(model)
    assert logged(model)["imagination/skipped"] == logged(model)["world_model/skipped"] == 0.0
    assert logged(model)["train/skipped"] == 0.0
    trajectory = model.imagine(32)
    assert all(th.isfinite(values).all() for values in trajectory)
    if EDGES[edge].get("ends") != "terminated":
        assert trajectory.terminals.sum() == 0.0, "nothing ever ended"


@pytest.mark.parametrize("edge", ["constant observations", "no rewards", "episodes of one step", "large observations"])
def test_environments_at_the_edge_under_vec_normalize(edge: str) -> None:
    model = tiny_model(VecNormalize(make_vec_env(lambda: EdgeEnv(**EDGES[edge]), 2))).learn(120)
    assert model._n_updates > 0 and all_finite(model)


# ---------------------------------------------------------------------- types of settings


def build(
    n: int = 1, share: float = 0.5, name: str = "a", width: int | None = 3, other: Callable[[], int] | None = None
) -> None:
    """Takes plain settings."""


@pytest.mark.parametrize("given", [dict(n=2), dict(share=1), dict(share=np.float32(0.1)), dict(width=None), dict(other=3), {}])
def test_settings_of_the_annotated_type_are_accepted(given: dict[str, Any]) -> None:
    check_settings("kwargs", build, given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(n=2.0), "n must be an integer, got 2.0"),
        (dict(n=True), "n must be an integer"),
        (dict(share="0.5"), "share must be a finite number, got '0.5'"),
        (dict(share=float("nan")), "share must be a finite number"),
        (dict(name=None), "name must be a string, got None"),
        (dict(width="wide"), "width must be an integer or None"),
    ],
)
def test_settings_of_another_type_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"kwargs: {message}"):
        check_settings("kwargs", build, given)
