"""Dreamer-v3's world model (Hafner et al., 2023), a sequential VAE with a recurrent state, for vector observations."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch as th
from torch import nn

from sb3_polygrad.common.trajectory import Trajectory
from sb3_polygrad.common.validation import Count, Decay, LearningRate, Positive
from sb3_polygrad.world_models.base import Metrics
from sb3_polygrad.world_models.one_step import OneStepWorldModel
from sb3_polygrad.world_models.standardized import FitSettings

UNIFORM_SHARE = 0.01  # of every categorical: no class is ever impossible
FREE_NATS = 1.0  # a smaller divergence is not pressed further
DYNAMICS_WEIGHT, REPRESENTATION_WEIGHT = 0.5, 0.1  # KL balance: the prior follows the posterior faster than the reverse
REWARD_LIMIT, N_REWARD_BINS = 20.0, 255  # of the reward's categorical, in symlog


def symlog(x: th.Tensor) -> th.Tensor:
    """Squashes large values, is the identity near 0."""
    return x.sign() * x.abs().log1p()


def symexp(x: th.Tensor) -> th.Tensor:
    """The inverse of :func:`symlog`."""
    return x.sign() * x.abs().expm1()


def two_hot(values: th.Tensor, bins: th.Tensor) -> th.Tensor:
    """
    Weights of the two bins next to a value whose mean is that value.

    :param values: ``(...)``, those beyond the bins count as the nearest bin
    :param bins: ``(n,)`` at equal distances, rising
    :return: ``(..., n)``
    """
    distances = (values.clamp(bins[0], bins[-1])[..., None] - bins).abs() / (bins[1] - bins[0])
    return (1.0 - distances).clamp(min=0.0)


def mixed_logits(logits: th.Tensor) -> th.Tensor:
    """Normalised logits of a categorical of which a small share is uniform."""
    probabilities = (1.0 - UNIFORM_SHARE) * logits.softmax(dim=-1) + UNIFORM_SHARE / logits.shape[-1]
    return probabilities.log()


def draw_classes(logits: th.Tensor) -> th.Tensor:
    """
    One-hot draws with straight-through gradients. (Not by torch's categorical: that one raises at NaN.)

    :param logits: ``(..., n_classes)``, normalised
    """
    probabilities = logits.exp()
    classes = (probabilities.detach() / th.empty_like(probabilities).exponential_()).argmax(dim=-1)
    one_hot = th.zeros_like(probabilities).scatter_(-1, classes[..., None], 1.0)
    return one_hot + probabilities - probabilities.detach()


def divergence(logits: th.Tensor, other: th.Tensor) -> th.Tensor:
    """KL(p || q) of products of categoricals, ``(..., n_variables, n_classes)`` to ``(...)``."""
    return (logits.exp() * (logits - other)).sum(dim=(-1, -2))


def mlp(n_inputs: int, width: int, n_layers: int, n_outputs: int) -> nn.Sequential:
    """Layers of Linear, LayerNorm and SiLU, then a Linear."""
    widths = [n_inputs, *[width] * n_layers]
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(widths):
        layers += [nn.Linear(n_in, n_out, bias=False), nn.LayerNorm(n_out), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], n_outputs))


class Latent(NamedTuple):
    """
    :param memory: ``(batch, width)`` recurrent, deterministic
    :param classes: ``(batch, n_variables * n_classes)`` one-hot draws
    """

    memory: th.Tensor
    classes: th.Tensor

    def features(self) -> th.Tensor:
        """What the heads read."""
        return th.cat(self, dim=-1)


class RSSM(nn.Module):
    """
    Recurrent state-space model: what is remembered is a GRU's state, what is uncertain are categorical variables.

    :param obs_dim: length of an observation
    :param action_dim: length of an action
    :param width: of the GRU and all layers
    :param n_layers: hidden layers of encoder, decoder and heads
    :param n_variables: categorical variables
    :param n_classes: their classes
    """

    bins: th.Tensor

    def __init__(self, obs_dim: int, action_dim: int, width: int, n_layers: int, n_variables: int, n_classes: int) -> None:
        super().__init__()
        self.width, self.shape = width, (n_variables, n_classes)
        n_stochastic = n_variables * n_classes
        self.encoder = mlp(obs_dim, width, n_layers, width)
        self.inputs = nn.Sequential(nn.Linear(n_stochastic + action_dim, width, bias=False), nn.LayerNorm(width), nn.SiLU())
        self.cell = nn.GRUCell(width, width)
        self.prior_head = mlp(width, width, 1, n_stochastic)
        self.posterior_head = mlp(2 * width, width, 1, n_stochastic)
        self.decoder = mlp(width + n_stochastic, width, n_layers, obs_dim)
        self.reward_head = mlp(width + n_stochastic, width, n_layers, N_REWARD_BINS)
        self.ending_head = mlp(width + n_stochastic, width, n_layers, 1)
        self.register_buffer("bins", th.linspace(-REWARD_LIMIT, REWARD_LIMIT, N_REWARD_BINS), persistent=False)
        nn.init.zeros_(self.reward_head[-1].weight)  # type: ignore[arg-type]

    def initial(self, batch: int, device: th.device) -> Latent:
        """Nothing is known yet."""
        n_variables, n_classes = self.shape
        return Latent(th.zeros(batch, self.width, device=device), th.zeros(batch, n_variables * n_classes, device=device))

    def advance(self, latent: Latent, action: th.Tensor) -> th.Tensor:
        """The memory after an action, ``(batch, width)``."""
        return self.cell(self.inputs(th.cat([latent.classes, action], dim=-1)), latent.memory)

    def prior(self, memory: th.Tensor) -> th.Tensor:
        """Logits of what is to be expected, ``(..., n_variables, n_classes)``."""
        return mixed_logits(self.prior_head(memory).unflatten(-1, self.shape))

    def posterior(self, memory: th.Tensor, embedded: th.Tensor) -> th.Tensor:
        """Logits given the observation too, ``(..., n_variables, n_classes)``."""
        return mixed_logits(self.posterior_head(th.cat([memory, embedded], dim=-1)).unflatten(-1, self.shape))

    def follow(self, states: th.Tensor, actions: th.Tensor) -> tuple[list[Latent], th.Tensor]:
        """
        The latents of observed sequences.

        :param states: ``(batch, n + 1, obs_dim)``, standardised
        :param actions: ``(batch, n, action_dim)`` between them
        :return: ``n + 1`` latents, and the posterior's logits ``(batch, n + 1, n_variables, n_classes)``
        """
        embedded = self.encoder(symlog(states))
        actions = nn.functional.pad(actions, (0, 0, 1, 0))  # nothing was done before the first observation
        latent, latents, posteriors = self.initial(len(states), states.device), [], []
        for t in range(states.shape[1]):
            memory = self.advance(latent, actions[:, t])
            posteriors.append(self.posterior(memory, embedded[:, t]))
            latent = Latent(memory, draw_classes(posteriors[-1]).flatten(1))
            latents.append(latent)
        return latents, th.stack(posteriors, dim=1)

    def forward(self, latent: Latent, action: th.Tensor) -> tuple[Latent, th.Tensor, th.Tensor, th.Tensor]:
        """
        One imagined step.

        :param latent: where it begins
        :param action: ``(batch, action_dim)``, standardised
        :return: latent; state ``(batch, obs_dim)``, reward ``(batch,)``, standardised; probability of a terminal ``(batch,)``
        """
        memory = self.advance(latent, action)
        latent = Latent(memory, draw_classes(self.prior(memory)).flatten(1))
        features = latent.features()
        reward = (self.reward_head(features).softmax(dim=-1) * self.bins).sum(dim=-1)
        ending = self.ending_head(features).squeeze(-1).sigmoid()
        return latent, symexp(self.decoder(features)), symexp(reward), ending


class RSSMWorldModel(OneStepWorldModel):
    """
    Imagines in the latent space; the observations that the policy acts on are decoded from there. One of the models that the
    paper compares with (Appendix C.2).

    The memory starts from the first observation alone, as it does at the beginning of every segment that it is fitted on.
    Gradients go straight through draws of classes.

    :param obs_dim: length of an observation
    :param action_low: ``(action_dim,)`` lower bounds of the action box
    :param action_high: ``(action_dim,)`` upper bounds of the action box
    :param horizon: steps per trajectory
    :param width: of the GRU and all layers
    :param n_layers: hidden layers of encoder, decoder and heads
    :param n_variables: categorical variables
    :param n_classes: their classes
    :param window: steps of the segments that it is fitted on; ``horizon`` if not given
    :param reconstruction_weight: of the decoded observations' error. 1 in Dreamer-v3, whose segments are longer: only the
        first step of a segment needs many nats, so that reconstruction is under-weighted on short ones
    :param learning_rate: of AdamW
    :param ema_decay: of the average of the weights that imagines
    """

    def __init__(
        self,
        obs_dim: int,
        action_low: th.Tensor,
        action_high: th.Tensor,
        horizon: int,
        width: Count = 128,
        n_layers: Count = 1,
        n_variables: Count = 16,
        n_classes: Count = 16,
        window: Count | None = None,
        reconstruction_weight: Positive = 10.0,
        learning_rate: LearningRate = 1e-3,
        ema_decay: Decay = 0.99,
    ) -> None:
        super().__init__(obs_dim, action_low, action_high, horizon, window)
        self.reconstruction_weight = reconstruction_weight
        network = RSSM(obs_dim, self.action_dim, width, n_layers, n_variables, n_classes)
        self._will_learn(network, FitSettings(learning_rate, ema_decay, max_grad_norm=100.0))

    def fit(self, segments: Trajectory) -> Metrics:
        """See :meth:`WorldModel.fit`."""
        states, rewards, _ = self._encode(segments).split([self.obs_dim, 1, 1], dim=-1)
        network = self.network
        assert isinstance(network, RSSM)
        happened = nn.functional.pad(segments.mask, (1, 0), value=1.0)
        latents, posterior = network.follow(states, self._condition(segments.actions))
        memory = th.stack([latent.memory for latent in latents], dim=1)
        features = th.stack([latent.features() for latent in latents], dim=1)

        def mean(values: th.Tensor, weights: th.Tensor) -> th.Tensor:
            return (values * weights).sum() / weights.sum()

        reconstruction = (network.decoder(features) - symlog(states)).square().sum(dim=-1)
        prior = network.prior(memory)
        dynamics = divergence(posterior.detach(), prior).clamp(min=FREE_NATS)
        representation = divergence(posterior, prior.detach()).clamp(min=FREE_NATS)
        latent_loss = (
            self.reconstruction_weight * reconstruction + DYNAMICS_WEIGHT * dynamics + REPRESENTATION_WEIGHT * representation
        )
        target = two_hot(symlog(rewards[:, 1:, 0]), network.bins)
        reward_loss = -(target * network.reward_head(features[:, 1:]).log_softmax(dim=-1)).sum(dim=-1)
        ending_loss = nn.functional.binary_cross_entropy_with_logits(
            network.ending_head(features[:, 1:]).squeeze(-1), segments.terminals, reduction="none"
        )
        loss = mean(latent_loss, happened) + mean(reward_loss + ending_loss, segments.mask)
        return {
            **self._learn(loss),
            "reconstruction": mean(reconstruction, happened).detach(),
            "divergence": mean(dynamics, happened).detach(),
        }

    def _begin(self, state: th.Tensor) -> Latent:
        network = self.average.module
        assert isinstance(network, RSSM)
        return network.follow(state[:, None], state.new_zeros(len(state), 0, self.action_dim))[0][-1]

    def _step(self, memory: Latent, state: th.Tensor, action: th.Tensor) -> tuple[Latent, th.Tensor]:
        latent, after, reward, ending = self.average(memory, action)
        return latent, th.cat([after, reward[:, None], self._standardized_ending(ending)], dim=1)
