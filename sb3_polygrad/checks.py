"""Checks of the constructor's arguments."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space

from sb3_polygrad.core.arguments import choose, is_number
from sb3_polygrad.policy.policies import PolyGRADPolicy

INTEGERS = (
    *("n_steps", "batch_size", "gradient_steps", "n_epochs", "n_minibatches"),
    *("buffer_size", "learning_starts", "policy_learning_starts", "horizon", "n_imagined", "update_trials"),
)
NUMBERS = (
    *("gamma", "gae_lambda", "ent_coef", "vf_coef", "max_grad_norm", "critic_learning_rate"),
    "learning_rate_adaptation",
)

GIVEN_TO_THE_POLICY = {"self", "observation_space", "action_space", "lr_schedule", "kwargs"}
"""Arguments of the policy's constructor that do not come from ``policy_kwargs``."""

if TYPE_CHECKING:
    from sb3_polygrad.polygrad import PolyGRAD


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


def _check_types(model: PolyGRAD) -> None:
    """Whole numbers and numbers, said by name."""
    integers = {name: getattr(model, name) for name in INTEGERS}
    seed = 0 if model.seed is None else model.seed
    for name, value in {**integers, "stats_window_size": model._stats_window_size, "seed": seed}.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name} must be an integer, got {value!r}")
    for name in NUMBERS:
        if not is_number(getattr(model, name)):
            raise TypeError(f"{name} must be a number, got {getattr(model, name)!r}")
    for name in ("target_update", "target_kl"):
        if getattr(model, name) is not None and not is_number(getattr(model, name)):
            raise TypeError(f"{name} must be a number or None, got {getattr(model, name)!r}")
    for name in ("learning_rate", "clip_range"):
        value = getattr(model, name)
        if isinstance(value, str):
            raise TypeError(
                f"{name}: {value!r} is for configuration files, which the zoo and load_hyperparams read; pass a number, or a "
                "schedule such as stable_baselines3.common.utils.LinearSchedule(1e-3, 0.0, 1.0)"
            )
        if not is_number(value(1.0) if callable(value) else value):
            raise TypeError(f"{name} must be a number or a schedule, got {value!r}")
    for name in ("normalize_advantage", "cuda_graphs"):
        if not isinstance(getattr(model, name), (bool, np.bool_)):
            raise TypeError(f"{name} must be True or False, got {getattr(model, name)!r}")
    if not isinstance(model.world_model_name, str) and not callable(model.world_model_name):
        raise TypeError(f"world_model must be a name, or a class or function that builds one, got {model.world_model_name!r}")
    if not isinstance(model.policy_kwargs, dict):
        raise TypeError(f"policy_kwargs must be a dict, got {model.policy_kwargs!r}")


def _check_numbers(model: PolyGRAD) -> None:
    """Ranges of numbers, said by name; a schedule is judged by its start. (Written so that NaN is refused.)"""
    for name in ("gamma", "gae_lambda", "learning_rate_adaptation", "learning_rate"):
        if not 0.0 <= _at_start(model, name) <= 1.0:
            raise ValueError(f"{name} must lie in [0, 1], got {_at_start(model, name)}")
    if not 0.0 < model.critic_learning_rate <= 1.0:
        raise ValueError(f"critic_learning_rate must lie in (0, 1], got {model.critic_learning_rate}")
    if not _at_start(model, "clip_range") <= 1e6:
        raise ValueError(
            f"clip_range must be at most 1e6, got {_at_start(model, 'clip_range')}: at 1 hardly anything is clipped"
        )
    for name in ("clip_range", "max_grad_norm", "target_update", "target_kl"):
        value = _at_start(model, name)
        if value is not None and not value > 0.0:
            raise ValueError(f"{name} must be positive, got {value}")
    for name in ("ent_coef", "vf_coef"):
        if not np.isfinite(getattr(model, name)):
            raise ValueError(f"{name} must be a finite number, got {getattr(model, name)}")


def _at_start(model: PolyGRAD, name: str) -> float:
    value = getattr(model, name)
    return value(1.0) if callable(value) else value


def check_arguments(model: PolyGRAD) -> None:
    """
    Refuse settings that cannot work, naming the argument and the fix.

    :param model: with all arguments set, nothing built yet
    :raises TypeError: for what is not a number but should be one
    :raises ValueError: at the first argument that cannot work
    """
    _check_types(model)
    if model.policy_class is PolyGRADPolicy:  # a class of one's own may take what it likes
        known = {
            *inspect.signature(PolyGRADPolicy.__init__).parameters,
            *inspect.signature(ActorCriticPolicy.__init__).parameters,
        }
        for name in model.policy_kwargs:
            choose("policy_kwargs", name, known - GIVEN_TO_THE_POLICY)
    if model.policy_kwargs.get("use_sde"):
        raise ValueError(
            "policy_kwargs: use_sde=True is not supported: imagination needs a std that does not depend on the state"
        )
    if model.horizon < 2:
        raise ValueError(f"horizon must be at least 2 steps, got {model.horizon}: the paper uses 10")
    if model.learning_starts < model.horizon * model.n_envs:
        raise ValueError(
            f"learning_starts={model.learning_starts} is shorter than one window of horizon={model.horizon} steps in each "
            f"of the {model.n_envs} environments: pass learning_starts >= {model.horizon * model.n_envs}"
        )
    if model.buffer_size < model.learning_starts:
        raise ValueError(
            f"buffer_size={model.buffer_size} cannot hold learning_starts={model.learning_starts} steps: enlarge it"
        )
    for name in ("n_steps", "batch_size", "n_epochs", "n_minibatches", "n_imagined", "update_trials"):
        if getattr(model, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(model, name)}")
    if model._stats_window_size < 1:
        raise ValueError(f"stats_window_size must be at least 1, got {model._stats_window_size}")
    if model.seed is not None and not 0 <= model.seed < 2**32:
        raise ValueError(f"seed must lie in [0, 2**32), as numpy wants it, got {model.seed}")
    if model.policy_learning_starts < 0:
        raise ValueError(f"policy_learning_starts must not be negative, got {model.policy_learning_starts}: 0 is no delay")
    if model.gradient_steps < 1 and model.gradient_steps != -1:
        raise ValueError(f"gradient_steps must be -1 (as many as real steps) or at least 1, got {model.gradient_steps}")
    _check_numbers(model)
    if model.policy_update is not None:
        choose("policy_update", model.policy_update, ("pathwise", "ppo", "a2c"))
