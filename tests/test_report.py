"""The numbers of a report, in closed form on curves made by hand."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("rliable", reason="needs the extra [benchmark]")

import pandas as pd

from sb3_polygrad.benchmark import compare
from sb3_polygrad.benchmark.curve_file import CurveFile
from sb3_polygrad.benchmark.tables import read_results, return_table, seed_table


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
    table = return_table(read_results(results, "polygrad"), [1_000, 3_000, 7_000], "polygrad")
    ours = only(table, env="A-v0", timesteps=3_000, label="polygrad")
    assert (ours["seeds"], ours["mean"], ours["min"], ours["max"]) == (3, 70, 40, 100)
    assert math.isnan(ours["improvement"]), "nobody improves over itself"
    assert only(table, env="A-v0", timesteps=3_000, label="ppo")["improvement"] == 1
    crossq = only(table, env="A-v0", timesteps=1_000, label="crossq")
    assert crossq["mean"] == 50 and crossq["improvement"] == 0
    # At 3,000 steps CrossQ has nothing, nobody has at 7,000: nothing is extrapolated.
    assert set(table[table["timesteps"] == 3_000].query("env == 'A-v0'")["label"]) == {"polygrad", "ppo"}
    assert table[table["timesteps"] == 7_000].empty
    # A seed that is not there yet is not counted.
    unfinished = only(table, env="B-v0", timesteps=3_000, label="ppo")
    assert (unfinished["seeds"], unfinished["mean"]) == (1, -3)


def test_probability_of_improvement_counts_pairs_of_seeds(tmp_path: Path) -> None:
    write(tmp_path, "A-v0", "polygrad", [1], [2])
    write(tmp_path, "A-v0", "ppo", [0], [2])
    table = return_table(read_results(tmp_path), None, "polygrad")
    # 1 > 0, 1 < 2, 2 > 0, 2 = 2: 2.5 of 4.
    assert only(table, label="ppo")["improvement"] == pytest.approx(2.5 / 4)


def test_steps_that_nobody_has(results: Path) -> None:
    with pytest.raises(ValueError, match="7000"):
        return_table(read_results(results, "polygrad"), [7_000], "polygrad")


def test_by_default_steps_are_where_curves_end(results: Path) -> None:
    table = return_table(read_results(results, "polygrad"), None, "polygrad")
    assert sorted(table[table["env"] == "A-v0"]["timesteps"].unique()) == [1_000, 3_000, 5_000]
    assert sorted(table[table["env"] == "B-v0"]["timesteps"].unique()) == [2_000, 3_000]


def test_single_runs(results: Path) -> None:
    seeds = seed_table(read_results(results, "polygrad"))
    collapsed = only(seeds, env="A-v0", label="polygrad", seed=1)
    assert (collapsed["final"], collapsed["best"], collapsed["best_at"], collapsed["timesteps"]) == (40, 60, 2_000, 3_000)
    assert collapsed["final_of_best"] == pytest.approx(2 / 3)
    assert collapsed["minutes_per_10000"] == pytest.approx(40) and collapsed["cpu_minutes_per_10000"] == pytest.approx(80)
    assert math.isnan(only(seeds, env="B-v0", label="polygrad")["final_of_best"]), "a fraction of -2 says nothing"


def test_the_page_and_its_files(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["compare", "report", str(results), "--at", "3000"])
    compare.main()
    out = results / "report"
    assert {path.name for path in out.iterdir()} == {"report.md", "report.json", "curves.png", "returns.csv", "seeds.csv"}
    page = (out / "report.md").read_text(encoding="utf-8")
    assert "## A-v0" in page and "## B-v0" in page and "(curves.png)" in page
    assert "| 3,000 | ppo | 2 | 25 | 20 | 30 | 1 |" in page
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
