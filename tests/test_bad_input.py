"""Bad input: refused at once, with the argument and the fix in the message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from sb3_polygrad import PolyGRAD
from tests.toys import TINY, BrokenEnv, PointEnv, SpacesEnv, tiny_model

CLIPPED = pytest.mark.xfail(strict=True, reason="VecNormalize has clipped the last observation of an episode")

VECTOR = spaces.Box(-1.0, 1.0, (3,))
ACTIONS = spaces.Box(-1.0, 1.0, (2,))

# ---------------------------------------------------------------------- spaces


@pytest.mark.parametrize("actions", [spaces.Discrete(3), spaces.MultiDiscrete([2, 2]), spaces.MultiBinary(2)])
def test_actions_must_be_a_box(actions: spaces.Space) -> None:
    with pytest.raises((AssertionError, ValueError), match=r"only supports .*Box"):
        tiny_model(SpacesEnv(VECTOR, actions))


def test_dict_observations_are_refused() -> None:
    # The first words are SB3's own; its contract tests look for them.
    with pytest.raises(ValueError, match="You must use `MultiInputPolicy`"):
        tiny_model(SpacesEnv(spaces.Dict(a=VECTOR), ACTIONS))


def test_dict_observations_are_refused_with_a_way_out() -> None:
    with pytest.raises(ValueError, match="FlattenObservation"):
        tiny_model(SpacesEnv(spaces.Dict(a=VECTOR), ACTIONS))


def test_flattened_dict_observations_are_fine() -> None:
    env = gym.wrappers.FlattenObservation(SpacesEnv(spaces.Dict(a=VECTOR, b=VECTOR), ACTIONS))
    tiny_model(env).learn(72)


@pytest.mark.parametrize("shape", [(36, 36, 3), (1, 8, 8)])
def test_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"observations that are vectors, got images.*CnnPolicy"):
        tiny_model(SpacesEnv(spaces.Box(0, 255, shape, np.uint8), ACTIONS))


def test_discrete_observations_are_refused() -> None:
    with pytest.raises(ValueError, match="needs Box observations"):
        tiny_model(SpacesEnv(spaces.Discrete(4), ACTIONS))


@pytest.mark.parametrize("high", [np.inf, np.array([1.0, np.inf], dtype=np.float32)])
def test_unbounded_actions_are_refused(high: Any) -> None:
    box = spaces.Box(-1.0, high, (2,)) if np.isscalar(high) else spaces.Box(-np.ones(2, dtype=np.float32), high)
    with pytest.raises((AssertionError, ValueError), match=r"bound"):
        tiny_model(SpacesEnv(VECTOR, box))


def test_unbounded_actions_are_refused_with_a_way_out() -> None:
    with pytest.raises((AssertionError, ValueError), match="finite bounds"):
        tiny_model(SpacesEnv(VECTOR, spaces.Box(-np.inf, np.inf, (2,))))


# ---------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("horizon", 1, "horizon must be at least 2"),
        ("learning_starts", 3, r"learning_starts=3 is shorter than one segment.*pass learning_starts >= 4"),
        ("buffer_size", 63, "buffer_size=63 cannot hold learning_starts=64"),
        ("n_steps", 0, "n_steps must be at least 1"),
        ("batch_size", 0, "batch_size must be at least 1"),
        ("n_imagined", 0, "n_imagined must be at least 1"),
        ("learning_rate", -0.1, r"learning_rate must be in \[0, 1\]"),
        ("learning_rate", float("nan"), r"learning_rate must be in \[0, 1\]"),
        ("seed", -1, r"seed must be in \[0, 4.*\]"),
        ("gradient_steps", -2, "gradient_steps must be at least -1"),
        ("gradient_steps", 0, "gradient_steps must be -1"),
        ("gamma", 1.5, r"gamma must be in \[0, 1\]"),
        ("gae_lambda", -0.1, r"gae_lambda must be in \[0, 1\]"),
        ("critic_learning_rate", 0.0, r"critic_learning_rate must be in \(0, 1\]"),
        ("max_grad_norm", -1.0, "max_grad_norm must be greater than 0"),
        ("policy_update", "pppo", "policy_update: 'pppo' is not known; did you mean 'ppo'"),
        ("world_model", "difusion", "world_model: 'difusion' is not known; did you mean 'diffusion'"),
    ],
)
def test_bad_arguments(name: str, value: Any, message: str) -> None:
    # Segments of the diffusion model are as long as the horizon.
    with pytest.raises(ValueError, match=message):
        tiny_model(PointEnv(), **{"world_model": "diffusion", name: value})


@pytest.mark.parametrize(
    ("policy_update", "name", "value", "message"),
    [
        ("pathwise", "n_epochs", 0, "n_epochs must be at least 1"),
        ("pathwise", "n_minibatches", 0, "n_minibatches must be at least 1"),
        ("pathwise", "n_continuations", -1, "n_continuations must be at least 0"),
        ("pathwise", "clip_range", 0.1, "'clip_range' is not known"),
        ("ppo", "clip_range", 0.0, "clip_range must be greater than 0"),
        ("ppo", "n_epochs", 0, "n_epochs must be at least 1"),
        ("ppo", "n_minibatches", 0, "n_minibatches must be at least 1"),
        ("ppo", "clip_rnage", 0.1, "'clip_rnage' is not known; did you mean 'clip_range'"),
        ("a2c", "target_step_size", 0.0, "target_step_size must be greater than 0"),
        ("a2c", "line_search_max_iter", 0, "line_search_max_iter must be at least 1"),
        ("a2c", "learning_rate_adaptation", 1.5, r"learning_rate_adaptation must be in \[0, 1\]"),
        ("a2c", "ent_coef", 0.1, "'ent_coef' is not known"),
    ],
)
def test_bad_policy_update_kwargs(policy_update: str, name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"policy_update_kwargs: {message}"):
        tiny_model(PointEnv(), policy_update=policy_update, policy_update_kwargs={name: value})


def test_pathwise_gradients_need_a_world_model_that_has_some() -> None:
    with pytest.raises(ValueError, match=r"policy_update='pathwise' needs gradients.*choose policy_update='ppo'"):
        tiny_model(PointEnv(), world_model="diffusion", policy_update="pathwise")


@pytest.mark.parametrize(
    ("world_model", "settings", "message"),
    [
        ("ensemble", {"widht": 64}, "'widht' is not known; did you mean 'width'"),
        ("ensemble", {"horizon": 5}, "world_model_kwargs: 'horizon' is not known"),
        ("ensemble", {"width": 0}, "width must be at least 1"),
        ("ensemble", {"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\)"),
        ("diffusion", {"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\)"),
        ("transformer", {"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\)"),
        ("rssm", {"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\)"),
        ("autoregressive_diffusion", {"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\)"),
        ("ensemble", {"weight_decay": 1e3, "learning_rate": 1e-2}, "lower weight_decay"),
        ("diffusion", {"denoiser": "residual_mpl"}, "did you mean 'residual_mlp'"),
        ("diffusion", {"n_diffusion_steps": 4}, "world_model_kwargs: 'n_diffusion_steps' is not known"),
        ("diffusion", {"sampler": {"name": "stagered"}}, "did you mean 'staggered'"),
        ("diffusion", {"sampler": {"n_difusion_step": 4}}, "did you mean 'n_diffusion_steps'"),
        ("diffusion", {"sampler": {"guidance": "policy_scor"}}, "did you mean 'policy_score'"),
        ("diffusion", {"sampler": {"guidance": "random"}}, "did you mean 'random_actions'"),
        ("diffusion", {"sampler": {"prediction": "v"}}, "prediction: 'v' is not known; .*known are 'epsilon', 'x0'"),
        ("diffusion", {"sampler": {"n_diffusion_steps": 0}}, "n_diffusion_steps must be at least 1"),
        ("diffusion", {"sampler": {"half_range": 1}}, r"world_model_kwargs\['sampler'\]: 'half_range' is not known"),
        ("autoregressive_diffusion", {"sampler": {"heum": True}}, "did you mean 'heun'"),
    ],
)
def test_bad_world_model_kwargs(world_model: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model(PointEnv(), world_model=world_model, world_model_kwargs=settings)


def test_learning_starts_counts_all_environments() -> None:
    with pytest.raises(ValueError, match="pass learning_starts >= 8"):
        tiny_model(make_vec_env(PointEnv, 2), world_model="diffusion", learning_starts=7)


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="learning_start"):
        PolyGRAD("MlpPolicy", PointEnv(), learning_start=100)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="policy_kwargs: 'net_arc' is not known; did you mean 'net_arch'"):
        tiny_model(PointEnv(), policy_kwargs=dict(net_arc=[4]))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("net_arch", 64, "net_arch must be a list of layer sizes"),
        ("net_arch", [64, 0], "net_arch must be a list of layer sizes"),
        ("net_arch", {"pi": [64.0]}, "net_arch must be a list of layer sizes"),
        ("net_arch", {"vf": 64}, "net_arch must be a list of layer sizes"),
        ("net_arch", {"pi": [64], "qf": [64]}, "net_arch: 'qf' is not known"),
        ("activation_fn", True, "activation_fn must be a class of torch.nn, or its name"),
        ("activation_fn", "rellu", r"policy_kwargs\['activation_fn'\]: 'rellu' is not known; did you mean 'relu'"),
        ("log_std_learning_rate", 1e150, r"log_std_learning_rate must be in \[0, 1\]"),
        ("log_std_init", 1e300, r"log_std_init must be in \[-20, 20\]"),
    ],
)
def test_bad_policy_kwargs(name: str, value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        tiny_model(PointEnv(), policy_kwargs={name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("policy", None), ("policy", 3), ("env", None), ("verbose", None), ("verbose", "1")]
)
def test_what_sb3_would_stumble_over_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} must be"):
        PolyGRAD(**{"policy": "MlpPolicy", "env": PointEnv(), name: value})


def test_policies_of_other_algorithms_are_refused() -> None:
    from stable_baselines3.common.policies import ActorCriticPolicy

    with pytest.raises(ValueError, match="subclass of PolyGRADPolicy, got ActorCriticPolicy"):
        PolyGRAD(ActorCriticPolicy, PointEnv(), **TINY)


# ---------------------------------------------------------------------- what comes from the environment


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize(("field", "at"), [("observation", 25), ("observation", 30), ("reset", 25), ("reward", 25)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_never_enter_the_buffer(field: str, at: int, value: float, n_envs: int) -> None:
    # Only the last environment breaks, within an episode or at its end.
    env = DummyVecEnv([PointEnv] * (n_envs - 1) + [lambda: BrokenEnv(field, value, at)])
    model = tiny_model(env)
    with pytest.raises(ValueError, match=rf"index {n_envs - 1}\) produced a .*(observation|reward) that is NaN or infinite"):
        model.learn(100)
    assert 0 < len(model.replay_buffer) < 40 * n_envs
    start = model.replay_buffer.sample_observations(100)
    assert np.isfinite(start.numpy()).all()


@pytest.mark.parametrize("at", [25, pytest.param(30, marks=CLIPPED)])
def test_values_that_are_not_finite_are_found_under_vec_normalize(at: int) -> None:
    # Step 30 is the last one of an episode: its observation comes from its info, already normalised and clipped.
    env = VecNormalize(DummyVecEnv([lambda: BrokenEnv("observation", np.inf, at)]))
    with pytest.raises(ValueError, match="NaN or infinite"):
        tiny_model(env).learn(100)


# ---------------------------------------------------------------------- spaces and wrappers that would fail later


@pytest.mark.parametrize("actions", [spaces.Box(np.zeros(2), np.array([1.0, 0.0])), spaces.Box(-3e38, 3e38, (1,))])
def test_action_boxes_without_a_usable_width_are_refused(actions: spaces.Box) -> None:
    with pytest.raises(ValueError, match=r"high > low|bounded action space"):
        tiny_model(SpacesEnv(VECTOR, actions))


def test_observations_without_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(1,\)"):
        tiny_model(SpacesEnv(spaces.Box(-1.0, 1.0, ()), ACTIONS))


def test_vec_normalize_has_to_be_outermost() -> None:
    with pytest.raises(ValueError, match="VecNormalize outermost"):
        tiny_model(VecFrameStack(VecNormalize(DummyVecEnv([PointEnv])), 2))


@pytest.mark.parametrize(("name", "value"), [("n_steps", 2.5), ("horizon", "4"), ("gamma", None), ("batch_size", True)])
def test_what_is_not_a_number_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=name):
        tiny_model(PointEnv(), **{name: value})


def test_settings_of_the_other_sampler_are_not_ignored_in_silence() -> None:
    sampler = {"name": "staggered", "prediction": "epsilon"}
    with pytest.raises(ValueError, match="'prediction' is not known"):
        tiny_model(PointEnv(), world_model="diffusion", world_model_kwargs={"sampler": sampler})


def test_overrides_of_load_are_checked(tmp_path: Path) -> None:
    tiny_model(PointEnv()).save(tmp_path / "model")
    for override, message in [({"n_imagned": 7}, "did you mean 'n_imagined'"), ({"policy_update": "A2C"}, "policy_update")]:
        with pytest.raises(ValueError, match=message):
            PolyGRAD.load(tmp_path / "model", env=PointEnv(), **override)


def test_custom_objects_of_load_are_not_judged(tmp_path: Path) -> None:
    # As the zoo's enjoy loads a model that is only to act.
    model = tiny_model(PointEnv())
    model.save(tmp_path / "model")
    nothing = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0, "gamma": 2.0}
    loaded = PolyGRAD.load(tmp_path / "model", custom_objects=nothing, seed=1)
    observation = np.array([0.5], dtype=np.float32)
    assert np.array_equal(
        loaded.predict(observation, deterministic=True)[0], model.predict(observation, deterministic=True)[0]
    )


def test_going_on_after_a_value_that_is_not_finite_begins_with_a_reset() -> None:
    env = FaultyEnv(at=90)
    model = tiny_model(env)
    with pytest.raises(ValueError, match="NaN"):
        model.learn(120)
    model.learn(40, reset_num_timesteps=False)
    buffer = model.replay_buffer
    jumps = (buffer.next_observations[: len(buffer)] - buffer.observations[: len(buffer)]).flatten()
    assert set(jumps.tolist()) == {1.0}, "every stored step is one step of the environment"


class FaultyEnv(gym.Env):
    """Counts its steps; the reward of one of them is NaN."""

    observation_space = spaces.Box(0.0, 1e4, (1,))
    action_space = spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        super().reset(seed=kwargs.get("seed"))
        return np.array([self.count], dtype=np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.count += 1
        return np.array([self.count], dtype=np.float32), np.nan if self.count == self.at else 0.0, False, False, {}
