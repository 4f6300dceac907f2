"""PolyGRAD: Algorithm 3 in SB3's two methods, :meth:`PolyGRAD.collect_rollouts` and :meth:`PolyGRAD.train`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from sb3_polygrad import checks
from sb3_polygrad.checkpoint import saving
from sb3_polygrad.checkpoint.archive import PathOrFile
from sb3_polygrad.checkpoint.load import load_model
from sb3_polygrad.common.device_means import DeviceMeans
from sb3_polygrad.common.faults import FaultMonitor
from sb3_polygrad.common.pace import PaceWarning
from sb3_polygrad.common.trajectory import Trajectory
from sb3_polygrad.common.validation import Count, Fraction, LearningRate, Positive, Range
from sb3_polygrad.episode_buffer import EpisodeBuffer
from sb3_polygrad.imagination import Imagination, StartStates
from sb3_polygrad.imagined_buffer import ImaginedRolloutBuffer
from sb3_polygrad.policies import PolyGRADPolicy
from sb3_polygrad.real_steps import real_step
from sb3_polygrad.updates import make_update
from sb3_polygrad.world_models.base import WorldModel
from sb3_polygrad.world_models.make import make_world_model

SelfPolyGRAD = TypeVar("SelfPolyGRAD", bound="PolyGRAD")


class PolyGRAD(OnPolicyAlgorithm):
    """
    A policy that learns from trajectories imagined by a world model, Algorithm 3 of "World Models via Policy-Guided Trajectory
    Diffusion" (Rigter et al., https://arxiv.org/abs/2312.08533).

    Real steps go to ``replay_buffer``, on which a world model is fitted; the policy learns from trajectories that the world
    model imagines under it, in ``rollout_buffer``. By default the world model is an ensemble of small one-step networks, and
    the policy follows the gradient of its imagined returns through them: of all that was measured this learns best on a CPU.
    The paper's world model, policy-guided diffusion, is ``world_model="diffusion"`` (sizes: hyperparams/polygrad-paper.yml).

    :param policy: ``"MlpPolicy"`` or a subclass of :class:`~sb3_polygrad.policies.PolyGRADPolicy`
    :param env: the environment, with Box observations and a bounded Box of actions
    :param learning_rate: of the actor, a number or a schedule
    :param n_steps: real steps per environment between two updates
    :param batch_size: segments per gradient step of the world model
    :param gradient_steps: gradient steps of the world model per update; -1 for as many as real steps were made
    :param gamma: discount factor
    :param gae_lambda: λ of GAE
    :param ent_coef: weight of the entropy bonus
    :param max_grad_norm: bound on the gradient's norm, for actor and critics each
    :param critic_learning_rate: of the critics
    :param buffer_size: capacity for real steps
    :param learning_starts: real steps, taken at random, before the first update
    :param horizon: steps per imagined trajectory
    :param n_imagined: trajectories imagined per update
    :param policy_update: ``"pathwise"`` (through the world model), ``"ppo"``, or ``"a2c"`` (the paper's). None is pathwise if
        the world model is differentiable, as the default is, and PPO if not, as ``"diffusion"`` is not
    :param policy_update_kwargs: its settings: see :mod:`sb3_polygrad.updates`
    :param world_model: a name of :data:`~sb3_polygrad.world_models.make.WORLD_MODELS`, or a class or function that makes one
    :param world_model_kwargs: its settings: the keyword arguments of its class
    :param policy_kwargs: arguments of the policy
    :param stats_window_size: as in SB3; so are tensorboard_log, verbose, seed, device and _init_setup_model
    :raises ValueError: if an argument makes no sense; the message names it and says what to do
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": PolyGRADPolicy}
    policy: PolyGRADPolicy
    rollout_buffer: ImaginedRolloutBuffer

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: Count = 5,
        batch_size: Count = 256,
        gradient_steps: Annotated[int, Range(-1)] = -1,
        gamma: Fraction = 0.995,
        gae_lambda: Fraction = 0.95,
        ent_coef: float = 1e-5,
        max_grad_norm: Positive = 0.5,
        critic_learning_rate: LearningRate = 1e-3,
        buffer_size: Count = 1_000_000,
        learning_starts: Count = 1_000,
        horizon: Annotated[int, Range(2)] = 5,
        n_imagined: Count = 256,
        policy_update: Literal["pathwise", "ppo", "a2c"] | None = None,
        policy_update_kwargs: Mapping[str, Any] | None = None,
        world_model: str | Callable[..., WorldModel] = "ensemble",
        world_model_kwargs: Mapping[str, Any] | None = None,
        stats_window_size: Count = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: Annotated[int, Range(0, 2**32 - 1)] | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        checks.check_before_sb3(PolyGRAD, policy, env, verbose, _init_setup_model)
        learning = dict(learning_rate=learning_rate, n_steps=n_steps, gamma=gamma, gae_lambda=gae_lambda, ent_coef=ent_coef)
        fixed = dict(vf_coef=1.0, use_sde=False, sde_sample_freq=-1, supported_action_spaces=(spaces.Box,))
        logging = dict(stats_window_size=stats_window_size, tensorboard_log=tensorboard_log, verbose=verbose)
        made = dict(rollout_buffer_class=ImaginedRolloutBuffer, policy_kwargs=policy_kwargs, seed=seed, device=device)
        kwargs: dict[str, Any] = {**learning, **fixed, **logging, **made, "max_grad_norm": max_grad_norm}
        super().__init__(policy, env, **kwargs, _init_setup_model=False)
        self.batch_size, self.gradient_steps, self.critic_learning_rate = batch_size, gradient_steps, critic_learning_rate
        self.buffer_size, self.learning_starts = buffer_size, learning_starts
        self.horizon, self.n_imagined = horizon, n_imagined
        self.policy_update, self.policy_update_kwargs = policy_update, policy_update_kwargs
        self.world_model_class, self.world_model_kwargs, self.uses_vec_normalize = world_model, world_model_kwargs, False
        if self.env is not None:
            self.check_arguments()
        if _init_setup_model:
            self._setup_model()

    def check_arguments(self) -> None:
        """Refuse arguments that cannot work, see :func:`~sb3_polygrad.checks.check_arguments`."""
        checks.check_arguments(self, PolyGRAD)

    @staticmethod
    def _wrap_env(env: GymEnv | str, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        """As in SB3, also for the name of an environment; every environment passes here before SB3 judges its spaces."""
        wrapped = OnPolicyAlgorithm._wrap_env(maybe_make_env(env, verbose), verbose, monitor_wrapper)  # type: ignore[arg-type]
        checks.check_env(wrapped)
        return wrapped

    def _setup_model(self) -> None:
        super()._setup_model()
        assert isinstance(self.action_space, spaces.Box)
        if not isinstance(self.policy, PolyGRADPolicy):
            raise ValueError(f"policy must be 'MlpPolicy' or a subclass of PolyGRADPolicy, got {type(self.policy).__name__}")
        obs_dim = int(np.prod(self.observation_space.shape))  # type: ignore[arg-type]
        low, high = (th.as_tensor(b).float().flatten() for b in (self.action_space.low, self.action_space.high))
        name, kwargs = self.world_model_class, self.world_model_kwargs
        self.world_model = make_world_model(name, obs_dim, low, high, self.horizon, kwargs).to(self.device)
        checks.check_segments(self, self.world_model.window)
        settings = self.policy_update, self.policy_update_kwargs, self.ent_coef, self.max_grad_norm
        self.update = make_update(*settings, differentiable=self.world_model.differentiable)
        self.replay_buffer = EpisodeBuffer(self.buffer_size, obs_dim, len(low), self.n_envs, self.device)
        self.imagination = Imagination(self.world_model, self.policy)
        self.start_states = StartStates(self.update.n_continuations)
        spaces_, discounts = (self.observation_space, self.action_space), (self.gae_lambda, self.gamma)
        self.rollout_buffer = ImaginedRolloutBuffer(self.horizon, *spaces_, self.device, *discounts, self.n_imagined)
        self._means, self._faults, self._pace = DeviceMeans(), FaultMonitor(), PaceWarning()

    def _setup_learn(
        self, total_timesteps: int, callback: MaybeCallback = None, reset_num_timesteps: bool = True, *args: Any, **kwargs: Any
    ) -> tuple[int, BaseCallback]:
        if reset_num_timesteps or self._last_obs is None:
            self.replay_buffer.end_episodes()  # the environments are about to be reset
        self.uses_vec_normalize = self._vec_normalize_env is not None
        return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, *args, **kwargs)

    # ------------------------------------------------------------------ Algorithm 3

    def collect_rollouts(  # type: ignore[override]
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: ImaginedRolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Algorithm 3, lines 4 and 5: real steps, the first ones random, into ``replay_buffer`` (not ``rollout_buffer``)."""
        self.policy.set_training_mode(False)
        callback.on_rollout_start()
        for _ in range(n_rollout_steps):
            actions = self._sample_actions()  # line 4
            # _last_obs is None during the step: if the step fails, the next learn() resets the environments.
            obs, original_obs, self._last_obs = self._last_obs, self._last_original_obs, None  # type: ignore[has-type]
            new_obs, rewards, dones, infos = env.step(actions)
            self.num_timesteps += env.num_envs
            step = real_step(obs, original_obs, actions, new_obs, rewards, dones, infos, self._vec_normalize_env)  # type: ignore[arg-type]
            self.replay_buffer.add(*step)  # line 5
            self._last_obs, self._last_episode_starts = new_obs, dones  # type: ignore[assignment]
            if self._vec_normalize_env is not None:
                self._last_original_obs = self._vec_normalize_env.get_original_obs()  # type: ignore[assignment]
            self._update_info_buffer(infos, dones)
            callback.update_locals(locals())
            if not callback.on_step():
                return False
        callback.on_rollout_end()
        return True

    def train(self) -> None:
        """Algorithm 3, lines 6 to 9: world model, imagination, policy, and δ if the world model has one."""
        if self._in_prefill:
            return
        steps = self.replay_buffer.take_new_steps()
        self.world_model.observe(steps)
        skipped_fits = self._fit_world_model(self._n_fits_due(len(steps.rewards)))  # line 6
        self.imagination.sync(self._vec_normalize_env)
        start = self.start_states.draw(self.replay_buffer, self.n_imagined)
        batch = self.imagination(start, self.update.differentiable)  # line 7
        if is_finite := batch.is_finite:
            self.start_states.keep(batch.trajectory)
            # Line 9 comes before line 8: δ is judged by the policy that acted.
            adapted = self.world_model.adapt(batch.detach().trajectory, self.imagination.policy_at)  # line 9
            self.rollout_buffer.fill(batch, self.policy)  # line 8: returns and advantages
            self.policy.set_learning_rates(self.lr_schedule(self._current_progress_remaining), self.critic_learning_rate)
            self.logger.record("train/learning_rate", self.policy.actor_optimizer.param_groups[0]["lr"])
            self.policy.set_training_mode(True)
            learned = self.update(self.policy, self.rollout_buffer)  # line 8: gradient steps
            self.policy.update_averages()
            self._means.add("train", {**learned, "std": self.policy.relative_std.mean()})
            self._means.add("imagination", {**batch.summary(), **adapted})
        self._means.add("imagination", {"skipped": th.tensor(0.0 if is_finite else 1.0)})
        self._n_updates += 1
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self._pace.update((self._total_timesteps - self.num_timesteps) / (self.n_steps * self.n_envs))
        faults = {
            "the gradients of the world model": float(skipped_fits) == 1.0,
            "the imagined trajectories": not is_finite,
            "the gradients of policy and critics": is_finite and float(learned["skipped"]) == 1.0,
        }
        self._faults.check(faults, self.policy, save=lambda: saving.save_where_it_failed(self))

    def _sample_actions(self) -> np.ndarray:
        """Actions for the present observations, clipped to the box: random ones until something was learnt."""
        if self._in_prefill and self._n_updates == 0:
            return np.array([self.action_space.sample() for _ in range(self.n_envs)])
        with th.no_grad():
            actions = self.policy._predict(obs_as_tensor(self._last_obs, self.device))  # type: ignore[arg-type]
        shaped = actions.cpu().numpy().reshape(-1, *self.action_space.shape)  # type: ignore[misc]
        return np.clip(shaped, self.action_space.low, self.action_space.high)  # type: ignore[attr-defined]

    @property
    def _in_prefill(self) -> bool:
        """Whether there are too few real steps to learn from (in all: a second ``learn`` has no prefill)."""
        return len(self.replay_buffer) < min(self.learning_starts, self.replay_buffer.capacity * self.n_envs)

    def _n_fits_due(self, n_new_steps: int) -> int:
        """Gradient steps of the world model for new real steps. Of a loaded buffer no more than the prefill count as new."""
        per_update = self.n_steps * self.n_envs
        n_new_steps = min(n_new_steps, max(self.learning_starts, per_update) + per_update)
        return n_new_steps if self.gradient_steps < 0 else n_new_steps * self.gradient_steps // per_update

    def _fit_world_model(self, n_fits: int) -> th.Tensor | float:
        """Gradient steps on segments of real steps (Algorithm 1); returns the fraction that was not finite, and not taken."""
        self.world_model.train()
        skipped: th.Tensor | float = 0.0
        for _ in range(n_fits):
            metrics = self.world_model.fit(self.replay_buffer.sample(self.batch_size, self.world_model.window))
            skipped = skipped + metrics.get("skipped", 0.0) / n_fits
            self._means.add("world_model", metrics)
        return skipped

    # ------------------------------------------------------------------ SB3's face

    def learn(
        self: SelfPolyGRAD,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 200,
        tb_log_name: str = "PolyGRAD",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfPolyGRAD:
        """Learn for a number of real steps, of all environments together; as in SB3. ``log_interval`` counts updates."""
        super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
        self._means.flush(self.logger)  # for whoever looks into the logger
        return self

    def dump_logs(self, iteration: int = 0) -> None:
        """Write the log; as in SB3."""
        self._means.flush(self.logger)
        super().dump_logs(iteration)

    def imagine(self, start: int | th.Tensor) -> Trajectory:
        """
        Imagine trajectories under the present policy, in the environment's units.

        :param start: how many, from random real observations; or start observations ``(batch, obs_dim)``
        :raises RuntimeError: if the world model was not fitted, or the ``VecNormalize`` that the policy needs is missing
        """
        if self.uses_vec_normalize and self._vec_normalize_env is None:
            raise RuntimeError("the policy was trained under VecNormalize: load the model with its environment to imagine")
        starts = start if isinstance(start, th.Tensor) else self.replay_buffer.sample_observations(start)
        self.imagination.sync(self._vec_normalize_env)
        return self.imagination(starts.to(self.device)).trajectory

    def _maybe_recommend_cpu(self, mlp_class_name: str = "") -> None: ...  # SB3 advises on-policy MLPs against GPUs

    # ------------------------------------------------------------------ saving, see sb3_polygrad.checkpoint

    def _excluded_save_params(self) -> list[str]:
        made_anew = ["world_model", "update", "imagination", "start_states", "_means", "_faults", "_pace"]
        return [*super()._excluded_save_params(), *made_anew, "_last_original_obs"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        optimizers = ["policy.actor_optimizer", "policy.critic_optimizer", "world_model.optimizer"]
        return ["policy", "world_model", *optimizers], []

    def save(self, path: PathOrFile, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:
        """Save the model as in SB3; the file replaces an older one of that name only when it is complete."""
        saving.save(self, path, exclude, include)

    @classmethod
    def load(cls: type[SelfPolyGRAD], path: PathOrFile, *args: Any, **kwargs: Any) -> SelfPolyGRAD:  # type: ignore[override]
        """Load a saved model as in SB3, see :func:`~sb3_polygrad.checkpoint.load.load_model`; only one that you trust."""
        return load_model(super().load, cls, path, args, kwargs)

    def save_replay_buffer(self, path: PathOrFile) -> None:
        """Save the real steps, as tensors (no pickles); the suffix ``.pkl``, SB3's, is added if there is none."""
        saving.save_replay_buffer(self, path)

    def load_replay_buffer(self, path: PathOrFile, truncate_last_traj: bool = True) -> None:
        """Load real steps as in SB3. The episodes under way always end where the file ends: the environments are elsewhere."""
        saving.load_replay_buffer(self, path)

    def save_checkpoint(self, folder: str | Path, keep: int = 3) -> Path:
        """Save all that :meth:`resume` needs, see :func:`~sb3_polygrad.checkpoint.saving.save_checkpoint`."""
        return saving.save_checkpoint(self, folder, keep)

    @classmethod
    def resume(
        cls: type[SelfPolyGRAD], path: str | Path, env: GymEnv | str, replay_buffer: str | Path | None = None, **kwargs: Any
    ) -> SelfPolyGRAD:
        """Resume a run from a checkpoint, see :func:`~sb3_polygrad.checkpoint.saving.resume`."""
        return saving.resume(cls, path, env, replay_buffer, **kwargs)

    @property
    def timesteps_left(self) -> int:
        """Real steps between now and the end of the latest :meth:`learn`, were it not interrupted."""
        return max(self._total_timesteps - self.num_timesteps, 0)
