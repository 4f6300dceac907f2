"""Callbacks for ``learn``."""

from __future__ import annotations

from pathlib import Path

from stable_baselines3.common.callbacks import BaseCallback

from sb3_polygrad.saving import Saving


class ResumableCheckpoints(BaseCallback):
    """
    Saves a checkpoint every so many real steps, from which :meth:`PolyGRAD.resume` goes on exactly.

    :param every: real steps, of all environments together, between two checkpoints
    :param folder: where they lie
    :param keep: older checkpoints than this many are removed
    :param verbose: 1 to say where a checkpoint was saved
    """

    model: Saving

    def __init__(self, every: int, folder: str | Path, keep: int = 3, verbose: int = 0) -> None:
        super().__init__(verbose)
        if every < 1 or keep < 1:
            raise ValueError(f"every and keep must be at least 1, got every={every} and keep={keep}")
        self.every, self.folder, self.keep = every, Path(folder), keep

    def _on_step(self) -> bool:
        # The multiples of `every`, wherever the run began.
        if self.num_timesteps // self.every > (self.num_timesteps - self.training_env.num_envs) // self.every:
            path = self.model.save_checkpoint(self.folder, self.keep)
            if self.verbose > 0:
                self.logger.info(f"Checkpoint saved: {path}")
        return True
