"""World model, policy and δ from real and imagined steps: Algorithm 3, lines 6 to 9."""

from __future__ import annotations

import torch as th
from stable_baselines3.common.type_aliases import Schedule
from torch.distributions import Normal

from sb3_polygrad.collecting import Collecting
from sb3_polygrad.core.controllers import adapted_share
from sb3_polygrad.core.on_policy import action_diagnostics, action_std, standardized_actions
from sb3_polygrad.core.trajectory import Trajectory, all_finite
from sb3_polygrad.imagining import Imagining
from sb3_polygrad.policy.deferred_means import DeferredMeans
from sb3_polygrad.policy.imagined_rollout_buffer import ImaginedRolloutBuffer
from sb3_polygrad.policy.update import A2CUpdate, Learner, LossSettings, PathwiseUpdate, PolicyUpdate, PPOUpdate
from sb3_polygrad.saving import Saving

MAX_FAULTY_UPDATES = 100
"""Updates in a row from which nothing could be learnt, before the run is given up."""


class Learning(Collecting, Imagining, Saving):
    """How PolyGRAD learns; :class:`~sb3_polygrad.PolyGRAD` is the algorithm, and says what the arguments mean."""

    rollout_buffer: ImaginedRolloutBuffer
    batch_size: int
    gradient_steps: int
    clip_range: float | Schedule
    n_epochs: int
    n_minibatches: int
    target_kl: float | None
    target_update: float | None
    update_trials: int
    learning_rate_adaptation: float
    normalize_advantage: bool
    critic_learning_rate: float
    policy_learning_starts: int
    n_imagined: int
    policy_update: str | None
    _learning_rate_share: float
    _n_faulty_updates: int

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
            policy.predict_all_values,
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
