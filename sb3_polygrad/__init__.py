"""World models via policy-guided trajectory diffusion, behind the API of Stable-Baselines3."""

from pathlib import Path

import _sb3_polygrad_zoo_hook
from sb3_polygrad.checkpoint.callback import ResumableCheckpoints
from sb3_polygrad.common.trajectory import Trajectory
from sb3_polygrad.diagnostics import ActionDiagnostics
from sb3_polygrad.hyperparams_loader import load_hyperparams
from sb3_polygrad.polygrad import PolyGRAD
from sb3_polygrad.world_models.base import WorldModel
from sb3_polygrad.world_models.diffusion import DiffusionWorldModel
from sb3_polygrad.world_models.ensemble import EnsembleWorldModel

__version__ = (Path(__file__).parent / "version.txt").read_text().strip()

__all__ = [
    "ActionDiagnostics",
    "DiffusionWorldModel",
    "EnsembleWorldModel",
    "PolyGRAD",
    "ResumableCheckpoints",
    "Trajectory",
    "WorldModel",
    "__version__",
    "load_hyperparams",
]

# For installations without start-up files (PYTHONPATH, pip install --target): importing this package is enough then.
_sb3_polygrad_zoo_hook.install()
