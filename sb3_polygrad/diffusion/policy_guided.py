"""Policy-guided trajectory diffusion: Algorithm 2."""

from __future__ import annotations

from collections.abc import Callable

import torch as th
from torch import nn
from torch.distributions import Distribution, Normal

from sb3_polygrad.common.action_diagnostics import action_diagnostics, action_std, standardized_actions
from sb3_polygrad.common.trajectory import Trajectory
from sb3_polygrad.diffusion.base import Corrupted, Sample, Task
from sb3_polygrad.diffusion.gaussian import GaussianDiffusion
from sb3_polygrad.diffusion.guidance import DiffusionStep, Guidance

FINAL_STEPS = 10
"""Number of last diffusion steps that ``final_clip`` is for (release)."""


class PolicyGuidedSampler(nn.Module):
    """
    The paper's sampler: all states have the same noise level, and actions follow the policy step by step.

    Details of the authors' release that the paper leaves out: the denoiser sees the actions scaled by sqrt(ᾱ_i), in
    training and in sampling; the noise added to the actions has the posterior's standard deviation of that diffusion step,
    not sqrt(β_i) as in Eq. 11; the change of the states may be bounded over the last steps.

    :param diffusion: schedule and parametrisation, N steps
    :param guidance: how actions follow the policy
    :param final_clip: bound on the change of the states per step over the last :data:`FINAL_STEPS` steps (0.25 in the
        release); None for no bound
    """

    n_level_inputs = 1

    def __init__(self, diffusion: GaussianDiffusion, guidance: Guidance, final_clip: float | None = None) -> None:
        super().__init__()
        self.diffusion = diffusion
        self.guidance = guidance
        self.final_clip = final_clip

    def corrupt(self, clean: th.Tensor, actions: th.Tensor) -> Corrupted:
        """See :class:`~sb3_polygrad.diffusion.base.Sampler`."""
        n_steps = self.diffusion.n_steps
        i = th.randint(1, n_steps + 1, (len(clean),), device=clean.device)  # Alg. 1, l. 4
        noise = th.randn_like(clean)  # Alg. 1, l. 5
        noisy = self.diffusion.add_noise(clean, i, noise)
        noisy[:, 0] = clean[:, 0]  # inpainting of the start
        scaled = actions * self.diffusion.signal[i, None, None]
        return Corrupted(noisy, scaled, i[:, None] / n_steps, self.diffusion.target(clean, noise))

    def sample(self, task: Task) -> Sample:
        """Algorithm 2; its lines are given beside the code."""
        process, batch = self.diffusion, len(task.first)

        def policy(states: th.Tensor) -> Normal:
            return _gaussian(task.policy(states))

        levels = th.arange(process.n_steps + 1, device=task.first.device).view(-1, 1, 1) / process.n_steps
        actions = task.action_mean + task.action_std * task.noise  # Alg. 2, l. 2
        noisy = th.randn(batch, actions.shape[1] + 1, task.first.shape[1], device=task.first.device)  # Alg. 2, l. 3
        for i in range(process.n_steps, 0, -1):
            noisy[:, 0] = task.first  # Alg. 2, l. 6
            output = task.denoiser(noisy, task.condition(actions) * process.signal[i], levels[i])  # Alg. 2, l. 7
            clean = task.bound(process.predict_clean(output, noisy, i))  # Alg. 2, l. 9
            clean[:, 0] = task.first
            if i == 1:
                break
            std = process.posterior_std[i]
            noise = std * task.action_std * th.randn_like(actions)
            actions, clean = self.guidance.guide(DiffusionStep(actions, clean, noisy, policy, noise))  # Alg. 2, l. 10
            mean = process.posterior_mean(clean, noisy, i)
            if self.final_clip is not None and i <= FINAL_STEPS:
                mean = noisy + (mean - noisy).clamp(-self.final_clip, self.final_clip)
            noisy = mean + std * th.randn_like(mean)  # Alg. 2, l. 13
        # Alg. 2, l. 12 to 14: the last step ends at the clean estimate, so that the loop breaks before it adds noise.
        return Sample(clean, self.guidance.finish(actions, policy(clean[:, :-1])))

    def adapt(self, imagined: Trajectory, policy: Callable[[th.Tensor], Distribution]) -> dict[str, th.Tensor]:
        """Eq. 9 and 10: δ from the standard deviation of the standardised actions, and how on-policy the batch was."""
        with th.no_grad():
            normal = _gaussian(policy(imagined.observations[:, :-1]))
        standardized = standardized_actions(imagined, normal.mean, normal.stddev)
        adapted = self.guidance.adapt(action_std(standardized, imagined.mask), normal.stddev)
        return {**adapted, **action_diagnostics(standardized, imagined)}


def _gaussian(policy: Distribution) -> Normal:
    if not isinstance(policy, Normal):
        raise TypeError(
            f"the policy-guided sampler follows the score of a Gaussian policy, got {type(policy).__name__}: "
            "use sampler={'name': 'staggered'}, which takes any policy that is a function of state and noise"
        )
    return policy
