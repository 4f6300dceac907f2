"""The command behind Figures 3 and 9 to 12, and its pictures."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from sb3_polygrad.evaluation import action_distribution, make_dataset, minari_files
from sb3_polygrad.evaluation.action_distribution import BIN_EDGES, RULES, delta_rate, follow, shape
from sb3_polygrad.plots import action_diagnostics
from sb3_polygrad.plots import action_distribution as distribution_plot
from sb3_polygrad.world_models.factory import build_diffusion


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hopper steps of an agent that has learnt nothing."""
    env = make_vec_env("Hopper-v5", n_envs=2, seed=0)
    agent = PPO("MlpPolicy", env, device="cpu")
    steps, _ = make_dataset.collect(agent, env, 600, (0.5,), 0)
    folder = minari_files.write(steps, "Hopper-v5", tmp_path_factory.mktemp("data"), "test/hopper-v0", "a test")
    agent.save(folder / "policy.zip")
    (folder / "dataset.json").write_text(json.dumps({"env": "Hopper-v5"}))
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_from_dataset_to_pictures(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = json.dumps({"width": 16, "n_layers": 1, "n_diffusion_steps": 4})
    monkeypatch.setattr("sys.argv", ["action_distribution", "--data", str(data), "--models", str(tmp_path),
                                     "--horizon", "4", "--gradient-steps", "5", "--world-model", size, "--rules", *RULES,
                                     "--stds", "0.1", "0.5", "--delta-rounds", "2", "--delta-batch", "10",
                                     "--trajectories", "40", "--replays", "5",
                                     "--out", str(tmp_path / "out" / "x")])  # fmt: skip
    action_distribution.main()
    rows = rows_of(tmp_path / "out" / "x.csv")
    assert [(row["rule"], row["sigma"]) for row in rows] == [(rule, sigma) for rule in RULES for sigma in ("0.5", "0.1")]
    assert all(bool(row["delta_rate"]) == (row["rule"] not in ("policy_sampling", "random_actions")) for row in rows)
    assert all(float(row["mse9_median"]) >= 0.0 for row in rows)
    by_step = rows_of(tmp_path / "out" / "x_steps.csv")
    assert [row["step"] for row in by_step] == ["1", "2", "3", "4"] * len(rows)
    histogram = rows_of(tmp_path / "out" / "x_histogram.csv")
    sampled = [float(row["density"]) for row in histogram if (row["rule"], row["sigma"]) == ("policy_sampling", "0.1")]
    assert sum(sampled) * (BIN_EDGES[1] - BIN_EDGES[0]) <= 1.0 + 1e-4, "a density; what lies beyond is left out"
    assert json.loads((tmp_path / "out" / "x.json").read_text())["training"]["gradient_steps"] == 5

    distribution_plot.plot([tmp_path / "out" / "x_histogram.csv"], "no_clipping", tmp_path / "distribution.png")
    action_diagnostics.plot([tmp_path / "out" / "x.csv"], "policy_score", 0.1, tmp_path / "diagnostics.png")
    assert all((tmp_path / name).stat().st_size > 1_000 for name in ("distribution.png", "diagnostics.png"))
    with pytest.raises(ValueError, match="no file has the rule 'policy_scor'"):
        distribution_plot.plot([tmp_path / "out" / "x_histogram.csv"], "policy_scor", tmp_path / "none.png")


def test_rules_share_one_denoiser() -> None:
    box = -th.ones(2), th.tensor([1.0, 3.0])
    model = build_diffusion(3, *box, 4, width=8, n_layers=1, sampler="policy_guided", n_diffusion_steps=2)
    weights = {name: tensor.clone() for name, tensor in model.denoiser.state_dict().items()}
    for rule in RULES:
        follow(model, rule, learning_rate=1.0)
        if rule in ("policy_sampling", "random_actions"):
            assert delta_rate(model, 0.5) is None
        else:
            # δ starts at 0.02; the smallest σ² in units of the box is (0.5 / 2)².
            assert delta_rate(model, 0.5) == pytest.approx(0.02 / 0.0625)
    assert all(th.equal(tensor, weights[name]) for name, tensor in model.denoiser.state_dict().items())


def test_shape_of_draws_and_of_what_is_not() -> None:
    draws = shape(th.randn(400_000))
    assert draws["kurtosis"] == pytest.approx(3.0, abs=0.05) and draws["at_clip"] == pytest.approx(0.0009, abs=0.0003)
    two_modes = shape(th.tensor([-3.0, 3.0, 0.0, 0.0]))
    assert two_modes["at_clip"] == 0.5
