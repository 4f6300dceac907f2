"""The world models that are compared, each in a right-sized and in the paper's size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch as th

from sb3_polygrad.world_models.factory import build_world_model
from sb3_polygrad.world_models.standardized import StandardizedWorldModel

RIVAL_HORIZON = 10
"""Models that imagine step by step are fitted on windows of this length (or of their own), whatever they imagine later."""


class Contestant(NamedTuple):
    """
    :param world_model: its name
    :param settings: its world_model_kwargs in each size
    """

    world_model: str
    settings: Mapping[str, Mapping[str, Any]]

    @property
    def whole(self) -> bool:
        """Whether it imagines whole trajectories, of the one length that it is fitted for."""
        return self.world_model == "diffusion"

    def build(
        self, obs_dim: int, action_low: th.Tensor, action_high: th.Tensor, horizon: int, settings: Mapping[str, Any]
    ) -> StandardizedWorldModel:
        """
        A fresh model.

        :param obs_dim: length of an observation
        :param action_low: lower bounds of the action box
        :param action_high: upper bounds of the action box
        :param horizon: steps of the trajectories that it will imagine
        :param settings: its world_model_kwargs
        """
        fit_horizon = horizon if self.whole else RIVAL_HORIZON
        model = build_world_model(self.world_model, obs_dim, action_low, action_high, fit_horizon, settings)
        assert isinstance(model, StandardizedWorldModel)
        model.horizon = horizon
        return model


def _rival(world_model: str, **default: Any) -> Contestant:
    return Contestant(world_model, {"default": default, "paper": {"size": "paper"}})


def _polygrad(denoiser: str, sampler: str, **default: Any) -> Contestant:
    common: dict[str, Any] = {"denoiser": denoiser, "sampler": sampler}
    if sampler == "policy_guided":
        # Steps of the states clipped at the end as in the release; δ quick to tune.
        common |= {"n_diffusion_steps": 128, "final_clip": 0.25, "delta_lr": 2.0}
    paper = {"width": None, "n_layers": 6, "learning_rate": 1e-4 if denoiser == "transformer" else 3e-4}
    return Contestant("diffusion", {"default": common | default, "paper": common | paper})


SMALL_TRANSFORMER = {"width": 64, "n_layers": 2, "learning_rate": 1e-3}

CONTESTANTS: dict[str, Contestant] = {
    "ensemble": _rival("ensemble"),
    "transformer": _rival("transformer"),
    "autoregressive_diffusion": _rival("autoregressive_diffusion"),
    "rssm": _rival("rssm"),
    "guided": _polygrad("residual_mlp", "policy_guided"),
    "guided_transformer": _polygrad("transformer", "policy_guided", **SMALL_TRANSFORMER),
    "staggered": _polygrad("residual_mlp", "staggered"),
    "staggered_transformer": _polygrad("transformer", "staggered", **SMALL_TRANSFORMER),
    "staggered_markov": Contestant(
        "diffusion", {"default": {}, "paper": {"width": 1024, "n_layers": 6, "learning_rate": 3e-4}}
    ),
}
"""PolyGRAD: the paper's sampler and the staggered one, with either of the paper's denoisers, and the package's default."""
