"""Datasets in Minari's format: what is written is read, and what others wrote too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer

from sb3_polygrad.evaluation import minari_files
from sb3_polygrad.evaluation.dataset import Dataset

ID = "polygrad/hopper/ppo-v0"


def hopper_steps() -> Dataset:
    """Two episodes of made-up numbers: four steps and an ending, three and a time limit."""
    rng = np.random.default_rng(0)
    path = rng.normal(size=(9, 11))
    before = np.r_[0:4, 5:8]
    return Dataset(
        observations=path[before],
        actions=rng.uniform(-1.0, 1.0, size=(7, 3)).astype(np.float32),
        rewards=rng.normal(size=7),
        next_observations=path[before + 1],
        terminated=np.arange(7) == 3,
        truncated=np.arange(7) == 6,
        simulator_states=rng.normal(size=(7, 12)),
    )


def foreign(root: Path, episode: dict[str, Any], **spaces: gym.Space) -> Path:
    """A dataset as others would write it."""
    with minari_files._root(root):
        minari.create_dataset_from_buffers("others/data-v0", [EpisodeBuffer(**episode)], env="Hopper-v5", **spaces)
    return root / "others/data-v0"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = hopper_steps()
    folder = minari_files.write(steps, "Hopper-v5", tmp_path, ID, "made up")
    assert folder == tmp_path / ID and "MINARI_DATASETS_PATH" not in os.environ
    stored = minari_files.read(folder)
    assert all((a == b).all() for a, b in zip(steps, stored.steps, strict=True))
    assert (stored.env_id, stored.folder) == ("Hopper-v5", folder)
    assert stored.mujoco_version is not None
    with pytest.raises(ValueError, match="already exists"):
        minari_files.write(steps, "Hopper-v5", tmp_path, ID, "made up")
    # Minari itself finds it by its name.
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    assert minari.load_dataset(ID).total_episodes == 2
    assert (minari_files.read(ID).steps.rewards == steps.rewards).all()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("infos", [None, {"qpos": np.ones((4, 6)), "qvel": np.zeros((4, 6))}])
def test_a_dataset_of_others(tmp_path: Path, infos: dict[str, Any] | None) -> None:
    episode = dict(
        observations=np.arange(44.0).reshape(4, 11),
        actions=np.zeros((3, 3), dtype=np.float32),
        rewards=[1.0, 2.0, 3.0],
        terminations=[False] * 3,
        truncations=[False] * 3,
        infos=infos,
    )
    stored = minari_files.read(foreign(tmp_path, episode))
    assert stored.mujoco_version is None
    assert stored.steps.next_observations[:, 0].tolist() == [11.0, 22.0, 33.0]
    assert stored.steps.truncated.tolist() == [False, False, True], "an episode ends where it ends"
    assert stored.steps.simulator_states.tolist() == ([[1.0] * 6 + [0.0] * 6] * 3 if infos else [[]] * 3)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_only_vectors_will_do(tmp_path: Path) -> None:
    image = gym.spaces.Box(0.0, 1.0, (2, 2))
    episode = dict(
        observations=np.zeros((2, 2, 2)),
        actions=np.zeros((1, 3), dtype=np.float32),
        rewards=[0.0],
        terminations=[True],
        truncations=[False],
    )
    with pytest.raises(ValueError, match="only vectors"):
        minari_files.read(foreign(tmp_path, episode, observation_space=image))


def test_another_simulator_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minari_files, "version", lambda package: "1.0")
    folder = minari_files.write(hopper_steps(), "Hopper-v5", tmp_path, ID, "made up")
    monkeypatch.undo()
    with pytest.warns(UserWarning, match=r"made with mujoco 1\.0"):
        minari_files.read(folder)
