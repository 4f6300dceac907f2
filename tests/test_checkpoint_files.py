"""Files of checkpoints: whole or not there, refused with a way out when damaged, and without pickles of ours."""

from __future__ import annotations

import ast
import io
import os
import pickle
import signal
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_polygrad import PolyGRAD, ResumableCheckpoints
from sb3_polygrad.checkpoint.archive import checkpoints
from sb3_polygrad.checkpoint.files import UNFINISHED, whole_file
from tests.test_checkpoint import RememberingPointEnv, StopAt
from tests.toys import PointEnv, tiny_model

ROOT = Path(__file__).parent.parent


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """A folder with two checkpoints."""
    tiny_model(RememberingPointEnv()).learn(80, callback=ResumableCheckpoints(40, tmp_path))
    return checkpoints(tmp_path)


# ---------------------------------------------------------------------- names, and how many are kept


def test_the_latest_are_kept(tmp_path: Path) -> None:
    callback = ResumableCheckpoints(save_freq=25, save_path=tmp_path, keep=2)
    tiny_model(make_vec_env(PointEnv, 2)).learn(160, callback=callback)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint_00005_128_steps.zip",  # the first iteration, of 16 steps, after 125
        "checkpoint_00006_160_steps.zip",  # the end of training
    ]


def test_checkpoints_go_on_counting_after_a_resume(tmp_path: Path) -> None:
    tiny_model(RememberingPointEnv()).learn(80, callback=ResumableCheckpoints(30, tmp_path))
    assert [path.name for path in checkpoints(tmp_path)] == [
        "checkpoint_00001_32_steps.zip",
        "checkpoint_00002_64_steps.zip",
    ]
    resumed = PolyGRAD.resume(tmp_path, RememberingPointEnv())
    resumed.learn(40, callback=ResumableCheckpoints(30, tmp_path), reset_num_timesteps=False)
    assert [path.name for path in checkpoints(tmp_path)] == [
        "checkpoint_00001_32_steps.zip",
        "checkpoint_00002_64_steps.zip",
        "checkpoint_00003_96_steps.zip",  # the multiple of 60 was saved before
    ]


def test_the_latest_is_the_last_written_not_the_one_with_most_steps(tmp_path: Path) -> None:
    tiny_model(RememberingPointEnv()).learn(120).save_checkpoint(tmp_path)
    tiny_model(RememberingPointEnv()).learn(80).save_checkpoint(tmp_path)
    assert PolyGRAD.resume(tmp_path, RememberingPointEnv()).num_timesteps == 80


def test_a_checkpoint_is_a_model(two: list[Path]) -> None:
    loaded = PolyGRAD.load(two[-1], env=PointEnv(), device="cpu")
    assert loaded.num_timesteps == 80 and len(loaded.replay_buffer) == 0
    assert PolyGRAD.resume(two[0], RememberingPointEnv()).num_timesteps == 40, "any of them can be given"


def test_arguments_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1"):
        tiny_model(PointEnv()).save_checkpoint(tmp_path, keep=0)
    with pytest.raises(ValueError, match="save_freq=0"):
        ResumableCheckpoints(0, tmp_path)
    with pytest.raises(ValueError, match="keep=0"):
        ResumableCheckpoints(10, tmp_path, keep=0)


# ---------------------------------------------------------------------- whole or not there


def test_a_failure_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(PointEnv()).learn(80)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(content: Any, file: Any) -> None:
        file.write(b"the first half")
        raise OSError("no space left on device")

    monkeypatch.setattr(th, "save", fail)
    for save in (model.save, model.save_checkpoint):
        with pytest.raises(OSError, match="no space"):
            save(tmp_path / "model" if save == model.save else tmp_path)
    with pytest.raises(OSError, match="no space"):
        model.save_replay_buffer(tmp_path / "buffer")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_takes_its_name_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with whole_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "model.zip").symlink_to(tmp_path / "real.zip")
    tiny_model(PointEnv()).save(tmp_path / "model")
    assert (tmp_path / "model.zip").is_symlink() and zipfile.is_zipfile(tmp_path / "real.zip")


def test_unfinished_files_are_passed_over_and_removed(two: list[Path]) -> None:
    folder = two[0].parent
    left_behind = folder / f".checkpoint_00003_120_steps.zip.123{UNFINISHED}"
    left_behind.write_bytes(two[-1].read_bytes()[:1000])
    model = PolyGRAD.resume(folder, RememberingPointEnv())
    assert model.num_timesteps == 80
    model.save_checkpoint(folder)
    assert not left_behind.exists()


def test_open_files_are_written_and_stay_open(tmp_path: Path) -> None:
    model = tiny_model(PointEnv()).learn(80)
    memory = io.BytesIO()
    model.save(memory)
    memory.seek(0)
    assert PolyGRAD.load(memory, device="cpu").num_timesteps == 80
    with (tmp_path / "buffer").open("wb") as file:
        model.save_replay_buffer(file)
        assert not file.closed
    with (tmp_path / "buffer").open("rb") as file:
        model.load_replay_buffer(file)


def test_a_folder_of_that_name_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "model.zip").mkdir()
    with pytest.warns(UserWarning, match="is a folder"):
        tiny_model(PointEnv()).save(tmp_path / "model.zip")
    assert (tmp_path / "model.zip_2").is_file()


# ---------------------------------------------------------------------- damage


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    ("damage", "fault"),
    [(cut, "cut off"), (flip, "wrong checksum"), (lambda data: b"", "empty"), (lambda data: b"hello" * 100, "no zip file")],
)
def test_damage_is_named_and_the_previous_checkpoint_offered(two: list[Path], damage: Any, fault: str) -> None:
    older, newer = two
    newer.write_bytes(damage(newer.read_bytes()))
    for read in (lambda: PolyGRAD.resume(newer.parent, RememberingPointEnv()), lambda: PolyGRAD.load(newer)):
        with pytest.raises(ValueError, match=rf"{newer.name} cannot be loaded: .*{fault}.*whole: .*{older.name}"):
            read()
    older.write_bytes(b"")
    with pytest.raises(ValueError, match="no older file that is whole"):
        PolyGRAD.resume(newer.parent, RememberingPointEnv())


@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_buffer_is_refused(tmp_path: Path, damage: Any) -> None:
    model = tiny_model(PointEnv()).learn(80)
    model.save_replay_buffer(tmp_path / "buffer")
    (tmp_path / "buffer.pkl").write_bytes(damage((tmp_path / "buffer.pkl").read_bytes()))
    with pytest.raises(ValueError, match=r"buffer\.pkl cannot be loaded"):
        model.load_replay_buffer(tmp_path / "buffer")


def without_average(state: dict[str, Any]) -> None:
    """A policy as it was before there was an average of the actors."""
    for name in [name for name in state if name.startswith("actor_average")]:
        del state[name]


def one_group(state: dict[str, Any]) -> None:
    """An optimiser with one learning rate for all."""
    del state["param_groups"][1:]


@pytest.mark.parametrize(
    ("part", "change"),
    [("policy", without_average), ("policy.actor_optimizer", one_group), ("world_model.optimizer", one_group)],
)
def test_networks_of_another_version_are_refused(tmp_path: Path, part: str, change: Any) -> None:
    tiny_model(PointEnv()).save(tmp_path / "now.zip")
    with zipfile.ZipFile(tmp_path / "now.zip") as now, zipfile.ZipFile(tmp_path / "before.zip", "w") as before:
        for name in now.namelist():
            content = now.read(name)
            if name == f"{part}.pth":
                state = th.load(io.BytesIO(content), weights_only=True)
                change(state)
                file = io.BytesIO()
                th.save(state, file)
                content = file.getvalue()
            before.writestr(name, content)
    with pytest.raises(ValueError, match=r"before\.zip, or their optimiser, are not those of this version"):
        PolyGRAD.load(tmp_path / "before.zip")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        PolyGRAD.resume(tmp_path, PointEnv())
    with pytest.raises(FileNotFoundError, match="there is no file"):
        PolyGRAD.resume(tmp_path / "model", PointEnv())
    model = tiny_model(PointEnv()).learn(80)
    model.save(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="neither in it nor beside it"):
        PolyGRAD.resume(tmp_path / "model", PointEnv())


def test_real_steps_of_another_moment_are_refused(tmp_path: Path) -> None:
    model = tiny_model(PointEnv()).learn(80)
    model.save(tmp_path / "model")
    model.learn(8, reset_num_timesteps=False).save_replay_buffer(tmp_path / "buffer")
    with pytest.raises(ValueError, match="another moment"):
        PolyGRAD.resume(tmp_path / "model", PointEnv(), replay_buffer=tmp_path / "buffer")


def test_another_number_of_environments_is_refused(two: list[Path]) -> None:
    with pytest.raises(ValueError, match="is of 1 environments, env has 2: pass as many"):
        PolyGRAD.resume(two[0].parent, make_vec_env(RememberingPointEnv, 2))


# ---------------------------------------------------------------------- environments that cannot say where they are


def n_segments(model: PolyGRAD) -> int:
    """Segments of four steps."""
    return len(model.replay_buffer.segment_starts(4))


def jumps(model: PolyGRAD) -> th.Tensor:
    """How far the point moves within segments; more than half a unit if a segment crosses a reset."""
    return model.replay_buffer.sample(500, 4).observations[..., 0].diff(dim=1).abs()


def test_without_state_access_new_episodes_begin_with_a_warning(tmp_path: Path) -> None:
    model = tiny_model(PointEnv(length=1_000))
    model.learn(100, callback=StopAt(83, tmp_path))
    with pytest.warns(UserWarning, match="begin new episodes.*no MuJoCo environments, and have no methods checkpoint_state"):
        resumed = PolyGRAD.resume(tmp_path, PointEnv(length=1_000), device="cpu")
    resumed.learn(40, reset_num_timesteps=False)
    assert resumed.num_timesteps == len(resumed.replay_buffer) == 123, "whole iterations of 8 steps"
    assert n_segments(resumed) == (83 - 3) + (40 - 3), "none crosses the interruption"
    assert (jumps(resumed) <= 0.5 + 1e-6).all()


def test_new_episodes_are_not_the_first_ones_again(tmp_path: Path) -> None:
    model = tiny_model(PointEnv())
    model.learn(160, callback=StopAt(80, tmp_path))
    first = model.replay_buffer.observations[0].item()
    with pytest.warns(UserWarning, match="begin new episodes"):
        resumed = PolyGRAD.resume(tmp_path, PointEnv(), device="cpu").learn(8, reset_num_timesteps=False)
    assert resumed.replay_buffer.observations[80].item() != first, "the seed is not used twice"


def test_unknown_wrappers_are_named(tmp_path: Path) -> None:
    pytest.importorskip("mujoco")
    import gymnasium as gym

    class Drift(gym.ObservationWrapper):
        def observation(self, observation: np.ndarray) -> np.ndarray:
            return observation

    def make() -> gym.Env:
        return Drift(gym.make("InvertedPendulum-v5"))

    tiny_model(make()).learn(8).save_checkpoint(tmp_path)
    with pytest.warns(UserWarning, match="the state of the wrapper Drift is not known"):
        PolyGRAD.resume(tmp_path, make())


def test_environments_of_another_kind_begin_anew(two: list[Path]) -> None:
    with pytest.warns(UserWarning, match="begin new episodes"):
        PolyGRAD.resume(two[0].parent, PointEnv())


def test_closed_environments_do_not_prevent_saving(tmp_path: Path) -> None:
    env = make_vec_env(PointEnv, 1, vec_env_cls=SubprocVecEnv, vec_env_kwargs=dict(start_method="fork"))
    model = tiny_model(env).learn(80)
    env.close()
    model.save_checkpoint(tmp_path)
    with pytest.warns(UserWarning, match="closed"):
        assert PolyGRAD.resume(tmp_path, PointEnv()).num_timesteps == 80


class Interrupted(RememberingPointEnv):
    """Somebody presses Ctrl-C in the middle of step 75."""

    n_steps = 0

    def step(self, action: np.ndarray) -> Any:
        result = super().step(action)
        self.n_steps += 1
        if self.n_steps == 75:
            raise KeyboardInterrupt
        return result


def test_interrupted_in_the_middle_of_a_step(tmp_path: Path) -> None:
    model = tiny_model(Interrupted(length=1_000))
    with pytest.raises(KeyboardInterrupt):
        model.learn(120)
    model.save_checkpoint(tmp_path)
    with pytest.warns(UserWarning, match="no environments between two steps"):
        resumed = PolyGRAD.resume(tmp_path, RememberingPointEnv(length=1_000), device="cpu")
    for each in (model, resumed):
        each.learn(40, reset_num_timesteps=False)
        assert n_segments(each) == (74 - 3) + (40 - 3)


# ---------------------------------------------------------------------- no pickles


class Harmful:
    """Says so when it is unpickled."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("unpickled",))


def test_pickles_are_not_executed(two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model(PointEnv())
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Harmful()))
    th.save({"observations": Harmful()}, tmp_path / "inside.pkl")
    for name in ("plain", "inside"):
        with pytest.raises((ValueError, pickle.UnpicklingError)):
            model.load_replay_buffer(tmp_path / name)
    for part in ("run_state.pt", "replay_buffer.pt"):
        with zipfile.ZipFile(two[0]) as old, zipfile.ZipFile(tmp_path / "forged.zip", "w") as new:
            for name in old.namelist():
                if name != part:
                    new.writestr(name, old.read(name))
            with new.open(part, "w") as file:
                th.save({"random": Harmful()}, file)
        with pytest.raises(pickle.UnpicklingError):
            PolyGRAD.resume(tmp_path / "forged.zip", RememberingPointEnv())
    assert not (tmp_path / "unpickled").exists()


PARALLEL = {"Parallel", "delayed", "parallel_config", "TerminatedWorkerError"}
"""What may be taken from joblib, by name: it runs functions in processes of ours, and reads no files (joblib.load does)."""


def pickling(source: str) -> set[str]:
    """What a source imports that can unpickle a file."""
    forbidden = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "load_from_pkl"}
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        names = {alias.name for alias in node.names}
        module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        if module.split(".")[0] == "joblib" and names <= PARALLEL:
            continue
        found |= {name for name in names | {module} if {name, name.split(".")[0]} & forbidden}
    return found


@pytest.mark.parametrize(
    "line",
    ["import joblib", "import joblib.numpy_pickle", "from joblib import load", "from joblib import Parallel, load",
     "from joblib import Memory", "from joblib import *", "from joblib import numpy_pickle",
     "from joblib.numpy_pickle import load", "import pickle", "from pickle import loads",
     "from stable_baselines3.common.save_util import load_from_pkl"],
)  # fmt: skip
def test_the_guard_sees_what_can_unpickle(line: str) -> None:
    assert pickling(line)
    assert not pickling("from joblib import Parallel, delayed, parallel_config")


@pytest.mark.parametrize("path", sorted((ROOT / "sb3_polygrad").rglob("*.py")), ids=lambda path: path.name)
def test_nothing_of_ours_unpickles(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert not pickling(source)
    tree = ast.parse(source)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        settings = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if ast.unparse(call.func) in ("th.load", "torch.load"):
            assert settings.get("weights_only") == "True"
        if ast.unparse(call.func) in ("np.load", "numpy.load"):
            assert settings.get("allow_pickle", "False") == "False"


# ---------------------------------------------------------------------- kills


def save_for_ever(model: PolyGRAD, folder: Path, report: int) -> None:
    """Checkpoint after checkpoint; after each, its number of steps goes to the file descriptor."""
    try:
        while True:
            model.num_timesteps += 1
            model.save_checkpoint(folder)
            os.write(report, f"{model.num_timesteps} ".encode())
    finally:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("n_kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_kills_lose_no_checkpoint(tmp_path: Path, n_kills: int) -> None:
    """SIGKILL at random moments of saving: the last checkpoint that was reported is there, or a later one."""
    model = tiny_model(RememberingPointEnv(), buffer_size=100_000).learn(80)
    model.replay_buffer.n_rows = 20_000  # a file of some size, whose writing takes its time
    randomness, n_unfinished = np.random.default_rng(0), 0
    model.save_checkpoint(tmp_path)
    for _ in range(n_kills):
        read, write = os.pipe()
        saver = os.fork()
        if saver == 0:
            save_for_ever(model, tmp_path, write)
        os.close(write)
        time.sleep(randomness.uniform(0.0, 0.4))
        os.kill(saver, signal.SIGKILL)
        os.waitpid(saver, 0)
        with os.fdopen(read) as reports:
            reported = [model.num_timesteps, *map(int, reports.read().split())]
        n_unfinished += any(tmp_path.glob(f".*{UNFINISHED}"))
        model.num_timesteps = PolyGRAD.resume(tmp_path, RememberingPointEnv(), device="cpu").num_timesteps
        assert model.num_timesteps - reported[-1] in (0, 1), "the next one may be complete, but not reported yet"
    assert n_unfinished > n_kills / 4, "the kills did hit the writing"
