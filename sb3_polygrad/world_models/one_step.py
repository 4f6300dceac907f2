"""World models that predict one step, and imagine one step after the other."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch as th
from torch import nn

from sb3_polygrad.common.draws import draw
from sb3_polygrad.common.normalizer import RunningNormalizer
from sb3_polygrad.common.trajectory import Trajectory
from sb3_polygrad.world_models.base import PolicyFn
from sb3_polygrad.world_models.standardized import Imagined, StandardizedWorldModel


class Steps(NamedTuple):
    """
    Real steps in standardised units, ``...`` being the shape of the batch.

    :param states: ``(..., obs_dim)`` in which was acted
    :param actions: ``(..., action_dim)``
    :param targets: ``(..., obs_dim + 1)`` changes of the observation, standardised by their own statistics, and rewards
    :param terminals: ``(...)`` 1.0 where the step ended the episode
    """

    states: th.Tensor
    actions: th.Tensor
    targets: th.Tensor
    terminals: th.Tensor

    def inputs(self) -> th.Tensor:
        """What there is to predict from, ``(..., obs_dim + action_dim)``."""
        return th.cat([self.states, self.actions], dim=-1)

    def flat(self) -> Steps:
        """Steps of segments, ``(batch, window)``, one after the other."""
        return Steps(*(tensor.flatten(0, 1) for tensor in self))


class OneStepWorldModel(StandardizedWorldModel):
    """
    Draws an action, predicts what it causes, and goes on from there. Subclasses say how one step is predicted.

    Most predict the change of the observation, which over one step is far smaller than the spread of the observations: it is
    standardised by its own mean and standard deviation. The constructor is that of :class:`StandardizedWorldModel`.
    """

    differentiable = True

    def __init__(
        self, obs_dim: int, action_low: th.Tensor, action_high: th.Tensor, horizon: int, window: int | None = None
    ) -> None:
        super().__init__(obs_dim, action_low, action_high, horizon, window)
        self.change_normalizer = RunningNormalizer(obs_dim)

    def observe(self, steps: Trajectory) -> None:
        """See :meth:`WorldModel.observe`."""
        super().observe(steps)
        self.change_normalizer.update(steps.observations.diff(dim=1))

    @abstractmethod
    def _begin(self, state: th.Tensor) -> Any:
        """
        :param state: ``(batch, obs_dim)``, standardised start
        :return: the memory that :meth:`_step` goes on from
        """

    @abstractmethod
    def _step(self, memory: Any, state: th.Tensor, action: th.Tensor) -> tuple[Any, th.Tensor]:
        """
        :param memory: of the steps so far
        :param state: ``(batch, obs_dim)``, standardised
        :param action: ``(batch, action_dim)``, standardised
        :return: new memory, and the channels of the next state, ``(batch, channels)``
        """

    def _imagine(self, start: th.Tensor, policy: PolicyFn) -> Imagined:
        """See :meth:`StandardizedWorldModel._imagine`."""
        bound = self._bound()
        noise = th.randn(len(start), self.horizon, self.action_dim, device=start.device)
        observation, state = start, self.state_normalizer.normalize(start)
        memory = self._begin(state)
        states, actions = [nn.functional.pad(state, (0, 2))], []
        for t in range(self.horizon):
            action = draw(policy(observation), noise[:, t])
            memory, after = self._step(memory, state, self._condition(action))
            states.append(bound(after))
            actions.append(action)
            state = states[-1][:, : self.obs_dim]
            observation = self.state_normalizer.denormalize(state)
        return Imagined(th.stack(states, dim=1), th.stack(actions, dim=1), bound.faulty)

    # ------------------------------------------------------------------ for models that predict changes

    def _steps(self, segments: Trajectory) -> Steps:
        """All steps of real segments, ``(batch, window)``; those with mask 0 are padding."""
        changes = self.change_normalizer.normalize(segments.observations.diff(dim=1))
        rewards = self.outcome_normalizer.normalize(th.stack([segments.rewards, segments.terminals], dim=-1))[..., :1]
        return Steps(
            self.state_normalizer.normalize(segments.observations[:, :-1]),
            self._condition(segments.actions),
            th.cat([changes, rewards], dim=-1),
            segments.terminals,
        )

    def _after(self, state: th.Tensor, prediction: th.Tensor, ending: th.Tensor) -> th.Tensor:
        """
        :param state: ``(batch, obs_dim)``, standardised
        :param prediction: ``(batch, obs_dim + 1)`` as the targets of :class:`Steps`
        :param ending: ``(batch,)`` probability that the episode ends
        :return: channels of the next state, ``(batch, channels)``
        """
        moved = self._moved(state, prediction[:, : self.obs_dim])
        return th.cat([moved, prediction[:, self.obs_dim :], self._standardized_ending(ending)], dim=1)

    def _moved(self, state: th.Tensor, change: th.Tensor) -> th.Tensor:
        """The standardised state after a standardised change, ``(batch, obs_dim)``."""
        return state + self.change_normalizer.denormalize(change) / self.state_normalizer.std

    def _standardized_ending(self, ending: th.Tensor) -> th.Tensor:
        """Probabilities ``(batch,)`` as a state's last channel, ``(batch, 1)``."""
        both = th.stack([ending, ending], dim=-1)
        return self.outcome_normalizer.normalize(both)[:, 1:]
