"""Errors against the simulator, their summary, timing, and the figures drawn from them."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch as th
from torch.distributions import Normal

from sb3_polygrad.core.trajectory import Trajectory, mask_after_ending
from sb3_polygrad.evaluation import timing
from sb3_polygrad.evaluation.contestants import CONTESTANTS, Contestant
from sb3_polygrad.evaluation.dataset import Dataset
from sb3_polygrad.evaluation.fitted_model import kept_or_fitted
from sb3_polygrad.evaluation.make_dataset import collect
from sb3_polygrad.evaluation.simulator import Simulator
from sb3_polygrad.evaluation.trajectory_error import WARM_UP, errors, measure, pose, summary
from sb3_polygrad.plots import timing as timing_plot
from sb3_polygrad.plots import trajectory_error as error_plot
from tests.known_system import MODELS

LOW, HIGH = -th.ones(3), th.ones(3)


def trajectory(states: list[list[float]], terminals: list[list[float]], rewards: float = 0.0) -> Trajectory:
    ends = th.tensor(terminals)
    observations = th.tensor(states)[..., None]
    return Trajectory(observations, th.zeros(*ends.shape, 1), th.full(ends.shape, rewards), ends, mask_after_ending(ends))


def test_errors_by_hand() -> None:
    alive = [[0.0, 0.0]] * 3
    imagined = trajectory([[0.0, 1.0, 4.0], [0.0, 1.0, 2.0], [0.0, 3.0, 2.0]], alive, rewards=1.0)
    real = trajectory([[0.0, 1.0, 2.0], [0.0, 2.0, 2.0], [0.0, 1.0, 9.0]], [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    first, second = errors(imagined, real, th.zeros(3, 1), th.tensor([2.0]), th.tensor(0.5))
    # Differences 0, 1, 2, in units of 2; the third trajectory really ends with its first step, which still counts.
    assert (first["n"], second["n"]) == (3, 2)
    assert first["mse_raw_mean"] == pytest.approx(5 / 3) and first["mse_mean"] == pytest.approx(5 / 12)
    assert first["mse_raw_median"] == 1.0 and first["mse_median"] == 0.25
    assert first["no_change_mean"] == pytest.approx((1 + 4 + 1) / 4 / 3)
    assert first["ending_error"] == pytest.approx(1 / 3)
    assert first["reward_mse"] == pytest.approx(4.0)
    assert second["mse_raw_mean"] == 2.0


def test_summary_is_over_seeds() -> None:
    def row(seed: int, step: int, error: float) -> dict[str, Any]:
        rest = {"mse_median": 0.0, "reward_mse": 0.0, "ending_error": 0.0, "no_change_mean": 8.0, "no_change_median": 1.0}
        return {"env": "E", "model": "m", "horizon": 10, "seed": seed, "step": step, "mse_mean": error, **rest}

    costs = [{"env": "E", "model": "m", "horizon": 10, "seed": seed, "calls": 7, "fit_seconds": 1.0 + seed} for seed in (0, 1)]
    table = summary([row(0, 1, 1.0), row(1, 1, 4.0), row(0, 2, 9.0), row(1, 2, 9.0)], costs)
    assert len(table) == 1, "step 2 is not among those summarised"
    assert table[0]["seeds"] == 2 and table[0]["mse_mean"] == 2.5 and table[0]["mse_mean_std"] == 1.5
    assert table[0]["better_mean"] == 5.0, "mean of 8 / 1 and 8 / 4"
    assert (table[0]["calls"], table[0]["fit_seconds"]) == (7, 1.5)


@pytest.fixture(scope="module")
def hopper() -> Dataset:
    from stable_baselines3.common.env_util import make_vec_env

    agent = SimpleNamespace(predict=lambda observations, deterministic: (np.zeros((len(observations), 3)), None))
    return collect(agent, make_vec_env("Hopper-v5", n_envs=2, seed=0), 400, [0.1, 1.0], seed=0)[0]  # type: ignore[arg-type]


def policy(observations: th.Tensor) -> Normal:
    return Normal(th.zeros_like(observations[..., :3]), 0.3)


def test_starts_come_with_what_led_to_them(hopper: Dataset) -> None:
    problem = pose(hopper, Simulator("Hopper-v5"), policy, 20, seed=0)
    assert problem.context.observations.shape == (20, WARM_UP, 11)
    # The context's last step leads to the start, in the simulator too.
    at = [
        int(np.flatnonzero((hopper.observations.astype(np.float32) == start).all(axis=1))[0])
        for start in problem.start.numpy()
    ]
    assert (hopper.simulator_states[at] == problem.states).all()
    assert np.allclose(hopper.next_observations[np.array(at) - 1], problem.start, atol=1e-6)
    assert (problem.context.actions[:, -1].numpy() == hopper.actions[np.array(at) - 1]).all()


def test_data_without_simulator_states_is_refused(hopper: Dataset) -> None:
    bare = hopper._replace(simulator_states=np.zeros((len(hopper.rewards), 0)))
    with pytest.raises(ValueError, match="no simulator states"):
        pose(bare, Simulator("Hopper-v5"), policy, 5, seed=0)


@pytest.mark.parametrize("name", ["ensemble", "rssm", "staggered_markov"])
def test_a_model_is_fitted_once_and_measured(hopper: Dataset, name: str, tmp_path: Path) -> None:
    problem, contestant = pose(hopper, Simulator("Hopper-v5"), policy, 10, seed=0), CONTESTANTS[name]
    tiny = {"ensemble": dict(width=8), "rssm": dict(width=8, n_variables=2, n_classes=2), "staggered_markov": dict(width=8)}
    fits = []
    for _ in range(2):
        model, training = kept_or_fitted(
            tmp_path / "model.pt", lambda: contestant.build(11, LOW, HIGH, 6, tiny[name]), {"model": name}, hopper, 3, 16, 0
        )
        fits.append(training)
    assert fits[0] == fits[1]
    rows, cost = measure(model, problem)
    assert 1 <= len(rows) <= 6 and [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert cost["calls"] == 6
    with pytest.raises(ValueError, match="name another folder"):
        kept_or_fitted(tmp_path / "model.pt", lambda: model, {"model": "another"}, hopper, 3, 16, 0)


def test_every_kind_of_world_model_is_among_the_contestants() -> None:
    assert {contestant.world_model for contestant in CONTESTANTS.values()} == {
        world_model for world_model, _ in MODELS.values()
    }


@pytest.mark.parametrize("size", ["default", "paper"])
def test_contestants_imagine_the_horizon_asked_for(size: str) -> None:
    for contestant in CONTESTANTS.values():
        settings = contestant.settings[size]
        small = {**settings, "width": 8} if "width" in settings or contestant.whole else {"width": 8, **settings}
        assert contestant.build(2, LOW, HIGH, 13, small).horizon == 13


def small(*names: str) -> dict[str, Contestant]:
    return {name: CONTESTANTS[name]._replace(settings={"default": {"width": 8}}) for name in names}


def test_timing_and_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {
        name: CONTESTANTS[name]._replace(settings={"default": {"width": 8}}) for name in ("ensemble", "staggered_markov")
    }
    monkeypatch.setattr(timing, "CONTESTANTS", models)
    given = dict(env="Hopper-v5", size="default", device="cpu", batch=4, repeats=1, max_seconds=1e3, threads=1)
    timing.study(argparse.Namespace(**given, models=list(models), horizons=[2, 5], out=tmp_path / "timing"))
    table = pd.read_csv(tmp_path / "timing.csv")
    assert table["calls"].tolist() == [2, 5, 2, 5] and (table["seconds"] > 0).all()
    assert (table["parameters"] > 0).all()
    timing_plot.plot([tmp_path / "timing.csv"], tmp_path / "timing.png")
    assert (tmp_path / "timing.png").stat().st_size > 1_000

    rows = [
        {
            "env": env,
            "model": model,
            "horizon": 5,
            "seed": seed,
            "step": t,
            "no_change_median": 1.0,
            "mse_median": t * (1.0 + seed),
        }
        for env in ("A", "B")
        for model in ("x", "y")
        for seed in (0, 1)
        for t in (1, 2)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "errors.csv", index=False)
    error_plot.plot([tmp_path / "errors.csv"], tmp_path / "errors.png")
    assert (tmp_path / "errors.png").stat().st_size > 1_000


def test_a_horizon_that_takes_too_long_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        timing, "CONTESTANTS", {"ensemble": CONTESTANTS["ensemble"]._replace(settings={"default": {"width": 8}})}
    )
    given = dict(env="Hopper-v5", size="default", device="cpu", batch=4, repeats=1, max_seconds=0.0, threads=1)
    timing.study(argparse.Namespace(**given, models=["ensemble"], horizons=[5, 2], out=tmp_path / "timing"))
    assert pd.read_csv(tmp_path / "timing.csv")["horizon"].tolist() == [2]
