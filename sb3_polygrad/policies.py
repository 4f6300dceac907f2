"""The actor-critic that learns from imagined trajectories."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import DiagGaussianDistribution, Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import MlpExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn
from torch.distributions import Normal

from sb3_polygrad.common.averaging import MovingAverage
from sb3_polygrad.common.validation import Count, Fraction, LearningRate, Range, check_settings, choose

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU, "tanh": nn.Tanh}
"""Activations by name, as they stand in YAML."""


def _with_layer_norm(net: nn.Sequential) -> nn.Sequential:
    """The same layers, each linear one followed by a LayerNorm."""
    layers: list[nn.Module] = []
    for layer in net:
        layers.append(layer)
        if isinstance(layer, nn.Linear):
            layers.append(nn.LayerNorm(layer.out_features))
    return nn.Sequential(*layers)


class Critics(nn.Module):
    """
    Value functions side by side: features ``(batch, n_features)`` to values ``(batch, n_critics)``.

    :param critics: value functions, each to ``(batch, 1)``
    """

    def __init__(self, critics: Iterable[nn.Module]) -> None:
        super().__init__()
        self.critics = nn.ModuleList(critics)

    def forward(self, features: th.Tensor) -> th.Tensor:
        return th.cat([critic(features) for critic in self.critics], dim=1)


class PolyGRADPolicy(ActorCriticPolicy):
    """
    Actor and critics, with target critics and an average of the recent actors.

    The mean is ``center + half_range * tanh(net(s))``, so it always lies in the action box; the standard deviation does not
    depend on the state, ``half_range * (exp(log_std) + min_std)``: the paper needs it bounded from below. (The authors'
    release assumes the box [-1, 1]; here every dimension is scaled to its own.)

    Deterministic actions are the means of the averaged actor, without the jitter of the latest updates. Stochastic actions and
    imagined ones are the actor's own.

    :param observation_space: Box
    :param action_space: bounded Box
    :param lr_schedule: learning rate schedule of the actor
    :param net_arch: hidden layers, as in SB3
    :param activation_fn: activation of the hidden layers, a class or one of the names in :data:`ACTIVATIONS`
    :param min_std: smallest standard deviation, in units of the half-range
    :param log_std_init: log of the initial standard deviation, in units of the half-range
    :param log_std_learning_rate: learning rate of ``log_std``. At the learning rate of the rest of the actor the standard
        deviation would take thousands of updates to shrink
    :param average_actor: act deterministically by an average over the latest tenth of all actors, instead of the latest actor
    :param tau: fraction of the critics that enters the target critics at each update
    :param n_critics: number of critics. The smallest value of their targets is bootstrapped from: else the policy goes where
        one of them errs upwards (Fujimoto et al., 2018)
    :param kwargs: every other argument of SB3's ``ActorCriticPolicy``, except ``use_sde`` and what belongs to it
    :raises ValueError: for an argument that makes no sense; the message names it
    """

    half_range: th.Tensor
    center: th.Tensor
    min_std: float
    log_std_learning_rate: float
    average_actor: bool
    tau: float
    n_critics: int

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] | str = nn.ReLU,
        min_std: Annotated[float, Range(0.0, 1.0)] = 0.1,
        log_std_init: Annotated[float, Range(-20.0, 20.0)] = -0.7,
        log_std_learning_rate: Fraction = 1.5e-3,
        average_actor: bool = True,
        tau: LearningRate = 0.1,
        n_critics: Count = 2,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("use_sde"):
            raise ValueError("use_sde=True is not supported: imagination needs a std that does not depend on the state")
        own = dict(
            min_std=min_std,
            log_std_init=log_std_init,
            log_std_learning_rate=log_std_learning_rate,
            average_actor=average_actor,
            tau=tau,
            n_critics=n_critics,
        )
        check_settings("policy_kwargs", PolyGRADPolicy, own)
        if not min_std < math.exp(log_std_init):
            raise ValueError(
                f"policy_kwargs: min_std={min_std} must be less than exp(log_std_init)={math.exp(log_std_init):.3g}"
            )
        if isinstance(activation_fn, str):
            activation_fn = ACTIVATIONS[choose("policy_kwargs['activation_fn']", activation_fn, ACTIVATIONS)]
        for name, value in own.items():
            setattr(self, name, value)
        self.own_settings = own
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=dict(pi=[128, 128], vf=[128, 128]) if net_arch is None else net_arch,
            activation_fn=activation_fn,
            log_std_init=log_std_init,
            **kwargs,
        )

    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        extractor: MlpExtractor = self.mlp_extractor
        extractor.policy_net = _with_layer_norm(extractor.policy_net)
        extractor.value_net = _with_layer_norm(extractor.value_net)

    def _build(self, lr_schedule: Schedule) -> None:
        assert isinstance(self.action_space, spaces.Box)
        low, high = (
            th.as_tensor(bound, dtype=th.float32).flatten() for bound in (self.action_space.low, self.action_space.high)
        )
        self.register_buffer("half_range", (high - low) / 2, persistent=False)
        self.register_buffer("center", (high + low) / 2, persistent=False)
        super()._build(lr_schedule)
        with th.no_grad():
            # exp(log_std) + min_std is the initial standard deviation that was asked for.
            self.log_std.copy_((self.log_std.exp() - self.min_std).log())
        # All layers of a critic stand in value_net; the extractor hands it the features as they are.
        critics = [nn.Sequential(self.mlp_extractor.value_net, self.value_net)]
        critics += [self._new_critic() for _ in range(self.n_critics - 1)]
        self.mlp_extractor.value_net = nn.Sequential()
        self.value_net = Critics(critics)  # type: ignore[assignment]
        self.critic_target = MovingAverage(self._critic(), 1.0 - self.tau)
        self.actor_average = MovingAverage(self._actor())
        self._build_optimizers(lr_schedule)

    def _new_critic(self) -> nn.Sequential:
        """A critic like the first, with initial weights of its own."""
        assert isinstance(self.net_arch, (list, dict))
        hidden = _with_layer_norm(MlpExtractor(self.features_dim, self.net_arch, self.activation_fn).value_net)
        head = nn.Linear(self.mlp_extractor.latent_dim_vf, 1)
        if self.ortho_init:
            hidden.apply(lambda module: self.init_weights(module, math.sqrt(2.0)))
            self.init_weights(head, 1.0)
        return nn.Sequential(hidden, head)

    def _build_optimizers(self, lr_schedule: Schedule) -> None:
        """One optimiser for the actor, in which ``log_std`` has a learning rate of its own, and one for the critics."""
        del self.optimizer  # SB3's, of all parameters
        kwargs = dict(self.optimizer_kwargs)
        if self.optimizer_class in (th.optim.Adam, th.optim.AdamW):
            kwargs.setdefault("fused", True)  # an update makes many small steps
        actor = [parameter for parameter in self.actor_parameters() if parameter is not self.log_std]
        groups: list[dict[str, Any]] = [{"params": actor}, {"params": [self.log_std]}]
        self.actor_optimizer = self.optimizer_class(groups, lr=lr_schedule(1), **kwargs)  # type: ignore[call-arg]
        self.actor_optimizer.param_groups[1]["lr"] = self.log_std_learning_rate
        self.critic_optimizer = self.optimizer_class(self.critic_parameters(), lr=lr_schedule(1), **kwargs)  # type: ignore[call-arg]

    def _actor(self) -> nn.Sequential:
        return nn.Sequential(self.pi_features_extractor, self.mlp_extractor.policy_net, self.action_net)

    def _critic(self) -> nn.Sequential:
        return nn.Sequential(self.vf_features_extractor, self.value_net)

    def critic_parameters(self) -> list[nn.Parameter]:
        """Parameters of the critics alone (a features extractor shared with the actor is not among them)."""
        modules: list[nn.Module] = [self.value_net]
        if not self.share_features_extractor:
            modules.append(self.vf_features_extractor)
        return [parameter for module in modules for parameter in module.parameters()]

    def actor_parameters(self) -> list[nn.Parameter]:
        """Every other trainable parameter."""
        critic = {id(parameter) for parameter in self.critic_parameters()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in critic]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        for name in ("use_sde", "squash_output", "full_std", "use_expln"):
            data.pop(name)
        shared = dict(share_features_extractor=self.share_features_extractor, normalize_images=self.normalize_images)
        return {**data, **self.own_settings, **shared}

    # ------------------------------------------------------------------ acting

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Distribution:
        assert isinstance(self.action_dist, DiagGaussianDistribution)
        mean = self._mean(self.action_net(latent_pi))
        std = self.half_range * (self.log_std.exp() + self.min_std)
        # As SB3 makes it, without its look at every value, for which the host would have to wait.
        self.action_dist.distribution = Normal(mean, std.expand_as(mean), validate_args=False)
        return self.action_dist

    def _mean(self, output: th.Tensor) -> th.Tensor:
        """Mean of the actions from the output of the actor's network."""
        return self.center + self.half_range * th.tanh(output)

    def forward(self, obs: th.Tensor, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        As in SB3; deterministic actions are by the averaged actor.

        :return: actions, values ``(batch, n_critics)`` and log-probabilities ``(batch,)``
        """
        if not deterministic:
            return super().forward(obs)
        actions = self._predict(obs, deterministic).reshape(-1, *self.action_space.shape)  # type: ignore[misc]
        values, log_prob, _ = self.evaluate_actions(obs, actions)
        return actions, values, log_prob

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        if not deterministic or not self.average_actor:
            return super()._predict(observation, deterministic)
        assert isinstance(observation, th.Tensor)
        return self._mean(self.actor_average(observation.float()))

    @property
    def relative_std(self) -> th.Tensor:
        """Standard deviation of the actions in units of the half-range, ``(action_dim,)``."""
        return self.log_std.detach().exp() + self.min_std

    # ------------------------------------------------------------------ learning

    def target_values(self, observations: th.Tensor) -> th.Tensor:
        """
        Values by the target critics: the smallest of them.

        :param observations: ``(batch, *observation_shape)``
        :return: ``(batch,)``
        """
        return self.critic_target(observations.float()).amin(dim=-1)

    def set_learning_rates(self, actor: float, critic: float) -> None:
        """
        :param actor: of the actor, except ``log_std``, which has its own
        :param critic: of the critics
        """
        self.actor_optimizer.param_groups[0]["lr"] = actor
        self.actor_optimizer.param_groups[1]["lr"] = self.log_std_learning_rate
        for group in self.critic_optimizer.param_groups:
            group["lr"] = critic

    def update_averages(self) -> None:
        """Move target critics and averaged actor towards what they follow; the first time they become copies."""
        self.critic_target.update_parameters(self._critic())
        self.actor_average.update_parameters(self._actor())


MlpPolicy = PolyGRADPolicy
