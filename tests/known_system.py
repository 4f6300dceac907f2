"""A system whose steps, rewards and endings are known, and a small world model of every kind fitted to it."""

from __future__ import annotations

from typing import Any

import torch as th
from torch.distributions import Normal

from sb3_polygrad.common.trajectory import Trajectory, mask_after_ending
from sb3_polygrad.world_models.base import WorldModel
from sb3_polygrad.world_models.make import make_world_model

OBS_DIM, ACTION_DIM, HORIZON = 2, 1, 4
LOW, HIGH = th.tensor([-1.0]), th.tensor([1.0])

# name: (world_model, world_model_kwargs)
NET: dict[str, Any] = dict(width=32, n_layers=1)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ensemble": ("ensemble", dict(NET, n_members=3)),
    "ensemble of one": ("ensemble", dict(NET, n_members=1)),
    "stochastic ensemble": ("ensemble", dict(NET, n_members=3, stochastic=True)),
    "policy_guided": ("diffusion", dict(NET, sampler=dict(n_diffusion_steps=4))),
    "policy_guided epsilon": ("diffusion", dict(NET, sampler=dict(n_diffusion_steps=4, prediction="epsilon"))),
    "staggered": ("diffusion", dict(NET, sampler=dict(name="staggered", n_levels=2, lag=1.0))),
    "transformer staggered": ("diffusion", dict(NET, denoiser="transformer", sampler=dict(name="staggered"))),
    "transformer policy_guided": ("diffusion", dict(NET, denoiser="transformer", sampler=dict(n_diffusion_steps=4))),
    "transformer": ("transformer", dict(NET, context=3)),
    "autoregressive_diffusion": ("autoregressive_diffusion", dict(NET)),
    "rssm": ("rssm", dict(NET, n_variables=4, n_classes=4)),
}


def build(name: str = "ensemble", **changes: Any) -> WorldModel:
    """A small world model that knows nothing yet."""
    world_model, kwargs = MODELS[name]
    return make_world_model(world_model, OBS_DIM, LOW, HIGH, HORIZON, {**kwargs, **changes})


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
    pairs = data.observations.unfold(1, 2, 1).flatten(0, 1).transpose(1, 2)  # (batch * horizon, 2, obs_dim)
    model.observe(Trajectory(pairs, *(tensor.flatten(0, 1)[:, None] for tensor in data[1:])))


def cut(windows: Trajectory, length: int) -> Trajectory:
    """The first steps of windows."""
    return Trajectory(windows.observations[:, : length + 1], *(tensor[:, :length] for tensor in windows[1:]))


def fitted(name: str = "ensemble", n_fits: int = 3, **changes: Any) -> WorldModel:
    """A small world model after some gradient steps."""
    model = build(name, **changes)
    data = real_windows(2_000)
    observe(model, data)
    for _ in range(n_fits):
        rows = th.randint(len(data.rewards), (64,))
        model.fit(cut(Trajectory(*(tensor[rows] for tensor in data)), model.window))
    return model.eval()
