"""Files that are whole or not there."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

UNFINISHED = ".unfinished"
"""Suffix of files that are being written; after a crash such a file may stay behind."""


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """
    Write a file so that, whatever happens, ``path`` holds either what it held before or all that was written.

    The data goes to another file of the same folder, is flushed to the disk, and takes the name ``path`` at the very end.

    :param path: where the file will be
    :return: the file to write to; it can be read and sought in too
    """
    path = path.resolve()  # behind a link, the file it points to is replaced, not the link
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        with unfinished.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Make a new name as durable as the data (where folders can be opened, that is, not on Windows)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fault_of_archive(path: Path) -> str | None:
    """
    What is wrong with a zip file (torch's files are zip files too), found by its own checksums.

    :param path: the file
    :return: the fault, or None if the file is whole
    """
    if path.stat().st_size == 0:
        return "it is empty"
    try:
        with zipfile.ZipFile(path) as archive:
            # In a file that is cut off, the directory of an archive that is a part of it can pass for its own.
            if min((part.header_offset for part in archive.infolist()), default=0) > 0:
                return "it is cut off: its directory is not there"
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        return f"it is cut off, or no zip file at all ({error})"
    except Exception as error:  # a damaged directory of the archive can make any of them
        return f"it cannot be read ({type(error).__name__}: {error})"
    return None if damaged is None else f"its part {damaged!r} is damaged (wrong checksum)"
