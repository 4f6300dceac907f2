"""Checkpoints between two iterations: a run that was cut there and resumed ends as the run that was not, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_polygrad import PolyGRAD, ResumableCheckpoints
from sb3_polygrad.checkpoint.archive import checkpoints
from sb3_polygrad.checkpoint.random_states import random_states
from tests.toys import PointEnv, equal_trees, tiny_model

ROOT = Path(__file__).parent.parent
SETTINGS: dict[str, dict[str, Any]] = {
    "default": dict(),  # ensemble, pathwise gradients, trajectories that are continued in the batches after
    "policy guided": dict(
        world_model="diffusion", policy_update="a2c", policy_update_kwargs=dict(learning_rate_adaptation=0.5)
    ),
    "staggered": dict(world_model="diffusion", world_model_kwargs=dict(sampler=dict(name="staggered"))),
}


class RememberingPointEnv(PointEnv):
    """A point that can say where it is, and be put there."""

    def checkpoint_state(self) -> dict[str, Any]:
        return {"x": self.x, "t": self.t}

    def restore_checkpoint_state(self, state: dict[str, Any]) -> None:
        self.x, self.t = state["x"], state["t"]


class StopAt(BaseCallback):
    """Ends a run at a step, in the middle of a rollout or not, after an optional checkpoint."""

    def __init__(self, num_timesteps: int, folder: Path | None = None) -> None:
        super().__init__()
        self.stop, self.folder = num_timesteps, folder

    def _on_step(self) -> bool:
        if self.num_timesteps < self.stop:
            return True
        if self.folder is not None:
            self.model.save_checkpoint(self.folder)  # type: ignore[attr-defined]
        return False


class Crash(BaseCallback):
    """Cuts a run at a step."""

    def __init__(self, num_timesteps: int) -> None:
        super().__init__()
        self.at = num_timesteps

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.at:
            raise RuntimeError("the run was cut")
        return True


def cut_after_a_checkpoint(model: PolyGRAD, total: int, at: int, folder: Path) -> Path:
    """Learn until some steps after a checkpoint at a given step, and return that checkpoint."""
    with pytest.raises(RuntimeError, match="the run was cut"):
        model.learn(total, callback=[ResumableCheckpoints(at, folder), Crash(at + 3 * model.n_envs)])
    (path,) = checkpoints(folder)
    assert path.name == f"checkpoint_00001_{at}_steps.zip"
    np.random.rand(7), th.rand(7)  # others have used the generators since
    return path


def everything(model: PolyGRAD) -> dict[str, Any]:
    """All that a run leaves behind."""
    assert model.ep_info_buffer is not None
    return {
        "parameters": model.get_parameters(),
        "buffer": model.replay_buffer.state_dict(),
        "start states": model.start_states.state_dict(),
        "episodes": [(info["r"], info["l"]) for info in model.ep_info_buffer],
        "counters": (model.num_timesteps, model._n_updates, model._episode_num),
        "observation": th.as_tensor(model._last_obs),
        "starts": model._last_episode_starts.tolist(),  # type: ignore[union-attr]
        "random": random_states(),
        "space": model.action_space.np_random.bit_generator.state,
    }


def same(left: dict[str, Any], right: dict[str, Any]) -> None:
    different = [name for name in left if not equal_trees(left[name], right[name])]
    assert not different, f"these differ: {different}"


def make_env(kind: str, n_envs: int = 1) -> Any:
    if kind == "subprocesses":
        return make_vec_env(RememberingPointEnv, n_envs, vec_env_cls=SubprocVecEnv, vec_env_kwargs=dict(start_method="fork"))
    env = make_vec_env(RememberingPointEnv, n_envs)
    if kind == "VecNormalize":
        return VecNormalize(env, gamma=0.9)
    if kind == "VecFrameStack":
        return VecFrameStack(env, 3)
    if kind == "VecMonitor":
        return VecMonitor(DummyVecEnv([RememberingPointEnv] * n_envs))
    return env


# ---------------------------------------------------------------------- the same run


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("at", [40, 96], ids=["in the prefill", "while learning"])
def test_cut_and_resumed_is_the_same_run(tmp_path: Path, name: str, n_envs: int, at: int) -> None:
    settings = {**SETTINGS[name], "learning_rate": lambda left: 1e-3 * left, "learning_starts": 64 * n_envs}
    at, total = at * n_envs, 160 * n_envs
    whole = everything(tiny_model(make_env("plain", n_envs), **settings).learn(total))
    path = cut_after_a_checkpoint(tiny_model(make_env("plain", n_envs), **settings), total, at, tmp_path)
    resumed = PolyGRAD.resume(path, make_env("plain", n_envs), device="cpu")
    assert (resumed.num_timesteps, resumed.timesteps_left) == (at, total - at)
    resumed.learn(resumed.timesteps_left, reset_num_timesteps=False)
    assert resumed._n_updates == 13
    same(everything(resumed), whole)


def test_the_default_continues_trajectories_across_a_checkpoint(tmp_path: Path) -> None:
    path = cut_after_a_checkpoint(tiny_model(make_env("plain")), 160, 96, tmp_path)
    resumed = PolyGRAD.resume(path, make_env("plain"), device="cpu")
    starts = resumed.start_states
    assert starts.ends.shape == (resumed.n_imagined, 1) and ((starts.ages > 0) & th.isfinite(starts.ages)).any()
    whole = everything(tiny_model(make_env("plain")).learn(160))
    starts.ends = starts.ends.flip(0)
    resumed.learn(resumed.timesteps_left, reset_num_timesteps=False)
    with pytest.raises(AssertionError, match="parameters"):  # without them it would be another run
        same(everything(resumed), whole)


@pytest.mark.parametrize("name", ["default", "policy guided"])
def test_resumed_from_the_end_of_training_is_the_same_run(tmp_path: Path, name: str) -> None:
    whole = tiny_model(make_env("plain", 2), **SETTINGS[name]).learn(160)
    whole.learn(80, reset_num_timesteps=False)
    tiny_model(make_env("plain", 2), **SETTINGS[name]).learn(160, callback=ResumableCheckpoints(160, tmp_path))
    resumed = PolyGRAD.resume(tmp_path, make_env("plain", 2), device="cpu")
    assert resumed.timesteps_left == 0
    resumed.learn(80, reset_num_timesteps=False)
    same(everything(resumed), everything(whole))


@pytest.mark.parametrize("kind", ["VecNormalize", "VecFrameStack", "VecMonitor", "subprocesses"])
@pytest.mark.parametrize("name", ["default", "policy guided"])
def test_wrappers_of_the_environments_go_on_too(tmp_path: Path, kind: str, name: str) -> None:
    environments = [make_env(kind, 2) for _ in range(3)]
    whole = everything(tiny_model(environments[0], **SETTINGS[name]).learn(240))
    cut_after_a_checkpoint(tiny_model(environments[1], **SETTINGS[name]), 240, 144, tmp_path)
    resumed = PolyGRAD.resume(tmp_path, environments[2], device="cpu")
    resumed.learn(resumed.timesteps_left, reset_num_timesteps=False)
    same(everything(resumed), whole)
    if kind == "VecNormalize":
        assert np.array_equal(environments[2].obs_rms.mean, environments[0].obs_rms.mean)
        assert np.array_equal(environments[2].returns, environments[0].returns)
    for env in environments:
        env.close()


def test_saving_changes_nothing(tmp_path: Path) -> None:
    saved = everything(tiny_model(make_env("plain")).learn(120, callback=ResumableCheckpoints(10, tmp_path)))
    same(everything(tiny_model(make_env("plain")).learn(120)), saved)


def test_continued_by_a_second_learn_is_the_same_run() -> None:
    whole = everything(tiny_model(PointEnv()).learn(160))
    model = tiny_model(PointEnv()).learn(88)
    model.learn(72, reset_num_timesteps=False)
    same(everything(model), whole)


@pytest.mark.parametrize("kind", ["plain", "VecNormalize"])
def test_the_files_of_sb3s_checkpoint_callback_suffice(tmp_path: Path, kind: str) -> None:
    """It saves in the middle of a rollout. Nothing is lost, but the iterations lie elsewhere from there on."""
    callback = CheckpointCallback(90, str(tmp_path), save_replay_buffer=True, save_vecnormalize=True)
    first = make_env(kind)
    with pytest.raises(RuntimeError, match="the run was cut"):
        tiny_model(first).learn(128, callback=[callback, Crash(91)])
    resumed = PolyGRAD.resume(tmp_path / "rl_model_90_steps.zip", make_env(kind), device="cpu")
    assert (resumed.num_timesteps, resumed.timesteps_left, len(resumed.replay_buffer)) == (90, 38, 90)
    resumed.learn(resumed.timesteps_left, reset_num_timesteps=False)
    assert resumed.num_timesteps == len(resumed.replay_buffer) == 130, "whole iterations of 8 steps"
    assert resumed._n_updates == 4 + 5, "those at 64, 72, 80 and 88 steps, and the new ones"
    whole = tiny_model(make_env(kind)).learn(96)  # up to the next update at 96 steps it makes the same steps
    n = 96
    for tensor in ("observations", "actions", "rewards", "next_observations"):
        assert th.equal(getattr(resumed.replay_buffer, tensor)[:n], getattr(whole.replay_buffer, tensor)[:n])


MUJOCO = """
import sys, torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv
from sb3_polygrad import PolyGRAD
from tests.test_checkpoint import SETTINGS, everything
from tests.toys import tiny_model
task, env_id, n_envs, workers, name, n = sys.argv[1:]
n_envs, n = int(n_envs), int(n)
th.set_num_threads(1)
classes = dict(vec_env_cls=SubprocVecEnv, vec_env_kwargs=dict(start_method="fork")) if workers == "processes" else {}
def fresh():
    return tiny_model(make_vec_env(env_id, n_envs, **classes), n_steps=10, **SETTINGS[name])
if task == "save":
    th.save(everything(fresh().learn(2 * n)), "whole.pt")
    model = fresh().learn(n)
    assert any(model.env.get_attr("rewards")), "not in the middle of an episode"
    model.save_checkpoint("checkpoints")
else:
    model = PolyGRAD.resume("checkpoints", make_vec_env(env_id, n_envs, **classes), device="cpu")
    th.save(everything(model.learn(n, reset_num_timesteps=False)), "resumed.pt")
"""


def check_in_a_new_process(folder: Path, *arguments: str) -> None:
    """``learn(2N)`` is ``learn(N)``, checkpoint, new process, resume, ``learn(N)``."""
    pytest.importorskip("mujoco")
    for task in ("save", "resume"):
        command = [sys.executable, "-W", "error:The environments begin", "-c", MUJOCO, task, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    whole, resumed = (th.load(folder / f"{name}.pt", weights_only=True) for name in ("whole", "resumed"))
    assert whole["counters"][1] > 5, "it did learn"
    same(resumed, whole)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("n_envs", "settings"),
    [
        ("2", "default"),
        pytest.param("1", "default", marks=SLOW),
        pytest.param("1", "policy guided", marks=SLOW),
        pytest.param("2", "policy guided", marks=SLOW),
        pytest.param("2", "staggered", marks=SLOW),
    ],
)
def test_hopper_in_a_new_process(tmp_path: Path, n_envs: str, settings: str) -> None:
    check_in_a_new_process(tmp_path, "Hopper-v5", n_envs, "here", settings, "120")


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["here", "processes"])
@pytest.mark.parametrize(
    "name", ["Hopper", "Walker2d", "HalfCheetah", "Ant", "Humanoid", "Swimmer", "Reacher", "InvertedPendulum"]
)
def test_mujoco_in_a_new_process(tmp_path: Path, name: str, workers: str) -> None:
    check_in_a_new_process(tmp_path, f"{name}-v5", "2", workers, "default", "320")  # no multiple of Reacher's 50 each
