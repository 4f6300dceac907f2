"""World models fitted to a dataset with a given budget, kept on disk so that many studies can ask the same model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch as th

from sb3_polygrad.evaluation.dataset import Dataset
from sb3_polygrad.world_models.base import WorldModel
from sb3_polygrad.world_models.diffusion import DiffusionWorldModel
from sb3_polygrad.world_models.factory import build_diffusion

AnyWorldModel = TypeVar("AnyWorldModel", bound=WorldModel)


def fit(model: WorldModel, data: Dataset, gradient_steps: int, batch_size: int) -> dict[str, float]:
    """
    :param model: to be fitted, fresh
    :param data: real steps
    :param gradient_steps: budget
    :param batch_size: windows per gradient step
    :return: the mean loss over the last tenth of the steps, and seconds by the clock and of the processor
    """
    observations, next_observations, actions, rewards, terminated = (
        th.as_tensor(array).float()
        for array in (data.observations, data.next_observations, data.actions, data.rewards, data.terminated)
    )
    model.observe(observations, next_observations, actions, th.stack([rewards, terminated], dim=1))
    buffer = data.to_buffer(model.window)
    clock, processor = time.perf_counter(), time.process_time()
    losses = th.stack([model.fit(buffer.sample(batch_size))["loss"] for _ in range(gradient_steps)])
    return {
        "loss": float(losses[-max(1, gradient_steps // 10) :].mean()),
        "seconds": round(time.perf_counter() - clock, 1),
        "cpu_seconds": round(time.process_time() - processor, 1),
    }


def fitted_model(
    path: Path,
    data: Dataset,
    action_low: th.Tensor,
    action_high: th.Tensor,
    horizon: int,
    settings: Mapping[str, Any],
    gradient_steps: int,
    batch_size: int = 256,
    seed: int = 0,
) -> tuple[DiffusionWorldModel, dict[str, Any]]:
    """
    The model at ``path``, or a new one that is fitted and written there.

    :param path: file of weights and statistics
    :param data: real steps to fit to
    :param action_low: lower bounds of the action box
    :param action_high: upper bounds of the action box
    :param horizon: steps per trajectory
    :param settings: keyword arguments of :func:`~sb3_polygrad.world_models.factory.build_diffusion`
    :param gradient_steps: budget
    :param batch_size: windows per gradient step
    :param seed: of the initial weights and of the training noise
    :return: the model in evaluation mode, and what there is to say about its training
    :raises ValueError: if the file holds a model with other settings
    """
    asked = {"horizon": horizon, "settings": dict(settings)}

    def build() -> DiffusionWorldModel:
        return build_diffusion(data.observations.shape[1], action_low, action_high, horizon, **settings)

    return kept_or_fitted(path, build, asked, data, gradient_steps, batch_size, seed)


def kept_or_fitted(
    path: Path,
    build: Callable[[], AnyWorldModel],
    asked: Mapping[str, Any],
    data: Dataset,
    gradient_steps: int,
    batch_size: int,
    seed: int,
) -> tuple[AnyWorldModel, dict[str, Any]]:
    """
    The model at ``path``, or a new one of any kind that is fitted and written there.

    :param path: file of weights and statistics
    :param build: makes a fresh model
    :param asked: what ``build`` makes, in plain values
    :param data: real steps to fit to
    :param gradient_steps: budget
    :param batch_size: windows per gradient step
    :param seed: of the initial weights and of the training noise
    :return: the model in evaluation mode, and what there is to say about its training
    :raises ValueError: if the file holds a model that was made otherwise
    """
    budget = {"gradient_steps": gradient_steps, "batch_size": batch_size, "steps": len(data.rewards), "seed": seed}
    asked = {**asked, **budget}
    th.manual_seed(seed)
    model = build()
    if path.exists():
        saved = th.load(path, weights_only=True)
        if saved["asked"] != asked:
            raise ValueError(f"{path} holds a model fitted with {saved['asked']}, not with {asked}: name another folder")
        model.load_state_dict(saved["model"])
        return model.eval(), {**asked, **saved["training"]}
    training = fit(model, data, gradient_steps, batch_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    th.save({"asked": asked, "training": training, "model": model.state_dict()}, path)
    return model.eval(), {**asked, **training}
