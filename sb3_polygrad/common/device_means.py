"""Means of scalars that stay on the device until the log is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch as th


class DeviceMeans:
    """Sums up scalar tensors by name; the host waits for the device only in :meth:`flush`."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], tuple[th.Tensor, th.Tensor]] = {}

    def add(self, prefix: str, scalars: Mapping[str, th.Tensor]) -> None:
        """
        Add the values of one update. NaN does not count.

        :param prefix: put before each name, with a slash
        :param scalars: by name
        """
        if not scalars:
            return
        names = tuple(f"{prefix}/{name}" for name in scalars)
        values = th.stack([value.detach().double() for value in scalars.values()])
        known = ~values.isnan()
        total, count = self._sums.get(names, (0.0, 0.0))
        self._sums[names] = total + values.nan_to_num(nan=0.0), count + known.double()

    def flush(self, logger: Any) -> None:
        """
        Record the means since the last call (NaN where no value was known), and start anew.

        :param logger: SB3's, or anything with ``record``
        """
        for names, (total, count) in self._sums.items():
            for name, mean in zip(names, (total / count).tolist(), strict=True):
                logger.record(name, mean)
        self._sums = {}
