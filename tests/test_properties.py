"""Whatever the settings: they work for 64 steps, or are refused with the name of an argument in the message."""

from __future__ import annotations

import inspect
import typing
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch as th
import yaml
from stable_baselines3.common.utils import LinearSchedule

from sb3_polygrad import PolyGRAD, hyperparams_loader, load_hyperparams
from sb3_polygrad.world_models.factory import BUILDERS, SETTINGS_OF
from tests.toys import TINY, TINY_WORLD_MODEL, PointEnv

hypothesis = pytest.importorskip("hypothesis", reason="needs the extra [tests]")
st = hypothesis.strategies

NOT_DRAWN = {"self", "policy", "env", "tensorboard_log", "verbose", "device", "_init_setup_model"}
ARGUMENTS = {
    name: parameter.default
    for name, parameter in inspect.signature(PolyGRAD.__init__).parameters.items()
    if name not in NOT_DRAWN
}
GIVEN_TO_BUILDERS = {"obs_dim", "action_low", "action_high", "horizon"}
SETTINGS = {
    world_model: {
        name: hint for name, hint in typing.get_type_hints(builder).items() if name not in {*GIVEN_TO_BUILDERS, "return"}
    }
    for world_model, builder in BUILDERS.items()
}
NAMES = {*ARGUMENTS, *(name for settings in SETTINGS.values() for name in settings)}
CHOICES = sorted({option for options in SETTINGS_OF.values() for option in options} | {"x0", "epsilon", "paper"})

WILD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(),
    st.sampled_from(["lin_0.001", "lin_x", "", "ppo", "staggered", [], [1, 2], {}, {"width": 4}, -1e300, 1e300, 1e-300]),
)
SHARE = st.floats(0.0, 1.0)
POSITIVE = st.one_of(st.floats(1e-6, 1.0), st.floats(1e-300, 1e30))
USABLE: dict[str, Any] = {
    "learning_rate": st.one_of(SHARE, st.builds(LinearSchedule, SHARE, SHARE, st.floats(0.1, 1.0))),
    "n_steps": st.integers(1, 20),
    "batch_size": st.integers(1, 16),
    "gradient_steps": st.sampled_from([-1, 1, 3]),
    "gamma": SHARE,
    "gae_lambda": SHARE,
    "clip_range": st.one_of(POSITIVE, st.builds(LinearSchedule, POSITIVE, SHARE, st.floats(0.1, 1.0))),
    "n_epochs": st.integers(1, 2),
    "n_minibatches": st.integers(1, 9),
    "target_kl": st.one_of(st.none(), POSITIVE),
    "target_update": st.one_of(st.none(), POSITIVE),
    "normalize_advantage": st.booleans(),
    "ent_coef": st.floats(-1e3, 1e3),
    "vf_coef": st.floats(-1e3, 1e30),
    "max_grad_norm": POSITIVE,
    "critic_learning_rate": st.floats(1e-6, 1.0),
    "buffer_size": st.integers(30, 300),
    "learning_starts": st.integers(8, 48),
    "horizon": st.integers(2, 6),
    "n_imagined": st.integers(1, 9),
    "policy_update": st.sampled_from(["ppo", "a2c"]),
    "world_model": st.sampled_from(sorted(BUILDERS)),
    "policy_kwargs": st.fixed_dictionaries(
        {}, optional={"net_arch": st.sampled_from([[], [4], dict(pi=[4], vf=[8])]), "critic_tau": st.floats(0.01, 1.0)}
    ),
    "stats_window_size": st.integers(1, 5),
    "seed": st.one_of(st.none(), st.integers(0, 2**31)),
}
"""Values that should work; an argument that is not here is drawn as its default."""


def of_type(hint: Any) -> Any:
    """Values of an annotated type, sensible and not."""
    if hint is int:
        return st.integers(-1, 6)
    if hint is float:
        return st.one_of(SHARE, st.floats(-1.0, 10.0), st.floats())
    if hint is bool:
        return st.booleans()
    options = typing.get_args(hint)
    if hint is str or (options and all(isinstance(option, str) for option in options)):
        return st.sampled_from([*CHOICES, "nonsense"])
    return st.one_of(st.none(), *(of_type(option) for option in options if option is not type(None)))


@st.composite
def arguments(draw: Any) -> dict[str, Any]:
    """Some arguments that should work, sometimes one that should not, and up to three settings of the world model."""
    names = draw(st.sets(st.sampled_from(sorted(set(ARGUMENTS) - {"world_model_kwargs"})), max_size=8))
    given = {name: draw(USABLE.get(name, st.just(ARGUMENTS[name]))) for name in sorted(names)}
    world_model = given.get("world_model", "diffusion")
    settings = SETTINGS[world_model]
    chosen = draw(st.sets(st.sampled_from(sorted(settings)), max_size=3))
    kwargs = dict(TINY_WORLD_MODEL) if world_model == "diffusion" else {"width": 8} if "width" in settings else {}
    given["world_model_kwargs"] = {**kwargs, **{name: draw(of_type(settings[name])) for name in sorted(chosen)}}
    if draw(st.integers(0, 3)) == 0:
        given[draw(st.sampled_from(sorted(ARGUMENTS)))] = draw(WILD)
    if draw(st.integers(0, 9)) == 0:
        given["world_model_kwargs"] = {**kwargs, draw(st.sampled_from(sorted(settings))): draw(WILD)}
    return {
        **{name: value for name, value in TINY.items() if name != "policy_kwargs"},
        "policy_kwargs": {"net_arch": [8]},
        **given,
    }


def works(given: dict[str, Any]) -> bool:
    """Whether settings work; that they are refused properly otherwise is asserted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = PolyGRAD("MlpPolicy", PointEnv(), **given).learn(64)
        except (ValueError, TypeError, AssertionError) as error:
            assert any(name in str(error) for name in NAMES), f"no argument is named: {error!r}"
            return False
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())
    return True


def check_draws(n_draws: int, derandomize: bool) -> None:
    outcomes = []

    @hypothesis.settings(
        max_examples=n_draws,
        deadline=None,
        database=None,
        derandomize=derandomize,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(arguments())
    def check(given: dict[str, Any]) -> None:
        outcomes.append(works(given))

    check()
    assert sum(outcomes) > len(outcomes) / 10, "some of the draws have to work, else little is tried"


def test_any_settings_work_or_are_refused() -> None:
    check_draws(30, derandomize=True)


@pytest.mark.slow
def test_two_thousand_settings_work_or_are_refused() -> None:
    check_draws(2_000, derandomize=False)


# ---------------------------------------------------------------------- configuration files


def check_entries(folder: Path, monkeypatch: pytest.MonkeyPatch, n_draws: int, derandomize: bool) -> None:
    monkeypatch.setattr(hyperparams_loader, "HYPERPARAMS", folder)
    wild = st.one_of(WILD, st.sampled_from(["lin_0.1", "const_3", "1e-3", "None", "dict(width=3)"]))

    @hypothesis.settings(
        max_examples=n_draws,
        deadline=None,
        database=None,
        derandomize=derandomize,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.dictionaries(st.sampled_from([*sorted(ARGUMENTS), "n_timesteps", "normalise"]), wild, max_size=2))
    def check(entry: dict[str, Any]) -> None:
        (folder / "mine.yml").write_text(yaml.safe_dump({"default": {"policy": "MlpPolicy", **entry}}))
        settings = {**TINY, "world_model_kwargs": TINY_WORLD_MODEL}
        try:
            settings.update(load_hyperparams("mine", "Hopper-v5"))
        except (ValueError, TypeError) as error:
            assert any(name in str(error) for name in entry), f"no argument is named: {error!r}"
            return
        if "normalise" in settings:
            with pytest.raises(TypeError, match="normalise"):
                PolyGRAD("MlpPolicy", PointEnv(), **settings)
            return
        works(settings)

    check()


def test_any_entry_of_a_file_works_or_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_entries(tmp_path, monkeypatch, 30, derandomize=True)


@pytest.mark.slow
def test_five_hundred_entries_of_a_file_work_or_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_entries(tmp_path, monkeypatch, 500, derandomize=False)


def test_schedules_in_files_are_those_of_the_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hyperparams_loader, "HYPERPARAMS", tmp_path)
    (tmp_path / "mine.yml").write_text("default: {learning_rate: lin_0.001, clip_range: 0.2}\nbroken: {clip_range: lin_much}")
    settings = load_hyperparams("mine", "Hopper-v5")
    assert [settings["learning_rate"](left) for left in (1.0, 0.5, 0.0)] == pytest.approx([1e-3, 5e-4, 0.0])
    assert settings["clip_range"] == 0.2
    with pytest.raises(ValueError, match="clip_range: 'lin_much'"):
        load_hyperparams("mine", "broken")
    with pytest.raises(TypeError, match=r"learning_rate: 'lin_0\.1' is for configuration files"):
        PolyGRAD("MlpPolicy", PointEnv(), learning_rate="lin_0.1")  # type: ignore[arg-type]
