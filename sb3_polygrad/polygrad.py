"""PolyGRAD: where Stable-Baselines3 and a world model meet. How it steps, imagines and is saved is beside it."""

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
from torch.distributions import Normal

from sb3_polygrad.checks import check_arguments, check_spaces
from sb3_polygrad.collecting import Collecting
from sb3_polygrad.core.capture import Captured
from sb3_polygrad.core.controllers import adapted_share
from sb3_polygrad.core.on_policy import action_diagnostics, action_std, standardized_actions
from sb3_polygrad.core.pace import PaceWarning
from sb3_polygrad.core.trajectory import Trajectory, all_finite
from sb3_polygrad.core.trajectory_buffer import TrajectoryBuffer
from sb3_polygrad.imagining import Imagining
from sb3_polygrad.policy.deferred_means import DeferredMeans
from sb3_polygrad.policy.imagined_rollout_buffer import ImaginedRolloutBuffer
from sb3_polygrad.policy.policies import PolyGRADPolicy
from sb3_polygrad.policy.update import A2CUpdate, Learner, LossSettings, PathwiseUpdate, PolicyUpdate, PPOUpdate
from sb3_polygrad.policy.vec_normalize import VecNormalizeView
from sb3_polygrad.saving import Saving
from sb3_polygrad.world_models.base import WorldModel
from sb3_polygrad.world_models.factory import build_world_model

MAX_FAULTY_UPDATES = 100
"""Updates in a row from which nothing could be learnt, before the run is given up."""

SelfPolyGRAD = TypeVar("SelfPolyGRAD", bound="PolyGRAD")


class PolyGRAD(Collecting, Imagining, Saving):
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
    policy: PolyGRADPolicy
    rollout_buffer: ImaginedRolloutBuffer
    replay_buffer: TrajectoryBuffer
    world_model: WorldModel

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

    # ------------------------------------------------------------------ construction

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

    # ------------------------------------------------------------------ learning

    def train(self) -> None:
        """World model, imagination, policy, δ (Algorithm 3, lines 6 to 9)."""
        self._rollout_step = 0
        n_steps = self.n_steps * self.n_envs
        self._gradient_steps_owed += self._gradient_steps_per_update
        if self._in_prefill:
            return
        skipped_fits = self._fit_world_model()
        self._update_learning_rates()
        fault = None
        buffer = self.replay_buffer
        if len(buffer) >= min(self.policy_learning_starts, buffer.capacity * buffer.n_envs):
            fault = self._learn_from(self._imagine_to_learn())
        # Asked for only now, when the device has nothing left to do.
        if fault is None and float(skipped_fits) == 1.0:
            fault = "the gradients of the world model"
        self._n_updates += 1
        self._note(fault)
        self._pace.update((self._total_timesteps - self.num_timesteps) / n_steps)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    @property
    def _gradient_steps_per_update(self) -> int:
        """Gradient steps of the world model that belong to one policy update."""
        return self.n_steps * self.n_envs if self.gradient_steps < 0 else self.gradient_steps

    def _note(self, fault: str | None) -> None:
        """A fault that passes is in the log; one that stays ends the run, saved as it is."""
        self._n_faulty_updates = 0 if fault is None else self._n_faulty_updates + 1
        if fault is not None and self._n_faulty_updates == MAX_FAULTY_UPDATES:
            self._n_faulty_updates = 0
            path = self._save_where_it_failed()
            raise ValueError(
                f"{fault} were not finite for {MAX_FAULTY_UPDATES} updates in a row: nothing is learnt any more. The run as "
                f"it is now was saved in {path}; lower the learning_rate of world_model_kwargs, or look for huge rewards or "
                "observations in the environment, and go on from an earlier checkpoint"
            )

    def _fit_world_model(self) -> th.Tensor | float:
        """
        Algorithm 3, line 6. The first call makes up for the gradient steps of the random prefill.

        :return: share of the gradients that were not finite, on the device
        """
        self.world_model.observe(*self.replay_buffer.latest(self._n_unobserved))
        self._n_unobserved = 0
        self.world_model.train()
        n_steps, self._gradient_steps_owed = self._gradient_steps_owed, 0
        if n_steps == 0:
            return 0.0
        skipped: th.Tensor | float = 0.0
        for _ in range(n_steps):
            metrics = self.world_model.fit(self.replay_buffer.sample(self.batch_size))
            skipped = skipped + metrics.get("skipped", 0.0)
        self._means.record("world_model", {**metrics, "skipped": skipped / n_steps})
        return skipped / n_steps

    def _imagine_to_learn(self) -> Trajectory:
        """Algorithm 3, line 7: with gradients, if the update wants them."""
        imagine = self._imagine_expected if self._update_name == "pathwise" else self.imagine
        return imagine(self.n_imagined)

    def _learn_from(self, trajectory: Trajectory) -> str | None:
        """
        Policy, critic and δ from one imagined batch (Algorithm 3, lines 8 and 9).

        :return: what was faulty throughout, if anything was; nothing was learnt then
        """
        if not all_finite(trajectory):  # the one time within an update that the host waits for the device
            self.logger.record_mean("imagination/skipped", 1.0)
            return "the imagined trajectories"
        self.logger.record_mean("imagination/skipped", 0.0)
        normal, values = self._fill_rollout_buffer(trajectory)
        metrics = self._update_policy()
        self.rollout_buffer.detach()
        trajectory = Trajectory(*(tensor.detach() for tensor in trajectory))

        standardized = standardized_actions(trajectory, normal.mean, normal.stddev)
        adapted = self.world_model.adapt(action_std(standardized, trajectory.mask), normal.stddev)
        self._means.record("train", {**metrics, "std": self.policy.relative_std.mean()})
        self._means.record("imagination", action_diagnostics(standardized, trajectory), leave_out_nan=True)
        n_steps = trajectory.mask.sum()
        self._means.record(
            "imagination",
            {
                **adapted,
                "reward_mean": (trajectory.rewards * trajectory.mask).sum() / n_steps,
                "terminal_rate": (trajectory.terminals * trajectory.mask).sum() / n_steps,
                "horizon_mean": n_steps / len(trajectory.mask),
                "value_mean": values.detach().mean(),
            },
        )
        if not all_finite(self.policy.parameters()):  # an optimiser's own doing
            raise ValueError(
                f"the optimiser made parameters of the policy not finite: lower learning_rate={self.learning_rate} or "
                f"critic_learning_rate={self.critic_learning_rate}, or look at optimizer_kwargs in policy_kwargs"
            )
        return "the gradients of policy and critic" if float(metrics["skipped"]) == 1.0 else None

    def _fill_rollout_buffer(self, trajectory: Trajectory) -> tuple[Normal, th.Tensor]:
        """
        The imagined batch in the units of policy and critic, with its advantages and returns.

        :return: the policy's distributions ``(n_imagined, horizon, action_dim)``, without gradients, and the target critic's
            values ``(n_imagined, horizon + 1)``
        """
        view = self._kept_view  # as it was when this was imagined
        assert view is not None
        observations, rewards = view.observations(trajectory.observations), view.rewards(trajectory.rewards)
        with th.no_grad():
            normal = self._distribution(observations[:, :-1])
            log_probs = normal.log_prob(trajectory.actions).sum(dim=-1)
        values = self.policy.predict_target_values(self._to_policy(observations)).view(observations.shape[:2])
        policy_observations = observations[:, :-1].unflatten(2, self.observation_space.shape)  # type: ignore[arg-type]
        self.rollout_buffer.fill(trajectory._replace(rewards=rewards), policy_observations, values, log_probs)
        return normal, values

    def _update_policy(self) -> dict[str, th.Tensor]:
        """Policy and critic from what is in ``rollout_buffer``; then their averages, and the learning rate's share."""
        policy = self.policy
        policy.set_training_mode(True)
        learner = Learner(
            policy.evaluate_actions,
            policy.predict_values,
            lambda observations: policy.get_distribution(observations).entropy(),
            policy.actor_parameters(),
            policy.critic_parameters(),
            policy.optimizer,
        )
        settings = LossSettings(self.ent_coef, self.vf_coef, self.max_grad_norm, self.normalize_advantage)
        metrics = self._present_update()(learner, self.rollout_buffer.get, settings)
        policy.update_averages()
        if self.learning_rate_adaptation > 0.0 and "step_scale" in metrics:
            self._learning_rate_share = adapted_share(
                self._learning_rate_share, float(metrics["step_scale"]), self.learning_rate_adaptation
            )
        return metrics

    @property
    def _update_name(self) -> str:
        if self.policy_update is None:
            return "ppo" if self.world_model.imagine_expected is None else "pathwise"
        return self.policy_update

    def _present_update(self) -> PolicyUpdate:
        """The policy update that was asked for, its schedule at the present progress."""
        if self._update_name == "pathwise":
            return PathwiseUpdate(self.n_epochs, self.n_minibatches)
        if self._update_name == "a2c":
            # The learning rate never exceeds its schedule, neither by adaptation nor by the search.
            max_scale = min(3.0, 1.0 / self._learning_rate_share) if self.learning_rate_adaptation > 0.0 else 3.0
            return A2CUpdate(self.target_update, self.update_trials, max_scale)
        assert callable(self.clip_range)
        clip_range = self.clip_range(self._current_progress_remaining)
        return PPOUpdate(clip_range, self.n_epochs, self.n_minibatches, self.target_kl)

    def _update_learning_rates(self) -> None:
        """The actor's follows the schedule, the critic's is its own."""
        actor, critic, log_std = self.policy.optimizer.param_groups
        actor["lr"] = self._learning_rate_share * self.lr_schedule(self._current_progress_remaining)
        critic["lr"] = self.critic_learning_rate
        log_std["lr"] = self.policy.log_std_rate * actor["lr"]
        self.logger.record("train/learning_rate", actor["lr"])

    @property
    def _means(self) -> DeferredMeans:
        """Averages over the updates between two dumps of the log."""
        return DeferredMeans.of(self.logger)

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
