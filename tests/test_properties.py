"""Whatever the settings: those that make sense work for 64 steps, all others work or are refused by their name."""

from __future__ import annotations

import functools
import inspect
import typing
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import gymnasium as gym
import pytest
import torch as th
import yaml
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_polygrad import EnsembleWorldModel, PolyGRAD, hyperparams_loader, load_hyperparams
from sb3_polygrad.common.validation import Count, Range
from sb3_polygrad.diffusion.staggered import StaggeredSampler
from sb3_polygrad.policies import PolyGRADPolicy
from sb3_polygrad.updates import UPDATES
from sb3_polygrad.world_models.diffusion import policy_guided
from sb3_polygrad.world_models.make import WORLD_MODELS
from tests.toys import TINY, TINY_ENSEMBLE, PointEnv

hypothesis = pytest.importorskip("hypothesis", reason="needs the extra [tests]")
st = hypothesis.strategies

ARGUMENTS = list(inspect.signature(PolyGRAD).parameters)
NESTED = {"policy_kwargs", "policy_update_kwargs", "world_model_kwargs"}


def hints_of(function: Any, *without: str) -> dict[str, Any]:
    """The annotations of a function's or class's settings."""
    function = vars(function)["__init__"] if isinstance(function, type) else function
    hints = typing.get_type_hints(function, include_extras=True)
    return {name: hint for name, hint in hints.items() if name not in {*without, "return"}}


UPDATE_SETTINGS = {name: hints_of(update, "ent_coef", "max_grad_norm") for name, update in UPDATES.items()}
GIVEN_TO_WORLD_MODELS = ("obs_dim", "action_low", "action_high", "horizon")
WORLD_MODEL_SETTINGS = {name: hints_of(make, *GIVEN_TO_WORLD_MODELS) for name, make in WORLD_MODELS.items()}
POLICY_SETTINGS = hints_of(PolyGRADPolicy, "observation_space", "action_space", "lr_schedule", "kwargs")
SAMPLERS = {"policy_guided": hints_of(policy_guided, "half_range"), "staggered": hints_of(StaggeredSampler, "horizon")}
IS_DIFFERENTIABLE = {name: typing.cast(Any, make).differentiable for name, make in WORLD_MODELS.items()}


# ---------------------------------------------------------------------- values


def usable(name: str, hint: Any) -> Any:
    """Values that should work: small ones of the annotated type, within its range."""
    if name in USABLE and not (name == "learning_rate" and typing.get_origin(hint) is Annotated):  # of a world model
        return USABLE[name]
    range_ = Range()
    if typing.get_origin(hint) is Annotated:
        hint, range_ = typing.get_args(hint)
    if hint is int:
        return st.integers(int(range_.low), int(range_.low) + 2)
    if hint is float:
        bounds = dict(exclude_min=range_.open_low, exclude_max=range_.open_high and range_.high <= 1.0)
        small = st.floats(max(range_.low, -1.0), min(range_.high, 1.0), **bounds)
        return small if range_.high <= 1.0 else st.one_of(small, st.floats(1.0, 1e30))
    if hint is bool:
        return st.booleans()
    if hint is type(None):
        return st.none()
    if typing.get_origin(hint) is Literal:
        return st.sampled_from(typing.get_args(hint))
    options = typing.get_args(hint)
    assert options, f"how to draw {name}: {hint}?"
    return st.one_of(*(usable("", option) for option in options))


def some(settings: Mapping[str, Any], **always: Any) -> Any:
    """Dicts of some of the settings."""
    optional = {name: usable(name, hint) for name, hint in settings.items() if name not in always}
    return st.fixed_dictionaries(always, optional=optional)


def normalized_env() -> VecNormalize:
    return VecNormalize(make_vec_env(PointEnv, 1))


def world_model_of_ones_own(
    obs_dim: int, action_low: th.Tensor, action_high: th.Tensor, horizon: int, width: Count = 4, n_layers: Count = 1
) -> EnsembleWorldModel:
    return EnsembleWorldModel(obs_dim, action_low, action_high, horizon, width=width, n_layers=n_layers)


WILD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(),
    st.sampled_from(["lin_0.001", "lin_x", "", "ppo", "staggered", [], [1, 2], {}, {"width": 4}, -1e300, 1e300, 1e-300]),
)
RATE = st.floats(0.0, 1.0)
USABLE: dict[str, Any] = {
    # of PolyGRAD
    "policy": st.sampled_from(["MlpPolicy", PolyGRADPolicy]),
    "env": st.sampled_from([PointEnv, lambda: PointEnv(goal_ends=True), lambda: make_vec_env(PointEnv, 2), normalized_env]),
    "learning_rate": st.one_of(RATE, st.builds(LinearSchedule, RATE, RATE, st.floats(0.1, 1.0))),
    "n_steps": st.integers(1, 20),
    "batch_size": st.integers(1, 16),
    "gradient_steps": st.sampled_from([-1, 1, 3]),
    "ent_coef": st.floats(-1e3, 1e3),
    "buffer_size": st.integers(64, 300),
    "learning_starts": st.integers(12, 48),
    "horizon": st.integers(2, 6),
    "n_imagined": st.integers(1, 9),
    "world_model": st.sampled_from([*WORLD_MODELS, world_model_of_ones_own, functools.partial(world_model_of_ones_own)]),
    "stats_window_size": st.integers(1, 5),
    "tensorboard_log": st.sampled_from([None, "tensorboard"]),
    "verbose": st.integers(0, 2),
    "seed": st.one_of(st.none(), st.integers(0, 2**32 - 1)),
    "device": st.sampled_from(["cpu", "auto", th.device("cpu")]),
    # of the policy; the floor of the standard deviation is below its start
    "net_arch": st.sampled_from([None, [], [4], dict(pi=[4], vf=[8])]),
    "activation_fn": st.sampled_from(["relu", "elu", "silu", "tanh", nn.Tanh]),
    "min_std": st.floats(0.0, 0.05),
    "log_std_init": st.floats(-2.0, 1.0),
    # of world models
    "width": st.sampled_from([4, 8]),
    "weight_decay": st.floats(0.0, 0.5),
    "context": st.integers(1, 6),
    "window": st.one_of(st.none(), st.integers(1, 6)),
    "denoiser": st.sampled_from(["residual_mlp", "transformer"]),
}
"""Values that should work, where the annotation does not say enough."""

SAMPLER = {
    "diffusion": st.one_of(*(some(settings, name=st.just(name)) for name, settings in SAMPLERS.items())),
    "autoregressive_diffusion": some(
        {"n_diffusion_steps": Annotated[int, Range(1)], "heun": bool, "churn": Annotated[float, Range(0.0)]},
    ),
}
SMALL: dict[str, Any] = {"width": st.just(8), "n_layers": st.just(1)}
NOT_LEFT_OUT: dict[str, dict[str, Any]] = {
    "diffusion": {**SMALL, "sampler": SAMPLER["diffusion"]},
    "transformer": {**SMALL, "context": st.integers(1, 6)},
    "autoregressive_diffusion": {**SMALL, "sampler": SAMPLER["autoregressive_diffusion"]},
}
"""Settings of world models whose defaults are too large for 64 steps."""


@st.composite
def sensible(draw: Any) -> dict[str, Any]:
    """Up to eight arguments that should work together, with settings of policy, update and world model."""
    hints = hints_of(PolyGRAD)
    chosen = draw(st.sets(st.sampled_from(sorted(set(ARGUMENTS) - NESTED)), max_size=8))
    given = {name: draw(usable(name, hints[name])) for name in sorted(chosen)}
    world_model = given.get("world_model", "ensemble")
    settings, small = hints_of(world_model_of_ones_own, *GIVEN_TO_WORLD_MODELS), SMALL
    if isinstance(world_model, str):
        settings, small = WORLD_MODEL_SETTINGS[world_model], NOT_LEFT_OUT.get(world_model, SMALL)
    is_differentiable = IS_DIFFERENTIABLE.get(world_model, True)
    if given.get("policy_update") == "pathwise" and not is_differentiable:
        del given["policy_update"]
    update = given.get("policy_update") or ("pathwise" if is_differentiable else "ppo")
    given["policy_update_kwargs"] = draw(some(UPDATE_SETTINGS[update]))
    given["world_model_kwargs"] = draw(some(settings, **small))
    given["policy_kwargs"] = draw(some(POLICY_SETTINGS, net_arch=USABLE["net_arch"]))
    return {"policy": "MlpPolicy", "env": PointEnv, **TINY, **given}


@st.composite
def with_a_wild_one(draw: Any) -> tuple[dict[str, Any], str]:
    """Arguments that should work, but for one, or one setting of one; and the name of that one."""
    given = draw(sensible())
    name = draw(st.sampled_from(ARGUMENTS))
    if name in NESTED and draw(st.integers(0, 3)):
        given[name] = {**given[name], (setting := draw(st.sampled_from(sorted(settings_of(name, given))))): draw(WILD)}
        return given, setting
    sampler = given["world_model_kwargs"].get("sampler")
    if name == "world_model_kwargs" and sampler and draw(st.booleans()):
        setting = draw(st.sampled_from(sorted(sampler)))
        given[name] = {**given[name], "sampler": {**sampler, setting: draw(WILD)}}
        return given, setting
    given[name] = draw(WILD)
    if name == "env":  # only a model that builds no networks may do without one
        given.pop("_init_setup_model", None)
    return given, name


def settings_of(name: str, given: dict[str, Any]) -> set[str]:
    """The settings that one of the nested arguments may have."""
    if name == "policy_kwargs":
        return set(POLICY_SETTINGS)
    if name == "policy_update_kwargs":
        return {setting for settings in UPDATE_SETTINGS.values() for setting in settings}
    return set(WORLD_MODEL_SETTINGS.get(given.get("world_model", "ensemble"), {"width", "n_layers"}))


# ---------------------------------------------------------------------- outcomes


def learns(given: dict[str, Any]) -> PolyGRAD:
    """A model that learns for 64 steps."""
    given = {**given, "env": given["env"]() if callable(given["env"]) else given["env"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PolyGRAD(**given)
        if not given.get("_init_setup_model", True):
            model._setup_model()
        model.learn(64)
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())
    return model


def refusal(given: dict[str, Any]) -> str | None:
    """The message with which settings are refused, or None if they work."""
    try:
        learns(given)
    except (ValueError, TypeError, AssertionError, RuntimeError, gym.error.Error) as error:
        return f"{type(error).__name__}: {error}"
    return None


def names(message: str, *arguments: str) -> bool:
    """Whether a message names one of several arguments. (Torch says "Device", SB3 "Policy", gymnasium "Environment".)"""
    return any(argument.lower() in message.lower() for argument in arguments)


def for_all(strategy: Any, n_draws: int, derandomize: bool) -> Callable[[Callable[[Any], None]], None]:
    """Call a function with everything that is drawn, at once."""

    def decorate(function: Callable[[Any], None]) -> None:
        settings = hypothesis.settings(
            max_examples=n_draws,
            deadline=None,
            database=None,
            derandomize=derandomize,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        settings(hypothesis.given(strategy)(function))()

    return decorate


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_argument_is_drawn() -> None:
    assert len(ARGUMENTS) == 26
    for name, hint in hints_of(PolyGRAD).items():
        assert name in NESTED or usable(name, hint) is not None
    assert set(UPDATE_SETTINGS) == {"pathwise", "ppo", "a2c"} and all(UPDATE_SETTINGS.values())
    assert set(WORLD_MODEL_SETTINGS) == set(WORLD_MODELS) and all(WORLD_MODEL_SETTINGS.values())


def check_sensible(n_draws: int, derandomize: bool) -> None:
    @for_all(sensible(), n_draws, derandomize)
    def check(given: dict[str, Any]) -> None:
        learns(given)


def check_wild(n_draws: int, derandomize: bool) -> None:
    n_refused = 0

    @for_all(with_a_wild_one(), n_draws, derandomize)
    def check(drawn: tuple[dict[str, Any], str]) -> None:
        nonlocal n_refused
        given, name = drawn
        message = refusal(given)
        n_refused += message is not None
        assert message is None or names(message, name), f"{name} is not named: {message}"

    assert n_refused > n_draws / 5, "some of the draws have to be refused, else nothing is tried"


def test_sensible_settings_work() -> None:
    check_sensible(30, derandomize=True)


def test_any_setting_works_or_is_refused_by_its_name() -> None:
    check_wild(60, derandomize=True)


@pytest.mark.slow
def test_a_thousand_sensible_settings_work() -> None:
    check_sensible(1_000, derandomize=False)


@pytest.mark.slow
def test_two_thousand_settings_work_or_are_refused_by_their_names() -> None:
    check_wild(2_000, derandomize=False)


# ---------------------------------------------------------------------- configuration files


def check_entries(folder: Path, monkeypatch: pytest.MonkeyPatch, n_draws: int, derandomize: bool) -> None:
    monkeypatch.setattr(hyperparams_loader, "HYPERPARAMS", folder)
    entries = sorted({*ARGUMENTS, "n_timesteps", "normalise"} - {"policy", "env", "_init_setup_model"})
    wild = st.one_of(WILD, st.sampled_from(["lin_0.1", "const_3", "1e-3", "None", "dict(width=3)"]))

    @for_all(st.dictionaries(st.sampled_from(entries), wild, max_size=2), n_draws, derandomize)
    def check(entry: dict[str, Any]) -> None:
        (folder / "mine.yml").write_text(yaml.safe_dump({"default": {"policy": "MlpPolicy", **entry}}))
        settings = {"policy": "MlpPolicy", "env": PointEnv, **TINY, "world_model_kwargs": TINY_ENSEMBLE}
        try:
            settings.update(load_hyperparams("mine", "Hopper-v5"))
        except (ValueError, TypeError) as error:
            assert names(str(error), *entry), f"no argument is named: {error!r}"
            return
        message = refusal(settings)
        assert message is None or names(message, *entry), f"no argument is named: {message}"
        assert message is not None or "normalise" not in entry


def test_any_entry_of_a_file_works_or_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_entries(tmp_path, monkeypatch, 40, derandomize=True)


@pytest.mark.slow
def test_five_hundred_entries_of_a_file_work_or_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_entries(tmp_path, monkeypatch, 500, derandomize=False)


def test_schedules_in_files_are_those_of_the_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hyperparams_loader, "HYPERPARAMS", tmp_path)
    (tmp_path / "mine.yml").write_text("default: {learning_rate: lin_0.001, n_steps: 5}\nbroken: {learning_rate: lin_much}")
    settings = load_hyperparams("mine", "Hopper-v5")
    assert [settings["learning_rate"](left) for left in (1.0, 0.5, 0.0)] == pytest.approx([1e-3, 5e-4, 0.0])
    assert settings["n_steps"] == 5
    with pytest.raises(ValueError, match="learning_rate: 'lin_much'"):
        load_hyperparams("mine", "broken")
    with pytest.raises(TypeError, match=r"learning_rate: 'lin_0\.1' is for configuration files"):
        PolyGRAD("MlpPolicy", PointEnv(), learning_rate="lin_0.1")  # type: ignore[arg-type]
