"""Runs of a comparison: skipped, extended, resumed after a kill, and no failing run stops the others."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from stable_baselines3.common.utils import LinearSchedule

pytest.importorskip("joblib", reason="needs the extra [benchmark]")

from sb3_polygrad.benchmark import compare
from sb3_polygrad.benchmark.algorithms import algorithm_class
from sb3_polygrad.benchmark.curve_file import COLUMNS, CurveFile, read_rows
from sb3_polygrad.benchmark.evaluations import CLOCKS
from sb3_polygrad.benchmark.provenance import provenance
from sb3_polygrad.benchmark.run import Run, execute
from sb3_polygrad.polygrad import PolyGRAD
from tests.toys import TINY, TINY_ENSEMBLE

SETTINGS = {name: value for name, value in TINY.items() if name not in ("seed", "device")}
SETTINGS = {**SETTINGS, "world_model_kwargs": TINY_ENSEMBLE}
# MuJoCo, whose states can be restored. Iterations of 8 steps: the checkpoints are at 64, 120, 184 and 240 steps.
POLYGRAD = Run("polygrad", "InvertedPendulum-v5", 0, steps=240, every=60, episodes=2, settings=SETTINGS)
PPO = Run("ppo", "Pendulum-v1", 0, steps=90, every=30, episodes=1, settings={"n_steps": 64, "batch_size": 32})
PPO_COMMAND = ["run", "--algos", "ppo", "--seeds", 0, "--episodes", 1, "--kwargs", json.dumps(PPO.settings)]
RESULTS = Path(__file__).parents[1] / "docs" / "results" / "comparison"


def run(run: Run, folder: Path) -> str:
    return execute(run, folder / "out", folder / "store", provenance("tests"))


def csv_of(run: Run, folder: Path) -> Path:
    return folder / "out" / f"{run.name}.csv"


def curve(run: Run, folder: Path) -> list[dict[str, str]]:
    """The rows of a run without times."""
    return [{name: row[name] for name in COLUMNS if name not in CLOCKS} for row in read_rows(csv_of(run, folder))]


def notes(run: Run, folder: Path) -> dict[str, Any]:
    return json.loads(csv_of(run, folder).with_suffix(".json").read_text())


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """The command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, arguments)])
    compare.main()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run(POLYGRAD, folder) == "finished"
    return curve(POLYGRAD, folder)


def test_columns_steps_and_notes(tmp_path: Path) -> None:
    assert run(PPO, tmp_path) == "finished"
    with csv_of(PPO, tmp_path).open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == list(COLUMNS)
    # PPO collects 64 steps at a time and makes 128: what comes after the 90 that were asked for is not in the file.
    assert [row[:5] for row in rows[1:]] == [["ppo", "ppo", "Pendulum-v1", "0", str(step)] for step in (30, 60, 90)]
    for row in read_rows(csv_of(PPO, tmp_path)):
        seconds, cpu_seconds, training_seconds, training_cpu_seconds = (float(row[clock]) for clock in CLOCKS)
        assert 0 <= training_seconds <= seconds and 0 <= training_cpu_seconds <= cpu_seconds
    written = notes(PPO, tmp_path)
    assert written["steps"] == 90 and written["threads"] == 1 and "torch" in written["versions"]
    assert written["run"]["settings"]["n_steps"] == 64
    assert written["run"]["settings"]["clip_range"] == 0.2, "the constructor's defaults too"


def test_a_complete_run_is_skipped(tmp_path: Path) -> None:
    run(PPO, tmp_path)
    before = csv_of(PPO, tmp_path).read_bytes(), csv_of(PPO, tmp_path).stat().st_mtime_ns
    assert run(PPO, tmp_path) == "skipped"
    assert run(replace(PPO, steps=60), tmp_path) == "skipped", "more than is asked for is there"
    assert (csv_of(PPO, tmp_path).read_bytes(), csv_of(PPO, tmp_path).stat().st_mtime_ns) == before


@pytest.mark.parametrize(("algorithm", "is_done"), [("a2c", True), ("polygrad", False)])
def test_stored_results_count_only_if_their_settings_are_the_present_ones(
    tmp_path: Path, algorithm: str, is_done: bool
) -> None:
    """The stored results of PolyGRAD are of another learner; those of A2C are what it would do today."""
    (tmp_path / "out").mkdir()
    stored = Run(algorithm, "Hopper-v5", 0, 20_000)
    stored = replace(stored, settings=compare.load_hyperparams(algorithm, "Hopper-v5"))
    for suffix in (".csv", ".json"):
        shutil.copy(RESULTS / f"{stored.name}{suffix}", tmp_path / "out")
    if is_done:
        assert run(stored, tmp_path) == "skipped"
    else:
        with pytest.raises(ValueError, match=r"another .*world_model"):
            run(stored, tmp_path)


def test_an_extended_baseline_begins_anew_and_an_interrupt_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(PPO, tmp_path)
    short, longer = csv_of(PPO, tmp_path).read_bytes(), replace(PPO, steps=120)
    append = CurveFile.append

    def interrupted(self: CurveFile, row: dict[str, Any]) -> None:
        if row["timesteps"] == 60:
            raise KeyboardInterrupt
        append(self, row)

    monkeypatch.setattr(CurveFile, "append", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(longer, tmp_path)
    before = csv_of(PPO, tmp_path).with_suffix(".csv.before")
    assert before.read_bytes() == short, "and not the shorter curve of the first interrupted attempt"
    monkeypatch.undo()
    assert run(longer, tmp_path) == "finished"
    rows = curve(longer, tmp_path)
    assert len(rows) == 4 and rows[:3] == [{name: row[name] for name in rows[0]} for row in read_rows(before)]


def test_evaluations_do_not_depend_on_the_algorithm(tmp_path: Path) -> None:
    """A2C and PPO that have learnt nothing have the same policy, so the returns are the same."""
    a2c = Run("a2c", "Pendulum-v1", 0, steps=20, every=20, episodes=2, settings={"n_steps": 64})
    ppo = replace(a2c, algorithm="ppo")
    run(a2c, tmp_path), run(ppo, tmp_path)
    same = ("timesteps", "mean_reward", "std_reward")
    assert [curve(a2c, tmp_path)[0][name] for name in same] == [curve(ppo, tmp_path)[0][name] for name in same]


def test_an_extended_polygrad_continues_exactly(tmp_path: Path, uninterrupted: list[dict[str, str]]) -> None:
    assert run(replace(POLYGRAD, steps=120), tmp_path) == "finished"
    first = read_rows(csv_of(POLYGRAD, tmp_path))
    assert run(POLYGRAD, tmp_path) == "resumed at 120 steps and finished"
    rows = read_rows(csv_of(POLYGRAD, tmp_path))
    assert curve(POLYGRAD, tmp_path) == uninterrupted and rows[:2] == first
    for clock in CLOCKS:
        times = [float(row[clock]) for row in rows]
        assert times == sorted(times), "the clocks continue"
    assert notes(POLYGRAD, tmp_path)["steps"] == 240
    assert [part["from"] for part in notes(POLYGRAD, tmp_path)["continued"]] == [120]


def test_an_interrupted_polygrad_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: list[dict[str, str]]
) -> None:
    train = PolyGRAD.train

    def interrupted(self: PolyGRAD) -> None:
        if self.num_timesteps > 150:
            raise KeyboardInterrupt
        train(self)

    monkeypatch.setattr(PolyGRAD, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(POLYGRAD, tmp_path)
    monkeypatch.undo()
    assert curve(POLYGRAD, tmp_path) == uninterrupted[:2], "what was evaluated is in the file"
    assert run(POLYGRAD, tmp_path) == "resumed at 120 steps and finished"
    assert curve(POLYGRAD, tmp_path) == uninterrupted


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("row cut off", "resumed at 120 steps and finished"),
        ("row missing", "finished"),  # no checkpoint is from before that row
        ("latest checkpoint damaged", "resumed at 120 steps and finished"),
        ("checkpoints gone", "finished"),
    ],
)
def test_what_a_kill_can_leave(tmp_path: Path, damage: str, expected: str, uninterrupted: list[dict[str, str]]) -> None:
    run(replace(POLYGRAD, steps=180), tmp_path)
    path = csv_of(POLYGRAD, tmp_path)
    held = sorted((tmp_path / "store").rglob("*.zip"))
    assert [file.name.split("_")[2] for file in held] == ["120", "184"]
    if damage == "row cut off":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "row missing":
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:1] + lines[2:]))
    elif damage == "latest checkpoint damaged":
        held[1].write_bytes(held[1].read_bytes()[:1000])
    else:
        shutil.rmtree(tmp_path / "store")
    assert run(POLYGRAD, tmp_path) == expected
    assert curve(POLYGRAD, tmp_path) == uninterrupted


def test_a_schedule_over_more_steps_is_another_run(tmp_path: Path) -> None:
    scheduled = replace(POLYGRAD, settings={**SETTINGS, "learning_rate": LinearSchedule(1e-3, 0.0, 1.0)}, steps=120)
    run(scheduled, tmp_path)
    assert run(replace(scheduled, steps=180), tmp_path) == "finished", "and not resumed at 120 steps"


@pytest.mark.parametrize(
    ("change", "name"),
    [({"settings": {"n_steps": 32, "batch_size": 32}}, "n_steps"), ({"every": 15}, "every"), ({"episodes": 3}, "episodes")],
)
def test_rows_of_other_settings_are_not_mixed_in(tmp_path: Path, change: dict[str, Any], name: str) -> None:
    run(PPO, tmp_path)
    with pytest.raises(ValueError, match=f"another .*{name}.*--label"):
        run(replace(PPO, **change), tmp_path)
    assert run(replace(PPO, **change, label="variant"), tmp_path) == "finished"


@pytest.mark.parametrize(
    ("where", "name", "default", "other"),
    [
        ("policy_kwargs", "tau", 0.1, 0.5),
        ("policy_update_kwargs", "n_epochs", 2, 1),
        ("world_model_kwargs", "weight_decay", 0.0, 1.0),
    ],
)
def test_defaults_of_policy_update_and_world_model_belong_to_a_run(
    tmp_path: Path, where: str, name: str, default: float, other: float
) -> None:
    def with_value(value: float) -> Run:
        return replace(POLYGRAD, settings={**SETTINGS, where: {**SETTINGS.get(where, {}), name: value}})

    assert POLYGRAD.identity() == with_value(default).identity(), "the default, given"
    (tmp_path / "out").mkdir()
    file = CurveFile(csv_of(POLYGRAD, tmp_path), POLYGRAD.rows_begin)
    row = dict.fromkeys(COLUMNS, "0")
    file.begin({"run": POLYGRAD.identity(), "id": "x", "steps": 60, "continued": []}, [row | {"timesteps": "60"}])
    assert run(replace(with_value(default), steps=60), tmp_path) == "skipped"
    with pytest.raises(ValueError, match=f"another {where}.{name}:"):
        run(replace(with_value(other), steps=60), tmp_path)


@pytest.mark.parametrize(("given", "nearest"), [({"world_model": "ensembel"}, "ensemble"), ({"policy_update": "poo"}, "ppo")])
def test_a_name_that_is_not_known_names_the_nearest(given: dict[str, Any], nearest: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{nearest}'"):
        replace(POLYGRAD, settings=given).identity()


@pytest.mark.parametrize("suffix", [".json", ".csv"])
@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"run": '])
def test_damaged_files_are_named(tmp_path: Path, suffix: str, text: str | None) -> None:
    run(PPO, tmp_path)
    path = csv_of(PPO, tmp_path).with_suffix(suffix)
    if suffix == ".csv":
        path.write_text(path.read_text().replace(",60,", f",{text},"))
    else:
        path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ValueError, match=rf"ppo_Pendulum-v1_0{suffix} .*move it away"):
        run(PPO, tmp_path)


def test_only_one_process_works_on_a_run(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / f".{PPO.name}.lock"), pytest.raises(RuntimeError, match="another process"):
        run(PPO, tmp_path)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failing_run_is_reported_and_the_others_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], jobs: int
) -> None:
    folders = ["--out", tmp_path / "out", "--store", tmp_path / "store", "--jobs", jobs]
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, *PPO_COMMAND, "--envs", "Nothing-v0", PPO.env, "--steps", 40, "--every", 20, *folders)
    assert "1 failed" in str(end.value) and "Nothing" in str(end.value) and "Traceback" in str(end.value)
    printed = capsys.readouterr().out
    assert "ppo_Nothing-v0_0: failed: NameNotFound" in printed and "ppo_Pendulum-v1_0: finished" in printed
    assert len(read_rows(csv_of(PPO, tmp_path))) == 2


def test_settings_come_from_the_files_and_kwargs_win() -> None:
    def runs(*arguments: str) -> list[Run]:
        return compare.runs_of(compare.arguments().parse_args(["run", "--out", "x", *arguments]))

    a2c, sac = runs("--algos", "a2c", "sac", "--seeds", "3", "--kwargs", '{"gamma": 0.9, "learning_rate": "lin_0.001"}')
    assert {**a2c.settings, "learning_rate": 0.001} == {"learning_rate": 0.001, "ent_coef": 0.00001, "gamma": 0.9}
    assert a2c.identity()["settings"]["learning_rate"] == "LinearSchedule(start=0.001, end=0.0, end_fraction=1.0)"
    assert sac.settings["gamma"] == 0.9 and sac.name == "sac_Hopper-v5_3"
    names = [each.name for each in runs("--algos", "ppo", "a2c", "--envs", "E", "F", "--seeds", "0", "1")]
    assert names[:4] == ["ppo_E_0", "a2c_E_0", "ppo_F_0", "a2c_F_0"] and len(names) == 8, "one seed of everything first"


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sb3_contrib", None)
    with pytest.raises(ImportError, match=r"sb3_polygrad\[benchmark\]"):
        algorithm_class("trpo")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--label", "mine"], "give one of --algos"),
        (["--steps", "50"], "--steps 50 is less than --every 1000"),
        (["--steps", "-5"], "must be at least 1"),
        (["--jobs", "0"], "must be at least 1"),
        (["--kwargs", "[1]"], 'like {"gamma": 0.9}'),
        (["--kwargs", "gamma=0.9"], 'like {"gamma": 0.9}'),
    ],
)
def test_wrong_arguments_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, given: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        command(monkeypatch, "run", "--out", tmp_path, *given)
    assert message in capsys.readouterr().err
