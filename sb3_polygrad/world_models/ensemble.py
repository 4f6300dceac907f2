"""A probabilistic ensemble of MLPs (Chua et al., 2018; Janner et al., 2019)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch as th
from torch import nn

from sb3_polygrad.core.trajectory import Trajectory
from sb3_polygrad.world_models.autoregressive import AutoregressiveWorldModel, Steps, draw_rows
from sb3_polygrad.world_models.base import Context
from sb3_polygrad.world_models.standardized import FitSettings, check_sizes

BOUND_WEIGHT = 0.01  # of the loss that draws the learned bounds of the variance together (Chua et al.)
SCORE_RATE = 0.01  # of the running held-out losses


class EnsembleMLP(nn.Module):
    """
    Several MLPs of the same shape, evaluated together by batched products.

    :param n_members: how many
    :param sizes: number of inputs, widths of the hidden layers, number of outputs
    """

    def __init__(self, n_members: int, sizes: list[int]) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for n_in, n_out in itertools.pairwise(sizes):
            scale = 1.0 / math.sqrt(n_in)  # as nn.Linear
            self.weights.append(th.empty(n_members, n_in, n_out).uniform_(-scale, scale))
            self.biases.append(th.empty(n_members, 1, n_out).uniform_(-scale, scale))

    def forward(self, x: th.Tensor, members: th.Tensor) -> th.Tensor:
        """
        :param x: ``(n, batch, inputs)``, a batch for each member
        :param members: ``(n,)`` their indices
        :return: ``(n, batch, outputs)``
        """
        layers = list(zip(self.weights, self.biases, strict=True))
        for weight, bias in layers[:-1]:
            x = nn.functional.silu(th.baddbmm(bias[members], x, weight[members]))
        weight, bias = layers[-1]
        return th.baddbmm(bias[members], x, weight[members])


class ProbabilisticEnsemble(nn.Module):
    """
    Gaussians of what a step changes, with learned bounds on their log variances, and the logit of its ending.

    :param n_members: number of MLPs
    :param n_inputs: length of an input
    :param n_targets: length of the Gaussian
    :param width: width of the hidden layers
    :param n_layers: number of hidden layers
    """

    def __init__(self, n_members: int, n_inputs: int, n_targets: int, width: int, n_layers: int) -> None:
        super().__init__()
        self.n_targets = n_targets
        self.mlp = EnsembleMLP(n_members, [n_inputs, *[width] * n_layers, 2 * n_targets + 1])
        self.max_log_variance = nn.Parameter(th.full((n_targets,), 0.5))
        self.min_log_variance = nn.Parameter(th.full((n_targets,), -10.0))

    def forward(self, inputs: th.Tensor, members: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :param inputs: ``(n, batch, n_inputs)``
        :param members: ``(n,)``
        :return: mean and log variance ``(n, batch, n_targets)``, logit ``(n, batch)``
        """
        mean, log_variance, logit = self.mlp(inputs, members).split([self.n_targets, self.n_targets, 1], dim=-1)
        log_variance = self.max_log_variance - nn.functional.softplus(self.max_log_variance - log_variance)
        log_variance = self.min_log_variance + nn.functional.softplus(log_variance - self.min_log_variance)
        return mean, log_variance, logit.squeeze(-1)


def held_out(batch: Trajectory, share: float) -> th.Tensor:
    """
    Whether a step is for scoring only. The bits of the step itself say so: a step that is shown again is the same kind again.

    :param batch: real windows
    :param share: of all steps that is held out
    :return: bool, ``(batch, horizon)``
    """
    bits = th.cat([batch.observations[:, :-1], batch.actions], dim=-1).view(th.int32).long().sum(dim=-1)
    return (bits * 2_654_435_761 >> 16) % 4096 < share * 4096  # Knuth's multiplicative hash


class EnsembleWorldModel(AutoregressiveWorldModel):
    """
    Every member has its own draw of the real steps to learn from. A share of the steps is held out; at every imagined step
    each trajectory follows one of the ``n_elites`` members that predict these best.

    :param obs_dim: length of an observation
    :param action_low: ``(action_dim,)`` lower bounds of the action box
    :param action_high: ``(action_dim,)`` upper bounds of the action box
    :param horizon: steps per trajectory
    :param network: the ensemble
    :param n_members: its members
    :param n_elites: members that imagine
    :param fit_steps: real steps per member and gradient step
    :param held_out_share: of the steps that is never learnt from
    :param fit_settings: optimiser and average
    """

    held_out_loss: th.Tensor

    def __init__(
        self,
        obs_dim: int,
        action_low: th.Tensor,
        action_high: th.Tensor,
        horizon: int,
        network: ProbabilisticEnsemble,
        n_members: int,
        n_elites: int,
        fit_steps: int,
        held_out_share: float,
        fit_settings: FitSettings,
    ) -> None:
        super().__init__(obs_dim, action_low, action_high, horizon, fit_settings)
        if n_elites > n_members:
            raise ValueError(f"world_model_kwargs: n_elites={n_elites} is more than n_members={n_members}")
        if not 0.0 < held_out_share < 1.0:
            raise ValueError(f"world_model_kwargs: held_out_share must lie in (0, 1), got {held_out_share}")
        self.network = network
        self.n_members, self.n_elites = n_members, n_elites
        self.fit_steps, self.held_out_share = fit_steps, held_out_share
        self.register_buffer("held_out_loss", th.zeros(n_members))
        self._will_learn(network)

    def _fit(self, batch: Trajectory) -> dict[str, th.Tensor]:
        """See :meth:`WorldModel.fit`; the loss is the negative log likelihood."""
        steps = self._steps(batch).flat()
        happened, held = batch.mask.flatten(), held_out(batch, self.held_out_share).flatten()
        # The small weight only matters where all steps are of the same kind.
        learnt, scored = (happened * th.where(kind, 1.0, 1e-6) for kind in (~held, held))

        members = th.arange(self.n_members, device=happened.device)
        own = steps.rows(draw_rows(learnt, self.n_members, self.fit_steps))
        mean, log_variance, logit = self.network(own.inputs(), members)
        likelihood = ((own.targets - mean).square() * (-log_variance).exp() + log_variance).mean()
        endings = nn.functional.binary_cross_entropy_with_logits(logit, own.terminals)
        bounds = (self.network.max_log_variance - self.network.min_log_variance).mean()
        loss = likelihood + endings + BOUND_WEIGHT * bounds
        metrics = self._learn(self.network, loss)
        self._score(steps.rows(draw_rows(scored, self.fit_steps // 4 + 1)))
        return {**metrics, "held_out_loss": self.held_out_loss.mean()}

    @th.no_grad()
    def _score(self, steps: Steps) -> None:
        """Take note of the squared errors on held-out steps."""
        members = th.arange(self.n_members, device=steps.states.device)
        mean, _, _ = self.average(steps.inputs().expand(self.n_members, -1, -1), members)
        errors = (mean - steps.targets).square().mean(dim=(1, 2))
        self.held_out_loss.lerp_(th.where(errors.isfinite(), errors, self.held_out_loss), SCORE_RATE)

    def _begin(self, state: th.Tensor, context: Context | None) -> None:
        return None

    def _step(self, memory: None, state: th.Tensor, action: th.Tensor) -> tuple[None, th.Tensor]:
        batch, device = len(state), state.device
        elites = self.held_out_loss.topk(self.n_elites, largest=False).indices
        elites = elites[th.randperm(self.n_elites, device=device)]
        # A random order cut into equal parts, one for each elite; what is missing in the last is filled from the beginning.
        order = th.randperm(batch, device=device)
        rows = order[th.arange(self.n_elites * math.ceil(batch / self.n_elites), device=device) % batch]
        inputs = th.cat([state, action], dim=1)[rows].view(self.n_elites, -1, state.shape[1] + action.shape[1])
        mean, log_variance, logit = (out.flatten(0, 1)[order.argsort()] for out in self.average(inputs, elites))
        prediction = mean + (0.5 * log_variance).exp() * th.randn_like(mean)
        return None, self._after(state, prediction, logit.sigmoid())


PAPER_SIZE: Mapping[str, Any] = {"n_members": 7, "n_elites": 5, "width": 200, "n_layers": 4}
"""Appendix C.2."""


def build_ensemble(
    obs_dim: int,
    action_low: th.Tensor,
    action_high: th.Tensor,
    horizon: int,
    *,
    n_members: int = 7,
    n_elites: int = 5,
    width: int = 128,
    n_layers: int = 3,
    fit_steps: int = 256,
    held_out_share: float = 0.1,
    learning_rate: float = 1e-3,
    max_grad_norm: float = 10.0,
    ema_decay: float = 0.99,
    ema_every: int = 1,
) -> EnsembleWorldModel:
    """
    An :class:`EnsembleWorldModel` from plain settings.

    :param obs_dim: length of an observation
    :param action_low: lower bounds of the action box
    :param action_high: upper bounds of the action box
    :param horizon: steps per trajectory
    :param n_members: MLPs
    :param n_elites: of these, that imagine
    :param width: of their hidden layers
    :param n_layers: number of hidden layers
    :param fit_steps: real steps per member and gradient step, drawn from the windows
    :param held_out_share: share of the real steps that elites are chosen by
    :param learning_rate: of Adam
    :param max_grad_norm: bound on the gradient
    :param ema_decay: of the average of the weights that imagines
    :param ema_every: gradient steps between updates of that average
    """
    check_sizes(n_members=n_members, n_elites=n_elites, width=width, n_layers=n_layers, fit_steps=fit_steps)
    network = ProbabilisticEnsemble(n_members, obs_dim + len(action_low), obs_dim + 1, width, n_layers)
    settings = FitSettings(learning_rate, max_grad_norm, ema_decay, ema_every)
    return EnsembleWorldModel(
        obs_dim, action_low, action_high, horizon, network, n_members, n_elites, fit_steps, held_out_share, settings
    )
