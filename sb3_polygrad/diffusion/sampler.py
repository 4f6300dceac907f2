"""Policy-guided trajectory diffusion: Algorithm 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch as th
from torch.distributions import Normal

from sb3_polygrad.diffusion.gaussian import GaussianDiffusion
from sb3_polygrad.diffusion.guidance import Guidance


class Sample(NamedTuple):
    """
    :param states: clean state sequence, ``(batch, horizon + 1, channels)``, standardised
    :param actions: ``(batch, horizon, action_dim)``, environment units, before clipping to the box
    """

    states: th.Tensor
    actions: th.Tensor


def policy_guided_sample(
    denoise: Callable[[th.Tensor, th.Tensor, int], th.Tensor],
    diffusion: GaussianDiffusion,
    guidance: Guidance,
    policy: Callable[[th.Tensor], Normal],
    first: th.Tensor,
    actions: th.Tensor,
    action_noise_scale: th.Tensor,
    final_clip: float | None = None,
    final_steps: int = 10,
) -> Sample:
    """
    Denoise a batch of trajectories while their actions are guided to the policy (Algorithm 2).

    Details of the authors' release that the paper leaves out: the noise that is added to the actions has the posterior's
    standard deviation of that diffusion step, not sqrt(β_i) as in Eq. 11; optionally the change of the states is
    bounded over the last steps.

    :param denoise: ``(noisy states, actions, i) -> clean states``; it writes the first state in (line 6)
    :param diffusion: the process, N steps
    :param guidance: how actions follow the policy (line 10)
    :param policy: clean standardised states ``(batch, horizon, channels)`` to the distribution of actions there
    :param first: ``(batch, channels)`` the first state, standardised
    :param actions: ``(batch, horizon, action_dim)`` initial actions, pure noise, in environment units (line 2)
    :param action_noise_scale: ``(action_dim,)`` environment units per standardised unit
    :param final_clip: bound on the change of the states per step over the last ``final_steps`` steps; None for no bound
    :param final_steps: number of last steps that ``final_clip`` is for
    :return: states and actions
    """
    batch, horizon, _ = actions.shape
    noisy = th.randn(batch, horizon + 1, first.shape[1], device=first.device)  # line 3
    for i in range(diffusion.n_steps, 0, -1):
        noisy[:, 0] = first  # line 6
        clean = denoise(noisy, actions, i)  # lines 7 and 9
        distribution = policy(clean[:, :-1])
        if i == 1:
            return Sample(clean, guidance.finish(actions, distribution))  # lines 12-14: the posterior at i = 1 is the estimate
        std = diffusion.posterior_std[i]
        actions = guidance.update(actions, distribution, std * action_noise_scale * th.randn_like(actions))  # line 10
        mean = diffusion.posterior_mean(clean, noisy, i)
        if final_clip is not None and i <= final_steps:
            mean = noisy + (mean - noisy).clamp(-final_clip, final_clip)
        noisy = mean + std * th.randn_like(mean)  # line 13
    raise AssertionError("unreachable: a process has at least one step")
