"""The staggered sampler beyond Gaussian policies, and the study that measures samplers."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pandas as pd
import pytest
import torch as th
from torch.distributions import Normal, TanhTransform, TransformedDistribution
from torch.optim.swa_utils import AveragedModel

from sb3_polygrad.core.trajectory import Trajectory
from sb3_polygrad.denoisers.base import Denoiser
from sb3_polygrad.diffusion.staggered import staggered_levels
from sb3_polygrad.evaluation import make_dataset, sampler_study, spread_study
from sb3_polygrad.evaluation.fitted_model import fitted_model
from sb3_polygrad.evaluation.linear_gaussian import LinearGaussianSystem
from sb3_polygrad.evaluation.policy_guidance import tune_delta
from sb3_polygrad.evaluation.sampler_study import errors_by_step, future_influence
from sb3_polygrad.plots import sampler_errors, sampler_grid, spread
from sb3_polygrad.plots import staggered_levels as levels_plot
from sb3_polygrad.world_models.diffusion import DiffusionWorldModel
from sb3_polygrad.world_models.factory import build_diffusion

HORIZON = 4


def small_model(**settings: object) -> DiffusionWorldModel:
    """A world model of the linear system that has seen a few windows of it."""
    th.manual_seed(0)
    system = LinearGaussianSystem()
    data = system.collect(n_episodes=20, length=10, stds=(0.5,))
    model = build_diffusion(2, system.action_low, system.action_high, HORIZON, width=16, n_layers=1, **settings)  # type: ignore[arg-type]
    steps = (th.as_tensor(array) for array in (data.observations, data.next_observations, data.actions))
    model.observe(*steps, th.zeros(len(data.rewards), 2))
    model.fit(data.to_buffer(HORIZON).sample(8))
    return model.eval()


def squashed(observations: th.Tensor) -> TransformedDistribution:
    mean = observations.sum(dim=-1, keepdim=True)
    return TransformedDistribution(Normal(mean, th.full_like(mean, 0.5)), [TanhTransform()])


@pytest.mark.parametrize(("lag", "calls"), [(1.1, 11), (0.7, 7), (0.3, 3), (0.55, 6)])
def test_no_call_is_lost_to_rounding(lag: float, calls: int) -> None:
    levels = staggered_levels(horizon=11, n_levels=4, lag=lag)  # 1.1 * 10 and 0.7 * 10 are a little too much in float64
    assert len(levels) - 1 == 4 + calls
    assert (levels[-1] == 0.0).all() and (levels[-2, -1] > 0.01)


@pytest.mark.parametrize(("n_levels", "lag"), [(2, 1.0), (3, 0.5), (2, 0.0), (2, 2.5)])
def test_actions_of_a_squashed_policy_are_its_draws(n_levels: int, lag: float) -> None:
    model, start = small_model(n_levels=n_levels, lag=lag), th.randn(500, 2)
    th.manual_seed(3)
    noise = th.randn(500, HORIZON, 1)  # the first numbers that imagining takes from the generator
    th.manual_seed(3)
    trajectory = model.imagine(start, squashed)
    base = squashed(trajectory.observations[:, :-1]).base_dist
    assert th.allclose(trajectory.actions, (base.mean + 0.5 * noise).tanh(), atol=1e-4)


def test_the_policy_guided_sampler_says_that_it_needs_a_gaussian() -> None:
    with pytest.raises(TypeError, match="follows the score of a Gaussian policy, got TransformedDistribution"):
        small_model(sampler="policy_guided", n_diffusion_steps=2).imagine(th.randn(3, 2), squashed)


# ---------------------------------------------------------------------- measurements


def test_errors_are_standardised_and_count_only_what_happened_on_both_sides() -> None:
    observations = th.zeros(1, 4, 2)
    observations[0, 1:, 0] = th.tensor([1.0, 2.0, 3.0])
    zeros = th.zeros(1, 3)
    imagined = Trajectory(observations, zeros[..., None], zeros, zeros, mask=th.tensor([[1.0, 1.0, 0.0]]))
    real = imagined._replace(observations=th.zeros(1, 4, 2), mask=th.tensor([[1.0, 1.0, 1.0]]))
    errors, counts = errors_by_step(imagined, real, std=th.tensor([2.0, 1.0]))
    assert errors[0].tolist() == pytest.approx([1 / 8, 4 / 8, 9 / 8])
    assert counts[0].tolist() == [True, True, False]


class _Chain(Denoiser):
    """Every state is its predecessor plus the action; or, looking ahead, the start plus all actions."""

    def __init__(self, looks_ahead: bool) -> None:
        super().__init__()
        self.looks_ahead = looks_ahead

    def forward(self, noisy: th.Tensor, actions: th.Tensor, level: th.Tensor) -> th.Tensor:
        sums = actions.cumsum(dim=1)
        if self.looks_ahead:
            sums = sums[:, -1:].expand_as(sums)
        return noisy[:, :1] + th.nn.functional.pad(sums, (0, noisy.shape[2] - 1, 1, 0))


def test_future_influence_of_a_denoiser_that_looks_ahead_and_of_one_that_does_not() -> None:

    def policy(observations: th.Tensor) -> Normal:
        return Normal(th.zeros(*observations.shape[:-1], 1), 0.5)

    influences = []
    for looks_ahead in (False, True):
        model = small_model(denoiser="residual_mlp", n_levels=1)
        model.average = AveragedModel(_Chain(looks_ahead))
        influences.append(future_influence(model, th.zeros(4_000, 2), policy))
    assert influences[0] == 0.0
    # The state is a sum of four draws, of which two come later: sqrt(2 / 4).
    assert influences[1] == pytest.approx(0.5**0.5, abs=0.03)


def test_the_future_has_no_influence_through_the_transformer() -> None:
    model = small_model(denoiser="transformer", n_levels=3, lag=0.5)
    assert future_influence(model, th.zeros(100, 2), LinearGaussianSystem().policy(0.5)) == 0.0


def test_tuning_delta_leaves_the_model_alone() -> None:
    model = small_model(sampler="policy_guided", n_diffusion_steps=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = tune_delta(model, th.randn(50, 2), LinearGaussianSystem().policy(0.5), rounds=2)
    changed = [name for name, tensor in tuned.state_dict().items() if not th.equal(tensor, before[name])]
    assert "sampler.guidance.controller.log_delta" in changed
    assert all(th.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_fitted_models_are_used_again_and_never_mistaken(tmp_path: Path) -> None:
    system = LinearGaussianSystem()
    data = system.collect(n_episodes=10, length=8, stds=(0.5,))

    def get(**changes: object) -> tuple[DiffusionWorldModel, dict[str, object]]:
        arguments = dict(settings={"width": 8, "n_layers": 1}, gradient_steps=3, batch_size=4) | changes
        bounds = system.action_low, system.action_high
        return fitted_model(tmp_path / "models" / "a.pt", data, *bounds, HORIZON, **arguments)  # type: ignore[arg-type]

    first, said = get()
    again, said_again = get()
    assert said == said_again and said["gradient_steps"] == 3
    trajectories = []
    for model in (first, again):
        th.manual_seed(1)
        trajectories.append(model.imagine(th.zeros(2, 2), system.policy(0.5)))
    assert th.equal(trajectories[0].observations, trajectories[1].observations)
    with pytest.raises(ValueError, match="name another folder"):
        get(gradient_steps=4)


# ---------------------------------------------------------------------- commands


def test_study_from_dataset_to_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["make_dataset", "--env", "Hopper-v5", "--steps", "800", "--agent-steps", "2048",
                                     "--root", str(tmp_path / "data")])  # fmt: skip
    make_dataset.main()
    data = tmp_path / "data" / "polygrad" / "hopper" / "ppo-v0"
    monkeypatch.setattr("sys.argv", ["sampler_study", "--data", str(data), "--models", str(tmp_path / "models"),
                                     "--horizon", "4", "--gradient-steps", "5", "--width", "16", "--layers", "1",
                                     "--levels", "1", "2", "--lags", "1", "--denoisers", "residual_mlp", "markov_mlp",
                                     "--staggered", '{"markov_mlp": {"learning_rate": 0.004}}',
                                     "--diffusion-steps", "3", "--delta-rounds", "1",
                                     "--stds", "0.5", "--trajectories", "40", "--replays", "10",
                                     "--out", str(tmp_path / "results" / "study")])  # fmt: skip
    sampler_study.main()
    with (tmp_path / "results" / "study.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["sampler"], row["denoiser"], row["K"], row["N"], row["calls"]) for row in rows] == [
        ("staggered", "residual_mlp", "1", "", "4"),
        ("staggered", "residual_mlp", "2", "", "5"),
        ("staggered", "markov_mlp", "1", "", "4"),
        ("staggered", "markov_mlp", "2", "", "8"),
        ("policy_guided", "residual_mlp", "", "3", "3"),
    ]
    assert all(float(row["mse9_median"]) > 0.0 for row in rows)
    with (tmp_path / "results" / "study_steps.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"] * 5
    sampler_errors.plot([tmp_path / "results" / "study_steps.csv"], tmp_path / "errors.png")
    sampler_grid.plot(tmp_path / "results" / "study.csv", tmp_path / "grid.png")
    assert all((tmp_path / name).stat().st_size > 1_000 for name in ("errors.png", "grid.png"))
    facts = json.loads((tmp_path / "results" / "study.json").read_text())
    assert list(facts["training"]) == [
        *("staggered_residual_mlp", "staggered_markov_mlp_1", "staggered_markov_mlp_2", "policy_guided_3")
    ]
    training = facts["training"]["staggered_markov_mlp_2"]
    assert facts["dataset"]["transitions"] == 800 and training["gradient_steps"] == 5 and "cpu_seconds" in training
    assert training["settings"]["learning_rate"] == 0.004 and training["settings"]["n_levels"] == 2
    assert "learning_rate" not in facts["training"]["staggered_residual_mlp"]["settings"]


def test_pictures_tell_denoisers_and_lags_apart(tmp_path: Path) -> None:
    rows = pd.DataFrame(
        [("residual_mlp", 1, 0.0), ("residual_mlp", 1, 1.0), ("residual_mlp", 2, 0.0)]
        + [("markov_mlp", k, float(k)) for k in (1, 2, 16)],
        columns=["denoiser", "K", "L"],
    )
    assert sampler_grid.name_columns(rows) == ["markov_mlp, L = K", "residual_mlp, L = 0", "residual_mlp, L = 1"]
    cells = rows.assign(env="A", horizon=4, sampler="staggered", sigma=0.5, calls=4, mse9_median=0.1)
    cells.to_csv(tmp_path / "grid.csv", index=False)
    sampler_grid.plot(tmp_path / "grid.csv", tmp_path / "grid.png")  # most cells were not measured
    guided = pd.DataFrame([dict(sampler="policy_guided", denoiser="residual_mlp", N=128)])
    curves = pd.concat([rows.assign(sampler="staggered"), guided])
    curves["family"] = curves.apply(sampler_errors.family, axis=1)
    names = list(curves.apply(sampler_errors.name, axis=1))
    assert names[0] == "staggered, residual_mlp: K=1 L=0" and names[-1] == "policy-guided: N=128"
    assert len(set(names)) == len(curves)


def test_spread_study_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["spread_study", "--models", str(tmp_path), "--horizon", "3", "--episodes", "20",
                                     "--gradient-steps", "5", "--width", "16", "--layers", "1", "--levels", "2", "--lags", "1",
                                     "--policy-guided", '{"delta_lr": 2.0}', "--diffusion-steps", "3", "--delta-rounds", "1",
                                     "--starts", "3", "--trajectories", "20", "--out", str(tmp_path / "spread")])  # fmt: skip
    spread_study.main()
    with (tmp_path / "spread.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3"] * 3  # markov, residual, policy-guided
    spread.plot(tmp_path / "spread.csv", tmp_path / "spread.png")
    levels_plot.plot(4, [2, 2, 1], [0.0, 1.0, 1.0], tmp_path / "levels.png")
    assert all((tmp_path / name).stat().st_size > 1_000 for name in ("spread.png", "levels.png"))
