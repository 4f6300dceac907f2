"""The states of the environments of a ``VecEnv``, taken and given back through what every ``VecEnv`` offers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecFrameStack, VecMonitor, VecNormalize
from stable_baselines3.common.vec_env.vec_check_nan import VecCheckNan

from sb3_polygrad.checkpoint.plain import from_plain, to_plain

Answer = TypeVar("Answer")

WRAPPERS: dict[str, tuple[str, ...]] = {
    "Monitor": ("rewards", "needs_reset", "total_steps"),
    "TimeLimit": ("_elapsed_steps",),
    **dict.fromkeys(
        ("OrderEnforcing", "PassiveEnvChecker", "DtypeObservation", "FilterObservation", "FlattenObservation"), ()
    ),
    **dict.fromkeys(("RescaleObservation", "ReshapeObservation", "TransformObservation", "ClipReward", "TransformReward"), ()),
    **dict.fromkeys(("ClipAction", "RescaleAction", "TransformAction"), ()),
}
"""Wrappers whose state is known: the attributes that change from step to step."""

OWN_METHODS = ("checkpoint_state", "restore_checkpoint_state")
"""Methods by which an environment, or a wrapper, of one's own gives and takes its state (plain values and arrays)."""


class Unavailable(Exception):
    """The environments cannot give or take their states; the message says why."""


def env_states(env: VecEnv) -> dict[str, Any]:
    """
    All that decides how the environments go on, between two steps.

    :param env: the environments
    :return: tensors and plain values, for :func:`set_env_states`; where the environments cannot give their states, the reason
        stands under ``"missing"``
    """
    base, wrappers = _layers(env)
    states: dict[str, Any] = {"wrappers": [_wrapper_state(wrapper) for wrapper in wrappers], "missing": None}
    try:
        states["generators"] = _generators(base)
        kind = _kind(base, wrappers)
        states[kind] = _simulators(base, kind)
        states["attributes"] = {name: _ask(base.get_attr, name) for name in _attributes(base)}
        return to_plain(states)
    except (Unavailable, TypeError) as error:  # what was learnt must be saved all the same; resume() warns with the reason
        states["missing"] = str(error)
    return to_plain({name: states[name] for name in ("wrappers", "missing", "generators") if name in states})


def set_env_states(env: VecEnv, states: dict[str, Any]) -> None:
    """
    Let the environments go on from given states; they must have been reset before.

    :param env: environments like those that the states are from
    :param states: from :func:`env_states`
    :raises Unavailable: if not all could be restored: the environments have to begin new episodes then
    """
    states = from_plain(states)
    base, wrappers = _layers(env)
    if [type(wrapper).__name__ for wrapper in wrappers] != [state["class"] for state in states["wrappers"]]:
        raise Unavailable("they have other wrappers than those that were saved")
    for wrapper, state in zip(wrappers, states["wrappers"], strict=True):
        _set_wrapper_state(wrapper, state)
    if "generators" in states:
        _set_generators(base, states["generators"])
    if states["missing"] is not None:
        raise Unavailable(states["missing"])
    kind = _kind(base, wrappers)
    if kind not in states or set(_attributes(base)) != set(states["attributes"]):
        raise Unavailable("they, or their wrappers, are others than those that were saved")
    for name, values in states["attributes"].items():
        _set_each(base, name, values)
    if kind == "own":
        for index, state in enumerate(states["own"]):
            base.env_method(OWN_METHODS[1], state, indices=[index])
        return
    simulators = _ask(base.get_attr, "data")  # in this process the simulators themselves, else copies of them
    for data, state in zip(simulators, states["mujoco"], strict=True):
        _set_simulator_state(data, state)
    _set_each(base, "data", simulators)


def _ask(question: Callable[..., Answer], *args: Any, **kwargs: Any) -> Answer:
    """
    :param question: a method of a ``VecEnv``, with its arguments
    :raises Unavailable: if there is no answer: a worker has died (EOFError, OSError), or a ``VecEnv`` of one's own lacks what
        is asked for
    """
    try:
        return question(*args, **kwargs)
    except (EOFError, OSError, AttributeError) as error:
        raise Unavailable(f"they cannot be asked ({type(error).__name__}: {error})") from error


def _layers(env: VecEnv) -> tuple[VecEnv, list[VecEnvWrapper]]:
    """The environments without the wrappers of ``VecEnv``, and those wrappers, outermost first."""
    wrappers = []
    while isinstance(env, VecEnvWrapper):
        wrappers.append(env)
        env = env.venv
    return env, wrappers


def _kind(base: VecEnv, wrappers: list[VecEnvWrapper]) -> str:
    """
    How the environments give their states: ``"own"`` methods, or ``"mujoco"``.

    :raises Unavailable: if their state is not fully known
    """
    for wrapper in wrappers:
        if not isinstance(wrapper, (VecNormalize, VecMonitor, VecFrameStack, VecCheckNan)):
            raise Unavailable(f"the state of {type(wrapper).__name__} is not known")
    if _ask(base.has_attr, OWN_METHODS[0]):
        return "own"
    if not (_ask(has_simulator_states, base) and _ask(base.has_attr, "do_simulation")):
        raise Unavailable(f"they are no MuJoCo environments, and have no methods {' and '.join(OWN_METHODS)}")
    for name in _wrapper_names(base):
        if name not in WRAPPERS:
            raise Unavailable(f"the state of the wrapper {name} is not known")
    return "mujoco"


def _simulators(base: VecEnv, kind: str) -> list[Any]:
    if kind == "own":
        return _ask(base.env_method, OWN_METHODS[0])
    return [_simulator_state(data) for data in _ask(base.get_attr, "data")]


def _generators(base: VecEnv) -> list[Any]:
    """
    States of the environments' random generators, ``np_random``.

    :raises Unavailable: if the environments cannot answer now
    """
    if getattr(base, "closed", False) or getattr(base, "waiting", False):
        raise Unavailable("they are closed, or in the middle of a step")
    generators = _ask(base.get_attr, "np_random")
    return [generator.bit_generator.state if isinstance(generator, np.random.Generator) else None for generator in generators]


def _set_generators(base: VecEnv, states: list[Any]) -> None:
    for index, (generator, state) in enumerate(zip(_ask(base.get_attr, "np_random"), states, strict=True)):
        if state is not None:
            generator.bit_generator.state = state
            base.env_method("set_wrapper_attr", "np_random", generator, indices=[index])


def _wrapper_names(base: VecEnv) -> list[str]:
    """Wrappers of the first environment, outermost first: ``<Monitor<TimeLimit<HopperEnv<Hopper-v5>>>>``."""
    text = _ask(base.env_method, "__str__", indices=[0])[0]
    names = re.findall(r"<(\w+)", text)
    return names[: -1 if text.rstrip(">").endswith(" instance") else -2]


def _attributes(base: VecEnv) -> list[str]:
    """Names of the attributes of known wrappers that are around these environments."""
    present = _wrapper_names(base)
    return [name for wrapper, names in WRAPPERS.items() if wrapper in present for name in names]


def _set_each(base: VecEnv, name: str, values: list[Any]) -> None:
    for index, value in enumerate(values):
        base.env_method("set_wrapper_attr", name, value, indices=[index])


# ---------------------------------------------------------------------- MuJoCo


def has_simulator_states(env: VecEnv) -> bool:
    """Whether the environments are MuJoCo's, whose states can be read."""
    return env.has_attr("state_vector") and env.has_attr("set_state")


def _simulator_state(data: Any) -> dict[str, Any]:
    """
    The integration state, and all that was derived from it: some environments look at it before their next step
    (``Ant-v5`` measures its speed by it).
    """
    import mujoco  # here only: no extra is needed without such environments

    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(data.model, kind))
    mujoco.mj_getState(data.model, data, state, kind)
    return {"integration": state, "derived": {name: np.array(values) for name, values in _arrays(data).items()}}


def _set_simulator_state(data: Any, state: dict[str, Any]) -> None:
    import mujoco

    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    if len(state["integration"]) != mujoco.mj_stateSize(data.model, kind):
        raise Unavailable("the simulated bodies are others than those that were saved")
    mujoco.mj_setState(data.model, data, state["integration"], kind)
    for name, values in _arrays(data).items():
        saved = state["derived"].get(name)
        if saved is not None and saved.shape == values.shape:  # lists of contacts and constraints differ, and are made anew
            values[...] = saved


def _arrays(data: Any) -> dict[str, np.ndarray]:
    values = {name: getattr(data, name) for name in dir(data) if not name.startswith("_")}
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray) and value.size}


# ---------------------------------------------------------------------- wrappers of VecEnv


def _wrapper_state(wrapper: VecEnvWrapper) -> dict[str, Any]:
    return {"class": type(wrapper).__name__, **{name: getattr(*_owner(wrapper, name)) for name in _wrapper_fields(wrapper)}}


def _set_wrapper_state(wrapper: VecEnvWrapper, state: dict[str, Any]) -> None:
    for name in _wrapper_fields(wrapper):
        setattr(*_owner(wrapper, name), state[name])


def _wrapper_fields(wrapper: VecEnvWrapper) -> list[str]:
    """Dotted names of what changes from step to step."""
    if isinstance(wrapper, VecNormalize):
        statistics = ["obs_rms", "ret_rms"] if hasattr(wrapper, "obs_rms") else ["ret_rms"]
        return [f"{s}.{name}" for s in statistics for name in ("mean", "var", "count")] + ["returns", "old_obs", "old_reward"]
    if isinstance(wrapper, VecMonitor):
        return ["episode_count", "episode_returns", "episode_lengths"]
    return ["stacked_obs.stacked_obs"] if isinstance(wrapper, VecFrameStack) else []


def _owner(wrapper: VecEnvWrapper, name: str) -> tuple[Any, str]:
    """The object that holds a dotted name, and the last part of the name."""
    *path, last = name.split(".")
    owner: Any = wrapper
    for part in path:
        owner = getattr(owner, part)
    return owner, last
