"""Checks of environments and of the constructor's arguments, beyond what the signature says."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_polygrad.common.validation import KINDS, check_settings, choose, is_number
from sb3_polygrad.policies import PolyGRADPolicy

if TYPE_CHECKING:
    from sb3_polygrad.polygrad import PolyGRAD

NOT_POLICY_KWARGS = {"self", "observation_space", "action_space", "lr_schedule", "kwargs"}
"""Arguments of the policy's constructor that do not come from ``policy_kwargs``."""

ATTRIBUTES = {"world_model": "world_model_class", "stats_window_size": "_stats_window_size"}
"""Arguments of PolyGRAD whose attribute has another name."""

NOT_ATTRIBUTES = {"self", "policy", "env", "learning_rate", "_init_setup_model"}
"""Arguments of PolyGRAD that are checked by hand, by SB3, or not at all."""


def check_env(env: VecEnv) -> None:
    """
    Refuse environments that PolyGRAD has no use for, naming a way out.

    :param env: the environment
    :raises AssertionError: for actions that are not a Box (as SB3 does)
    :raises ValueError: for everything else that is not supported
    """
    check_spaces(env.observation_space, env.action_space)
    normalizer = unwrap_vec_normalize(env)
    if normalizer is not None and normalizer.observation_space.shape != env.observation_space.shape:
        raise ValueError("a wrapper around VecNormalize changes the observations: put VecNormalize outermost")


def check_spaces(observation_space: spaces.Space, action_space: spaces.Space) -> None:
    """
    Refuse observations and actions that PolyGRAD has no use for, naming a way out.

    :param observation_space: of the environment
    :param action_space: of the environment
    :raises AssertionError: for actions that are not a Box (as SB3 does)
    :raises ValueError: for everything else that is not supported
    """
    if isinstance(observation_space, spaces.Dict):
        raise ValueError(
            "PolyGRAD does not support Dict observations: wrap the environment in gymnasium.wrappers.FlattenObservation, or "
            "take another algorithm, PPO or SAC. (There: You must use `MultiInputPolicy`.)"
        )
    if not isinstance(observation_space, spaces.Box):
        raise ValueError(f"PolyGRAD needs Box observations, got {observation_space}: use PPO or DQN for such an environment")
    if observation_space.shape == ():
        raise ValueError("PolyGRAD needs observations that are vectors, got a Box without dimensions: give it the shape (1,)")
    if is_image_space(observation_space) or len(observation_space.shape) == 3:
        raise ValueError(
            f"PolyGRAD needs observations that are vectors, got images {observation_space.shape}: use PPO with CnnPolicy, "
            "or wrap the environment so that it returns features"
        )
    assert isinstance(action_space, spaces.Box), (
        f"PolyGRAD only supports {spaces.Box} as action spaces, got {action_space}: use PPO or DQN for such an environment"
    )
    with np.errstate(over="ignore"):
        width = action_space.high.astype(np.float32) - action_space.low.astype(np.float32)
    if (width <= 0.0).any():
        raise ValueError(f"PolyGRAD needs an action box with high > low in every dimension, got {action_space}")
    if not (action_space.is_bounded() and np.isfinite(width).all()):
        raise ValueError(
            f"PolyGRAD needs a bounded action space (the policy's mean and std are scaled to it), got {action_space}: give it "
            "finite bounds, for instance by gymnasium.wrappers.TransformAction(env, lambda action: action, Box(-1, 1, shape))"
        )


def check_before_sb3(algorithm: type[PolyGRAD], policy: Any, env: Any, verbose: Any, builds_networks: bool) -> None:
    """
    Refuse the arguments that SB3's constructor would stumble over.

    :param algorithm: the class whose constructor declares types
    :param policy: as given to the constructor
    :param env: as given to the constructor
    :param verbose: as given to the constructor
    :param builds_networks: whether the constructor needs an environment (``load`` does without one)
    :raises TypeError: for an argument of another type
    """
    check_settings("", algorithm, {"verbose": verbose})
    if not (isinstance(policy, str) or callable(policy)):
        raise TypeError(f"policy must be 'MlpPolicy' or a subclass of PolyGRADPolicy, got {policy!r}")
    if env is None and builds_networks:
        raise TypeError("env must be an environment, or the name of one, got None")


def check_arguments(model: PolyGRAD, algorithm: type[PolyGRAD]) -> None:
    """
    Refuse settings that cannot work, naming the argument and the fix. Types and ranges are those of the signature.

    :param model: with all arguments set, nothing built yet
    :param algorithm: the class whose constructor declares types and ranges
    :raises TypeError: for an argument of another type
    :raises ValueError: at the first argument that cannot work
    """
    names = set(inspect.signature(algorithm.__init__).parameters) - NOT_ATTRIBUTES
    check_settings("", algorithm, {name: getattr(model, ATTRIBUTES.get(name, name)) for name in sorted(names)})
    rate = model.learning_rate
    if isinstance(rate, str):
        raise TypeError(
            f"learning_rate: {rate!r} is for configuration files, which the zoo and load_hyperparams read; pass a number, or "
            "a schedule such as stable_baselines3.common.utils.LinearSchedule(1e-3, 0.0, 1.0)"
        )
    first = rate(1.0) if callable(rate) else rate
    if not is_number(first):
        raise TypeError(f"learning_rate must be a number or a schedule, got {rate!r}")
    if not 0.0 <= first <= 1.0:
        raise ValueError(f"learning_rate must be in [0, 1], got {first}")
    if not isinstance(model.world_model_class, str) and not callable(model.world_model_class):
        raise TypeError(f"world_model must be a name, or a class or function that makes one, got {model.world_model_class!r}")
    if model.gradient_steps == 0:
        raise ValueError("gradient_steps must be -1 (as many as real steps) or at least 1, got 0")
    if model.buffer_size < model.learning_starts:
        raise ValueError(
            f"buffer_size={model.buffer_size} cannot hold learning_starts={model.learning_starts} steps: enlarge it"
        )
    if model.policy_class is PolyGRADPolicy:  # a class of one's own may take what it likes
        known = inspect.signature(PolyGRADPolicy).parameters.keys() | inspect.signature(ActorCriticPolicy).parameters.keys()
        for name in model.policy_kwargs:
            choose("policy_kwargs", name, known - NOT_POLICY_KWARGS)
        kwargs = model.policy_kwargs
        _check_networks(**{name: kwargs[name] for name in ("net_arch", "activation_fn") if name in kwargs})
    if model.policy_kwargs.get("use_sde"):
        raise ValueError(
            "policy_kwargs: use_sde=True is not supported: imagination needs a std that does not depend on the state"
        )


def _check_networks(net_arch: Any = None, activation_fn: Any = "relu") -> None:
    """Refuse hidden layers and activations of which no network can be made."""
    parts = net_arch if isinstance(net_arch, dict) else {"pi": [] if net_arch is None else net_arch}
    for name, sizes in parts.items():
        choose("policy_kwargs: net_arch", name, ("pi", "vf"))
        if not (isinstance(sizes, (list, tuple)) and all(KINDS[int][1](size) and size >= 1 for size in sizes)):
            raise TypeError(
                "policy_kwargs: net_arch must be a list of layer sizes, or two of them such as dict(pi=[64], vf=[64]), "
                f"got {net_arch!r}"
            )
    if not (isinstance(activation_fn, str) or callable(activation_fn)):
        raise TypeError(f"policy_kwargs: activation_fn must be a class of torch.nn, or its name, got {activation_fn!r}")


def check_segments(model: PolyGRAD, window: int) -> None:
    """
    :param model: with all arguments set
    :param window: steps of the segments that its world model is fitted on
    :raises ValueError: if ``learning_starts`` gives no environment time for one of them
    """
    if model.learning_starts < window * model.n_envs:
        raise ValueError(
            f"learning_starts={model.learning_starts} is shorter than one segment of {window} steps in each of the "
            f"{model.n_envs} environments: pass learning_starts >= {window * model.n_envs}"
        )
