"""Says early when a run will take very long."""

from __future__ import annotations

import time
import warnings


class PaceWarning:
    """Warns once, after the first few updates of a run, if the rest will take many hours (paper sizes on a CPU do)."""

    n_timed, hours = 3, 5.0  # updates that are timed; a shorter run is not worth a warning

    def __init__(self) -> None:
        self._times: list[float] = []

    def update(self, updates_left: float) -> None:
        """To be called after each update, with the number of updates until the end of the run."""
        if len(self._times) > self.n_timed:
            return
        self._times.append(time.perf_counter())
        if len(self._times) <= self.n_timed:
            return
        hours = (self._times[-1] - self._times[0]) / self.n_timed * updates_left / 3600
        if hours > self.hours:
            warnings.warn(
                f"at this pace the rest of the run takes about {hours:.0f} hours: use a GPU (device='cuda'), or the "
                "constructor's default sizes, which are meant for a CPU",
                UserWarning,
            )
