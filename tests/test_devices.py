"""
Everything that is done on a device stays there. Stand-in for a GPU is torch's device without data, ``meta``: a tensor left on
the CPU cannot be mixed with its tensors, and the host cannot ask for their values.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_polygrad import PolyGRAD, imagination
from sb3_polygrad.common import faults, optimizing
from sb3_polygrad.common.device_means import DeviceMeans
from sb3_polygrad.episode_buffer import EpisodeBuffer
from tests.toys import PointEnv, tiny_model

META = th.device("meta")
NET = dict(width=16, n_layers=1)
MODELS: dict[str, dict[str, Any]] = {
    "default": dict(),
    "ensemble of Gaussians": dict(world_model_kwargs=dict(stochastic=True)),
    "policy guided": dict(world_model="diffusion", policy_update="a2c"),
    "staggered": dict(world_model="diffusion", policy_update="ppo", world_model_kwargs=dict(sampler=dict(name="staggered"))),
    "transformer denoiser": dict(world_model="diffusion", world_model_kwargs=dict(denoiser="transformer")),
    "transformer": dict(world_model="transformer", world_model_kwargs=dict(NET, context=3)),
    "autoregressive_diffusion": dict(world_model="autoregressive_diffusion", world_model_kwargs=NET),
    "rssm": dict(world_model="rssm", world_model_kwargs=NET),
    "a2c": dict(policy_update="a2c"),
    "ppo": dict(policy_update="ppo"),
}


def move(model: PolyGRAD) -> None:
    """Everything of a model to the device without data. (Adam's fused steps do not know it.)"""
    model.device = META
    model.world_model.to(META)
    model.policy.to(META)
    buffer, starts = model.replay_buffer, model.start_states
    buffer.device = META
    for name in EpisodeBuffer._tensors:
        setattr(buffer, name, getattr(buffer, name).to(META))
    starts.ends, starts.ages = starts.ends.to(META), starts.ages.to(META)
    model._means = DeviceMeans()
    for optimizer in (model.world_model.optimizer, model.policy.actor_optimizer, model.policy.critic_optimizer):
        optimizer.state.clear()
        for group in optimizer.param_groups:
            group["fused"] = False
            for parameter in group["params"]:
                parameter.grad = None


@pytest.mark.parametrize("name", MODELS)
def test_learning_stays_on_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env = VecNormalize(make_vec_env(lambda: PointEnv(length=50), 1))
    model = tiny_model(env, **MODELS[name]).learn(80)
    move(model)
    # The places where the host does ask, once each per update, and the fused steps.
    questions: list[str] = []

    def all_finite(tensors: Iterable[th.Tensor]) -> bool:
        questions.append("finite?")
        return all([tensor.device == META for tensor in tensors])

    def skipped(tensor: th.Tensor) -> float:
        questions.append("skipped?")
        return 0.5

    for module in (imagination, faults):
        monkeypatch.setattr(module, "all_finite", all_finite)
    monkeypatch.setattr(th.Tensor, "__float__", skipped)
    monkeypatch.setattr(optimizing, "_step_if", lambda wanted, optimizer: optimizer.step())

    model.replay_buffer.n_new_rows = 8
    n_fits, n_updates = model.world_model.n_fits, model._n_updates
    model.train()
    assert model.world_model.n_fits == n_fits + 4 and model._n_updates == n_updates + 1
    assert len(questions) == 4, (
        "whether batch and policy are finite, and whether steps were skipped, of the world model and else"
    )
    on_device = {name for names, (total, _) in model._means._sums.items() for name in names if total.device == META}
    assert {name.split("/")[0] for name in on_device} == {"world_model", "imagination", "train"}
    on_host = {name for names, (total, _) in model._means._sums.items() for name in names if total.device != META}
    assert on_host == {"imagination/skipped"}


def test_starts_may_lie_anywhere() -> None:
    model = tiny_model(PointEnv()).learn(80)
    move(model)
    assert all(tensor.device == META for tensor in model.imagine(th.zeros(3, 1)))
