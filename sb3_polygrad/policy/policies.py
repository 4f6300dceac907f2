"""The actor-critic that learns from imagined trajectories."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import DiagGaussianDistribution, Distribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import MlpExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn
from torch.distributions import Normal

from sb3_polygrad.core.arguments import check_types, choose
from sb3_polygrad.core.averaging import ExponentialAverage, WindowedAverage


def _with_layer_norm(net: nn.Sequential) -> nn.Sequential:
    """The same layers, each linear one followed by a LayerNorm."""
    layers: list[nn.Module] = []
    for layer in net:
        layers.append(layer)
        if isinstance(layer, nn.Linear):
            layers.append(nn.LayerNorm(layer.out_features))
    return nn.Sequential(*layers)


class _Chain(nn.Module):
    """The parts of the policy that make up the mean of the actions, or the value function: one module that can be averaged."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(*parts)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.net(observations)


class _SideBySide(nn.Module):
    """Critics of the same features: ``(batch, n_features)`` to ``(batch, n_critics)``."""

    def __init__(self, critics: Iterable[nn.Module]) -> None:
        super().__init__()
        self.critics = nn.ModuleList(critics)

    def forward(self, features: th.Tensor) -> th.Tensor:
        return th.cat([critic(features) for critic in self.critics], dim=1)


ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU, "tanh": nn.Tanh}
"""Activations by name, as they stand in YAML."""


class PolyGRADPolicy(ActorCriticPolicy):
    """
    Actor and critic with a target critic and an average of the recent actors.

    The mean is ``center + half_range * tanh(net(s))``, so it always lies in the action box; the standard deviation is
    independent of the state, ``half_range * (exp(log_std) + min_std)``: the paper needs it bounded from below.
    (The authors' release assumes the box [-1, 1]; here every dimension is scaled to its own.)

    Deterministic actions are the means of the averaged actor: what was learnt without the jitter of the latest updates.
    Stochastic ones, which explore, and everything that is imagined are of the actor itself. Weights
    that are changed by hand reach the average with the updates that follow.

    :param observation_space: Observation space, Box
    :param action_space: Action space, bounded Box
    :param lr_schedule: Learning rate schedule of the actor
    :param net_arch: hidden layers, as in SB3
    :param activation_fn: activation of the hidden layers, a class or one of the names in :data:`ACTIVATIONS`. ReLU by default
        (the release has ELU: ``activation_fn: elu``), which makes an update on a CPU a little quicker (docs/speed.md)
    :param layer_norm: normalise before each activation
    :param min_std: smallest standard deviation, in units of the half-range
    :param log_std_init: log of the initial standard deviation, in units of the half-range
    :param log_std_rate: learning rate of the standard deviation relative to the rest of the actor. With the same rate it would
        take thousands of updates to shrink
    :param actor_window: the average is of about this share of all updates so far, the latest; 0 for the latest actor alone
    :param critic_tau: share of the critic that enters the target critic at each update
    :param n_critics: critics that learn side by side. What is bootstrapped from is the smallest of their targets' values: else
        the policy goes where one of them errs upwards (Fujimoto et al., 2018)
    :param kwargs: every other argument of SB3's ``ActorCriticPolicy``, except ``use_sde`` and what belongs to it
    """

    half_range: th.Tensor
    center: th.Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] | str = nn.ReLU,
        layer_norm: bool = True,
        min_std: float = 0.1,
        log_std_init: float = -0.7,
        log_std_rate: float = 2.0,
        actor_window: float = 0.1,
        critic_tau: float = 0.1,
        n_critics: int = 1,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("use_sde"):
            raise ValueError("use_sde=True is not supported: imagination needs a std that does not depend on the state")
        own = dict(layer_norm=layer_norm, min_std=min_std, log_std_init=log_std_init, log_std_rate=log_std_rate)
        own |= dict(actor_window=actor_window, critic_tau=critic_tau, n_critics=n_critics)
        check_types("policy_kwargs", PolyGRADPolicy, own)
        if not 0.0 <= min_std < float(th.tensor(log_std_init).exp()):
            raise ValueError(
                f"min_std={min_std} must lie in [0, exp(log_std_init)={float(th.tensor(log_std_init).exp()):.3g})"
            )
        if not 0.0 <= actor_window <= 1.0:
            raise ValueError(f"actor_window must lie in [0, 1], got {actor_window}")
        if not 0.0 < critic_tau <= 1.0:
            raise ValueError(f"critic_tau must lie in (0, 1], got {critic_tau}")
        if log_std_rate <= 0.0:
            raise ValueError(f"log_std_rate must be positive, got {log_std_rate}")
        if n_critics < 1:
            raise ValueError(f"n_critics must be at least 1, got {n_critics}")
        if isinstance(activation_fn, str):
            activation_fn = ACTIVATIONS[choose("policy_kwargs['activation_fn']", activation_fn, ACTIVATIONS)]
        self.layer_norm, self.min_std, self.log_std_rate = layer_norm, min_std, log_std_rate
        self.actor_window, self.critic_tau, self.n_critics = actor_window, critic_tau, n_critics
        if net_arch is None:
            net_arch = dict(pi=[128, 128], vf=[128, 128])
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=net_arch,
            activation_fn=activation_fn,
            log_std_init=log_std_init,
            **kwargs,
        )

    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        if self.layer_norm:
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
        self.other_critics = nn.ModuleList(self._new_critic() for _ in range(self.n_critics - 1))
        self.critic_target = ExponentialAverage(self._critic(), 1.0 - self.critic_tau)
        # Without a window it is made all the same: what is saved has one shape.
        self.actor_average = WindowedAverage(self._actor(), self.actor_window or 1.0)
        # One optimiser with a group for each learning rate: actor, critic, log_std.
        actor = [parameter for parameter in self.actor_parameters() if parameter is not self.log_std]
        groups = [{"params": actor}, {"params": self.critic_parameters()}, {"params": [self.log_std]}]
        kwargs = dict(self.optimizer_kwargs)
        if self.optimizer_class in (th.optim.Adam, th.optim.AdamW):
            kwargs.setdefault("fused", True)  # an update makes many small steps
        self.optimizer = self.optimizer_class(groups, lr=lr_schedule(1), **kwargs)  # type: ignore[call-arg]

    def _actor(self) -> _Chain:
        return _Chain(self.pi_features_extractor, self.mlp_extractor.policy_net, self.action_net)

    def _critic(self) -> _Chain:
        first = self.mlp_extractor.value_net, self.value_net
        if self.n_critics == 1:
            return _Chain(self.vf_features_extractor, *first)
        return _Chain(self.vf_features_extractor, _SideBySide([nn.Sequential(*first), *self.other_critics]))

    def _new_critic(self) -> nn.Sequential:
        """Like the first one, with weights of its own."""
        hidden, head = copy.deepcopy(self.mlp_extractor.value_net), copy.deepcopy(self.value_net)
        for net, gain in ((hidden, 2.0**0.5), (head, 1.0)):
            for module in net.modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
                if self.ortho_init:
                    self.init_weights(module, gain)
        return nn.Sequential(hidden, head)

    def critic_parameters(self) -> list[nn.Parameter]:
        """Parameters of the value function alone (a features extractor shared with the actor is not among them)."""
        modules: list[nn.Module] = [self.mlp_extractor.value_net, self.value_net, self.other_critics]
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
        data.update(
            layer_norm=self.layer_norm,
            min_std=self.min_std,
            log_std_rate=self.log_std_rate,
            actor_window=self.actor_window,
            critic_tau=self.critic_tau,
            n_critics=self.n_critics,
            share_features_extractor=self.share_features_extractor,
            normalize_images=self.normalize_images,
        )
        return data

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Distribution:
        assert isinstance(self.action_dist, DiagGaussianDistribution)
        mean = self._mean(self.action_net(latent_pi))
        std = self.half_range * (self.log_std.exp() + self.min_std)
        # As SB3 makes it, without its look at every value, for which the host would have to wait.
        self.action_dist.distribution = Normal(mean, std.expand_as(mean), validate_args=False)
        return self.action_dist

    def _mean(self, output: th.Tensor) -> th.Tensor:
        """Mean of the actions from what the actor's network puts out."""
        return self.center + self.half_range * th.tanh(output)

    def forward(self, obs: th.Tensor, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Actions, their values and log-probabilities, as SB3 has it; deterministic ones by the average."""
        if not deterministic:
            return super().forward(obs)
        actions = self._predict(obs, deterministic).reshape(-1, *self.action_space.shape)  # type: ignore[misc]
        values, log_prob, _ = self.evaluate_actions(obs, actions)
        return actions, values[:, :1], log_prob

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        if not deterministic or self.actor_window == 0.0:
            return super()._predict(observation, deterministic)
        assert isinstance(observation, th.Tensor)
        return self._mean(self.actor_average(observation.float()))

    @property
    def relative_std(self) -> th.Tensor:
        """Standard deviation of the actions in units of the half-range, ``(action_dim,)``."""
        return self.log_std.detach().exp() + self.min_std

    def evaluate_actions(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """As SB3 has it, with the values of all critics, ``(batch, n_critics)``."""
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        return self._beside_others(values, obs), log_prob, entropy

    def predict_all_values(self, observations: PyTorchObs) -> th.Tensor:
        """
        Values by all critics.

        :param observations: ``(batch, *observation_shape)``
        :return: ``(batch, n_critics)``; the first are those of ``predict_values``
        """
        return self._beside_others(self.predict_values(observations), observations)

    def _beside_others(self, values: th.Tensor, observations: PyTorchObs) -> th.Tensor:
        """The first critic's values, ``(batch, 1)``, beside those of the others."""
        if self.n_critics == 1:
            return values
        features = BasePolicy.extract_features(self, observations, self.vf_features_extractor)
        return th.cat([values, *(critic(features) for critic in self.other_critics)], dim=1)

    def predict_target_values(self, observations: PyTorchObs) -> th.Tensor:
        """
        Values by the target critics: the smallest of them.

        :param observations: ``(batch, *observation_shape)``
        :return: ``(batch,)``
        """
        assert isinstance(observations, th.Tensor)
        return self.critic_target(observations.float()).amin(dim=-1)

    def update_averages(self) -> None:
        """Move target critic and averaged actor towards what they follow; the first time they become copies."""
        self.critic_target.update_parameters(self._critic())
        self.actor_average.update_parameters(self._actor())


MlpPolicy = PolyGRADPolicy
