"""Means for SB3's log of what is known on the device, read when the log is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch as th
from stable_baselines3.common.logger import KVWriter, Logger

MAX_PENDING = 1_000
"""Calls of :meth:`DeferredMeans.record` whose values are kept on the device, should the log never be written."""


class DeferredMeans(KVWriter):
    """
    SB3's ``record_mean`` for tensors: the host waits for their values when the log is written, whoever has it written, and
    not before. The means are those of ``record_mean``.

    It belongs to a logger as the first of its output formats, which writes nothing itself; see :meth:`of`.

    :param logger: what the values are for
    """

    def __init__(self, logger: Logger) -> None:
        self.logger = logger
        self._pending: list[tuple[list[str], th.Tensor, bool]] = []

    @classmethod
    def of(cls, logger: Logger) -> DeferredMeans:
        """
        The one that belongs to a logger; it is added if there is none yet.

        :param logger: any of SB3's
        """
        formats: list[Any] = logger.output_formats
        if not formats or not isinstance(formats[0], cls):
            formats[:] = [cls(logger), *(each for each in formats if not isinstance(each, cls))]
        return formats[0]

    def record(self, group: str, metrics: Mapping[str, th.Tensor | float], leave_out_nan: bool = False) -> None:
        """
        Take note of the values of one update. Tensors are kept as they are now.

        :param group: what stands before the slash
        :param metrics: scalars by name
        :param leave_out_nan: a tensor that is NaN does not count
        """
        names = [name for name, value in metrics.items() if isinstance(value, th.Tensor)]
        for name in metrics.keys() - names:
            self.logger.record_mean(f"{group}/{name}", float(metrics[name]))
        if names:
            values = th.stack([metrics[name].detach().double() for name in names])  # type: ignore[union-attr]
            self._pending.append(([f"{group}/{name}" for name in names], values, leave_out_nan))
        if len(self._pending) >= MAX_PENDING:
            self.flush()

    def flush(self) -> None:
        """Hand everything to the logger."""
        if not self._pending:
            return
        values = iter(th.cat([values for _, values, _ in self._pending]).tolist())
        for names, _, leave_out_nan in self._pending:
            for name, value in zip(names, values):  # noqa: B905  (the values of all updates, one after the other)
                if not (leave_out_nan and math.isnan(value)):
                    self.logger.record_mean(name, value)
        self._pending.clear()

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Called before the logger's other formats are, with what they will be given: the logger's own dictionaries."""
        self.flush()

    def close(self) -> None:
        """Nothing is open."""
