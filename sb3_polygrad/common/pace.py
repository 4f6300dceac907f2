"""Says early when a run will take very long."""

from __future__ import annotations

import time
import warnings


class PaceWarning:
    """
    Warns once, after the first few updates of a run, if the rest will take many hours (paper sizes on a CPU do).

    :param after_updates: updates that are timed
    :param hours: a shorter run is not worth a warning
    """

    def __init__(self, after_updates: int = 3, hours: float = 5.0) -> None:
        self.after_updates = after_updates
        self.hours = hours
        self._times: list[float] = []

    def update(self, updates_left: float) -> None:
        """
        To be called after each update.

        :param updates_left: updates until the end of the run
        """
        if len(self._times) > self.after_updates:
            return
        self._times.append(time.perf_counter())
        if len(self._times) <= self.after_updates:
            return
        hours = (self._times[-1] - self._times[0]) / self.after_updates * updates_left / 3600
        if hours > self.hours:
            warnings.warn(
                f"at this pace the rest of the run takes about {hours:.0f} hours: use a GPU (device='cuda'), or the "
                "constructor's default sizes, which are meant for a CPU",
                UserWarning,
            )
