"""World models via policy-guided trajectory diffusion, behind the API of Stable-Baselines3."""

from pathlib import Path

from sb3_polygrad.core.trajectory import Trajectory
from sb3_polygrad.polygrad import PolyGRAD
from sb3_polygrad.world_models.diffusion import DiffusionWorldModel

__version__ = (Path(__file__).parent / "version.txt").read_text().strip()

__all__ = ["DiffusionWorldModel", "PolyGRAD", "Trajectory", "__version__"]
