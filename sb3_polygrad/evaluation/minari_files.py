"""
Datasets in Minari's format (https://minari.farama.org), which the extra ``offline`` brings: ``pip install ".[offline]"``.

A dataset is a folder ``<root>/<id>`` whose subfolder ``data`` is Minari's; what else belongs to it may lie beside that. With
``MINARI_DATASETS_PATH=<root>`` Minari itself finds it by its id.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sb3_polygrad.evaluation.dataset import Dataset

if TYPE_CHECKING:
    import minari

STATES = "simulator_states"


class StoredDataset(NamedTuple):
    """
    :param steps: the transitions
    :param env_id: environment that they come from
    :param mujoco_version: of the simulator, None if not known
    :param folder: where it lies
    """

    steps: Dataset
    env_id: str
    mujoco_version: str | None
    folder: Path


def _import_minari() -> Any:
    try:
        import minari
    except ImportError as error:
        raise ImportError('datasets need Minari: pip install -c constraints.txt ".[offline]"') from error
    return minari


@contextmanager
def _root(folder: Path) -> Iterator[None]:
    """Minari's root folder, for the time being."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder.absolute())
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before


def write(steps: Dataset, env_id: str, root: Path, dataset_id: str, description: str) -> Path:
    """
    Store a dataset, the version of mujoco with it.

    :param steps: the transitions
    :param env_id: environment that they come from
    :param root: folder of all datasets
    :param dataset_id: ``namespace/name-v0``
    :param description: how they came about
    :return: the dataset's folder
    :raises ValueError: if there is one of that name
    """
    minari = _import_minari()
    ends = (np.flatnonzero(steps.terminated | steps.truncated) + 1).tolist()
    episodes = [_episode(minari, steps.steps(begin, end)) for begin, end in itertools.pairwise([0, *ends])]
    with _root(root), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no e-mail address, no permalink
        stored = minari.create_dataset_from_buffers(
            dataset_id,
            episodes,
            env=env_id,
            algorithm_name="PPO (stable_baselines3)",
            description=description,
            requirements=[f"mujoco=={version('mujoco')}"],
        )
        stored.storage.update_metadata({"mujoco_version": version("mujoco")})
    return root / dataset_id


def _episode(minari: Any, steps: Dataset) -> minari.EpisodeBuffer:
    """The state after the last step is not known: NaN stands for it."""
    states = np.concatenate([steps.simulator_states, np.full((1, steps.simulator_states.shape[1]), np.nan)])
    return minari.data_collector.EpisodeBuffer(
        observations=np.concatenate([steps.observations, steps.next_observations[-1:]]),
        actions=steps.actions,
        rewards=steps.rewards,
        terminations=steps.terminated,
        truncations=steps.truncated,
        infos={STATES: states},
    )


def read(source: str | Path) -> StoredDataset:
    """
    Load any Minari dataset with vector observations and actions.

    :param source: a dataset's folder, or an id that Minari knows, in its root folder or to be downloaded
    :raises ValueError: for other observations or actions
    """
    minari = _import_minari()
    data = Path(source) / "data"
    stored = minari.MinariDataset(data) if data.exists() else minari.load_dataset(str(source), download=True)
    for name in ("observation", "action"):
        space = getattr(stored, f"{name}_space")
        if space.shape is None or len(space.shape) != 1:
            raise ValueError(f"{source} has {name}s {space}, but only vectors can be used: flatten them when it is collected")
    metadata = stored.storage.metadata
    known = metadata.get("mujoco_version")
    if known is not None and known != version("mujoco"):
        warnings.warn(f"{source} was made with mujoco {known}, this is {version('mujoco')}: replayed steps will differ")
    columns = zip(*(_columns(episode) for episode in stored.iterate_episodes()), strict=True)
    steps = Dataset(*(np.concatenate(column) for column in columns))
    return StoredDataset(steps, stored.env_spec.id, known, Path(stored.storage.data_path).parent)


def _columns(episode: minari.EpisodeData) -> Dataset:
    """An episode's steps. Its last one ends it, whatever the dataset says."""
    n, infos = len(episode.rewards), episode.infos or {}
    if STATES in infos:
        states = infos[STATES][:n]
    elif "qpos" in infos and "qvel" in infos:
        states = np.concatenate([infos["qpos"][:n], infos["qvel"][:n]], axis=1)
    else:
        states = np.zeros((n, 0))
    truncated = np.array(episode.truncations, dtype=bool)
    truncated[-1] |= not episode.terminations[-1]
    return Dataset(
        observations=episode.observations[:-1],
        actions=episode.actions,
        rewards=episode.rewards,
        next_observations=episode.observations[1:],
        terminated=np.array(episode.terminations, dtype=bool),
        truncated=truncated,
        simulator_states=states,
    )
