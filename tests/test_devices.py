"""
Everything that is done on a device stays there. Stand-in for a GPU is torch's device without data, ``meta``: a tensor left on
the CPU cannot be mixed with its tensors, and the host cannot ask for their values.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecNormalize

from sb3_polygrad import PolyGRAD, learning
from sb3_polygrad.policy import update
from sb3_polygrad.policy.deferred_means import DeferredMeans
from sb3_polygrad.world_models import standardized
from tests.test_polygrad import VARIANTS
from tests.toys import TINY, TINY_WORLD_MODEL, PointEnv

META = th.device("meta")
WORLD_MODELS: dict[str, dict[str, Any]] = {
    **{
        name: {**kwargs, "world_model_kwargs": {**TINY_WORLD_MODEL, **kwargs["world_model_kwargs"]}}
        for name, kwargs in VARIANTS.items()
    },
    "bfloat16": dict(world_model_kwargs=dict(width=256, n_layers=1, dtype="bfloat16"), policy_update="a2c", update_trials=1),
    "ensemble": dict(world_model_kwargs=dict(width=16, n_layers=1)),
    "transformer": dict(world_model_kwargs=dict(width=16, n_layers=1, context=3)),
    "autoregressive_diffusion": dict(world_model_kwargs=dict(width=16, n_layers=1)),
    "rssm": dict(world_model_kwargs=dict(width=16)),
}


def move(model: PolyGRAD) -> None:
    """Everything of a model to the device without data. (Adam's fused steps do not know it.)"""
    model.device = META
    model.world_model.to(META)
    model.policy.to(META)
    model.replay_buffer.to(META)
    model._kept_view = None
    for optimizer in (model.world_model.optimizer, model.policy.optimizer):
        optimizer.state.clear()
        for group in optimizer.param_groups:
            group["fused"] = False
            for parameter in group["params"]:
                parameter.grad = None


@pytest.mark.parametrize("name", WORLD_MODELS)
def test_learning_stays_on_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs = {"world_model": name, **TINY, **WORLD_MODELS[name]}
    if name in VARIANTS or name == "bfloat16":
        kwargs["world_model"] = "diffusion"
    env = VecNormalize(make_vec_env(lambda: PointEnv(length=50), 1))
    model = PolyGRAD("MlpPolicy", env, **kwargs).learn(80)
    move(model)
    model.set_logger(Logger(None, []))
    # The two places at the edges of an update where the host does ask, and the fused steps.
    monkeypatch.setattr(learning, "all_finite", lambda tensors: all(tensor.device == META for tensor in tensors))
    monkeypatch.setattr(th.Tensor, "__float__", lambda tensor: 0.5)
    for module in (standardized, update):
        monkeypatch.setattr(module, "step_if", lambda usable, optimizer: optimizer.step())

    model._n_unobserved = 8
    model._gradient_steps_owed = 3
    skipped = model._fit_world_model()
    trajectory = model._imagine_to_learn()
    assert model._learn_from(trajectory) is None
    assert skipped.device == META and all(tensor.device == META for tensor in trajectory)  # type: ignore[union-attr]
    (means,) = model.logger.output_formats
    assert isinstance(means, DeferredMeans)
    logged = {each.split("/")[0] for names, values, _ in means._pending for each in names if values.device == META}
    assert logged == {"world_model", "imagination", "train"}


def test_starts_may_lie_anywhere() -> None:
    model = PolyGRAD("MlpPolicy", PointEnv(), **{**TINY, "world_model_kwargs": dict(width=16, n_layers=1)}).learn(80)
    move(model)
    assert all(tensor.device == META for tensor in model.imagine(3, th.zeros(3, 1)))
