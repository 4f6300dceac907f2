"""The paper's world model: a diffusion model of whole trajectories, sampled under a policy's guidance."""

from __future__ import annotations

import torch as th
from torch import nn

from sb3_polygrad.core.bfloat16 import BFloat16Copy
from sb3_polygrad.core.normalizer import RunningNormalizer
from sb3_polygrad.core.trajectory import Trajectory
from sb3_polygrad.denoisers.base import Denoiser
from sb3_polygrad.diffusion.base import Sampler, Task
from sb3_polygrad.world_models.base import Context, PolicyFn
from sb3_polygrad.world_models.standardized import DEFAULT_FIT_SETTINGS, FitSettings, Imagined, StandardizedWorldModel


class DiffusionWorldModel(StandardizedWorldModel):
    """
    Learns to denoise windows of real steps (Algorithm 1) and imagines by diffusion under a policy (Algorithm 2).

    What is diffused is the sequence of states of :class:`StandardizedWorldModel`, in the denoiser's units. State 0 is
    inpainted: never noisy, in training and in sampling. The denoiser is conditioned on the actions, without noise.

    :param obs_dim: length of an observation
    :param action_low: ``(action_dim,)`` lower bounds of the action box
    :param action_high: ``(action_dim,)`` upper bounds of the action box
    :param horizon: steps per trajectory
    :param denoiser: the network
    :param sampler: how trajectories are noised for training, and denoised under a policy
    :param fit_settings: optimiser and average
    :param bound_margin: clean estimates stay within what was really seen, widened by this share on each side
    :param window: steps of the windows it is fitted on; ``horizon`` if not given
    :param dtype: of the large matrix products in imagining, ``th.float32`` or ``th.bfloat16``; fitting is in float32
    """

    def __init__(
        self,
        obs_dim: int,
        action_low: th.Tensor,
        action_high: th.Tensor,
        horizon: int,
        denoiser: Denoiser,
        sampler: Sampler,
        fit_settings: FitSettings = DEFAULT_FIT_SETTINGS,
        bound_margin: float = 0.5,
        window: int | None = None,
        dtype: th.dtype = th.float32,
    ) -> None:
        super().__init__(obs_dim, action_low, action_high, horizon, fit_settings, bound_margin)
        self.window = window or horizon
        self.change_normalizer = RunningNormalizer(obs_dim)
        self.denoiser = denoiser
        self.sampler = sampler
        self.ending_is_probability = sampler.predicts_means
        self._will_learn(denoiser)
        self.imagine_in(dtype)

    def imagine_in(self, dtype: th.dtype) -> None:
        """
        Choose the precision of the large matrix products in imagining; fitting is in float32 all the same.

        :param dtype: ``th.float32`` or ``th.bfloat16``
        """
        self._fast = BFloat16Copy(self.average.module) if dtype == th.bfloat16 else None

    def imagined_by(self) -> list[th.Tensor]:
        """See :meth:`WorldModel.imagined_by`."""
        return super().imagined_by() + ([] if self._fast is None else self._fast.tensors())

    def observe(self, observations: th.Tensor, next_observations: th.Tensor, actions: th.Tensor, outcomes: th.Tensor) -> None:
        """See :meth:`WorldModel.observe`."""
        super().observe(observations, next_observations, actions, outcomes)
        self.change_normalizer.update(next_observations - observations)
        self.denoiser.observe_changes(self.change_normalizer.std / self.state_normalizer.std)

    def _fit(self, batch: Trajectory) -> dict[str, th.Tensor]:
        """See :meth:`WorldModel.fit`; Algorithm 1, lines 3 to 6."""
        clean = self._encode(batch) / self.denoiser.units
        # After an ending the window repeats the last action. Departs from the release, which shows the repetition to the
        # denoiser: it would tell where the episode ended, and imagined actions, which never repeat, that it did not.
        strangers = batch.actions.flatten(0, 1)[th.randperm(batch.mask.numel(), device=clean.device)].view_as(batch.actions)
        actions = th.where(batch.mask[..., None] > 0.0, batch.actions, strangers)
        corrupted = self.sampler.corrupt(clean, self._condition(actions))
        output = self.denoiser(corrupted.noisy, corrupted.actions, corrupted.level)
        loss = nn.functional.mse_loss(output[:, 1:], corrupted.target[:, 1:])  # line 6; the first state is given
        return self._learn(self.denoiser, loss)

    def _imagine(self, start: th.Tensor, policy: PolicyFn, context: Context | None) -> Imagined:
        """See :meth:`WorldModel.imagine`; Algorithm 2. The context is left aside. Gradients are always in float32."""
        units = self.average.get_buffer("module.units")
        bound = self._bound(units)
        fast = None if th.is_grad_enabled() else self._fast
        if fast is not None:
            fast.refresh()
        task = Task(
            denoiser=fast or self.average,
            condition=self._condition,
            policy=lambda states: policy(self.state_normalizer.denormalize((states * units)[..., : self.obs_dim])),
            bound=bound,
            first=nn.functional.pad(self.state_normalizer.normalize(start), (0, 2)) / units,
            noise=th.randn(len(start), self.horizon, self.action_dim, device=start.device),
            action_mean=self.action_normalizer.denormalize(th.zeros(self.action_dim, device=start.device)),
            action_std=self.action_normalizer.std,
            markov=self.denoiser.markov,
        )
        sample = self.sampler.sample(task)
        return Imagined(sample.states * units, sample.actions, bound.faulty)

    def adapt(self, standardized_std: th.Tensor, policy_std: th.Tensor) -> dict[str, th.Tensor]:
        """See :meth:`WorldModel.adapt`; the δ controller."""
        return self.sampler.adapt(standardized_std, policy_std)
