"""The callback that saves checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stable_baselines3.common.callbacks import BaseCallback

if TYPE_CHECKING:
    from sb3_polygrad.polygrad import PolyGRAD


class ResumableCheckpoints(BaseCallback):
    """
    Saves checkpoints from which :meth:`PolyGRAD.resume` goes on exactly.

    A checkpoint is saved before the first real steps of an iteration, as soon as ``save_freq`` steps are reached, and at the
    end of training.

    :param save_freq: real steps, of all environments together, between two checkpoints (its multiples, wherever a run began)
    :param save_path: folder of the checkpoints of this run
    :param keep: the number of checkpoints that are kept, the latest
    :param verbose: 1 to say where a checkpoint was saved
    :raises ValueError: if ``save_freq`` or ``keep`` is less than 1
    """

    model: PolyGRAD

    def __init__(self, save_freq: int, save_path: str | Path, keep: int = 3, verbose: int = 0) -> None:
        super().__init__(verbose)
        if save_freq < 1 or keep < 1:
            raise ValueError(f"save_freq and keep must be at least 1, got save_freq={save_freq} and keep={keep}")
        self.save_freq, self.save_path, self.keep = save_freq, Path(save_path), keep
        self._n_saved = 0  # multiples of save_freq that were reached when it last saved

    def _on_training_start(self) -> None:
        self._n_saved = self.model.num_timesteps // self.save_freq

    def _on_rollout_start(self) -> None:
        self._save_if_due()

    def _on_training_end(self) -> None:
        self._save_if_due()

    def _save_if_due(self) -> None:
        n_reached = self.model.num_timesteps // self.save_freq
        if n_reached > self._n_saved:
            self._n_saved = n_reached
            path = self.model.save_checkpoint(self.save_path, self.keep)
            if self.verbose > 0:
                self.logger.info(f"Checkpoint saved: {path}")

    def _on_step(self) -> bool:
        return True
