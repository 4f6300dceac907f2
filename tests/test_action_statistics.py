"""Statistics of standardised actions, on samples whose answer is known."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_polygrad.core.on_policy import action_diagnostics, action_statistics, ks_distance, per_step_std, predictable_share
from sb3_polygrad.core.trajectory import Trajectory
from sb3_polygrad.evaluation import action_statistics as command
from tests.toys import PointEnv, tiny_model

BATCH, HORIZON = 4_000, 5
MASK = th.ones(BATCH, HORIZON)


def test_ks_distance_by_hand() -> None:
    # One sample at the median: the step from 0 to 1 is half away from the curve. Two samples: at ±0.6745, quarter points.
    assert ks_distance(th.zeros(1)) == pytest.approx(0.5)
    assert ks_distance(th.tensor([0.67449, -0.67449])) == pytest.approx(0.25, abs=1e-4)
    assert ks_distance(th.full((10,), 8.0)) == pytest.approx(1.0)


def test_ks_distance_of_a_wider_gaussian_is_the_gap_of_the_curves() -> None:
    # Φ(x) - Φ(x / 2) is largest where the densities are equal: x² = 8/3 ln 2.
    x = math.sqrt(8 / 3 * math.log(2))
    expected = float(th.special.ndtr(th.tensor(x)) - th.special.ndtr(th.tensor(x / 2)))
    assert ks_distance(2 * th.randn(200_000)) == pytest.approx(expected, abs=0.005)


def test_draws_look_like_draws() -> None:
    statistics = action_statistics(th.randn(BATCH, HORIZON, 2), th.randn(BATCH, HORIZON, 3), MASK)
    assert statistics["action_std"] == pytest.approx(1.0, abs=0.02)
    assert statistics["ks"] < 0.01
    assert abs(statistics["autocorrelation"]) < 0.03
    assert abs(statistics["predictable"]) < 0.01


def test_predictable_share_is_the_explained_variance() -> None:
    # Variance 0.8 from the observation, 0.2 of its own; a constant feature must not disturb.
    observations = th.cat([th.randn(BATCH, HORIZON, 1), th.full((BATCH, HORIZON, 1), 7.0)], dim=-1)
    actions = math.sqrt(0.8) * observations[..., :1] + math.sqrt(0.2) * th.randn(BATCH, HORIZON, 1)
    assert predictable_share(actions, 3.0 * observations + 1.0, MASK) == pytest.approx(0.8, abs=0.02)


def test_steps_that_did_not_happen_do_not_count() -> None:
    mask = (th.arange(HORIZON) < 3).float().expand(BATCH, -1)
    actions, observations = th.randn(BATCH, HORIZON, 1), th.randn(BATCH, HORIZON, 2)
    actions[:, 3:] = 1e3
    statistics = action_statistics(actions, observations, mask)
    assert statistics["action_std"] == pytest.approx(1.0, abs=0.03) and statistics["ks"] < 0.015


def test_per_step_std() -> None:
    scale = th.tensor([0.5, 1.0, 1.5, 2.0, 2.5])
    assert th.allclose(per_step_std(th.randn(BATCH, HORIZON, 3) * scale[:, None], MASK), scale, rtol=0.05)


def test_a_mean_that_is_off_shows() -> None:
    statistics = action_statistics(th.randn(BATCH, HORIZON, 2) + 0.5, th.randn(BATCH, HORIZON, 3), MASK)
    assert statistics["action_mean"] == pytest.approx(0.5, abs=0.02)


def test_nothing_can_be_said_of_too_few_steps() -> None:
    one = th.zeros(1, 2, 1)
    assert math.isnan(predictable_share(one, one, th.ones(1, 2)))


def trajectories(observations: th.Tensor, mask: th.Tensor) -> Trajectory:
    zeros = th.zeros(mask.shape)
    return Trajectory(observations, zeros[..., None], zeros, zeros, mask)


def test_diagnostics_see_a_spread_that_grows() -> None:
    scale = th.linspace(0.5, 1.5, HORIZON)[:, None]
    diagnostics = action_diagnostics(th.randn(BATCH, HORIZON, 2) * scale, trajectories(th.randn(BATCH, HORIZON + 1, 3), MASK))
    assert diagnostics["action_std_first"] == pytest.approx(0.5, rel=0.05)
    assert diagnostics["action_std_last"] == pytest.approx(1.5, rel=0.05)


def test_a_step_that_nobody_reaches_has_no_spread() -> None:
    mask = (th.arange(HORIZON) < 3).float().expand(BATCH, -1)
    diagnostics = action_diagnostics(th.randn(BATCH, HORIZON, 2), trajectories(th.randn(BATCH, HORIZON + 1, 3), mask))
    assert diagnostics["action_std_first"] == pytest.approx(1.0, abs=0.05) and math.isnan(diagnostics["action_std_last"])


@pytest.mark.parametrize("normalized", [False, True])
def test_command_on_a_saved_model(
    normalized: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    env = make_vec_env(PointEnv, n_envs=2)
    arguments = [str(tmp_path / "model.zip"), "--buffer", str(tmp_path / "buffer.pkl")]
    if normalized:
        env = VecNormalize(env)
        monkeypatch.setattr(command, "make_vec_env", lambda env_id, n_envs: make_vec_env(PointEnv, n_envs))
        arguments += ["--vec-normalize", str(tmp_path / "statistics.pkl"), "--env", "Point"]
    model = tiny_model(env)
    model.learn(96)
    model.save(tmp_path / "model.zip")
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    if normalized:
        env.save(str(tmp_path / "statistics.pkl"))
    arguments += ["--trajectories", "4000", "--out", str(tmp_path / "results" / "actions")]
    monkeypatch.setattr("sys.argv", ["action_statistics", *arguments])
    command.main()
    with (tmp_path / "results" / "actions.csv").open() as file:
        (row,) = csv.DictReader(file)
    # The staggered sampler's actions are draws: any policy and any model will do.
    assert float(row["action_std"]) == pytest.approx(1.0, abs=0.03) and float(row["ks"]) < 0.02
    assert f"autocorrelation  {row['autocorrelation']}" in capsys.readouterr().out
    with (tmp_path / "results" / "actions_steps.csv").open() as file:
        assert len(list(csv.DictReader(file))) == model.horizon
    assert json.loads((tmp_path / "results" / "actions.json").read_text())["real_steps"] == 96
