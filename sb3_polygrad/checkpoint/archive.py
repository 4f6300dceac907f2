"""Model files and checkpoints: SB3's zip files with two more parts. Reading them, and keeping a few."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch as th

from sb3_polygrad.checkpoint.files import UNFINISHED, fault_of_archive

PathOrFile = str | Path | io.BufferedIOBase

RUN_STATE = "run_state.pt"
"""Part of a model's zip file: random states, states of the environments. SB3 reads ``.pth`` parts only and passes it over."""

REPLAY_BUFFER = "replay_buffer.pt"
"""Part of a checkpoint: the real steps."""

NAME = re.compile(r"checkpoint_(\d+)_(\d+)_steps\.zip")


def write_part(file: BinaryIO, name: str, content: dict[str, Any]) -> None:
    """
    Add tensors and plain values to a zip file.

    :param file: the zip file, readable and writable
    :param name: of the part
    :param content: what to write
    """
    with zipfile.ZipFile(file, "a") as archive, archive.open(name, "w", force_zip64=True) as part:
        th.save(content, part)


def read_part(path: Path, name: str) -> dict[str, Any] | None:
    """
    Read what :func:`write_part` wrote; nothing is unpickled.

    :param path: the zip file
    :param name: of the part
    :return: its content on the CPU, or None if there is no such part
    """
    with zipfile.ZipFile(path) as archive:
        if name not in archive.namelist():
            return None
        with archive.open(name) as part:
            return th.load(part, map_location="cpu", weights_only=True)


def existing(path: str | Path, suffix: str) -> Path:
    """
    :param path: a file, with or without its suffix
    :param suffix: the suffix to try, as SB3 does
    :raises FileNotFoundError: if there is no such file
    """
    path = Path(path)
    found = path if path.is_file() else Path(f"{path}.{suffix}")
    if not found.is_file():
        raise FileNotFoundError(f"there is no file {path}, nor {found}")
    return found


def require_whole(path: Path) -> None:
    """
    :param path: a file that is to be loaded
    :raises ValueError: if it is damaged; the message says how, and names an older file of the folder that is whole
    """
    fault = fault_of_archive(path)
    if fault is None:
        return
    age = path.stat().st_mtime_ns
    older = [file for file in path.parent.glob(f"*{path.suffix}") if file != path and file.stat().st_mtime_ns <= age]
    for file in sorted(older, key=lambda file: (file.stat().st_mtime_ns, file.name), reverse=True):
        if fault_of_archive(file) is None:
            raise ValueError(f"{path} cannot be loaded: {fault}. An older file that is whole: {file}")
    raise ValueError(f"{path} cannot be loaded: {fault}. There is no older file that is whole in that folder")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, in the order in which they were written."""
    found = [(NAME.fullmatch(path.name), path) for path in folder.glob("*.zip")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match is not None)]


def next_checkpoint(folder: Path, num_timesteps: int) -> Path:
    """The name of the next checkpoint of a folder."""
    held = checkpoints(folder)
    number = int(NAME.fullmatch(held[-1].name)[1]) + 1 if held else 1  # type: ignore[index]
    return folder / f"checkpoint_{number:05d}_{num_timesteps}_steps.zip"


def keep_latest(folder: Path, keep: int) -> None:
    """Remove all but the latest checkpoints of a folder, and what crashes have left there."""
    for path in [*checkpoints(folder)[:-keep], *folder.glob(f".checkpoint_*{UNFINISHED}")]:
        path.unlink(missing_ok=True)


def replay_buffer_beside(path: Path) -> Path | None:
    """
    Where the real steps of a model lie: ``NAME_replay_buffer_N_steps.pkl`` beside ``NAME_N_steps.zip``, as SB3's
    ``CheckpointCallback`` calls them, or ``replay_buffer.pkl``, as the zoo does.

    :param path: the model
    """
    match = re.fullmatch(r"(.*_)(\d+_steps)", path.stem)
    names = ["replay_buffer.pkl"] if match is None else [f"{match[1]}replay_buffer_{match[2]}.pkl"]
    return next((path.with_name(name) for name in names if path.with_name(name).is_file()), None)
