"""An ensemble of one-step networks: PolyGRAD's default world model."""

from __future__ import annotations

import math

import torch as th
from torch import nn

from sb3_polygrad.common.trajectory import Trajectory
from sb3_polygrad.common.validation import Count, Decay, LearningRate, NotNegative
from sb3_polygrad.world_models.base import Metrics
from sb3_polygrad.world_models.one_step import OneStepWorldModel
from sb3_polygrad.world_models.standardized import FitSettings

BOUND_WEIGHT = 0.01
"""Weight in the loss of the distance between the learned bounds of the log variance (Chua et al., 2018)."""


class MemberLinear(nn.Module):
    """
    The same linear layer of every member, as one batched product; initial weights are those of ``nn.Linear``.

    :param n_members: number of members
    :param n_inputs: length of an input
    :param n_outputs: length of an output
    """

    def __init__(self, n_members: int, n_inputs: int, n_outputs: int) -> None:
        super().__init__()
        scale = 1.0 / math.sqrt(n_inputs)
        self.weight = nn.Parameter(th.empty(n_members, n_inputs, n_outputs).uniform_(-scale, scale))
        self.bias = nn.Parameter(th.empty(n_members, 1, n_outputs).uniform_(-scale, scale))

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        """``(n_members, rows, n_inputs)`` to ``(n_members, rows, n_outputs)``."""
        return th.baddbmm(self.bias, inputs, self.weight)


class EnsembleNetwork(nn.Module):
    """
    Residual MLPs side by side: a projection, blocks ``x + Linear(ReLU(LayerNorm(x)))``, and a head.

    :param n_members: number of MLPs
    :param n_inputs: length of an input
    :param n_targets: length of what is predicted, the logit of a terminal aside
    :param width: width of the blocks
    :param n_layers: number of blocks
    :param stochastic: predict a log variance beside each mean
    """

    def __init__(self, n_members: int, n_inputs: int, n_targets: int, width: int, n_layers: int, stochastic: bool) -> None:
        super().__init__()
        self.n_targets, self.stochastic = n_targets, stochastic
        self.project = MemberLinear(n_members, n_inputs, width)
        self.blocks = nn.ModuleList(MemberLinear(n_members, width, width) for _ in range(n_layers))
        self.head = MemberLinear(n_members, width, n_targets * (2 if stochastic else 1) + 1)
        if stochastic:
            self.max_log_variance_bias = nn.Parameter(th.full((n_targets,), 0.5))
            self.min_log_variance_bias = nn.Parameter(th.full((n_targets,), -10.0))

    def forward(self, inputs: th.Tensor) -> tuple[th.Tensor, th.Tensor | None, th.Tensor]:
        """
        :param inputs: ``(n_members, rows, n_inputs)``
        :return: mean and (if stochastic) log variance ``(n_members, rows, n_targets)``, logit of a terminal
            ``(n_members, rows)``
        """
        x = self.project(inputs)
        for block in self.blocks:
            x = x + block(nn.functional.layer_norm(x, x.shape[-1:]).relu())
        output = self.head(x)
        mean, logit = output[..., : self.n_targets], output[..., -1]
        if not self.stochastic:
            return mean, None, logit
        # Soft bounds that are learned themselves (Chua et al., 2018)
        high, low = self.max_log_variance_bias, self.min_log_variance_bias
        log_variance = high - nn.functional.softplus(high - output[..., self.n_targets : -1])
        return mean, low + nn.functional.softplus(log_variance - low), logit


class EnsembleWorldModel(OneStepWorldModel):
    """
    Several small networks that predict one step: the change of the observation, the reward, and whether the episode ends.

    Every row of a batch goes to one member, in fitting and in imagining, so that the ensemble costs as much as one network.
    In imagining each trajectory is handed to a random member at every step, so that a policy cannot exploit the errors of any
    one of them for long. Stochastic members are Gaussians that are sampled (Chua et al., 2018; Janner et al., 2019),
    deterministic ones predict means; both have gradients. Departs from those papers: all members imagine,
    not those with the smallest held-out errors.

    This model does not diffuse. It is the default since it learns best at equal cost; the paper's world model is
    :class:`~sb3_polygrad.world_models.diffusion.DiffusionWorldModel`.

    :param obs_dim: length of an observation
    :param action_low: ``(action_dim,)`` lower bounds of the action box
    :param action_high: ``(action_dim,)`` upper bounds of the action box
    :param horizon: steps per trajectory
    :param n_members: number of networks
    :param stochastic: learn how much each prediction may be off, and sample it. For environments that are random
    :param width: width of the networks
    :param n_layers: number of their blocks
    :param learning_rate: of AdamW
    :param weight_decay: of the matrices of all layers but the last
    :param ema_decay: of the average of the weights that imagines
    """

    def __init__(
        self,
        obs_dim: int,
        action_low: th.Tensor,
        action_high: th.Tensor,
        horizon: int,
        n_members: Count = 5,
        stochastic: bool = False,
        width: Count = 256,
        n_layers: Count = 4,
        learning_rate: LearningRate = 1e-3,
        weight_decay: NotNegative = 0.0,
        ema_decay: Decay = 0.99,
    ) -> None:
        super().__init__(obs_dim, action_low, action_high, horizon, window=1)
        self.n_members = n_members
        network = EnsembleNetwork(n_members, obs_dim + self.action_dim, obs_dim + 1, width, n_layers, stochastic)
        self._will_learn(network, FitSettings(learning_rate, ema_decay, weight_decay))

    def _deal(self, rows: th.Tensor) -> th.Tensor:
        """Rows ``(batch, n)`` in equal parts, ``(n_members, rows, n)``; the last part is filled up with the first rows."""
        n_rows = math.ceil(len(rows) / self.n_members)
        return rows[th.arange(self.n_members * n_rows, device=rows.device) % len(rows)].view(self.n_members, n_rows, -1)

    @staticmethod
    def _gather(parts: th.Tensor, batch: int) -> th.Tensor:
        """The inverse of :meth:`_deal`, ``(n_members, rows, ...)`` to ``(batch, ...)``."""
        return parts.flatten(0, 1)[:batch]

    def fit(self, segments: Trajectory) -> Metrics:
        """See :meth:`WorldModel.fit`; squared error, or (stochastic) negative log likelihood, and cross-entropy of endings."""
        steps = self._steps(segments).flat()
        mean, log_variance, logit = self.network(self._deal(steps.inputs()))
        errors = (steps.targets - self._gather(mean, len(steps.targets))).square()
        if log_variance is not None:
            log_variance = self._gather(log_variance, len(steps.targets))
            assert isinstance(self.network, EnsembleNetwork)
            bounds = self.network.max_log_variance_bias - self.network.min_log_variance_bias
            errors = errors * (-log_variance).exp() + log_variance + BOUND_WEIGHT * bounds
        endings = nn.functional.binary_cross_entropy_with_logits(self._gather(logit, len(steps.targets)), steps.terminals)
        return self._learn(errors.mean() + endings)

    def _begin(self, state: th.Tensor) -> None:
        return None

    def _step(self, memory: None, state: th.Tensor, action: th.Tensor) -> tuple[None, th.Tensor]:
        members = th.randperm(self.n_members, device=state.device)  # which part goes to which member
        parts = self._deal(th.cat([state, action], dim=1))[members]
        mean, log_variance, logit = self.average(parts)  # averaged weights imagine, self.network learns
        if log_variance is not None:
            mean = mean + (0.5 * log_variance).exp() * th.randn_like(mean)
        prediction, logit = (self._gather(out[members.argsort()], len(state)) for out in (mean, logit))
        return None, self._after(state, prediction, logit.sigmoid())
