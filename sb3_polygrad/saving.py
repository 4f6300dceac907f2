"""Saving and loading of PolyGRAD: SB3's files, written whole, and checkpoints from which a run goes on exactly."""

from __future__ import annotations

import inspect
import io
import pathlib
import shutil
import tempfile
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.type_aliases import GymEnv

from sb3_polygrad.checkpoint import (
    REPLAY_BUFFER,
    RUN_STATE,
    checkpoints,
    existing,
    keep_latest,
    next_checkpoint,
    read_part,
    replay_buffer_beside,
    require_whole,
    write_part,
)
from sb3_polygrad.checks import check_arguments
from sb3_polygrad.core.arguments import choose
from sb3_polygrad.core.files import whole_file
from sb3_polygrad.core.plain import from_plain, to_plain
from sb3_polygrad.core.random_states import random_states, set_random_states
from sb3_polygrad.core.trajectory_buffer import TrajectoryBuffer
from sb3_polygrad.policy.env_states import Unavailable, env_states, set_env_states

PathOrFile = str | pathlib.Path | io.BufferedIOBase
SelfSaving = TypeVar("SelfSaving", bound="Saving")


class Saving(OnPolicyAlgorithm):
    """How PolyGRAD is saved; :class:`~sb3_polygrad.PolyGRAD` is the algorithm."""

    replay_buffer: TrajectoryBuffer
    learning_starts: int
    _last_original_obs: np.ndarray | None
    _n_updates: int
    _n_unobserved: int
    _gradient_steps_owed: int
    _in_step: bool

    def _excluded_save_params(self) -> list[str]:
        of_this_process = ("_pace", "_kept_view", "_imagining", "_last_original_obs", "_in_step")
        return [*super()._excluded_save_params(), "world_model", *of_this_process]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer", "world_model", "world_model.optimizer"], []

    # ------------------------------------------------------------------ the model

    def save(self, path: PathOrFile, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:
        """
        Save the model as SB3 does, in a zip file that replaces an older one of that name only when it is complete.

        :param path: file; the suffix ``.zip`` is added if there is none
        :param exclude: attributes to leave out
        :param include: attributes to keep that would be left out
        """
        with _written(path, "zip") as file:
            super().save(file, exclude, include)  # type: ignore[arg-type]
            write_part(file, RUN_STATE, self._run_state())

    @classmethod
    def load(cls: type[SelfSaving], path: PathOrFile, *args: Any, **kwargs: Any) -> SelfSaving:  # type: ignore[override]
        """
        Load a saved model; see SB3. What shapes the world model cannot be changed, as SB3 has it for ``policy_kwargs``.

        :param path: file; it contains pickles, so only load one that you trust
        :param args: as in SB3
        :param kwargs: as in SB3
        :raises ValueError: if the file is damaged or its networks are those of another version, or another ``world_model``,
            ``world_model_kwargs`` or ``horizon`` is given than was saved
        """
        if isinstance(path, (str, pathlib.Path)):
            path = existing(path, "zip")
            require_whole(path)
        fixed = {"world_model": "world_model_name", "world_model_kwargs": "world_model_kwargs", "horizon": "horizon"}
        given = {name: kwargs.pop(name) for name in fixed if name in kwargs}
        of_load = inspect.signature(super().load).parameters
        overrides = [name for name in kwargs if name not in of_load]
        for name in overrides:
            choose("load", name, set(inspect.signature(cls.__init__).parameters) - {"self"})
        try:
            model = super().load(path, *args, **kwargs)
        except (RuntimeError, ValueError) as error:
            if "state_dict" not in str(error) and "parameter group" not in str(error):
                raise
            raise ValueError(
                f"the networks in {path}, or their optimiser, are not those of this version of sb3_polygrad: load it with the "
                "one that saved it, with classes of your own as they were, and custom_objects that change no shapes"
            ) from error
        for name, value in given.items():
            saved = getattr(model, fixed[name])
            if (value or {}) != (saved or {}):
                raise ValueError(
                    f"the saved model has {name}={saved!r}, which cannot be changed to {value!r}: leave it out, or where a "
                    f"settings file of the zoo has it, pass -params {name}:{saved!r}"
                )
        # Custom objects stand for what is not needed (the zoo's enjoy puts 0 for every schedule): not to be judged.
        if overrides and not kwargs.get("custom_objects"):
            check_arguments(model)  # type: ignore[arg-type]
        return model

    # ------------------------------------------------------------------ real steps

    def save_replay_buffer(self, path: PathOrFile) -> None:
        """
        Save the real steps, as tensors. (The usual suffix is SB3's and the zoo's; there are no pickles in the file.)

        :param path: file; the suffix ``.pkl`` is added if there is none
        """
        with _written(path, "pkl") as file:
            th.save(self.replay_buffer.state_dict(), file)

    def load_replay_buffer(self, path: PathOrFile, truncate_last_traj: bool = True) -> None:
        """
        Load real steps that were saved.

        :param path: file written by :meth:`save_replay_buffer`
        :param truncate_last_traj: kept for SB3's interface; the episodes under way always end where the file ends, since
            the environments are elsewhere now
        :raises ValueError: if the file is damaged or something else, or the steps do not fit this model
        """
        buffer = _read_buffer(path)
        buffer.interrupt()
        self._take_buffer(buffer)
        if self._n_updates == 0:  # a fresh world model has seen none of it; it begins as after a random prefill
            self._n_unobserved = len(buffer) // buffer.n_envs
            n_updates = min(len(buffer), self.learning_starts) // (self.n_steps * self.n_envs)
            self._gradient_steps_owed = n_updates * self._gradient_steps_per_update

    def _take_buffer(self, buffer: TrajectoryBuffer) -> None:
        ours = self.replay_buffer
        for name in ("obs_dim", "action_dim", "horizon", "n_envs"):
            if getattr(buffer, name) != getattr(ours, name):
                raise ValueError(
                    f"the saved buffer has {name}={getattr(buffer, name)}, this model {name}={getattr(ours, name)}: "
                    "load it into a model for the same environments with the same horizon"
                )
        self.replay_buffer = buffer.to(self.device)

    @property
    @abstractmethod
    def _gradient_steps_per_update(self) -> int:
        """Gradient steps of the world model that belong to one policy update."""

    # ------------------------------------------------------------------ checkpoints

    def save_checkpoint(self, folder: str | pathlib.Path, keep: int = 3) -> pathlib.Path:
        """
        Save everything that the run needs to go on as if it had not been interrupted; see :meth:`resume`.

        A checkpoint is a model file (:meth:`load` takes it too) that also contains the real steps.

        :param folder: where the checkpoints of this run lie; it is made if need be
        :param keep: older checkpoints than this many are removed
        :return: the file
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1 checkpoint, got {keep}")
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = next_checkpoint(folder, self.num_timesteps)
        self._save_all(path)
        keep_latest(folder, keep)
        return path

    def _save_all(self, path: pathlib.Path) -> None:
        """Model and real steps in one file."""
        with whole_file(path) as file:
            super().save(file)  # type: ignore[arg-type]
            write_part(file, RUN_STATE, self._run_state())
            write_part(file, REPLAY_BUFFER, self.replay_buffer.state_dict())

    def _save_where_it_failed(self) -> pathlib.Path:
        """Save everything where the logs are, for whoever looks into a fault."""
        path = pathlib.Path(self.logger.get_dir() or ".").resolve() / f"faulty_{self.num_timesteps}_steps.zip"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._save_all(path)
        return path

    @classmethod
    def resume(
        cls: type[SelfSaving],
        path: str | pathlib.Path,
        env: GymEnv | str,
        replay_buffer: str | pathlib.Path | None = None,
        **kwargs: Any,
    ) -> SelfSaving:
        """
        The model as it was when a checkpoint was saved: ``learn(steps, reset_num_timesteps=False)`` goes on from there, on a
        CPU bit for bit as the run would have done without interruption.

        :param path: a folder of checkpoints (the latest is taken), a checkpoint, or a model saved by SB3's
            ``CheckpointCallback(save_replay_buffer=True)``
        :param env: environments like those of the run (as many, with the same wrappers), or the name of one. Their states are
            restored if they are MuJoCo's or have methods for it; otherwise a warning says that new episodes begin
        :param replay_buffer: file of the real steps, if it does not lie beside the model under the name that SB3 or the zoo
            gives it
        :param kwargs: as in :meth:`load`
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
        if state is None:
            raise ValueError(f"{path} was not saved by PolyGRAD, or by an older version: use load()")
        buffer = _buffer_of(path, replay_buffer)
        if (buffer.position, buffer.full) != (state["buffer_position"], state["buffer_full"]):
            raise ValueError(
                "the real steps are from another moment than the model: pass the replay_buffer that belongs to it"
            )
        model = cls.load(path, env=env, **kwargs)
        if model.n_envs != buffer.n_envs:
            raise ValueError(f"the checkpoint is of {buffer.n_envs} environments, env has {model.n_envs}: pass as many")
        model._take_buffer(buffer)
        model._go_on_from(state)
        return model

    @property
    def timesteps_left(self) -> int:
        """Real steps between now and the end of the latest :meth:`learn`, were it not interrupted."""
        return max(self._total_timesteps - self.num_timesteps, 0)

    def _run_state(self) -> dict[str, Any]:
        """What SB3 leaves out of a saved model: where the environments and the random generators are."""
        states: dict[str, Any] = {"missing": "the model had no environments between two steps"}
        if self.env is not None and self._last_obs is not None and not self._in_step:
            states = env_states(self.env)
        spaces = (self.action_space, self.observation_space)
        return {
            "random": random_states(),
            "spaces": [space.np_random.bit_generator.state for space in spaces],
            "environments": states,
            "observations": to_plain([self._last_obs, self._last_original_obs]),
            "buffer_position": self.replay_buffer.position,
            "buffer_full": self.replay_buffer.full,
        }

    def _go_on_from(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`_run_state` took."""
        assert self.env is not None
        self.env.reset()  # environments want to be reset once; this also uses up the seeds that load() has set
        try:
            if "wrappers" not in state["environments"]:
                raise Unavailable(state["environments"]["missing"])
            set_env_states(self.env, state["environments"])
            self._last_obs, self._last_original_obs = from_plain(state["observations"])
        except Unavailable as reason:
            warnings.warn(
                f"The environments begin new episodes, since their states could not be restored: {reason}.", UserWarning
            )
            self._last_obs = None  # learn() will reset them, and end the episodes in the buffer
        for space, generator in zip((self.action_space, self.observation_space), state["spaces"], strict=True):
            space.np_random.bit_generator.state = generator
        set_random_states(state["random"])


@contextmanager
def _written(path: PathOrFile, suffix: str) -> Iterator[BinaryIO]:
    """A file to write to, for a path or an open file; under the path it only appears whole."""
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


def _read_buffer(path: PathOrFile) -> TrajectoryBuffer:
    """:raises ValueError: if the file is damaged, or something else"""
    if isinstance(path, (str, pathlib.Path)):
        path = existing(path, "pkl")
        require_whole(path)
    try:
        return TrajectoryBuffer.from_state_dict(th.load(path, map_location="cpu", weights_only=True))  # type: ignore[arg-type]
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} holds no TrajectoryBuffer as saved by save_replay_buffer()") from error


def _buffer_of(path: pathlib.Path, given: str | pathlib.Path | None) -> TrajectoryBuffer:
    """The real steps that belong to a model."""
    if given is not None:
        return _read_buffer(given)
    state = read_part(path, REPLAY_BUFFER)
    if state is not None:
        return TrajectoryBuffer.from_state_dict(state)
    beside = replay_buffer_beside(path)
    if beside is None:
        raise FileNotFoundError(f"the real steps of {path} are neither in it nor beside it: pass replay_buffer=FILE")
    return _read_buffer(beside)
