"""The numbers of a report, in closed form on curves made by hand."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rliable", reason="needs the extra [benchmark]")

import pandas as pd
from rliable import metrics

from sb3_polygrad.benchmark import compare
from sb3_polygrad.benchmark.comparison_tables import (
    cost_table,
    curve_table,
    improvement_table,
    reach_table,
    read_results,
    return_table,
    seed_table,
)
from sb3_polygrad.benchmark.curve_file import CurveFile
from sb3_polygrad.benchmark.reliability import interquartile_mean, probability_of_improvement
from sb3_polygrad.plots import comparison


def write(folder: Path, env: str, label: str, *seeds: Sequence[float], every: int = 1_000, minutes: float = 1.0) -> None:
    """Curves of several seeds; 1,000 steps take ``minutes`` of training on two cores, and as long again for evaluations."""
    for seed, returns in enumerate(seeds):
        file = CurveFile(folder / f"{label}_{env}_{seed}.csv", {"label": label, "algorithm": label, "env": env, "seed": seed})
        file.begin({}, [])
        for index, value in enumerate(returns, 1):
            seconds = 60 * minutes * index * every / 1_000
            times = {"seconds": 2 * seconds, "cpu_seconds": 4 * seconds}
            times |= {"training_seconds": seconds, "training_cpu_seconds": 2 * seconds}
            file.append({"timesteps": index * every, "mean_reward": value, "std_reward": 0.0, **times})


@pytest.fixture
def results(tmp_path: Path) -> Path:
    write(tmp_path, "A-v0", "polygrad", [10, 40, 70], [20, 60, 40], [30, 80, 100], minutes=4)
    write(tmp_path, "A-v0", "ppo", [0, 10, 20, 30, 50], [0, 20, 30, 40, 70])  # their mean ends at 60
    write(tmp_path, "A-v0", "crossq", [50])
    write(tmp_path, "B-v0", "polygrad", [-5, -2, -4])
    write(tmp_path, "B-v0", "ppo", [-6, -5, -3], [-6, -1])  # the second seed is not done
    return tmp_path


def only(table: pd.DataFrame, **where: object) -> pd.Series:
    """The one row of a table where columns have given values."""
    for name, value in where.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table.iloc[0]


def test_ours_come_first(results: Path) -> None:
    rows = read_results(results, "ppo")
    assert list(rows[rows["env"] == "A-v0"]["label"].unique()) == ["ppo", "crossq", "polygrad"]


def test_returns_at_given_steps(results: Path) -> None:
    rows = read_results(results, "polygrad")
    table = return_table(rows, curve_table(rows), [1_000, 3_000, 7_000], "polygrad")
    ours = only(table, env="A-v0", timesteps=3_000, label="polygrad")
    assert (ours["seeds"], ours["mean"], ours["min"], ours["max"], ours["iqm"]) == (3, 70, 40, 100, 70)
    # Means of the seeds are 20, 60, 70 at 1,000, 2,000, 3,000: (20 + 60) / 2 + (60 + 70) / 2, over 2 widths.
    assert ours["area"] == pytest.approx(52.5)
    assert math.isnan(ours["improvement"]), "nobody improves over itself"
    ppo = only(table, env="A-v0", timesteps=3_000, label="ppo")
    assert ppo["area"] == pytest.approx((0 + 2 * 15 + 25) / 4) and ppo["improvement"] == 1
    crossq = only(table, env="A-v0", timesteps=1_000, label="crossq")
    assert crossq["area"] == crossq["mean"] == 50, "a single evaluation is its own area"
    assert crossq["improvement"] == 0 and math.isnan(crossq["iqm_low"]) and math.isnan(crossq["improvement_low"])
    # At 3,000 steps CrossQ has nothing, nobody has at 7,000: nothing is extrapolated.
    assert set(table[table["timesteps"] == 3_000].query("env == 'A-v0'")["label"]) == {"polygrad", "ppo"}
    assert table[table["timesteps"] == 7_000].empty
    # A seed that is not there yet is not counted, and said not to be.
    unfinished = only(table, env="B-v0", timesteps=3_000, label="ppo")
    assert (unfinished["seeds"], unfinished["mean"]) == (1, -3) and math.isnan(unfinished["iqm"])


def test_steps_that_nobody_has(results: Path) -> None:
    rows = read_results(results, "polygrad")
    with pytest.raises(ValueError, match="7000"):
        return_table(rows, curve_table(rows), [7_000], "polygrad")


def test_by_default_steps_are_where_curves_end(results: Path) -> None:
    rows = read_results(results, "polygrad")
    table = return_table(rows, curve_table(rows), None, "polygrad")
    assert sorted(table[table["env"] == "A-v0"]["timesteps"].unique()) == [1_000, 3_000, 5_000]
    assert sorted(table[table["env"] == "B-v0"]["timesteps"].unique()) == [2_000, 3_000]


def test_areas_are_taken_where_all_curves_have_evaluations(tmp_path: Path) -> None:
    write(tmp_path, "A-v0", "polygrad", [0, 100, 10, 100, 20])
    write(tmp_path, "A-v0", "ppo", [1, 3], every=2_000)
    rows = read_results(tmp_path)
    table = return_table(rows, curve_table(rows), [4_000], "polygrad")
    assert list(table["area"]) == [100, 2], "at 2,000 and 4,000"


def test_curves_at_the_steps_of_all_seeds(results: Path) -> None:
    curves = curve_table(read_results(results, "polygrad"))
    ppo = curves[(curves["env"] == "B-v0") & (curves["label"] == "ppo")]
    assert list(ppo["timesteps"]) == [1_000, 2_000] and list(ppo["iqm"]) == [-6, -3]
    assert list(ppo["iqm_low"]) == [-6, -5] and list(ppo["iqm_high"]) == [-6, -1]


def test_reaching(results: Path) -> None:
    table = reach_table(read_results(results, "polygrad"), "ppo", {"A-v0": 80})
    ppo = table[table["goal"] == "ppo at 5,000"]
    assert set(ppo["target"]) == {60}
    ours = only(ppo, label="polygrad")
    assert (ours["reached"], ours["seeds"]) == (3, 3)
    # At 3,000, 2,000 and 2,000 steps.
    assert (ours["steps"], ours["minutes"], ours["cpu_minutes"]) == (2_000, 8, 16)
    assert only(ppo, label="ppo")["reached"] == 1 and math.isnan(only(ppo, label="ppo")["steps"]), "the other seed never does"
    stated = table[table["goal"] == "stated"]
    assert only(stated, label="polygrad")["reached"] == 1 and math.isnan(only(stated, label="polygrad")["minutes"])
    assert only(stated, label="crossq")["within"] == 1_000
    # In the other environment PPO's mean is known up to 2,000 steps.
    assert only(table, env="B-v0", label="polygrad")["target"] == -3


def test_seeds_and_cost(results: Path) -> None:
    seeds = seed_table(read_results(results, "polygrad"))
    collapsed = only(seeds, env="A-v0", label="polygrad", seed=1)
    assert (collapsed["final"], collapsed["best"], collapsed["best_at"], collapsed["timesteps"]) == (40, 60, 2_000, 3_000)
    assert collapsed["final_of_best"] == pytest.approx(2 / 3)
    assert collapsed["minutes_per_10000"] == pytest.approx(40) and collapsed["cpu_minutes_per_10000"] == pytest.approx(80)
    assert math.isnan(only(seeds, env="B-v0", label="polygrad")["final_of_best"]), "a share of -2 says nothing"
    cost = only(cost_table(seeds), env="A-v0", label="polygrad")
    assert (cost["seeds"], cost["minutes_per_10000"]) == (3, pytest.approx(40))
    assert cost["final_of_best_min"] == pytest.approx(2 / 3)


def test_improvement_over_environments(tmp_path: Path) -> None:
    write(tmp_path, "A-v0", "polygrad", [1], [2])
    write(tmp_path, "A-v0", "ppo", [0], [2])
    write(tmp_path, "B-v0", "polygrad", [5], [6], [0])  # a third seed that is in one environment only
    write(tmp_path, "B-v0", "ppo", [7], [8])
    row = only(improvement_table(read_results(tmp_path), None, "polygrad"), label="ppo")
    # In A: 1 > 0, 1 < 2, 2 > 0, 2 = 2: 2.5 of 4. In B: 0 of 4.
    assert (row["environments"], row["improvement"]) == (2, pytest.approx(2.5 / 8))


def test_an_environment_of_a_single_seed_does_not_silence_the_others(tmp_path: Path) -> None:
    write(tmp_path, "A-v0", "polygrad", [1], [2])
    write(tmp_path, "A-v0", "ppo", [0], [2])
    write(tmp_path, "B-v0", "polygrad", [5])
    write(tmp_path, "B-v0", "ppo", [7], [8])
    row = only(improvement_table(read_results(tmp_path), None, "polygrad"), label="ppo")
    assert (row["environments"], row["seeds"], row["improvement"]) == (1, 2, pytest.approx(2.5 / 4))


def test_statistics_are_rliables() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 5, (6, 3)).astype(float), generator.integers(0, 5, (4, 3)).astype(float)
    probability, (low, high) = probability_of_improvement(x, y)
    assert probability == pytest.approx(metrics.probability_of_improvement(x, y)) and low <= probability <= high
    mean, interval = interquartile_mean(x)
    assert mean == pytest.approx([metrics.aggregate_iqm(x[:, [point]]) for point in range(3)])
    assert (interval[0] <= mean).all() and (mean <= interval[1]).all()


def test_intervals_are_the_same_again_and_disturb_no_one() -> None:
    scores = np.random.default_rng(0).normal(size=(5, 2))
    np.random.seed(3)
    undisturbed = np.random.rand()
    np.random.seed(3)
    first = interquartile_mean(scores)[1]
    assert np.random.rand() == undisturbed
    assert np.array_equal(first, interquartile_mean(scores)[1])


def test_the_page_and_its_files(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["compare", "report", str(results), "--at", "3000", "--target", "A-v0=80"])
    compare.main()
    out = results / "report"
    pictures = {"curves.png", "curves_A-v0.png", "curves_B-v0.png"}
    tables = {f"{name}.csv" for name in ("curves", "returns", "improvement", "reaching", "cost", "seeds")}
    assert {path.name for path in out.iterdir()} == {"report.md", "report.json", *pictures, *tables}
    page = (out / "report.md").read_text(encoding="utf-8")
    assert all(f"({picture})" in page for picture in pictures)
    assert "| 3,000 | ppo | 2 | 25 | 20 | 30 | 13.8 |" in page
    assert pd.read_csv(out / "returns.csv")["mean"].tolist() == [70, 25, -4, -3]


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no evaluations"):
        read_results(tmp_path)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not written by"):
        read_results(tmp_path)


def test_no_evaluation_counts_twice(tmp_path: Path) -> None:
    write(tmp_path, "A-v0", "ppo", [1, 2])
    (tmp_path / "copy.csv").write_bytes((tmp_path / "ppo_A-v0_0.csv").read_bytes())
    with pytest.raises(ValueError, match="same evaluation"):
        read_results(tmp_path)


def test_many_labels_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn = []
    monkeypatch.setattr(comparison, "save", lambda figure, out: drawn.extend(figure.axes[0].lines))
    row = {"env": "A", "timesteps": 1, "seeds": 3, "iqm": 0.0, "iqm_low": 0.0, "iqm_high": 0.0}
    comparison.plot(pd.DataFrame([{**row, "label": f"variant {index}"} for index in range(25)]), tmp_path / "a.png")
    assert len({(line.get_color(), line.get_linestyle()) for line in drawn}) == 25
