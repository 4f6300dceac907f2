"""Names, as they stand in YAML, to world models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch as th

from sb3_polygrad.common.validation import check_settings, choose
from sb3_polygrad.world_models.autoregressive_diffusion import AutoregressiveDiffusionWorldModel
from sb3_polygrad.world_models.base import WorldModel
from sb3_polygrad.world_models.diffusion import DiffusionWorldModel
from sb3_polygrad.world_models.ensemble import EnsembleWorldModel
from sb3_polygrad.world_models.rssm import RSSMWorldModel
from sb3_polygrad.world_models.standardized import StandardizedWorldModel
from sb3_polygrad.world_models.transformer import TransformerWorldModel

WORLD_MODELS: dict[str, type[StandardizedWorldModel]] = {
    "ensemble": EnsembleWorldModel,
    "diffusion": DiffusionWorldModel,
    "transformer": TransformerWorldModel,
    "rssm": RSSMWorldModel,
    "autoregressive_diffusion": AutoregressiveDiffusionWorldModel,
}
"""World models by name: the default, the paper's, and those that the paper compares with."""


def make_world_model(
    world_model: str | Callable[..., WorldModel],
    obs_dim: int,
    action_low: th.Tensor,
    action_high: th.Tensor,
    horizon: int,
    kwargs: Mapping[str, Any] | None = None,
) -> WorldModel:
    """
    :param world_model: a name of :data:`WORLD_MODELS`, or a class or function that takes the four arguments that follow
    :param obs_dim: length of an observation
    :param action_low: ``(action_dim,)`` lower bounds of the action box
    :param action_high: ``(action_dim,)`` upper bounds of the action box
    :param horizon: steps per trajectory
    :param kwargs: its settings; None for the defaults
    :raises ValueError: for an unknown name or setting (naming the nearest known one), or a setting that is out of range
    :raises TypeError: for a setting of another type
    """
    kwargs = kwargs or {}
    make = WORLD_MODELS[choose("world_model", world_model, WORLD_MODELS)] if isinstance(world_model, str) else world_model
    check_settings("world_model_kwargs", make, kwargs, not_settings=("obs_dim", "action_low", "action_high", "horizon"))
    return make(obs_dim, action_low, action_high, horizon, **kwargs)
