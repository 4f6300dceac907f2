"""PolyGRAD: its arguments, and what it is made of. How it learns, steps, imagines and is saved is beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_polygrad.checks import check_arguments, check_spaces
from sb3_polygrad.core.capture import Captured
from sb3_polygrad.core.pace import PaceWarning
from sb3_polygrad.core.trajectory_buffer import TrajectoryBuffer
from sb3_polygrad.learning import Learning
from sb3_polygrad.policy.imagined_rollout_buffer import ImaginedRolloutBuffer
from sb3_polygrad.policy.policies import PolyGRADPolicy
from sb3_polygrad.policy.vec_normalize import VecNormalizeView
from sb3_polygrad.world_models.base import WorldModel
from sb3_polygrad.world_models.factory import build_world_model

SelfPolyGRAD = TypeVar("SelfPolyGRAD", bound="PolyGRAD")


class PolyGRAD(Learning):
    """
    World Models via Policy-Guided Trajectory Diffusion (Rigter et al., https://arxiv.org/abs/2312.08533), Algorithm 3.

    Real steps go to a buffer of episodes (``replay_buffer``) on which a world model is fitted; the policy learns from
    trajectories that the world model imagines under it (``rollout_buffer``). The constructor's defaults are sized for two
    CPU cores; the paper's sizes are in ``hyperparams/polygrad-paper.yml``.

    :param policy: ``"MlpPolicy"`` or a subclass of :class:`~sb3_polygrad.policy.policies.PolyGRADPolicy`
    :param env: the environment, with Box observations and a bounded Box of actions
    :param learning_rate: of the actor, a number or a schedule; that of its ``log_std`` is this times ``log_std_rate``
    :param n_steps: real steps per environment between two updates
    :param batch_size: windows per gradient step of the world model
    :param gradient_steps: gradient steps of the world model per update; -1 for as many as real steps were made
    :param gamma: discount factor
    :param gae_lambda: λ of GAE
    :param clip_range: PPO's bound on the probability ratio (``policy_update="ppo"``), a number or a schedule
    :param n_epochs: passes over an imagined batch, PPO's or (``policy_update="pathwise"``) those of the critic
    :param n_minibatches: gradient steps per pass
    :param target_kl: PPO stops its passes at 1.5 times this KL divergence; None for no limit
    :param target_update: mean ``|Δ log π|`` of an update (``policy_update="a2c"``); None takes the optimiser's step
    :param update_trials: measurements of that size per update at most: 1 corrects the step once, to first order; more search
        until it is within 20 % of the target
    :param learning_rate_adaptation: part of each such correction that the learning rate keeps, in log space; 0 leaves it to
        the schedule alone, else the schedule is its upper limit
    :param normalize_advantage: standardise advantages (pathwise: divide returns by their standard deviation)
    :param ent_coef: weight of the entropy bonus
    :param vf_coef: weight of the value loss
    :param max_grad_norm: bound on the gradient's norm, for actor and critic each
    :param critic_learning_rate: of the critic
    :param buffer_size: capacity for real steps
    :param learning_starts: real steps, taken at random, before the first update
    :param policy_learning_starts: real steps before the first update of the policy, if that is to be later
    :param horizon: steps per imagined trajectory
    :param n_imagined: trajectories imagined per update
    :param policy_update: ``"pathwise"``, through the world model; ``"ppo"``; or ``"a2c"`` as in the paper. None for the first
        where the world model has gradients (the default one has), else the second
    :param world_model: ``"diffusion"``, ``"ensemble"``, ``"transformer"``, ``"autoregressive_diffusion"``, ``"rssm"``, or a
        class or function that builds a world model
    :param world_model_kwargs: its settings: the keyword arguments of its builder, see
        :data:`~sb3_polygrad.world_models.factory.BUILDERS`
    :param cuda_graphs: on a GPU, run imagination (without gradients) and the fitting of the world model as CUDA graphs
    :param stats_window_size: episodes over which the logged return is averaged
    :param tensorboard_log: folder for tensorboard
    :param policy_kwargs: arguments of the policy
    :param verbose: 0 silent, 1 info, 2 debug
    :param seed: of all random generators
    :param device: device of policy, world model and buffers
    :param _init_setup_model: build the networks now
    :raises ValueError: if an argument makes no sense; the message names it and what to do
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": PolyGRADPolicy}

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 6e-4,
        n_steps: int = 10,
        batch_size: int = 256,
        gradient_steps: int = -1,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule = 0.1,
        n_epochs: int = 2,
        n_minibatches: int = 2,
        target_kl: float | None = None,
        target_update: float | None = 0.02,
        update_trials: int = 1,
        learning_rate_adaptation: float = 0.0,
        normalize_advantage: bool = True,
        ent_coef: float = 1e-5,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        critic_learning_rate: float = 1e-3,
        buffer_size: int = 1_000_000,
        learning_starts: int = 1_000,
        policy_learning_starts: int = 0,
        horizon: int = 20,
        n_imagined: int = 128,
        policy_update: str | None = None,
        world_model: str | Callable[..., WorldModel] = "diffusion",
        world_model_kwargs: Mapping[str, Any] | None = None,
        cuda_graphs: bool = True,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            use_sde=False,
            sde_sample_freq=-1,
            rollout_buffer_class=ImaginedRolloutBuffer,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            supported_action_spaces=(spaces.Box,),
            _init_setup_model=False,
        )
        self.batch_size = batch_size
        self.gradient_steps = gradient_steps
        self.clip_range = clip_range
        self.n_epochs = n_epochs
        self.n_minibatches = n_minibatches
        self.target_kl = target_kl
        self.target_update = target_update
        self.update_trials = update_trials
        self.learning_rate_adaptation = learning_rate_adaptation
        self.normalize_advantage = normalize_advantage
        self.critic_learning_rate = critic_learning_rate
        self.buffer_size = buffer_size
        self.learning_starts = learning_starts
        self.policy_learning_starts = policy_learning_starts
        self.horizon = horizon
        self.n_imagined = n_imagined
        self.policy_update = policy_update
        self.world_model_name = world_model
        if not isinstance(world_model_kwargs, (Mapping, type(None))):
            raise TypeError(f"world_model_kwargs must be a mapping, got {world_model_kwargs!r}")
        self.world_model_kwargs = dict(world_model_kwargs or {})
        self.cuda_graphs = cuda_graphs
        self._n_updates = 0
        self._learning_rate_share = 1.0  # of the schedule
        # Real steps per environment that the world model's statistics have not seen, gradient steps that it has not taken.
        self._n_unobserved = 0
        self._gradient_steps_owed = 0
        self._seen_normalized = False
        self._n_faulty_updates = 0
        self._kept_view: VecNormalizeView | None = None
        # Where in an update the run is, should it be saved and resumed there.
        self._rollout_step = 0
        self._in_step = False
        self._pace = PaceWarning()
        if self.env is not None:
            check_arguments(self)
        if _init_setup_model:
            self._setup_model()

    @staticmethod
    def _wrap_env(env: GymEnv | str, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        """
        As SB3 does it; the one place that every environment passes before SB3 judges its spaces.

        Takes an environment's name too, so that ``load`` and ``set_env`` accept what the constructor accepts.
        """
        wrapped = OnPolicyAlgorithm._wrap_env(maybe_make_env(env, verbose), verbose, monitor_wrapper)  # type: ignore[arg-type]
        check_spaces(wrapped.observation_space, wrapped.action_space)
        normalizer = unwrap_vec_normalize(wrapped)
        if normalizer is not None and normalizer.observation_space.shape != wrapped.observation_space.shape:
            raise ValueError("a wrapper around VecNormalize changes the observations: put VecNormalize outermost")
        return wrapped

    def _setup_model(self) -> None:
        super()._setup_model()
        assert isinstance(self.observation_space, spaces.Box) and isinstance(self.action_space, spaces.Box)
        if not isinstance(self.policy, PolyGRADPolicy):
            raise ValueError(f"policy must be 'MlpPolicy' or a subclass of PolyGRADPolicy, got {type(self.policy).__name__}")
        obs_dim = int(np.prod(self.observation_space.shape))
        action_low, action_high = (th.as_tensor(b).float().flatten() for b in (self.action_space.low, self.action_space.high))
        self.world_model = build_world_model(
            self.world_model_name, obs_dim, action_low, action_high, self.horizon, self.world_model_kwargs
        ).to(self.device)
        if self.policy_update == "pathwise" and self.world_model.imagine_expected is None:
            raise ValueError(
                f"policy_update='pathwise' needs gradients, and world_model={self.world_model_name!r} has none with these "
                "world_model_kwargs: choose policy_update='ppo', or leave it to the default"
            )
        self.world_model.cuda_graphs = self.cuda_graphs
        self._imagining = Captured(self._imagine_from, self._imagined_by)
        self.replay_buffer = TrajectoryBuffer(
            self.buffer_size, obs_dim, len(action_low), self.world_model.window, self.n_envs, self.device
        )
        self.rollout_buffer = ImaginedRolloutBuffer(
            self.horizon,
            self.observation_space,
            self.action_space,
            device=self.device,
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
            n_envs=self.n_imagined,
        )
        self.clip_range = FloatSchedule(self.clip_range)

    def _maybe_recommend_cpu(self, mlp_class_name: str = "ActorCriticPolicy") -> None:
        """No recommendation: unlike A2C and PPO, this algorithm has work for a GPU."""

    def learn(
        self: SelfPolyGRAD,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 200,
        tb_log_name: str = "PolyGRAD",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfPolyGRAD:
        """
        Learn for a number of real steps; see SB3.

        :param total_timesteps: real steps, of all environments together
        :param callback: called at every real step
        :param log_interval: updates between two dumps of the log
        :param tb_log_name: name of the run
        :param reset_num_timesteps: count from 0 (and reset the environments)
        :param progress_bar: show one
        :return: the model
        """
        super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
        self._means.flush()  # for whoever looks into the logger
        return self
