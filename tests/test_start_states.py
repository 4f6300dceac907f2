"""Where imagined trajectories start: from real observations, or from where the last ones ended."""

from __future__ import annotations

import numpy as np
import pytest
import torch as th

from sb3_polygrad.common.trajectory import Trajectory
from sb3_polygrad.episode_buffer import EpisodeBuffer
from sb3_polygrad.imagination import StartStates
from tests.toys import PointEnv, equal_trees, tiny_model

N, HORIZON = 6, 3


def real_observations() -> EpisodeBuffer:
    """A buffer whose observations are negative; imagined ones are positive."""
    buffer, no = EpisodeBuffer(10, 1, 1), np.array([False])
    for t in range(10):
        step = np.full((1, 1), -1.0 - t)
        buffer.add(step, step, step[0], step, no, no)
    return buffer


def imagined_from(start: th.Tensor, terminals: th.Tensor | None = None, mask: th.Tensor | None = None) -> Trajectory:
    """Trajectories of three steps of length 1 to the right, from a real start those to 1, 2 and 3."""
    observations = start.clamp(min=0.0)[:, None] + th.arange(HORIZON + 1)[:, None]
    nothing = th.zeros(len(start), HORIZON)
    terminals = nothing if terminals is None else terminals
    return Trajectory(observations, nothing[..., None], nothing, terminals, nothing + 1.0 if mask is None else mask)


@pytest.mark.parametrize("n_continuations", [1, 2, 3])
def test_a_trajectory_is_continued_as_often_as_asked_for(n_continuations: int) -> None:
    starts, buffer = StartStates(n_continuations), real_observations()
    for batch in range(3 * (n_continuations + 1)):
        start = starts.draw(buffer, N)
        n_before = batch % (n_continuations + 1)
        if n_before == 0:
            assert (start < 0.0).all(), "a real observation"
        else:
            assert (start == 3.0 * n_before).all(), "where the trajectory ended"
        starts.keep(imagined_from(start))


def test_without_continuations_all_starts_are_real() -> None:
    starts, buffer = StartStates(0), real_observations()
    for _ in range(3):
        start = starts.draw(buffer, N)
        assert (start < 0.0).all()
        starts.keep(imagined_from(start))


def test_a_trajectory_that_ended_is_replaced_by_a_real_observation() -> None:
    starts, buffer = StartStates(3), real_observations()
    terminals = th.zeros(N, HORIZON)
    terminals[0] = terminals[1, 1:] = terminals[2, 2] = 1.0  # at the first step, the second, the last one
    mask = th.ones(N, HORIZON)
    mask[0, 1:] = mask[1, 2:] = 0.0
    starts.keep(imagined_from(starts.draw(buffer, N), terminals, mask))
    start = starts.draw(buffer, N)
    assert (start[:3] < 0.0).all() and (start[3:] == 3.0).all()
    # Each trajectory has an age of its own: the new ones are continued for longer.
    for batch in (2, 3, 4):
        starts.keep(imagined_from(start))
        start = starts.draw(buffer, N)
        assert (start[:3] == 3.0 * (batch - 1)).all()
        assert (start[3:] == 3.0 * batch).all() if batch <= 3 else (start[3:] < 0.0).all()


@pytest.mark.parametrize(("terminal", "weight", "share"), [(0.25, 1.0, 0.75), (0.25, 0.5, 0.375), (0.0, 0.5, 0.5)])
def test_a_probable_ending_replaces_that_share_of_the_trajectories(terminal: float, weight: float, share: float) -> None:
    starts, buffer, n = StartStates(3), real_observations(), 10_000
    terminals, mask = th.zeros(n, HORIZON), th.ones(n, HORIZON)
    terminals[:, -1], mask[:, -1] = terminal, weight
    starts.keep(imagined_from(starts.draw(buffer, n), terminals, mask))
    assert (starts.draw(buffer, n) > 0.0).float().mean().item() == pytest.approx(share, abs=0.02)


def test_a_batch_that_was_thrown_away_does_not_bring_ended_trajectories_back() -> None:
    starts, buffer = StartStates(1), real_observations()
    starts.keep(imagined_from(starts.draw(buffer, N), th.ones(N, HORIZON)))
    assert (starts.draw(buffer, N) < 0.0).all()
    # The batch from these was not finite, and not kept.
    start = starts.draw(buffer, N)
    assert (start < 0.0).all()
    starts.keep(imagined_from(start))
    assert (starts.draw(buffer, N) == 3.0).all()


def test_no_graph_is_kept() -> None:
    starts, buffer = StartStates(1), real_observations()
    shift = th.zeros(1, requires_grad=True)
    imagined = imagined_from(starts.draw(buffer, N))
    starts.keep(imagined._replace(observations=imagined.observations + shift, mask=imagined.mask + shift))
    assert not starts.draw(buffer, N).requires_grad


def test_another_number_of_trajectories_starts_anew() -> None:
    starts, buffer = StartStates(3), real_observations()
    starts.keep(imagined_from(starts.draw(buffer, N)))
    for n in (N + 1, N - 1):
        start = starts.draw(buffer, n)
        assert start.shape == (n, 1) and (start < 0.0).all()
        starts.keep(imagined_from(start))


def test_state_dict_is_all_there_is() -> None:
    kept, buffer = StartStates(2), real_observations()
    copied = StartStates(2)
    terminals = th.zeros(N, HORIZON)
    terminals[0, -1] = 1.0
    kept.keep(imagined_from(kept.draw(buffer, N), terminals))
    copied.load_state_dict(kept.state_dict(), th.device("cpu"))
    for _ in range(4):
        drawn = []
        for starts in (kept, copied):
            th.manual_seed(1)
            drawn.append(starts.draw(buffer, N))
            starts.keep(imagined_from(drawn[-1]))
        assert th.equal(*drawn)
        assert equal_trees(kept.state_dict(), copied.state_dict())


def test_the_update_says_how_often() -> None:
    pathwise, ppo, twice = (
        tiny_model(PointEnv(), **settings).learn(120)
        for settings in (dict(), dict(policy_update="ppo"), dict(policy_update_kwargs=dict(n_continuations=2)))
    )
    assert pathwise.start_states.n_continuations == 3 and twice.start_states.n_continuations == 2
    for model in (pathwise, twice):
        assert model.start_states.ends.shape == (16, 1) and (model.start_states.ages >= 1.0).all()
    assert ppo.start_states.n_continuations == 0 and len(ppo.start_states.ends) == 0, "as in the paper"
