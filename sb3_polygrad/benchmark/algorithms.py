"""The algorithms that are compared, by name."""

from __future__ import annotations

from stable_baselines3 import A2C, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_polygrad.polygrad import PolyGRAD

ALGORITHMS: dict[str, type[BaseAlgorithm]] = {"polygrad": PolyGRAD, "ppo": PPO, "a2c": A2C, "sac": SAC}

OF_CONTRIB = {"trpo": "TRPO", "crossq": "CrossQ"}
"""Names of those of sb3_contrib, and of their classes there."""

NAMES = (*ALGORITHMS, *OF_CONTRIB)


def algorithm_class(name: str) -> type[BaseAlgorithm]:
    """
    :param name: one of :data:`NAMES`
    :raises ImportError: if it is sb3_contrib's and that is not installed
    """
    if name not in OF_CONTRIB:
        return ALGORITHMS[name]
    try:
        import sb3_contrib  # here only: the others do without
    except ImportError as error:
        raise ImportError(f'{name} is in sb3_contrib: pip install "sb3_polygrad[benchmark]"') from error
    return getattr(sb3_contrib, OF_CONTRIB[name])
