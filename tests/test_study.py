"""The runner of all studies: one table, resumed, and drawn."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pandas as pd
import pytest
import torch as th

from sb3_polygrad.study import datasets, figures, runner
from sb3_polygrad.study.measures import MEASURES, actions_of
from sb3_polygrad.study.runner import CONFIGS, Study, merged, read, run
from sb3_polygrad.world_models.make import make_world_model
from tests.toys import PointEnv, tiny_model

GUIDED = {"width": 8, "n_layers": 1, "sampler": {"name": "policy_guided", "n_diffusion_steps": 2}}
STUDY = Study(
    datasets=["test/hopper-v0", "test/linear-v0"],
    models={
        "ensemble": {"world_model_kwargs": {"width": 8}},
        "guided": {"world_model": "diffusion", "world_model_kwargs": GUIDED},
    },
    measures=list(MEASURES),
    variants={"K=1, L=0": {}, "K=1, L=1": {"fit_horizon": 3}},
    defaults={"horizon": 3, "n_fits": 2, "batch_size": 8, "n_adapts": 2},
    n_trajectories=20,
    held_out=0.4,
)


@pytest.fixture(autouse=True)
def two_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "data"))
    for source, env_id in zip(STUDY.datasets, ("Hopper-v5", "LinearGaussian-v0"), strict=True):
        datasets.make_dataset(source, env_id, None, 120, [0.5, 1.0], 0, "random")


def test_a_table_is_made_resumed_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "results" / "study.csv"
    table = run(STUDY, out, threads=1)
    assert list(table.columns) == ["env", "model", "variant", "sigma", "seed", "step", "measure", "value"]
    cells = table[runner.CELL].drop_duplicates()
    assert len(cells) == 2 * 2 * 2 and len(list(out.with_name("study_fits").iterdir())) == 4, "variants share a fitted model"
    assert set(table.loc[table["measure"] == "mse_median", "step"]) == {1, 2, 3}
    assert {"delta", "fit_loss", "seconds", "crps_excess", "ended", "ks", "action"} <= set(table["measure"])
    same = (
        table[~table["measure"].str.contains("seconds")].drop(columns="variant").groupby(["env", "model", "measure", "step"])
    )
    assert (same["value"].nunique() <= same["value"].size() / 2).all(), "a variant that changes nothing measures the same"

    drop = table["variant"] == "K=1, L=1"
    table[~drop].to_csv(out, index=False)
    monkeypatch.setattr(runner.EpisodeBuffer, "sample", None)  # nothing is fitted again
    again = run(dataclasses.replace(STUDY, sigmas=[0.5, 0.1]), out)
    assert len(again[runner.CELL].drop_duplicates()) == 16
    measured = again[again["measure"] != "action"]
    assert not measured.duplicated([*runner.CELL, "step", "measure"]).any()
    facts = json.loads(out.with_suffix(".json").read_text())
    assert facts["study"]["sigmas"] == [0.5, 0.1] and "torch" in facts["versions"]
    with pytest.raises(ValueError, match=r"made with other \['held_out'\]"):
        run(dataclasses.replace(STUDY, held_out=0.2), out)
    with pytest.raises(ValueError, match="must be of different environments"):
        run(dataclasses.replace(STUDY, datasets=[STUDY.datasets[0]] * 2), tmp_path / "other.csv")

    for kind, measure, step in (("lines", "n", None), ("grid", "mse_median", 3), ("sigma", "ks", 0), ("histogram", "", None)):
        drawn = figures.draw(pd.read_csv(out), kind, measure, step)
        assert {axis.get_title().split(" = ")[-1] for axis in drawn.axes.flat} == {"Hopper-v5", "LinearGaussian-v0"}
    with pytest.raises(ValueError, match="there is no 'mse'"):
        figures.draw(again, "lines", "mse", None)


def test_mappings_are_merged() -> None:
    given = {"a": 1, "sampler": {"name": "x", "clip": 3.0}}
    assert merged(given, {"sampler": {"clip": None}, "b": 2}) == {"a": 1, "b": 2, "sampler": {"name": "x", "clip": None}}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yml")), ids=lambda path: path.stem)
def test_every_configuration_makes_world_models(path: Path) -> None:
    study = read(path)
    for model in study.models:
        for variant in study.variants:
            setting = study.setting(model, variant)
            kwargs = merged(merged(setting.world_model_kwargs, setting.imagine_with), {"width": 16})
            made = make_world_model(setting.world_model, 2, -th.ones(1), th.ones(1), setting.horizon, kwargs)
            assert made.horizon == setting.horizon


def test_what_is_unknown_is_said(tmp_path: Path) -> None:
    path = tmp_path / "study.yml"
    path.write_text("{datasets: [a], measures: [errors], models: {ensemble: {n_fit: 3}}}")
    with pytest.raises(ValueError, match=r"ensemble, default: unknown \['n_fit'\]"):
        read(path)
    path.write_text("{datasets: [a], measures: [error], models: {}}")
    with pytest.raises(ValueError, match="unknown measures"):
        read(path)


def test_actions_of_a_saved_model() -> None:
    model = tiny_model(PointEnv(), world_model="ensemble", world_model_kwargs={"width": 8}).learn(96)
    table = actions_of(model, 4_000).set_index(["step", "measure"])["value"]
    # The actions of a step-by-step model are draws: any policy and any model will do.
    assert table[0, "action_std"] == pytest.approx(1.0, abs=0.03) and table[0, "ks"] < 0.02
