"""
PolyGRAD in rl_zoo3: ``python -m rl_zoo3.train --algo polygrad --env Hopper-v5``.

rl_zoo3 has no plugin point, so three of its modules are completed in place: the table of algorithms, the tables of search
spaces, and the manager of experiments, which learns where our configuration files are. Nothing of the zoo is imported here,
since this module is itself imported while the zoo is.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sb3_polygrad.common.validation import choose
from sb3_polygrad.hyperparams_loader import HYPERPARAMS
from sb3_polygrad.polygrad import PolyGRAD

if TYPE_CHECKING:
    from optuna import Trial

NAME = "polygrad"

GIVEN_BY_THE_ZOO = frozenset({"self", "env", "tensorboard_log", "verbose", "seed", "device", "_init_setup_model"})
"""Arguments of the constructor that stand on the zoo's command line, not in its configuration files."""

TAKEN_BY_THE_ZOO = frozenset(
    {
        "n_timesteps",
        "n_envs",
        "normalize",
        "frame_stack",
        "env_wrapper",
        "vec_env_wrapper",
        "callback",
        "monitor_kwargs",
        "env_kwargs",
    }
)
"""Entries of the configuration files that the zoo uses itself."""


def complete(module: ModuleType) -> None:
    """
    Make one module of the zoo know PolyGRAD. Doing it twice does no harm.

    :param module: ``rl_zoo3.utils``, ``rl_zoo3.hyperparams_opt`` or ``rl_zoo3.exp_manager``
    """
    completions[module.__name__](module)


def register() -> None:
    """Import the zoo and make all of it know PolyGRAD; what the import hook does without being asked."""
    for name in completions:
        complete(importlib.import_module(name))


def add_algorithm(utils: ModuleType) -> None:
    """
    Every script of the zoo holds this one dictionary, and makes ``--algo`` from it.

    :param utils: ``rl_zoo3.utils``
    """
    utils.ALGOS[NAME] = PolyGRAD


def add_search_space(hyperparams_opt: ModuleType) -> None:
    """
    For ``-optimize`` and ``--trial-id``.

    :param hyperparams_opt: ``rl_zoo3.hyperparams_opt``
    """
    hyperparams_opt.HYPERPARAMS_SAMPLER[NAME] = sample_polygrad_params
    hyperparams_opt.HYPERPARAMS_CONVERTER[NAME] = convert_polygrad_params


def extend_manager(exp_manager: ModuleType) -> None:
    """
    Let the manager of experiments find our configuration files, and refuse misspelt settings.

    :param exp_manager: ``rl_zoo3.exp_manager``
    """
    manager = exp_manager.ExperimentManager
    initialize, read_hyperparameters = manager.__init__, manager.read_hyperparameters

    @functools.wraps(initialize)
    def initialize_and_find(self: Any, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        self.config = find_configuration(self.config)

    @functools.wraps(read_hyperparameters)
    def read_and_check(self: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        hyperparams, saved_hyperparams = read_hyperparameters(self)
        if self.algo == NAME:
            check_names(hyperparams)
        return hyperparams, saved_hyperparams

    manager.__init__, manager.read_hyperparameters = initialize_and_find, read_and_check


def find_configuration(config: str) -> str:
    """
    The zoo looks for ``polygrad.yml`` in its own ``hyperparams`` folder. So does, from anywhere, ``-conf hyperparams/ppo.yml``
    or ``-conf ppo.yml`` in the working directory. Where there is no such file, ours of that name is meant.

    :param config: path that the zoo would read, or the name of a Python module
    :return: path to read
    """
    path = Path(config)
    ours = HYPERPARAMS / path.name
    if path.exists() or path.parent.name not in ("", "hyperparams") or not ours.exists():
        return config
    return str(ours)


def check_names(hyperparams: Iterable[str]) -> None:
    """
    :param hyperparams: names of settings, from a file, ``-params`` and a study
    :raises ValueError: for a name that neither PolyGRAD nor the zoo knows, with the nearest one
    """
    known = (set(inspect.signature(PolyGRAD.__init__).parameters) - GIVEN_BY_THE_ZOO) | TAKEN_BY_THE_ZOO
    for name in hyperparams:
        choose("hyperparameter", name, known)


def sample_polygrad_params(trial: Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    A point of the search space, which is sized for CPUs. A trial decides all of ``world_model_kwargs`` and
    ``policy_update_kwargs``.

    :param trial: draws the values
    :param n_actions: unused, as are the others: part of the zoo's signature
    :param n_envs: number of environments
    :param additional_args: about hindsight replay
    :return: keyword arguments of PolyGRAD
    """
    trial.suggest_float("one_minus_gamma", 1e-3, 0.03, log=True)
    trial.suggest_float("one_minus_gae_lambda", 0.02, 0.3, log=True)
    trial.suggest_float("learning_rate", 3e-5, 1e-3, log=True)
    trial.suggest_float("critic_learning_rate", 3e-4, 3e-3, log=True)
    trial.suggest_float("ent_coef", 1e-6, 1e-2, log=True)
    trial.suggest_int("n_steps_pow", 2, 5)
    trial.suggest_int("n_imagined_pow", 6, 9)
    trial.suggest_int("horizon", 3, 15)
    if trial.suggest_categorical("world_model", ["ensemble", "diffusion"]) == "ensemble":
        update = trial.suggest_categorical("policy_update", ["pathwise", "ppo", "a2c"])
        trial.suggest_int("world_model_n_members", 1, 7)
    else:  # no gradients: a parameter of its own, since Optuna wants the same choices at every draw
        update = trial.suggest_categorical("policy_update_without_gradients", ["ppo", "a2c"])
        trial.suggest_int("sampler_n_diffusion_steps_pow", 3, 6)
    if update == "ppo":
        trial.suggest_float("policy_update_clip_range", 0.05, 0.2, log=True)
    if update in ("pathwise", "ppo"):
        trial.suggest_int("policy_update_n_epochs", 1, 6)
    if update == "a2c":
        trial.suggest_float("policy_update_target_step_size", 0.005, 0.05, log=True)
    trial.suggest_int("world_model_width_pow", 6, 9)
    trial.suggest_int("world_model_n_layers", 2, 6)
    trial.suggest_float("world_model_learning_rate", 1e-4, 3e-3, log=True)
    params = convert_polygrad_params(trial.params)
    for name in ("gamma", "gae_lambda", "n_steps", "n_imagined"):  # the values meant, beside those drawn
        trial.set_user_attr(name, params[name])
    return params


def convert_polygrad_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: values as a study stores them
    :return: keyword arguments of PolyGRAD
    """
    params: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {"policy_update_": {}, "world_model_": {}, "sampler_": {}}
    for name, value in sampled_params.items():
        if name == "policy_update_without_gradients":
            name = "policy_update"
        prefix = next((prefix for prefix in nested if name.startswith(prefix)), "")
        name = name.removeprefix(prefix)
        if name.endswith("_pow"):
            name, value = name.removesuffix("_pow"), 2**value
        elif name.startswith("one_minus_"):
            name, value = name.removeprefix("one_minus_"), 1 - value
        nested.get(prefix, params)[name] = value
    world_model_kwargs = nested["world_model_"]
    if nested["sampler_"]:
        world_model_kwargs["sampler"] = {"name": "policy_guided", **nested["sampler_"]}
    return {**params, "policy_update_kwargs": nested["policy_update_"], "world_model_kwargs": world_model_kwargs}


completions: dict[str, Callable[[ModuleType], None]] = {
    "rl_zoo3.utils": add_algorithm,
    "rl_zoo3.hyperparams_opt": add_search_space,
    "rl_zoo3.exp_manager": extend_manager,
}
