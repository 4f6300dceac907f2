"""The algorithm as SB3's users meet it: learning, saving, environments, callbacks."""

from __future__ import annotations

import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor, VecNormalize

from sb3_polygrad import ActionDiagnostics, DiffusionWorldModel, PolyGRAD, Trajectory
from sb3_polygrad.episode_buffer import EpisodeBuffer
from sb3_polygrad.imagination import Imagination, StartStates
from sb3_polygrad.imagined_buffer import gae
from sb3_polygrad.world_models.base import Metrics, PolicyFn, WorldModel
from tests.toys import PointEnv, SpacesEnv, equal_trees, tiny_model

OBSERVATIONS = np.linspace(-2.0, 2.0, 9, dtype=np.float32)[:, None]
VARIANTS: dict[str, dict[str, Any]] = {
    "pathwise, ensemble": dict(policy_update="pathwise", world_model="ensemble"),
    "ppo, staggered": dict(
        policy_update="ppo", world_model="diffusion", world_model_kwargs=dict(sampler=dict(name="staggered", n_levels=2))
    ),
    "a2c, policy guided": dict(policy_update="a2c", world_model="diffusion"),
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> dict[str, Any]:
    return deepcopy(VARIANTS[request.param])


def predictions(model: PolyGRAD) -> np.ndarray:
    return model.predict(OBSERVATIONS, deterministic=True)[0]


def imagined(model: PolyGRAD, seed: int = 3) -> Trajectory:
    th.manual_seed(seed)
    return model.imagine(th.as_tensor(OBSERVATIONS))


def equal_trajectories(a: Trajectory, b: Trajectory) -> bool:
    return all(th.equal(x, y) for x, y in zip(a, b, strict=True))


class Record(KVWriter):
    """Keeps everything that is logged."""

    def __init__(self) -> None:
        self.dumps: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.dumps.append(dict(key_values))

    def close(self) -> None:
        pass


def recorded(model: PolyGRAD) -> Record:
    record = Record()
    model.set_logger(Logger(None, [record]))
    return record


# ---------------------------------------------------------------------- learning


@pytest.mark.parametrize("env", [PointEnv(), PointEnv(goal_ends=True), PointEnv(scale=3.0, center=7.0)])
def test_toy_environment_keeps_the_contract(env: gym.Env) -> None:
    check_env(env)


def test_learns_the_known_optimum() -> None:
    # Per episode: straight to 0 costs about 1, an untrained policy about 15.
    env = PointEnv(scale=3.0, center=7.0)
    model = tiny_model(
        env,
        world_model_kwargs=dict(width=32, n_layers=2, learning_rate=2e-3),
        gradient_steps=8,
        batch_size=64,
        n_imagined=64,
        horizon=6,
        learning_rate=2e-3,
        gamma=0.9,
        policy_kwargs=dict(net_arch=[32], log_std_init=-0.5),
        learning_starts=200,
    )
    untrained, _ = evaluate_policy(model, Monitor(env), n_eval_episodes=30)
    model.learn(600)
    trained, _ = evaluate_policy(model, Monitor(env), n_eval_episodes=30)
    assert trained > -2.5, f"near the optimum (untrained {untrained:.1f})"
    assert trained > untrained + 5.0


def test_imagined_steps_are_no_real_steps(variant: dict[str, Any]) -> None:
    model = tiny_model(PointEnv(), **variant).learn(160)
    assert model.num_timesteps == len(model.replay_buffer) == 160
    assert len(model.ep_info_buffer) == 16, "episodes of 10 steps"  # type: ignore[arg-type]
    assert model._n_updates == (160 - 64) // 8 + 1, "one per n_steps, from learning_starts on"


def test_world_model_makes_up_for_the_prefill() -> None:
    model = tiny_model(PointEnv(), gradient_steps=-1).learn(80)
    assert model.world_model.n_fits == 80, "one gradient step per real step, those of the prefill included"


def test_acts_at_random_until_learning_starts() -> None:
    model = tiny_model(PointEnv(), policy_kwargs=dict(log_std_init=-6.0, min_std=0.0))
    with th.no_grad():
        model.policy.action_net.weight.zero_()  # the policy would hardly move
    model.learn(128)
    actions = model.replay_buffer.actions[:128, 0]
    assert actions[:64].std() > 0.4, "uniform over the box"
    assert actions[64:].abs().max() < 0.4, "the policy's"


def test_buffer_holds_what_the_environment_received_and_returned() -> None:
    model = tiny_model(PointEnv(), policy_kwargs=dict(log_std_init=1.0)).learn(200)  # many draws beyond the box
    buffer = model.replay_buffer
    actions, now, after = (tensor[:200, 0] for tensor in (buffer.actions, buffer.observations, buffer.next_observations))
    assert actions.abs().max() == 1.0, "clipped to the box"
    assert th.allclose(after, (now + 0.5 * actions).clamp(-2, 2), atol=1e-6), "the true successor, at time limits too"
    assert th.allclose(buffer.rewards[:200], -after.square(), atol=1e-6)
    assert buffer.terminals[:200].sum() == 0.0, "a time limit is no terminal"


def test_terminals_are_stored_as_such() -> None:
    model = tiny_model(PointEnv(length=50, goal_ends=True)).learn(200)
    buffer = model.replay_buffer
    reached = buffer.next_observations[:200, 0].abs() < 0.1
    assert reached.any()
    assert th.equal(buffer.terminals[:200].bool(), reached)


@pytest.mark.parametrize("vec_env_class", [DummyVecEnv, SubprocVecEnv])
def test_several_environments(vec_env_class: type) -> None:
    env = make_vec_env(PointEnv, 2, vec_env_cls=vec_env_class)
    model = tiny_model(env).learn(160)
    env.close()
    assert model.num_timesteps == len(model.replay_buffer) == 160
    now, after = model.replay_buffer.observations[:160, 0], model.replay_buffer.next_observations[:160, 0]
    # A ring of two environments in turn: within an episode of 10 an observation is the successor of the one before it.
    for index in range(2):
        starts, ends = now[index::2], after[index::2]
        follows = th.isclose(starts[1:], ends[:-1])
        assert follows.reshape(-1)[[t for t in range(79) if t % 10 != 9]].all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float64_environments(dtype: type) -> None:
    tiny_model(PointEnv(dtype=dtype)).learn(100)  # the environment checks the actions' type


def test_boxes_of_more_than_one_dimension() -> None:
    env = SpacesEnv(spaces.Box(-1.0, 1.0, (2, 3)), spaces.Box(-2.0, 3.0, (2, 2)))
    model = tiny_model(env).learn(100)
    assert model.predict(env.observation_space.sample())[0].shape == (2, 2)
    assert model.imagine(5).observations.shape == (5, 5, 6)


def test_an_exploding_world_model_does_not_end_the_run() -> None:
    model = tiny_model(PointEnv()).learn(80)
    with th.no_grad():
        for parameter in model.world_model.parameters():
            parameter.fill_(th.nan)
    before = predictions(model)
    record = recorded(model)
    model.learn(80, log_interval=1)
    assert np.array_equal(predictions(model), before), "nothing is learnt from nonsense"
    assert record.dumps[-1]["imagination/skipped"] == 1.0


@pytest.mark.parametrize("learning_rate", [3e-3, lambda progress: 3e-3 * progress])
def test_actor_follows_the_schedule_and_the_critic_its_own_rate(learning_rate: Any) -> None:
    model = tiny_model(PointEnv(), learning_rate=learning_rate, critic_learning_rate=0.02).learn(160)
    actor, log_std = model.policy.actor_optimizer.param_groups
    (critic,) = model.policy.critic_optimizer.param_groups
    assert actor["lr"] == pytest.approx(
        3e-3 if not callable(learning_rate) else learning_rate(model._current_progress_remaining)
    )
    assert critic["lr"] == 0.02 and log_std["lr"] == model.policy.log_std_learning_rate


def test_a_world_model_of_ones_own() -> None:
    built = []

    def mine(obs_dim: int, action_low: th.Tensor, action_high: th.Tensor, horizon: int, size: int = 8) -> Any:
        built.append(size)
        return DiffusionWorldModel(obs_dim, action_low, action_high, horizon, width=size, n_layers=1)

    model = PolyGRAD("MlpPolicy", PointEnv(), world_model=mine, world_model_kwargs={"size": 16}, learning_starts=64, horizon=4)
    assert built == [16]
    with pytest.raises(ValueError, match="did you mean 'size'"):
        PolyGRAD("MlpPolicy", PointEnv(), world_model=mine, world_model_kwargs={"sise": 16})
    assert model.world_model.horizon == 4


# ---------------------------------------------------------------------- the same again


def test_same_seed_same_run(variant: dict[str, Any]) -> None:
    runs = [tiny_model(PointEnv(), **{**variant, "seed": seed}).learn(96) for seed in (1, 1, 2)]
    rewards = [model.replay_buffer.rewards[:96] for model in runs]
    assert th.equal(rewards[0], rewards[1]) and np.array_equal(predictions(runs[0]), predictions(runs[1]))
    assert not th.equal(rewards[0], rewards[2])


def test_learn_again_goes_on() -> None:
    model = tiny_model(PointEnv()).learn(100)
    policy, n_updates = predictions(model), model._n_updates
    model.learn(48, reset_num_timesteps=False)
    assert model.num_timesteps == 152, "13 rollouts of 8 steps, then 6"
    assert len(model.replay_buffer) == 152
    assert model._n_updates == n_updates + 6, "without another prefill"
    assert not np.array_equal(predictions(model), policy)
    model.learn(8)
    assert model.num_timesteps == 8 and len(model.replay_buffer) == 160, "counted anew, nothing forgotten"


def test_no_segment_crosses_a_second_learn() -> None:
    # Episodes longer than a run: learn() resets the environment in the middle of one.
    model = tiny_model(PointEnv(length=1_000)).learn(64)
    model.learn(8)
    observations = model.replay_buffer.sample(500, 4).observations[..., 0]
    assert (observations.diff(dim=1).abs() <= 0.5 + 1e-6).all(), "the point moves by half a unit at most"
    # 61 segments of 4 in the first episode, 5 in the second.
    assert len(model.replay_buffer.segment_starts(4)) == 66


# ---------------------------------------------------------------------- saving


@pytest.mark.parametrize("path_type", [str, Path])
def test_save_and_load(tmp_path: Path, variant: dict[str, Any], path_type: type) -> None:
    model = tiny_model(PointEnv(), **variant).learn(80)
    model.save(path_type(tmp_path / "model"))
    loaded = PolyGRAD.load(path_type(tmp_path / "model"), env=PointEnv(), device="cpu")
    assert np.array_equal(predictions(loaded), predictions(model))
    assert equal_trajectories(imagined(loaded), imagined(model))
    assert equal_trees(loaded.get_parameters(), model.get_parameters()), "optimisers, normalisers and δ too"
    assert (loaded.num_timesteps, loaded._n_updates) == (model.num_timesteps, model._n_updates)
    before = predictions(loaded)
    loaded.learn(80, reset_num_timesteps=False)
    assert loaded.num_timesteps == 160 and loaded._n_updates > model._n_updates
    assert not np.array_equal(predictions(loaded), before), "it goes on learning"


def test_saved_files_go_on_as_the_model_would(tmp_path: Path, variant: dict[str, Any]) -> None:
    # Same weights, same buffer, same randomness: the same updates. (Where trajectories go on from is only in a checkpoint.)
    model = tiny_model(PointEnv(), **variant).learn(120)
    model.start_states = StartStates(model.update.n_continuations)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = PolyGRAD.load(tmp_path / "model", env=PointEnv(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer")
    for each in (model, loaded):
        each.set_random_seed(5)
        recorded(each)
        for _ in range(3):
            each.replay_buffer.count_all_as_new()
            each.train()
    assert equal_trees(loaded.get_parameters(), model.get_parameters())


def test_loaded_without_environment_it_predicts_and_imagines(tmp_path: Path) -> None:
    model = tiny_model(PointEnv()).learn(80)
    model.save(tmp_path / "model")
    loaded = PolyGRAD.load(tmp_path / "model", device="cpu")
    assert np.array_equal(predictions(loaded), predictions(model))
    assert equal_trajectories(imagined(loaded), imagined(model))


def test_load_with_another_number_of_environments(tmp_path: Path) -> None:
    tiny_model(PointEnv()).learn(80).save(tmp_path / "model")
    env = make_vec_env(PointEnv, 2)
    with pytest.raises(AssertionError):
        tiny_model(PointEnv()).set_env(env)
    loaded = PolyGRAD.load(tmp_path / "model", env=env, device="cpu").learn(80)
    assert len(loaded.replay_buffer) == 80 and loaded.replay_buffer.n_envs == 2


def test_load_refuses_another_world_model(tmp_path: Path) -> None:
    tiny_model(PointEnv()).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"horizon=4, which cannot be changed to 8"):
        PolyGRAD.load(tmp_path / "model", horizon=8)
    with pytest.raises(ValueError, match=r"world_model_kwargs=.*cannot be changed"):
        PolyGRAD.load(tmp_path / "model", world_model_kwargs=dict(width=8))
    assert PolyGRAD.load(tmp_path / "model", horizon=4, gamma=0.5).gamma == 0.5


def test_saved_model_is_small(tmp_path: Path) -> None:
    model = tiny_model(PointEnv(), buffer_size=100_000).learn(80)
    model.save(tmp_path / "model")
    assert (tmp_path / "model.zip").stat().st_size < 500_000, "no buffers inside"


def test_policy_alone(tmp_path: Path) -> None:
    model = tiny_model(PointEnv(scale=3.0, center=7.0)).learn(80)
    model.policy.save(tmp_path / "policy.pkl")
    policy = type(model.policy).load(tmp_path / "policy.pkl")
    assert np.array_equal(policy.predict(OBSERVATIONS, deterministic=True)[0], predictions(model))


@pytest.mark.parametrize("optimizer_class", [th.optim.SGD, th.optim.AdamW])
def test_optimizer_class_survives(tmp_path: Path, optimizer_class: type) -> None:
    tiny_model(PointEnv(), policy_kwargs=dict(net_arch=[8], optimizer_class=optimizer_class)).learn(80).save(
        tmp_path / "model"
    )
    loaded = PolyGRAD.load(tmp_path / "model", env=PointEnv(), device="cpu").learn(80)
    assert isinstance(loaded.policy.actor_optimizer, optimizer_class)
    assert isinstance(loaded.policy.critic_optimizer, optimizer_class)


def test_every_tensor_can_be_randomised(variant: dict[str, Any]) -> None:
    # As SB3's test_save_load does it.
    model = tiny_model(PointEnv(), **variant).learn(80)
    parameters = model.get_parameters()
    states = {name: state for name, state in parameters.items() if "optim" not in name}
    assert set(states) == {"policy", "world_model"}
    assert all(tensor.is_floating_point() for state in states.values() for tensor in state.values())
    random = {name: {key: th.rand_like(tensor) for key, tensor in state.items()} for name, state in states.items()}
    kept = {name: random[name].popitem() for name in random}
    before = {name: deepcopy(states[name][key]) for name, (key, _) in kept.items()}
    model.set_parameters(deepcopy(random), exact_match=False)
    after = model.get_parameters()
    for name, state in random.items():
        assert all(th.equal(after[name][key], tensor) for key, tensor in state.items())
        assert th.equal(after[name][kept[name][0]], before[name]), "the last one was not given"
    model.learn(80)


def test_set_parameters_refuses_what_does_not_fit() -> None:
    model = tiny_model(PointEnv())
    parameters = model.get_parameters()
    optimizers = {"policy.actor_optimizer", "policy.critic_optimizer", "world_model.optimizer"}
    assert {"policy", "world_model", *optimizers} == set(parameters)
    for exact_match in (True, False):
        with pytest.raises(ValueError, match="unknown"):
            model.set_parameters({**parameters, "unknown": {}}, exact_match=exact_match)
    for name in ("policy", "world_model"):
        with pytest.raises(ValueError):
            model.set_parameters({key: value for key, value in parameters.items() if key != name})
        truncated = dict(list(parameters[name].items())[:-1])
        with pytest.raises(RuntimeError):
            model.set_parameters({**parameters, name: truncated})


# ---------------------------------------------------------------------- the replay buffer


def test_replay_buffer_round_trip(tmp_path: Path) -> None:
    model = tiny_model(PointEnv()).learn(100)
    model.save_replay_buffer(tmp_path / "folder" / "buffer")
    fresh = tiny_model(PointEnv())
    fresh.load_replay_buffer(tmp_path / "folder" / "buffer")
    assert len(fresh.replay_buffer) == 104
    assert th.equal(fresh.replay_buffer.observations, model.replay_buffer.observations)
    assert np.array_equal(fresh.replay_buffer.segment_starts(4), model.replay_buffer.segment_starts(4))
    fresh.learn(16)
    assert len(fresh.replay_buffer) == 120 and fresh._n_updates == 2, "no prefill where there is data"
    normalizer = fresh.world_model.state_normalizer
    assert normalizer.count == 2 * 120, "the statistics have seen what was loaded, once"


def test_replay_buffer_of_other_environments_is_refused(tmp_path: Path) -> None:
    tiny_model(PointEnv()).learn(80).save_replay_buffer(tmp_path / "buffer")
    with pytest.raises(ValueError, match="the saved buffer has n_envs=1, this model n_envs=2"):
        tiny_model(make_vec_env(PointEnv, 2)).load_replay_buffer(tmp_path / "buffer")
    with pytest.raises(ValueError, match="obs_dim=1, this model obs_dim=3"):
        tiny_model(SpacesEnv(spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (1,)))).load_replay_buffer(tmp_path / "buffer")
    (tmp_path / "other.pkl").write_bytes(pickle.dumps({"not": "a buffer"}))
    with pytest.raises(ValueError, match=r"other\.pkl cannot be loaded"):
        tiny_model(PointEnv()).load_replay_buffer(tmp_path / "other")
    th.save({"not": "a buffer"}, tmp_path / "another.pkl")
    with pytest.raises(ValueError, match=r"another\.pkl holds no EpisodeBuffer"):
        tiny_model(PointEnv()).load_replay_buffer(tmp_path / "another")


def test_replay_buffer_fits_models_with_another_horizon(tmp_path: Path) -> None:
    tiny_model(PointEnv()).learn(80).save_replay_buffer(tmp_path / "buffer")
    model = tiny_model(PointEnv(), world_model="diffusion", horizon=6)
    model.load_replay_buffer(tmp_path / "buffer")
    assert model.learn(8).world_model.n_fits > 0


def test_loaded_buffer_does_not_go_on_in_another_environment(tmp_path: Path) -> None:
    tiny_model(PointEnv(length=1_000)).learn(64).save_replay_buffer(tmp_path / "buffer")
    model = tiny_model(PointEnv(length=1_000)).learn(8)  # in the middle of an episode of its own
    model.load_replay_buffer(tmp_path / "buffer")
    model.learn(8, reset_num_timesteps=False)
    assert len(model.replay_buffer.segment_starts(4)) == 61 + 5, "none across the seam"


# ---------------------------------------------------------------------- imagination


def test_imagine_starts_from_what_was_really_seen() -> None:
    model = tiny_model(PointEnv()).learn(80)
    trajectory = model.imagine(50)
    seen = set(model.replay_buffer.observations[:80, 0].tolist())
    assert set(trajectory.observations[:, 0, 0].tolist()) <= seen
    start = th.full((3, 1), 0.5)
    assert th.equal(model.imagine(start).observations[:, 0], start)


def test_imagined_actions_are_draws_from_the_policy() -> None:
    model = tiny_model(PointEnv(scale=3.0, center=7.0), policy_kwargs=dict(log_std_init=-2.0, min_std=0.05)).learn(80)
    trajectory = model.imagine(2_000)
    normal = model.policy.get_distribution(trajectory.observations[:, :-1].reshape(-1, 1)).distribution
    z = (trajectory.actions.reshape(-1, 1) - normal.mean) / normal.stddev  # type: ignore[attr-defined]
    assert z.mean().item() == pytest.approx(0.0, abs=4 / 8_000**0.5)
    assert z.std().item() == pytest.approx(1.0, abs=4 / 16_000**0.5)


def test_imagining_needs_a_fitted_model() -> None:
    with pytest.raises(ValueError, match="the buffer is empty"):
        tiny_model(PointEnv()).imagine(4)
    with pytest.raises(RuntimeError, match="never fitted"):
        tiny_model(PointEnv()).imagine(th.zeros(4, 1))


# ---------------------------------------------------------------------- VecNormalize


def test_vec_normalize(tmp_path: Path) -> None:
    env = VecNormalize(make_vec_env(PointEnv, 2), gamma=0.9)
    model = tiny_model(env).learn(160)
    buffer = model.replay_buffer
    now, after = buffer.observations[:160, 0], buffer.next_observations[:160, 0]
    actions = buffer.actions[:160, 0]
    assert th.allclose(after, (now + 0.5 * actions).clamp(-2, 2), atol=1e-4), "the environment's units"
    assert th.allclose(buffer.rewards[:160], -after.square(), atol=1e-4)
    # Imagination starts in the environment's units; the policy acts on what it would see there.
    trajectory = model.imagine(2_000)
    seen = env.normalize_obs(trajectory.observations[:, :-1].reshape(-1, 1).numpy())
    normal = model.policy.get_distribution(th.as_tensor(seen).float()).distribution
    z = (trajectory.actions.reshape(-1, 1) - normal.mean) / normal.stddev  # type: ignore[attr-defined]
    assert z.std().item() == pytest.approx(1.0, abs=4 / 16_000**0.5)
    # What the critic learnt from is in VecNormalize's units.
    scale = np.sqrt(env.ret_rms.var + env.epsilon)
    batch = model.imagination(model.replay_buffer.sample_observations(model.n_imagined))
    rewards = batch.trajectory.rewards / float(scale)
    assert th.allclose(batch.rewards, rewards, atol=1e-5)
    model.rollout_buffer.fill(batch, model.policy)
    samples = model.rollout_buffer.all_steps()
    seen = env.normalize_obs(batch.trajectory.observations.reshape(-1, 1).numpy())
    values = model.policy.target_values(th.as_tensor(seen).float()).view(model.n_imagined, model.horizon + 1)
    advantages = gae(rewards, values, batch.trajectory.terminals, model.gamma, model.gae_lambda).flatten()
    assert th.allclose(samples.advantages, advantages, atol=1e-4)
    # Loading finds the wrapper again.
    model.save(tmp_path / "model")
    env.save(str(tmp_path / "statistics.pkl"))
    loaded_env = VecNormalize.load(str(tmp_path / "statistics.pkl"), make_vec_env(PointEnv, 2))
    loaded = PolyGRAD.load(tmp_path / "model", env=loaded_env, device="cpu")
    assert loaded.get_vec_normalize_env() is loaded_env
    loaded.learn(80)


class Ramp(WorldModel):
    """Imagines given observations and rewards."""

    def __init__(self, values: th.Tensor) -> None:
        super().__init__(1, 1, len(values))
        self.values = values

    def observe(self, steps: Trajectory) -> None: ...

    def fit(self, segments: Trajectory) -> Metrics:
        return {}

    def imagine(self, start: th.Tensor, policy: PolicyFn, *, differentiable: bool = False) -> Trajectory:
        actions = policy(self.values[:, None]).sample()
        observations = th.cat([start, self.values[:, None]])
        nothing = th.zeros(1, len(self.values))
        return Trajectory(observations[None], actions[None], self.values[None], nothing, 1.0 - nothing)


def test_imagined_data_is_normalised_as_real_data_is() -> None:
    env = VecNormalize(make_vec_env(PointEnv, 1), clip_obs=2.0, clip_reward=1.5)
    env.obs_rms.mean, env.obs_rms.var, env.ret_rms.var = np.array([3.0]), np.array([4.0]), np.array(9.0)  # type: ignore[union-attr]
    values = th.linspace(-20.0, 20.0, 41)
    policy = tiny_model(PointEnv()).policy
    imagination = Imagination(Ramp(values), policy)
    for wrapper in (env, None):
        imagination.sync(wrapper)
        batch = imagination(th.zeros(1, 1))
        normalize_obs = (lambda x: x) if wrapper is None else wrapper.normalize_obs
        normalize_reward = (lambda x: x) if wrapper is None else wrapper.normalize_reward
        assert np.allclose(batch.observations[0, 1:, 0].numpy(), normalize_obs(values[:, None].numpy())[:, 0], atol=1e-5)
        assert np.allclose(batch.rewards[0].numpy(), normalize_reward(values.numpy()), atol=1e-5)
        assert th.equal(batch.trajectory.observations[0, 1:, 0], values) and th.equal(batch.trajectory.rewards[0], values)
        seen = th.as_tensor(normalize_obs(values[:, None].numpy())).float()
        assert th.allclose(imagination.policy_at(values[:, None]).mean, policy.get_distribution(seen).mode(), atol=1e-6)


def test_vec_normalize_of_rewards_alone() -> None:
    model = tiny_model(VecNormalize(make_vec_env(PointEnv, 1), norm_obs=False)).learn(120)
    assert th.allclose(model.replay_buffer.rewards[:120], -model.replay_buffer.next_observations[:120, 0].square(), atol=1e-4)


def test_set_env_swaps_the_wrapper() -> None:
    model = tiny_model(make_vec_env(PointEnv, 1)).learn(80)
    env = VecNormalize(make_vec_env(PointEnv, 1))
    model.set_env(env)
    assert model.get_vec_normalize_env() is env
    model.learn(40, reset_num_timesteps=False)
    now, after = model.replay_buffer.observations[:120, 0], model.replay_buffer.next_observations[:120, 0]
    assert th.allclose(after, (now + 0.5 * model.replay_buffer.actions[:120, 0]).clamp(-2, 2), atol=1e-4)


def test_set_env_wraps_and_resets() -> None:
    model = tiny_model(PointEnv()).learn(80)
    model.set_env(PointEnv(length=3))
    assert model._last_obs is None
    model.learn(16, reset_num_timesteps=False)
    assert model.num_timesteps == 96


# ---------------------------------------------------------------------- callbacks and logging


class Watch(BaseCallback):
    """Counts calls and checks what SB3's own callbacks rely on."""

    def __init__(self, stop: Any = None) -> None:
        super().__init__()
        self.stop, self.events = stop, [0, 0]

    def _on_rollout_start(self) -> None:
        self.events[0] += 1

    def _on_rollout_end(self) -> None:
        self.events[1] += 1

    def _on_step(self) -> Any:
        assert {"new_obs", "rewards", "dones", "infos", "actions"} <= set(self.locals)
        assert len(self.model.replay_buffer) == self.num_timesteps, "the step is stored before the callback sees it"  # type: ignore[attr-defined]
        return self.stop if self.stop is not None else True


def test_callbacks_see_every_step() -> None:
    watch = Watch()
    tiny_model(PointEnv()).learn(80, callback=watch)
    assert watch.n_calls == watch.num_timesteps == 80
    assert watch.events == [10, 10]


@pytest.mark.parametrize("stop", [False, np.bool_(0), th.tensor(0)])
def test_callback_stops_after_one_call(stop: Any) -> None:
    watch = Watch(stop)
    model = tiny_model(PointEnv()).learn(80, callback=watch)
    assert watch.n_calls == model.num_timesteps == 1


@pytest.mark.parametrize("n_envs", [1, 2])
def test_max_episodes_is_exact(n_envs: int) -> None:
    model = tiny_model(make_vec_env(PointEnv, n_envs))
    model.learn(10_000, callback=StopTrainingOnMaxEpisodes(max_episodes=3))
    assert model.num_timesteps == 3 * 10 * n_envs, "episodes of 10 steps, all environments at once"


def test_sb3_callbacks_together(tmp_path: Path) -> None:
    evaluation = EvalCallback(
        DummyVecEnv([lambda: Monitor(PointEnv())]),
        eval_freq=40,
        n_eval_episodes=2,
        best_model_save_path=str(tmp_path / "best"),
        log_path=str(tmp_path),
    )
    checkpoint = CheckpointCallback(40, str(tmp_path), "point", save_replay_buffer=True, save_vecnormalize=True)
    every = EveryNTimesteps(16, Watch())
    model = tiny_model(VecNormalize(make_vec_env(PointEnv, 1)))
    evaluation.eval_env = VecNormalize(evaluation.eval_env, training=False)
    model.learn(96, callback=[evaluation, checkpoint, every, LogEveryNTimesteps(20)], progress_bar=True)
    assert evaluation.evaluations_timesteps == [40, 80]
    assert (tmp_path / "best" / "best_model.zip").exists()
    buffers = sorted(tmp_path.glob("point_replay_buffer_*.pkl"))
    assert len(buffers) == 2
    resumed = PolyGRAD.load(tmp_path / "point_80_steps.zip", env=VecNormalize(make_vec_env(PointEnv, 1)), device="cpu")
    resumed.load_replay_buffer(tmp_path / "point_replay_buffer_80_steps.pkl")
    assert isinstance(resumed.replay_buffer, EpisodeBuffer) and len(resumed.replay_buffer) == 80
    VecNormalize.load(str(tmp_path / "point_vecnormalize_80_steps.pkl"), make_vec_env(PointEnv, 1))


def test_a_function_as_callback_and_none() -> None:
    calls = []
    tiny_model(PointEnv()).learn(16, callback=lambda _locals, _globals: calls.append(1) or True)
    assert len(calls) == 16
    tiny_model(PointEnv()).learn(16, callback=None)


@pytest.mark.parametrize("n_envs", [1, 2])
def test_evaluate_policy(n_envs: int) -> None:
    model = tiny_model(PointEnv())
    mean, _ = evaluate_policy(model, VecMonitor(make_vec_env(PointEnv, n_envs)), n_eval_episodes=4)
    assert np.isfinite(mean)


ACTION_NAMES = {"std", "autocorr", "mean", "ks", "predictable", "std_first", "std_last"}


def test_log_names(variant: dict[str, Any]) -> None:
    model = tiny_model(PointEnv(length=50, goal_ends=True), **variant)
    record = recorded(model)
    model.learn(160, log_interval=1)
    names = set().union(*record.dumps)
    expected = {
        "rollout/ep_rew_mean",
        "rollout/success_rate",
        "time/total_timesteps",
        "train/learning_rate",
        "train/n_updates",
    }
    expected |= {"train/policy_loss", "train/value_loss", "train/entropy_loss", "train/std", "train/skipped"}
    if variant["policy_update"] != "pathwise":
        expected |= {"train/update_size"}
    expected |= {"world_model/loss", "world_model/skipped", "imagination/reward_mean", "imagination/skipped"}
    expected |= {"imagination/terminal_rate", "imagination/horizon_mean"}
    if variant["policy_update"] == "a2c":
        expected |= {"imagination/delta", "imagination/delta_at_bound"} | {f"imagination/action_{x}" for x in ACTION_NAMES}
    assert expected <= names, f"missing: {expected - names}"
    assert all(len(name.split("/")[1]) <= 33 for name in names), "longer ones are cut by SB3's table"
    last = record.dumps[-1]
    assert all(np.isfinite(value) for value in last.values() if isinstance(value, int | float))
    assert last["train/n_updates"] == model._n_updates - 1, "dumped before the update of this rollout"


@pytest.mark.parametrize(("world_model", "kwargs"), [("ensemble", {}), ("transformer", dict(width=16, n_layers=1, context=4))])
def test_drawn_actions_are_on_policy_in_the_log(world_model: str, kwargs: dict[str, Any]) -> None:
    model = tiny_model(PointEnv(), world_model=world_model, world_model_kwargs=kwargs, learning_starts=72)
    record = recorded(model)
    model.learn(88, callback=ActionDiagnostics(freq=8, n_trajectories=1_000), log_interval=1)
    last = record.dumps[-1]
    assert {f"imagination/action_{name}" for name in ACTION_NAMES} <= set(last)
    assert last["imagination/action_std"] == pytest.approx(1.0, abs=0.05)
    assert last["imagination/action_autocorr"] == pytest.approx(0.0, abs=0.06)


def test_tensorboard_folders(tmp_path: Path) -> None:
    model = tiny_model(PointEnv(), tensorboard_log=str(tmp_path))
    model.learn(16, tb_log_name="run")
    model.learn(16, tb_log_name="run")
    model.learn(16, tb_log_name="run", reset_num_timesteps=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run_1", "run_2"]


# ---------------------------------------------------------------------- settings that must not end in silence


def test_prefill_ends_whatever_the_sizes() -> None:
    # A buffer of 65 steps for two environments holds 64.
    model = tiny_model(make_vec_env(PointEnv, 2), buffer_size=65, learning_starts=65)
    model.learn(200)
    assert model._n_updates > 0


def test_episodes_shorter_than_a_segment_are_reported() -> None:
    with pytest.raises(ValueError, match="horizon"):
        tiny_model(PointEnv(length=3), world_model="diffusion", horizon=4).learn(200)


def test_episodes_shorter_than_the_horizon_are_enough_for_one_step_models() -> None:
    assert tiny_model(PointEnv(length=3), horizon=4).learn(96).world_model.n_fits > 0


def test_policy_and_world_model_can_be_pickled() -> None:
    model = tiny_model(PointEnv()).learn(80)
    policy, world_model = pickle.loads(pickle.dumps((model.policy, model.world_model)))
    observation = np.array([0.5], dtype=np.float32)
    assert np.array_equal(
        policy.predict(observation, deterministic=True)[0], model.predict(observation, deterministic=True)[0]
    )
    assert all(
        th.equal(a, b) for a, b in zip(world_model.state_dict().values(), model.world_model.state_dict().values(), strict=True)
    )


# ---------------------------------------------------------------------- the paper's details


@pytest.mark.parametrize("guidance", ["noisy_states", "state_update", "policy_sampling", "random_actions"])
def test_learns_with_every_ablation(guidance: str) -> None:
    sampler = dict(name="policy_guided", n_diffusion_steps=4, guidance=guidance)
    model = tiny_model(PointEnv(), world_model="diffusion", policy_update="a2c", world_model_kwargs=dict(sampler=sampler))
    before = predictions(model)
    model.learn(96)
    assert not np.array_equal(predictions(model), before)
    model.policy.zero_grad(set_to_none=True)
    model.imagine(8)
    assert all(parameter.grad is None for parameter in model.policy.parameters()), "imagining leaves no gradient"


def test_the_learning_rate_adapts_below_its_schedule_and_is_saved(tmp_path: Path) -> None:
    # At this rate steps are far too large, so that the search has to shrink them.
    settings = dict(target_step_size=0.001, line_search_max_iter=20, learning_rate_adaptation=0.5)
    model = tiny_model(PointEnv(), policy_update="a2c", policy_update_kwargs=settings, learning_rate=0.01).learn(160)
    group = model.policy.actor_optimizer.param_groups[0]
    assert 1e-5 < group["lr"] < 0.005
    model.save(tmp_path / "model")
    loaded = PolyGRAD.load(tmp_path / "model", env=PointEnv())
    fraction = loaded.policy.actor_optimizer.param_groups[0]["schedule_fraction"]
    assert fraction == group["schedule_fraction"] < 0.5
    loaded.learn(8, reset_num_timesteps=False)
    assert loaded.policy.actor_optimizer.param_groups[0]["lr"] < 0.005, "it goes on from there"
