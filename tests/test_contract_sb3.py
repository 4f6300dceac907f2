"""What Stable-Baselines3 holds every algorithm to, as far as other files do not test it already (docs/trust.md lists both)."""

from __future__ import annotations

import gc
import time
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import HParam
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecMonitor, VecNormalize
from torch import nn

from sb3_polygrad import PolyGRAD
from tests.test_polygrad import OBSERVATIONS, predictions, recorded
from tests.toys import PointEnv, SpacesEnv, equal_trees, tiny_model

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU"))

# ---------------------------------------------------------------------- test_save_load


@pytest.mark.parametrize("device", ["auto", "cpu", CUDA])
def test_loads_on_any_device_and_learns_on(tmp_path: Path, device: str) -> None:
    model = tiny_model(PointEnv()).learn(80)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = PolyGRAD.load(tmp_path / "model", env=PointEnv(), device=device)
    loaded.load_replay_buffer(tmp_path / "buffer")
    tensors = [*loaded.policy.parameters(), *loaded.world_model.parameters(), loaded.replay_buffer.observations]
    assert {tensor.device.type for tensor in tensors} == {loaded.device.type}
    assert np.allclose(predictions(loaded), predictions(model), atol=1e-5)
    loaded.learn(16, reset_num_timesteps=False)


@pytest.mark.slow
def test_a_compiled_policy_is_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny_model(PointEnv()).learn(80)
    before = predictions(model)
    model.policy = th.compile(model.policy)  # type: ignore[assignment]
    model.save(tmp_path / "model")
    loaded = PolyGRAD.load(tmp_path / "model", env=PointEnv(), device="cpu").learn(80)
    assert loaded._n_updates > model._n_updates
    assert np.array_equal(predictions(PolyGRAD.load(tmp_path / "model", device="cpu")), before)


def test_no_file_is_left_open(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        model = tiny_model(PointEnv()).learn(80)
        model.save(tmp_path / "model")
        model.save_replay_buffer(tmp_path / "buffer")
        PolyGRAD.load(tmp_path / "model", env=PointEnv()).load_replay_buffer(tmp_path / "buffer")
        with (tmp_path / "open").open("wb") as file:
            model.save(file)
            assert not file.closed
        gc.collect()


def test_exclude_include_and_custom_objects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(PointEnv(), gamma=0.5).learn(80)
    model.save(tmp_path / "excluded", exclude=["gamma", "_n_updates"])
    loaded = PolyGRAD.load(tmp_path / "excluded", print_system_info=True)
    assert (loaded.gamma, loaded._n_updates) == (0.995, 0), "the constructor's"
    assert "SAVED MODEL SYSTEM INFO" in capsys.readouterr().out
    model.save(tmp_path / "included", include=["_pace"])
    assert PolyGRAD.load(tmp_path / "included")._pace is not None
    loaded = PolyGRAD.load(tmp_path / "included", custom_objects={"gamma": 0.7, "unheard_of": 1})
    assert loaded.gamma == 0.7 and not hasattr(loaded, "unheard_of")


def test_schedules_give_floats_and_survive(tmp_path: Path) -> None:
    model = tiny_model(PointEnv(), learning_rate=lambda left: np.float32(1e-3) * left)
    assert type(model.lr_schedule(0.5)) is float
    model.save(tmp_path / "model")
    loaded = PolyGRAD.load(tmp_path / "model")
    assert loaded.lr_schedule(0.5) == pytest.approx(5e-4)


def test_an_object_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import stable_baselines3.common.save_util as save_util

    model = tiny_model(PointEnv())
    model.save(tmp_path / "model")

    def fail(*args: Any) -> None:
        raise RuntimeError("made by another python")

    monkeypatch.setattr(save_util.cloudpickle, "loads", fail)
    with pytest.warns(UserWarning, match="custom_objects"), pytest.raises(Exception):  # noqa: B017
        PolyGRAD.load(tmp_path / "model")


def test_a_model_to_act_with_takes_little_memory(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    tiny_model(PointEnv(), buffer_size=5_000_000).save(tmp_path / "model")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loaded = PolyGRAD.load(tmp_path / "model")
    loaded.predict(OBSERVATIONS)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "the steps alone would take 100 MB"


# ---------------------------------------------------------------------- test_callbacks, test_logger, test_tensorboard


def test_eval_callback_synchronises_the_statistics_and_logs_at_the_step() -> None:
    env, eval_env = VecNormalize(make_vec_env(PointEnv, 1)), VecNormalize(make_vec_env(PointEnv, 2), training=False)
    model = tiny_model(env)
    record = recorded(model)
    model.learn(80, callback=EvalCallback(eval_env, n_eval_episodes=2, eval_freq=40, warn=False), log_interval=1)
    assert np.array_equal(eval_env.obs_rms.mean, env.obs_rms.mean), "the last evaluation was at the last step"  # type: ignore[union-attr]
    assert {dump["time/total_timesteps"] for dump in record.dumps if "eval/mean_reward" in dump} == {40, 80}


def test_eval_callback_says_what_is_missing() -> None:
    callback = EvalCallback(make_vec_env(PointEnv, 1), eval_freq=8, warn=False)
    with pytest.raises(AssertionError, match="synchronizing normalization stats"):
        tiny_model(VecNormalize(make_vec_env(PointEnv, 1))).learn(16, callback=callback)


class Clock(BaseCallback):
    """Every step takes 10 ms."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.now = 10**18
        monkeypatch.setattr(time, "time_ns", lambda: self.now)

    def _on_step(self) -> bool:
        self.now += 10**7
        return True


@pytest.mark.parametrize("reset", [True, False])
def test_fps_is_of_this_learn(monkeypatch: pytest.MonkeyPatch, reset: bool) -> None:
    clock = Clock(monkeypatch)
    model = tiny_model(PointEnv())
    record = recorded(model)
    model.learn(80, callback=clock, log_interval=1)
    assert record.dumps[-1]["time/fps"] == pytest.approx(100, abs=1)
    clock.now += 10**12  # a long pause
    model.learn(80, callback=clock, log_interval=1, reset_num_timesteps=reset)
    assert record.dumps[-1]["time/fps"] == pytest.approx(100, abs=1)


def test_a_clock_that_stands_still_is_no_division_by_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 10**18)
    model = tiny_model(PointEnv())
    recorded(model)
    model.learn(16, log_interval=1)
    model.dump_logs(iteration=0)


def test_stats_window_size() -> None:
    model = tiny_model(PointEnv(), stats_window_size=3).learn(80)
    for buffer in (model.ep_info_buffer, model.ep_success_buffer):
        assert buffer is not None and buffer.maxlen == 3 and len(buffer) == 3


def test_success_rate_is_that_of_the_last_episodes() -> None:
    class Every(PointEnv):
        """Every second episode is a success."""

        n_episodes = 0

        def step(self, action: np.ndarray) -> Any:
            *result, _ = super().step(action)
            self.n_episodes += result[3]
            return *result, {"is_success": self.n_episodes % 2 == 1}

    model = tiny_model(Every())
    record = recorded(model)
    model.learn(80, log_interval=1)
    assert record.dumps[-1]["rollout/success_rate"] == pytest.approx(0.5)


def test_hyperparameters_in_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")

    class Settings(BaseCallback):
        def _on_training_start(self) -> None:
            settings = {"gamma": self.model.gamma, "learning_rate": self.model.learning_rate}  # type: ignore[attr-defined]
            self.logger.record(
                "hparams", HParam(settings, {"train/value_loss": 0.0}), exclude=("stdout", "log", "json", "csv")
            )

        def _on_step(self) -> bool:
            return True

    tiny_model(PointEnv(), tensorboard_log=str(tmp_path)).learn(80, callback=Settings(), log_interval=1)
    assert list(tmp_path.glob("PolyGRAD_1/**/events*"))


# ---------------------------------------------------------------------- test_predict, test_spaces


def test_predict_single_and_batched() -> None:
    model = tiny_model(PointEnv(scale=3.0, center=7.0))
    for observation, shape in ((np.zeros(1, dtype=np.float32), (1,)), (np.zeros((5, 1), dtype=np.float32), (5, 1))):
        for deterministic in (True, False):
            action, state = model.predict(observation, deterministic=deterministic)
            assert isinstance(action, np.ndarray) and action.shape == shape and state is None
            assert (action >= 4.0).all() and (action <= 10.0).all()


def test_the_old_gym_interface_is_recognised() -> None:
    model = tiny_model(PointEnv())
    with pytest.raises(ValueError, match="mixing Gym API"):
        model.predict(PointEnv().reset())  # type: ignore[arg-type]


def test_subclassed_spaces(tmp_path: Path) -> None:
    class MyBox(spaces.Box):
        pass

    model = tiny_model(SpacesEnv(MyBox(-1.0, 1.0, (3,)), MyBox(-1.0, 1.0, (2,)))).learn(80)
    assert model.predict(np.zeros(3, dtype=np.float32))[0].shape == (2,)


def test_environments_by_name() -> None:
    assert tiny_model("Pendulum-v1").learn(8).num_timesteps == 8


# ---------------------------------------------------------------------- test_run, test_deterministic, test_train_eval_mode


@pytest.mark.parametrize("policy_update", ["pathwise", "ppo", "a2c"])
def test_losses_are_finite(policy_update: str) -> None:
    model = tiny_model(PointEnv(), policy_update=policy_update)
    record = recorded(model)
    model.learn(96, log_interval=1)
    assert all(np.isfinite(record.dumps[-1][f"train/{name}"]) for name in ("policy_loss", "value_loss", "entropy_loss"))


def test_same_seed_same_draws() -> None:
    draws = []
    for _ in range(2):
        model = tiny_model(PointEnv(), seed=3).learn(96)
        draws.append([model.predict(OBSERVATIONS)[0] for _ in range(100)])
    assert np.array_equal(draws[0], draws[1])


class NormalisedFeatures(BaseFeaturesExtractor):
    """Layers that behave differently in training."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, 4)
        self.net = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.net(observations)


def test_batch_norm_and_dropout_only_act_in_training() -> None:
    model = tiny_model(PointEnv(), policy_kwargs=dict(net_arch=[8], features_extractor_class=NormalisedFeatures))
    norm = model.policy.features_extractor.net[1]
    model.learn(56)  # real steps only
    assert norm.running_mean.abs().sum() == 0.0, "unchanged where real steps are made"
    assert np.array_equal(predictions(model), predictions(model)), "no dropout"
    assert norm.running_mean.abs().sum() == 0.0, "unchanged by predict"
    model.learn(80, reset_num_timesteps=False)
    after = norm.running_mean.clone()
    assert after.abs().sum() > 0.0, "changed by the updates"
    model.imagine(4)
    assert th.equal(norm.running_mean, after), "unchanged where it is imagined"


# ---------------------------------------------------------------------- test_monitor, test_utils


def test_a_monitor_is_put_around_plain_environments() -> None:
    model = tiny_model(PointEnv())
    assert model.env is not None and model.env.env_is_wrapped(Monitor) == [True]
    assert len(model.learn(80).ep_info_buffer) == 8  # type: ignore[arg-type]


def test_vec_monitor_gives_no_warning() -> None:
    env = VecMonitor(DummyVecEnv([PointEnv, PointEnv]))
    model = tiny_model(env)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(80)
        evaluate_policy(model, env, n_eval_episodes=2)
    assert model.ep_info_buffer


class Alone(VecEnv):
    """Environments that are stepped together and have no objects of their own, as simulators on GPUs have it."""

    refusal: type[Exception] = AttributeError

    def __init__(self, n_envs: int) -> None:
        self.env = PointEnv()
        super().__init__(n_envs, self.env.observation_space, self.env.action_space)
        self.x, self.t = np.zeros((n_envs, 1), dtype=np.float32), 0

    def reset(self) -> np.ndarray:
        self.x, self.t = np.full((self.num_envs, 1), 1.5, dtype=np.float32), 0
        return self.x.copy()

    def step_async(self, actions: np.ndarray) -> None:
        self.x, self.t = np.clip(self.x + 0.5 * actions, -2.0, 2.0).astype(np.float32), self.t + 1

    def step_wait(self) -> Any:
        last, rewards, done = self.x.copy(), -(self.x[:, 0] ** 2), self.t >= 10
        info = {"terminal_observation": None, "TimeLimit.truncated": True} if done else {}
        infos = [{**info, "terminal_observation": row} if done else {} for row in last]
        return (self.reset() if done else last), rewards, np.full(self.num_envs, done), infos

    def close(self) -> None:
        pass

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        if attr_name == "render_mode":
            return [None] * self.num_envs
        raise self.refusal(attr_name)

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise AttributeError(attr_name)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise self.refusal(method_name)

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


@pytest.mark.parametrize("refusal", [AttributeError, EOFError, BrokenPipeError])
def test_a_vec_env_of_ones_own(refusal: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(VecMonitor(Alone(2))).learn(160)
    assert len(model.replay_buffer) == 160 and model._n_updates > 0
    with monkeypatch.context() as patch:
        patch.setattr(Alone, "refusal", refusal)  # a worker that died, say
        model.save_checkpoint(tmp_path)
    with pytest.warns(UserWarning, match=f"begin new episodes.*cannot be asked.*{refusal.__name__}"):
        resumed = PolyGRAD.resume(tmp_path, VecMonitor(Alone(2)), device="cpu")
    assert equal_trees(resumed.get_parameters(), model.get_parameters())
    resumed.learn(16, reset_num_timesteps=False)


def test_environments_in_processes_learn_the_same() -> None:
    models = []
    for vec_env_class, kwargs in ((DummyVecEnv, {}), (SubprocVecEnv, {"start_method": "fork"})):
        env = make_vec_env(PointEnv, 2, vec_env_cls=vec_env_class, vec_env_kwargs=kwargs)
        models.append(tiny_model(env).learn(160))
        env.close()
    assert equal_trees(models[0].get_parameters(), models[1].get_parameters())


# ---------------------------------------------------------------------- test_gae::test_infinite_horizon


class Endless(gym.Env):
    """One observation, reward 1 for ever; time limits cut it at every tenth step."""

    observation_space = spaces.Box(-1.0, 1.0, (1,))
    action_space = spaces.Box(-1.0, 1.0, (1,))
    t = 0

    def reset(self, **kwargs: Any) -> Any:
        super().reset(seed=kwargs.get("seed"))
        self.t = 0
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action: np.ndarray) -> Any:
        self.t += 1
        return np.zeros(1, dtype=np.float32), 1.0, False, self.t >= 10, {}


def test_time_limits_bootstrap() -> None:
    model = tiny_model(
        Endless(),
        gamma=0.8,
        gradient_steps=1,
        critic_learning_rate=1e-2,
        policy_update_kwargs=dict(n_epochs=4),
        policy_kwargs=dict(net_arch=[16], tau=1.0),
        world_model_kwargs=dict(learning_rate=1e-2),
    ).learn(800)
    value = model.policy.predict_values(th.zeros(1, 1)).mean().item()
    assert value == pytest.approx(1.0 / (1.0 - 0.8), abs=0.8), "the sum of 0.8^t; cut at the time limit it would be 3.2"
