"""A system whose steps, rewards and endings are known, and a small world model of every kind fitted to it."""

from __future__ import annotations

from typing import Any

import torch as th
from torch.distributions import Normal

from sb3_polygrad.core.trajectory import Trajectory, mask_after_ending
from sb3_polygrad.world_models.base import WorldModel
from sb3_polygrad.world_models.factory import build_world_model

OBS_DIM, ACTION_DIM, HORIZON = 2, 1, 4
LOW, HIGH = th.tensor([-1.0]), th.tensor([1.0])

# name: (world_model, world_model_kwargs)
TINY_DIFFUSION: dict[str, Any] = dict(width=32, n_layers=1)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "staggered": ("diffusion", dict(TINY_DIFFUSION, sampler="staggered", n_levels=2, lag=1.0)),
    "policy_guided": ("diffusion", dict(TINY_DIFFUSION, sampler="policy_guided", n_diffusion_steps=4)),
    "policy_guided epsilon": (
        "diffusion",
        dict(TINY_DIFFUSION, sampler="policy_guided", n_diffusion_steps=4, prediction="epsilon"),
    ),
    "markov": ("diffusion", dict(TINY_DIFFUSION, denoiser="markov_mlp", sampler="staggered", n_levels=2, lag=2.0)),
    "markov pipelined": ("diffusion", dict(TINY_DIFFUSION, denoiser="markov_mlp", sampler="staggered", n_levels=2, lag=1.0)),
    "markov policy_guided": (
        "diffusion",
        dict(TINY_DIFFUSION, denoiser="markov_mlp", sampler="policy_guided", n_diffusion_steps=4),
    ),
    "transformer staggered": ("diffusion", dict(TINY_DIFFUSION, denoiser="transformer", sampler="staggered")),
    "transformer policy_guided": (
        "diffusion",
        dict(TINY_DIFFUSION, denoiser="transformer", sampler="policy_guided", n_diffusion_steps=4),
    ),
    "ensemble": ("ensemble", dict(n_members=3, n_elites=2, width=32, n_layers=1, fit_steps=64)),
    "transformer": ("transformer", dict(width=32, n_layers=1, n_heads=2, context=3)),
    "autoregressive_diffusion": ("autoregressive_diffusion", dict(width=32, n_layers=1)),
    "rssm": ("rssm", dict(width=32, n_layers=1, n_variables=4, n_classes=4, fit_windows=32)),
}


def build(name: str = "staggered", **changes: Any) -> WorldModel:
    """A small world model that knows nothing yet."""
    world_model, kwargs = MODELS[name]
    return build_world_model(world_model, OBS_DIM, LOW, HIGH, HORIZON, {**kwargs, **changes})


def policy(observations: th.Tensor) -> Normal:
    """Pushes against the first observation, loudly enough to leave the box at times."""
    mean = -0.5 * (observations[..., :1] - 100.0)
    return Normal(mean, th.full_like(mean, 0.7))


def real_windows(batch: int) -> Trajectory:
    """Windows of s' = (0.9 s_0 + 0.3 a, s_0), reward s_0 - a, over when s_0' > 1.5; units far from standard ones: +100."""
    first = th.randn(batch, 1)
    states, rewards, ends = [th.cat([first, th.randn(batch, 1)], dim=1)], [], []
    actions = th.rand(batch, HORIZON, ACTION_DIM) * 2 - 1
    for t in range(HORIZON):
        now = states[-1][:, :1]
        states.append(th.cat([0.9 * now + 0.3 * actions[:, t], now], dim=1))
        rewards.append((now - actions[:, t])[:, 0])
        ends.append((states[-1][:, 0] > 1.5).float())
    terminals = th.stack(ends, dim=1).cummax(dim=1).values
    return Trajectory(
        th.stack(states, dim=1) + 100.0, actions, th.stack(rewards, dim=1), terminals, mask_after_ending(terminals)
    )


def observe(model: WorldModel, data: Trajectory) -> None:
    """Show the steps of windows to a model."""
    flat = (tensor.flatten(0, 1) for tensor in (data.observations[:, :-1], data.observations[:, 1:], data.actions))
    model.observe(*flat, th.stack([data.rewards, data.terminals], dim=-1).flatten(0, 1))


def cut(windows: Trajectory, length: int) -> Trajectory:
    """The first steps of windows."""
    return Trajectory(windows.observations[:, : length + 1], *(tensor[:, :length] for tensor in windows[1:]))


def fitted(name: str = "staggered", n_fits: int = 3, **changes: Any) -> WorldModel:
    """A small world model after some gradient steps."""
    model = build(name, **changes)
    data = real_windows(2_000)
    observe(model, data)
    for _ in range(n_fits):
        rows = th.randint(len(data.rewards), (64,))
        model.fit(cut(Trajectory(*(tensor[rows] for tensor in data)), model.window))
    return model.eval()
