"""Runs of a comparison: skipped, extended, gone on with after a kill, and none takes the others with it."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sb3_polygrad.benchmark.curve_file import COLUMNS, CurveFile, read_rows
from sb3_polygrad.benchmark.evaluations import CLOCKS
from sb3_polygrad.benchmark.provenance import provenance
from sb3_polygrad.benchmark.single_run import Run, execute
from sb3_polygrad.evaluation.results import write_csv
from tests.toys import TINY, TINY_WORLD_MODEL

pytest.importorskip("joblib", reason="needs the extra [benchmark]")

from sb3_polygrad.benchmark import compare, learning_curves

SETTINGS = {name: value for name, value in TINY.items() if name not in ("seed", "device")}
SETTINGS = {**SETTINGS, "world_model_kwargs": TINY_WORLD_MODEL}

# MuJoCo: an interrupted run goes on exactly where the simulator can be put where it was.
POLYGRAD = Run("polygrad", "InvertedPendulum-v5", 0, steps=240, every=60, episodes=2, settings=SETTINGS)
PPO = Run("ppo", "Pendulum-v1", 0, steps=90, every=30, episodes=1, settings={"n_steps": 64, "batch_size": 32})

# Two evaluations are made, then a kill in the midst of learning.
KILLED = """
import os, signal, sys
from pathlib import Path
from tests.test_compare import POLYGRAD, run
from sb3_polygrad import PolyGRAD

learn_from_imagined = PolyGRAD.train

def train(self):
    if self.num_timesteps > 150:
        os.kill(os.getpid(), signal.SIGKILL)
    learn_from_imagined(self)

PolyGRAD.train = train
run(POLYGRAD, Path(sys.argv[1]))
"""


def run(run: Run, folder: Path) -> str:
    return execute(run, folder / "out", folder / "store", provenance("tests"))


def curve(run: Run, folder: Path) -> list[dict[str, str]]:
    """Its rows, without times."""
    return [
        {name: value for name, value in row.items() if name not in CLOCKS}
        for row in read_rows(folder / "out" / f"{run.name}.csv")
    ]


def notes(run: Run, folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / f"{run.name}.json").read_text())


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
    with (tmp_path / "out" / "ppo_Pendulum-v1_0.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == list(COLUMNS)
    assert [row[:5] for row in rows[1:]] == [["ppo", "ppo", "Pendulum-v1", "0", str(step)] for step in (30, 60, 90)]
    # PPO collects 64 steps at a time and so makes 128: what comes after the 90 that were asked for is not in the file.
    for row in read_rows(tmp_path / "out" / "ppo_Pendulum-v1_0.csv"):
        seconds, cpu_seconds, training_seconds, training_cpu_seconds = (float(row[clock]) for clock in CLOCKS)
        assert 0 <= training_seconds <= seconds and 0 <= training_cpu_seconds <= cpu_seconds
    written = notes(PPO, tmp_path)
    assert written["steps"] == 90 and written["threads"] == 1 and "torch" in written["versions"]
    assert written["run"]["settings"]["n_steps"] == 64
    assert written["run"]["settings"]["clip_range"] == 0.2, "the constructor's defaults too"


def test_what_is_complete_is_skipped(tmp_path: Path) -> None:
    run(PPO, tmp_path)
    path = tmp_path / "out" / "ppo_Pendulum-v1_0.csv"
    before = path.read_bytes(), path.stat().st_mtime_ns
    assert run(PPO, tmp_path) == "skipped"
    assert run(replace(PPO, steps=60), tmp_path) == "skipped", "more than is asked for is there"
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_baselines_begin_anew(tmp_path: Path) -> None:
    run(PPO, tmp_path)
    short = curve(PPO, tmp_path)
    assert run(replace(PPO, steps=120), tmp_path) == "finished"
    assert curve(PPO, tmp_path)[:3] == short and len(curve(PPO, tmp_path)) == 4


def test_an_interrupted_extension_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(PPO, tmp_path)
    path = tmp_path / "out" / "ppo_Pendulum-v1_0.csv"
    before = path.read_bytes(), path.with_suffix(".json").read_bytes()
    whole = CurveFile.append

    def append(self: CurveFile, row: dict[str, Any]) -> None:
        if row["timesteps"] == 60:
            raise KeyboardInterrupt
        whole(self, row)

    longer = replace(PPO, steps=120)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CurveFile, "append", append)
        run(longer, tmp_path)
    assert (path.read_bytes(), path.with_suffix(".json").read_bytes()) == before
    path.rename(tmp_path / "moved_away.csv")
    with pytest.raises(ValueError, match=r"unfinished.*was made with another n_steps"):
        run(replace(longer, settings={**longer.settings, "n_steps": 32}), tmp_path)
    (tmp_path / "moved_away.csv").rename(path)
    assert run(longer, tmp_path) == "finished"
    assert len(curve(longer, tmp_path)) == 4 and notes(longer, tmp_path)["steps"] == 120
    assert not list((tmp_path / "out" / "unfinished").iterdir())


def test_evaluations_do_not_depend_on_the_algorithm(tmp_path: Path) -> None:
    """A2C that has learnt nothing yet and PPO that has not either have the same policy: so the returns are the same."""
    a2c = Run("a2c", "Pendulum-v1", 0, steps=20, every=20, episodes=2, settings={"n_steps": 64})
    ppo = replace(a2c, algorithm="ppo")
    run(a2c, tmp_path), run(ppo, tmp_path)
    same = ("timesteps", "mean_reward", "std_reward")
    assert [curve(a2c, tmp_path)[0][name] for name in same] == [curve(ppo, tmp_path)[0][name] for name in same]


def test_polygrad_is_extended_exactly(tmp_path: Path, uninterrupted: list[dict[str, str]]) -> None:
    assert run(replace(POLYGRAD, steps=120), tmp_path) == "finished"
    first = read_rows(tmp_path / "out" / f"{POLYGRAD.name}.csv")
    assert run(POLYGRAD, tmp_path) == "finished from 120 steps on"
    assert curve(POLYGRAD, tmp_path) == uninterrupted
    rows = read_rows(tmp_path / "out" / f"{POLYGRAD.name}.csv")
    assert rows[:2] == first, "what was there stays as it was"
    for clock in CLOCKS:
        times = [float(row[clock]) for row in rows]
        assert times == sorted(times), "the clocks go on from where they were"
    written = notes(POLYGRAD, tmp_path)
    assert written["steps"] == 240 and [part["from"] for part in written["continued"]] == [120]


def test_polygrad_is_gone_on_with_after_a_kill(tmp_path: Path, uninterrupted: list[dict[str, str]]) -> None:
    process = subprocess.run([sys.executable, "-c", KILLED, tmp_path], cwd=Path(__file__).parent.parent)
    assert process.returncode == -signal.SIGKILL
    assert curve(POLYGRAD, tmp_path) == uninterrupted[:2], "a killed run leaves what it has"
    assert run(POLYGRAD, tmp_path) == "finished from 120 steps on"
    assert curve(POLYGRAD, tmp_path) == uninterrupted


@pytest.mark.parametrize("damage", ["row cut off", "checkpoints behind", "checkpoints gone"])
def test_whatever_the_kill_has_left(tmp_path: Path, damage: str, uninterrupted: list[dict[str, str]]) -> None:
    """Killed while a row was written, between a row and its checkpoint, or moved to where the checkpoints are not."""
    run(replace(POLYGRAD, steps=180), tmp_path)
    path = tmp_path / "out" / f"{POLYGRAD.name}.csv"
    held = sorted((tmp_path / "store").rglob("*.zip"))
    assert [file.name.split("_")[2] for file in held] == ["120", "180"]
    expected = "finished from 180 steps on"
    if damage == "row cut off":
        path.write_bytes(path.read_bytes()[:-5])
        expected = "finished from 120 steps on"
    elif damage == "checkpoints behind":
        held[1].unlink()
        expected = "finished from 120 steps on"
    else:
        held[0].unlink(), held[1].unlink()
        expected = "finished"
    assert run(POLYGRAD, tmp_path) == expected
    assert curve(POLYGRAD, tmp_path) == uninterrupted


def test_a_schedule_of_another_length_is_another_run(tmp_path: Path) -> None:
    from stable_baselines3.common.utils import LinearSchedule

    scheduled = replace(POLYGRAD, settings={**SETTINGS, "learning_rate": LinearSchedule(1e-3, 0.0, 1.0)}, steps=120)
    run(scheduled, tmp_path)
    assert run(replace(scheduled, steps=180), tmp_path) == "finished", "and not from 120 steps on"


@pytest.mark.parametrize(
    "change, name",
    [({"settings": {"n_steps": 32, "batch_size": 32}}, "n_steps"), ({"every": 15}, "every"), ({"episodes": 3}, "episodes")],
)
def test_other_settings_are_not_mixed_in(tmp_path: Path, change: dict[str, Any], name: str) -> None:
    run(PPO, tmp_path)
    with pytest.raises(ValueError, match=f"another .*{name}.*--label"):
        run(replace(PPO, **change), tmp_path)
    assert run(replace(PPO, **change, label="variant"), tmp_path) == "finished"


def test_no_one_knows_what_rows_without_notes_are(tmp_path: Path) -> None:
    run(PPO, tmp_path)
    (tmp_path / "out" / "ppo_Pendulum-v1_0.json").unlink()
    with pytest.raises(ValueError, match="move it away"):
        run(PPO, tmp_path)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / f".{PPO.name}.lock"), pytest.raises(RuntimeError, match="another process"):
        run(PPO, tmp_path)


def test_a_failing_run_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", "--algos", "ppo", "--envs", "Nothing-v0", "Pendulum-v1", "--seeds", 0, "--steps", 40, "--every", 20]
    arguments += [
        "--episodes",
        1,
        "--kwargs",
        '{"n_steps": 32, "batch_size": 32}',
        "--out",
        tmp_path / "out",
        "--store",
        tmp_path / "store",
    ]
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, *arguments)
    assert "1 failed" in str(end.value) and "Nothing" in str(end.value) and "Traceback" in str(end.value)
    printed = capsys.readouterr().out
    assert "ppo_Nothing-v0_0: failed: NameNotFound" in printed and "ppo_Pendulum-v1_0: finished" in printed
    assert len(read_rows(tmp_path / "out" / "ppo_Pendulum-v1_0.csv")) == 2


def test_settings_come_from_the_files_and_kwargs_win() -> None:
    parse = compare.arguments().parse_args
    args = parse(
        ["run", "--algos", "a2c", "sac", "--envs", "Hopper-v5", "--seeds", "3", "--kwargs", '{"gamma": 0.9}', "--out", "x"]
    )
    a2c, sac = compare.runs_of(args)
    assert a2c.settings == {"learning_rate": 0.0003, "ent_coef": 0.00001, "gamma": 0.9} and a2c.seed == 3
    assert sac.settings["gamma"] == 0.9 and sac.name == "sac_Hopper-v5_3"
    args = parse(["run", "--algos", "ppo", "a2c", "--envs", "E", "F", "--seeds", "0", "1", "--out", "x"])
    names = [each.name for each in compare.runs_of(args)]
    assert names[:4] == ["ppo_E_0", "a2c_E_0", "ppo_F_0", "a2c_F_0"] and len(names) == 8, "one seed of everything first"


def test_a_label_is_of_one_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, "run", "--algos", "ppo", "a2c", "--label", "mine", "--out", "x")
    assert end.value.code == 2


def test_what_is_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from sb3_polygrad.benchmark.algorithms import algorithm_class

    monkeypatch.setitem(sys.modules, "sb3_contrib", None)
    with pytest.raises(ImportError, match=r"sb3_polygrad\[benchmark\]"):
        algorithm_class("trpo")


@pytest.mark.slow
def test_in_processes_with_one_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment ends its process at the first attempt; the second one, and the other run, come to their ends."""
    marker = tmp_path / "was here"
    module = tmp_path / "deadly_env.py"
    module.write_text(
        "import os, gymnasium\n"
        "from gymnasium.envs.classic_control import PendulumEnv\n"
        "class Deadly(PendulumEnv):\n"
        "    def step(self, action):\n"
        f"        if not os.path.exists({str(marker)!r}):\n"
        f"            open({str(marker)!r}, 'w').close()\n"
        "            os._exit(1)\n"
        "        return super().step(action)\n"
        "gymnasium.register('Deadly-v0', Deadly, max_episode_steps=20)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arguments = [
        "run",
        "--algos",
        "ppo",
        "--envs",
        "deadly_env:Deadly-v0",
        "Pendulum-v1",
        "--seeds",
        0,
        "--steps",
        40,
        "--jobs",
        2,
    ]
    arguments += ["--every", 20, "--episodes", 1, "--kwargs", '{"n_steps": 32, "batch_size": 32}', "--out", tmp_path / "out"]
    command(monkeypatch, *arguments, "--store", tmp_path / "store")
    assert marker.is_file()
    for name in ("ppo_deadly_env-Deadly-v0_0.csv", "ppo_Pendulum-v1_0.csv"):
        assert len(read_rows(tmp_path / "out" / name)) == 2


def test_workers_of_a_dask_cluster_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The same rows as in this process; a folder is where the one who asks has it, not where a worker was begun."""
    distributed = pytest.importorskip("distributed", reason="needs the extra [dask]")
    run(PPO, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(compare, "execute")  # here; the workers import it anew
    arguments = ["run", "--algos", "ppo", "--envs", PPO.env, "--seeds", 0, 1, "--steps", PPO.steps, "--every", PPO.every]
    arguments += ["--episodes", PPO.episodes, "--kwargs", json.dumps(PPO.settings), "--out", "there", "--store", "store"]
    settings = {"threads_per_worker": 1, "dashboard_address": None, "local_directory": tmp_path}
    with distributed.LocalCluster(n_workers=1, **settings) as cluster:
        command(monkeypatch, *arguments, "--dask", cluster.scheduler_address)
    done = sorted(capsys.readouterr().out.splitlines())
    assert done == ["ppo_Pendulum-v1_0: finished", "ppo_Pendulum-v1_1: finished"]
    rows = [read_rows(tmp_path / folder / "ppo_Pendulum-v1_0.csv") for folder in ("out", "there")]
    returns = [[row["mean_reward"] for row in table] for table in rows]
    assert returns[0] == returns[1] and len(returns[0]) == PPO.steps // PPO.every


def test_without_dask_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match=r"\[dask\]"):
        command(monkeypatch, "run", "--out", tmp_path, "--dask", "tcp://127.0.0.1:1")


def test_runs_do_not_share_a_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed", reason="needs the extra [dask]")
    arguments = ["run", "--algos", "ppo", "--seeds", 0, "--out", tmp_path]
    with distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster:
        with pytest.raises(SystemExit, match="--nthreads 1"):
            command(monkeypatch, *arguments, "--dask", cluster.scheduler_address)


def test_the_policy_s_defaults_belong_to_a_run(tmp_path: Path) -> None:
    policy_kwargs = POLYGRAD.settings.get("policy_kwargs") or {}
    other = replace(POLYGRAD, settings={**SETTINGS, "policy_kwargs": {**policy_kwargs, "actor_window": 0.1}})
    assert POLYGRAD.identity() == other.identity(), "the default, given"
    run(POLYGRAD, tmp_path)
    other = replace(POLYGRAD, settings={**SETTINGS, "policy_kwargs": {**policy_kwargs, "actor_window": 0.5}})
    with pytest.raises(ValueError, match=r"was made with another policy_kwargs.actor_window:"):
        run(other, tmp_path)
    assert run(replace(POLYGRAD, settings={**SETTINGS, "verbose": 0}), tmp_path) == "skipped", "decides nothing"
    older = notes(POLYGRAD, tmp_path)  # of a version whose policy had no window
    del older["run"]["settings"]["policy_kwargs"]["actor_window"]
    (tmp_path / "out" / f"{POLYGRAD.name}.json").write_text(json.dumps(older))
    assert run(POLYGRAD, tmp_path) == "skipped"
    with pytest.raises(ValueError, match=r"another policy_kwargs.actor_window:"):
        run(other, tmp_path)


def test_the_world_model_s_defaults_belong_to_a_run(tmp_path: Path) -> None:
    def with_decay(decay: float) -> Run:
        return replace(POLYGRAD, settings={**SETTINGS, "world_model_kwargs": {**TINY_WORLD_MODEL, "weight_decay": decay}})

    assert POLYGRAD.identity() == with_decay(0.0).identity(), "the default, given"
    run(POLYGRAD, tmp_path)
    with pytest.raises(ValueError, match=r"was made with another world_model_kwargs.weight_decay:"):
        run(with_decay(1.0), tmp_path)
    paper = replace(POLYGRAD, settings={"world_model": "ensemble", "world_model_kwargs": {"size": "paper"}})
    assert paper.identity() != replace(paper, settings={"world_model": "ensemble"}).identity(), "another size"
    with pytest.raises(ValueError, match="world_model: 'difusion' is not known; did you mean 'diffusion'"):
        run(replace(POLYGRAD, settings={"world_model": "difusion"}), tmp_path)


def test_a_row_that_is_missing_is_made_again(tmp_path: Path, uninterrupted: list[dict[str, str]]) -> None:
    run(POLYGRAD, tmp_path)
    path = tmp_path / "out" / f"{POLYGRAD.name}.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:1] + lines[2:]))
    assert run(POLYGRAD, tmp_path) == "finished", "no checkpoint is from before that row"
    assert curve(POLYGRAD, tmp_path) == uninterrupted


def test_rows_beyond_what_is_asked_for_are_not_lost(tmp_path: Path) -> None:
    run(PPO, tmp_path)
    path = tmp_path / "out" / "ppo_Pendulum-v1_0.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:1] + lines[2:]))
    with pytest.raises(ValueError, match="reaches 90 steps and lacks evaluations before 60"):
        run(replace(PPO, steps=60), tmp_path)
    assert len(read_rows(path)) == 2


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, uninterrupted: list[dict[str, str]]) -> None:
    run(replace(POLYGRAD, steps=180), tmp_path)
    latest = sorted((tmp_path / "store").glob("*/*180_steps.zip"))[0]
    latest.write_bytes(latest.read_bytes()[:1000])
    assert run(POLYGRAD, tmp_path) == "finished from 120 steps on"
    assert curve(POLYGRAD, tmp_path) == uninterrupted


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"run": '])
def test_damaged_notes_are_named(tmp_path: Path, text: str) -> None:
    run(PPO, tmp_path)
    (tmp_path / "out" / "ppo_Pendulum-v1_0.json").write_text(text)
    with pytest.raises(ValueError, match=r"ppo_Pendulum-v1_0.json is damaged: move it away"):
        run(PPO, tmp_path)


@pytest.mark.parametrize("damage", ["x0", ""])
def test_damaged_rows_are_named(tmp_path: Path, damage: str) -> None:
    run(PPO, tmp_path)
    path = tmp_path / "out" / "ppo_Pendulum-v1_0.csv"
    path.write_text(path.read_text().replace(",60,", f",{damage},"))
    with pytest.raises(ValueError, match=r"ppo_Pendulum-v1_0.csv is damaged"):
        run(PPO, tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--steps", "50"], "--steps 50 is less than --every 1000"),
        (["--steps", "-5"], "must be at least 1"),
        (["--episodes", "0"], "must be at least 1"),
        (["--jobs", "0"], "must be at least 1"),
        (["--kwargs", "[1]"], "must be like"),
        (["--kwargs", "gamma=0.9"], "is no json"),
        (["--kwargs", '{"learning_rate": "lin_much"}'], "is no schedule"),
    ],
)
def test_nothing_to_do_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, given: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        command(monkeypatch, "run", "--out", tmp_path, *given)
    assert message in capsys.readouterr().err


def test_schedules_of_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A schedule means the same in ``--kwargs`` as in a yml file: both learn, and say in the json what from."""
    given = ["--kwargs", '{"n_steps": 32, "learning_rate": "lin_0.001"}', "--steps", "64", "--every", "64", "--episodes", "1"]
    command(
        monkeypatch,
        "run",
        "--algos",
        "ppo",
        "--envs",
        "Pendulum-v1",
        "--seeds",
        "0",
        *given,
        "--out",
        tmp_path,
        "--store",
        tmp_path,
    )
    rate = json.loads((tmp_path / "ppo_Pendulum-v1_0.json").read_text())["run"]["settings"]["learning_rate"]
    assert rate == "LinearSchedule(start=0.001, end=0.0, end_fraction=1.0)"
    monkeypatch.setattr(sys, "argv", ["learning_curves", "--algo", "ppo", "--env", "Pendulum-v1", "--seeds", "0", *given])
    sys.argv += ["--out", str(tmp_path / "curve")]
    learning_curves.main()
    assert json.loads((tmp_path / "curve.json").read_text())["settings"]["learning_rate"] == rate


def test_a_table_that_cannot_be_written_leaves_the_former_one(tmp_path: Path) -> None:
    class Unwritable:
        def __str__(self) -> str:
            raise OSError("no space left on device")

    write_csv(tmp_path / "a.csv", [{"seed": 0}])
    with pytest.raises(OSError, match="no space"):
        write_csv(tmp_path / "a.csv", [{"seed": 1}, {"seed": Unwritable()}])
    assert (tmp_path / "a.csv").read_text().split() == ["seed", "0"]
