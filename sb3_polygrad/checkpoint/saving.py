"""Checkpoints of a run, and how it goes on from them."""

from __future__ import annotations

import pathlib
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import torch as th
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.type_aliases import GymEnv

from sb3_polygrad.checkpoint.archive import (
    REPLAY_BUFFER,
    RUN_STATE,
    PathOrFile,
    checkpoints,
    existing,
    keep_latest,
    next_checkpoint,
    read_part,
    replay_buffer_beside,
    require_whole,
    write_part,
)
from sb3_polygrad.checkpoint.env_states import Unavailable, env_states, set_env_states
from sb3_polygrad.checkpoint.files import whole_file
from sb3_polygrad.checkpoint.plain import from_plain, to_plain
from sb3_polygrad.checkpoint.random_states import random_states, set_random_states
from sb3_polygrad.episode_buffer import EpisodeBuffer

if TYPE_CHECKING:
    from sb3_polygrad.polygrad import PolyGRAD

Model = TypeVar("Model", bound="PolyGRAD")


@contextmanager
def written(path: PathOrFile, suffix: str) -> Iterator[BinaryIO]:
    """A file to write to, for a path or an open file; a path holds the file only when it is complete."""
    if not isinstance(path, (str, pathlib.Path)):
        target = open_path(path, "w")  # SB3's checks
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            shutil.copyfileobj(file, target)
        return
    path = pathlib.Path(path)
    if path.suffix == "":
        path = path.with_name(f"{path.name}.{suffix}")
    if path.is_dir():
        warnings.warn(f"Path '{path}' is a folder. Will save instead to {path}_2")
        path = path.with_name(f"{path.name}_2")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        yield file


def save(
    model: PolyGRAD, path: PathOrFile, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None
) -> None:
    """
    Save a model as SB3 does, in a zip file that replaces an older one of that name only when it is complete.

    :param model: what to save
    :param path: file; the suffix ``.zip`` is added if there is none
    :param exclude: attributes to leave out
    :param include: attributes to keep that would be left out
    """
    with written(path, "zip") as file:
        OnPolicyAlgorithm.save(model, file, exclude, include)  # type: ignore[arg-type]
        write_part(file, RUN_STATE, run_state(model))


def save_checkpoint(model: PolyGRAD, folder: str | pathlib.Path, keep: int) -> pathlib.Path:
    """
    Save everything that :func:`resume` needs: a model file (``load`` takes it too) that also holds the real steps.

    :param model: what to save
    :param folder: folder of the checkpoints of this run; it is made if need be
    :param keep: the number of checkpoints that are kept, the latest
    :return: the file
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1 checkpoint, got {keep}")
    folder = pathlib.Path(folder)
    path = next_checkpoint(folder, model.num_timesteps)
    save_all(model, path)
    keep_latest(folder, keep)
    return path


def save_all(model: PolyGRAD, path: pathlib.Path) -> None:
    """Model, run and real steps in one file."""
    with written(path, "zip") as file:
        save(model, file)  # type: ignore[arg-type]
        write_part(file, REPLAY_BUFFER, model.replay_buffer.state_dict())


def save_where_it_failed(model: PolyGRAD) -> pathlib.Path:
    """Save everything where the logs are, for whoever looks into a fault."""
    path = pathlib.Path(model.logger.get_dir() or ".").resolve() / f"faulty_{model.num_timesteps}_steps.zip"
    save_all(model, path)
    return path


def run_state(model: PolyGRAD) -> dict[str, Any]:
    """What SB3 leaves out of a saved model: the states of the environments and of the random generators."""
    states: dict[str, Any] = {"missing": "the model had no environments between two steps"}
    if model.env is not None and model._last_obs is not None:
        states = env_states(model.env)
    spaces = (model.action_space, model.observation_space)
    return {
        "random": random_states(),
        "spaces": [space.np_random.bit_generator.state for space in spaces],
        "environments": states,
        "observations": to_plain([model._last_obs, model._last_original_obs]),
        "start_states": model.start_states.state_dict(),
        "n_rows": model.replay_buffer.n_rows,
    }


def restore_run_state(model: PolyGRAD, state: dict[str, Any]) -> None:
    """Restore what :func:`run_state` took."""
    assert model.env is not None
    model.env.reset()  # environments must be reset once; this also uses up the seeds that load() has set
    try:
        if "wrappers" not in state["environments"]:
            raise Unavailable(state["environments"]["missing"])
        set_env_states(model.env, state["environments"])
        model._last_obs, model._last_original_obs = from_plain(state["observations"])
    except Unavailable as reason:
        warnings.warn(f"The environments begin new episodes, since their states could not be restored: {reason}.", UserWarning)
        model._last_obs = None  # learn() will reset them, and end the episodes in the buffer
    model.start_states.load_state_dict(state["start_states"], model.device)
    for space, generator in zip((model.action_space, model.observation_space), state["spaces"], strict=True):
        space.np_random.bit_generator.state = generator
    set_random_states(state["random"])


def resume(
    cls: type[Model],
    path: str | pathlib.Path,
    env: GymEnv | str,
    replay_buffer: str | pathlib.Path | None,
    **kwargs: Any,
) -> Model:
    """
    The model of a checkpoint, from which ``learn(model.timesteps_left, reset_num_timesteps=False)`` goes on.

    From a checkpoint between two iterations (:class:`~sb3_polygrad.ResumableCheckpoints` saves there) the run goes on as it
    would have done without interruption, on a CPU bit for bit.

    :param cls: PolyGRAD, or a subclass
    :param path: a folder of checkpoints (the latest is taken), a checkpoint, or a model saved by SB3's
        ``CheckpointCallback(save_replay_buffer=True)``
    :param env: environments like those of the run (as many, with the same wrappers), or the name of one. Their states are
        restored if they are MuJoCo's or have methods for it; otherwise a warning says that new episodes begin
    :param replay_buffer: file of the real steps, if it is not beside the model under the name that SB3 or the zoo gives it
    :param kwargs: as in ``load``
    :raises FileNotFoundError: if there is no checkpoint, or no file of real steps
    :raises ValueError: if the file is damaged (the message names the previous one), or does not fit the environments
    """
    path = pathlib.Path(path)
    if path.is_dir():
        held = checkpoints(path)
        if not held:
            raise FileNotFoundError(f"there is no checkpoint in {path}")
        path = held[-1]
    path = existing(path, "zip")
    require_whole(path)
    state = read_part(path, RUN_STATE)
    if state is None or "start_states" not in state:
        raise ValueError(f"{path} was not saved by PolyGRAD, or by an older version: use load()")
    buffer = _buffer_of(path, replay_buffer)
    if buffer.n_rows != state["n_rows"]:
        raise ValueError("the real steps are from another moment than the model: pass the replay_buffer that belongs to it")
    model = cls.load(path, env=env, **kwargs)
    if model.n_envs != buffer.n_envs:
        raise ValueError(f"the checkpoint is of {buffer.n_envs} environments, env has {model.n_envs}: pass as many")
    set_replay_buffer(model, buffer)
    restore_run_state(model, state)
    return model


# ---------------------------------------------------------------------- real steps


def set_replay_buffer(model: PolyGRAD, buffer: EpisodeBuffer) -> None:
    """
    Give a model real steps that were saved.

    :raises ValueError: if they are of other environments
    """
    for name in ("obs_dim", "action_dim", "n_envs"):
        if getattr(buffer, name) != getattr(model.replay_buffer, name):
            raise ValueError(
                f"the saved buffer has {name}={getattr(buffer, name)}, this model {name}={getattr(model.replay_buffer, name)}:"
                " load it into a model for the same environments"
            )
    model.replay_buffer = EpisodeBuffer.from_state_dict(buffer.state_dict(), model.device)


def save_replay_buffer(model: PolyGRAD, path: PathOrFile) -> None:
    """
    :param model: whose real steps to save, as tensors
    :param path: file; the suffix ``.pkl`` is added if there is none
    """
    with written(path, "pkl") as file:
        th.save(model.replay_buffer.state_dict(), file)


def load_replay_buffer(model: PolyGRAD, path: PathOrFile) -> None:
    """
    Give a model real steps that were saved; the episodes under way end where the file ends.

    :param model: a model for the same environments
    :param path: file of :func:`save_replay_buffer`
    :raises ValueError: if the file is damaged or something else, or the steps do not fit this model
    """
    set_replay_buffer(model, read_buffer(path))
    model.replay_buffer.end_episodes()
    if model._n_updates == 0:  # a world model that has seen none of the steps
        model.replay_buffer.count_all_as_new()


def read_buffer(path: PathOrFile) -> EpisodeBuffer:
    """
    :param path: file of :meth:`PolyGRAD.save_replay_buffer`
    :raises ValueError: if the file is damaged, or something else
    """
    if isinstance(path, (str, pathlib.Path)):
        path = existing(path, "pkl")
        require_whole(path)
    try:
        return EpisodeBuffer.from_state_dict(th.load(path, map_location="cpu", weights_only=True))  # type: ignore[arg-type]
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} holds no EpisodeBuffer as saved by save_replay_buffer()") from error


def _buffer_of(path: pathlib.Path, given: str | pathlib.Path | None) -> EpisodeBuffer:
    """The real steps that belong to a model."""
    if given is not None:
        return read_buffer(given)
    state = read_part(path, REPLAY_BUFFER)
    if state is not None:
        return EpisodeBuffer.from_state_dict(state)
    beside = replay_buffer_beside(path)
    if beside is None:
        raise FileNotFoundError(f"the real steps of {path} are neither in it nor beside it: pass replay_buffer=FILE")
    return read_buffer(beside)
