"""Fitted world models with the staggered sampler, for many levels K and lags L."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from sb3_polygrad.diffusion.staggered import StaggeredSampler
from sb3_polygrad.world_models.diffusion import DiffusionWorldModel


class Candidate(NamedTuple):
    """
    A sampler to be measured.

    :param model: fitted world model with that sampler
    :param labels: what the csv says of it
    :param name: of the fitted model
    :param training: what there is to say about its training
    """

    model: DiffusionWorldModel
    labels: dict[str, Any]
    name: str
    training: dict[str, Any]


def staggered_candidates(
    denoiser: str,
    settings: dict[str, Any],
    levels: Sequence[int],
    lags: Sequence[float],
    fitted: Callable[[str, dict[str, Any]], tuple[DiffusionWorldModel, dict[str, Any]]],
) -> Iterator[Candidate]:
    """
    All K with all L from one model; but a Markov denoiser, which learns the levels that it is sampled with, has a model for
    each K, and L = K.

    :param denoiser: its name
    :param settings: more keyword arguments of :func:`~sb3_polygrad.world_models.factory.build_diffusion`
    :param levels: K
    :param lags: L
    :param fitted: name and settings to a fitted model, and what there is to say about its training
    """
    name, settings = f"staggered_{denoiser}", {"sampler": "staggered", "denoiser": denoiser, **settings}
    labels = {"sampler": "staggered", "denoiser": denoiser}
    if denoiser == "markov_mlp":
        for n_levels in levels:
            model, training = fitted(f"{name}_{n_levels}", {**settings, "n_levels": n_levels})
            yield Candidate(model, {**labels, "K": n_levels, "L": float(n_levels)}, f"{name}_{n_levels}", training)
        return
    model, training = fitted(name, settings)
    for n_levels in levels:
        for lag in lags:
            candidate = copy.deepcopy(model)
            candidate.sampler = StaggeredSampler(model.horizon, n_levels, lag)
            yield Candidate(candidate, {**labels, "K": n_levels, "L": lag}, name, training)
