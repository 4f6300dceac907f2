"""Checkpoints: a run that was interrupted ends as the run that was not, bit for bit."""

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
from sb3_polygrad.common.random_states import random_states
from tests.toys import PointEnv, equal_trees, tiny_model

ROOT = Path(__file__).parent.parent
SAMPLERS: dict[str, dict[str, Any]] = {
    "pathwise": dict(policy_update="pathwise", world_model_kwargs=dict(sampler="staggered", n_levels=1)),
    "staggered": dict(policy_update="ppo", world_model_kwargs=dict(sampler="staggered")),
    "policy guided": dict(policy_update="a2c", world_model_kwargs=dict(sampler="policy_guided")),
}


class RememberingPointEnv(PointEnv):
    """A point that can say where it is, and be put there."""

    def checkpoint_state(self) -> dict[str, Any]:
        return {"x": self.x, "t": self.t}

    def restore_checkpoint_state(self, state: dict[str, Any]) -> None:
        self.x, self.t = state["x"], state["t"]


class StopAt(BaseCallback):
    """Interrupts a run at a step, as a crash would, after an optional last checkpoint."""

    def __init__(self, num_timesteps: int, folder: Path | None = None) -> None:
        super().__init__()
        self.stop, self.folder = num_timesteps, folder

    def _on_step(self) -> bool:
        if self.num_timesteps < self.stop:
            return True
        if self.folder is not None:
            self.model.save_checkpoint(self.folder)  # type: ignore[attr-defined]
        return False


def everything(model: PolyGRAD) -> dict[str, Any]:
    """All that a run leaves behind."""
    assert model.ep_info_buffer is not None
    return {
        "parameters": model.get_parameters(),
        "buffer": model.replay_buffer.state_dict(),
        "episodes": [(info["r"], info["l"]) for info in model.ep_info_buffer],
        "counters": (model.num_timesteps, model._n_updates, model._episode_num),
        "observation": th.as_tensor(model._last_obs),
        "starts": model._last_episode_starts.tolist(),  # type: ignore[union-attr]
        "random": random_states(),
        "space": model.action_space.np_random.bit_generator.state,
    }


def same(left: dict[str, Any], right: dict[str, Any]) -> None:
    different = [name for name in left if not equal_trees(_without_nan(left[name]), _without_nan(right[name]))]
    assert not different, f"these differ: {different}"


def _without_nan(tree: Any) -> Any:
    """NaN (no simulator state) is equal to NaN here."""
    if isinstance(tree, dict):
        return {key: _without_nan(value) for key, value in tree.items()}
    return tree.nan_to_num(nan=-1e9) if isinstance(tree, th.Tensor) and tree.is_floating_point() else tree


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


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("at", [64, 83, 96], ids=["in the prefill", "in the middle of an update", "before an update"])
def test_interrupted_and_resumed_is_the_same_run(tmp_path: Path, sampler: str, n_envs: int, at: int) -> None:
    settings = {**SAMPLERS[sampler], "learning_rate": lambda left: 1e-3 * left}
    at *= n_envs
    whole = everything(tiny_model(make_env("plain", n_envs), **settings).learn(160 * n_envs))
    first = tiny_model(make_env("plain", n_envs), **settings)
    first.learn(160 * n_envs, callback=StopAt(at, tmp_path))
    assert first.num_timesteps == at
    np.random.rand(7), th.rand(7)  # others have used the generators since
    resumed = PolyGRAD.resume(tmp_path, make_env("plain", n_envs), device="cpu")
    assert resumed.timesteps_left == 160 * n_envs - at
    resumed.learn(resumed.timesteps_left, reset_num_timesteps=False)
    same(everything(resumed), whole)


@pytest.mark.parametrize("kind", ["VecNormalize", "VecFrameStack", "VecMonitor", "subprocesses"])
def test_wrappers_of_the_environments_go_on_too(tmp_path: Path, kind: str) -> None:
    environments = [make_env(kind, 2) for _ in range(3)]
    whole = everything(tiny_model(environments[0]).learn(240))
    tiny_model(environments[1]).learn(240, callback=StopAt(150, tmp_path))
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


def test_stopped_and_continued_without_leaving_is_the_same_run() -> None:
    whole = everything(tiny_model(PointEnv()).learn(160))
    model = tiny_model(PointEnv())
    model.learn(160, callback=StopAt(83))
    model.learn(model.timesteps_left, reset_num_timesteps=False)
    same(everything(model), whole)


@pytest.mark.parametrize("vec_normalize", [False, True])
def test_the_files_of_sb3s_checkpoint_callback_suffice(tmp_path: Path, vec_normalize: bool) -> None:
    kind = "VecNormalize" if vec_normalize else "plain"
    callback = CheckpointCallback(90, str(tmp_path), save_replay_buffer=True, save_vecnormalize=True)
    whole = everything(tiny_model(make_env(kind)).learn(128, callback=callback))
    resumed = PolyGRAD.resume(tmp_path / "rl_model_90_steps.zip", make_env(kind), device="cpu")
    resumed.learn(resumed.timesteps_left, reset_num_timesteps=False)
    same(everything(resumed), whole)


MUJOCO = """
import sys, torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv
from sb3_polygrad import PolyGRAD
from tests.test_checkpoint import SAMPLERS, everything
from tests.toys import tiny_model
task, env_id, n_envs, workers, sampler, n = sys.argv[1:]
n_envs, n = int(n_envs), int(n)
th.set_num_threads(1)
classes = dict(vec_env_cls=SubprocVecEnv, vec_env_kwargs=dict(start_method="fork")) if workers == "processes" else {}
def fresh():
    return tiny_model(make_vec_env(env_id, n_envs, **classes), n_steps=10, **SAMPLERS[sampler])
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
    ("n_envs", "sampler"),
    [
        ("1", "staggered"),
        ("2", "policy guided"),
        pytest.param("1", "policy guided", marks=SLOW),
        pytest.param("2", "staggered", marks=SLOW),
    ],
)
def test_hopper_in_a_new_process(tmp_path: Path, n_envs: str, sampler: str) -> None:
    check_in_a_new_process(tmp_path, "Hopper-v5", n_envs, "here", sampler, "120")


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["here", "processes"])
@pytest.mark.parametrize(
    "name", ["Hopper", "Walker2d", "HalfCheetah", "Ant", "Humanoid", "Swimmer", "Reacher", "InvertedPendulum"]
)
def test_mujoco_in_a_new_process(tmp_path: Path, name: str, workers: str) -> None:
    check_in_a_new_process(tmp_path, f"{name}-v5", "2", workers, "staggered", "320")  # no multiple of Reacher's 50 each
