"""The buffer of real episodes against a slow list of everything that happened."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch as th

from sb3_polygrad.common.trajectory import Trajectory
from sb3_polygrad.common.trajectory_buffer import TrajectoryBuffer


@dataclass
class Step:
    """One real step; ``obs`` is unique, so that a window says which steps it is made of."""

    obs: float
    next_obs: float
    action: float
    reward: float
    terminated: bool
    truncated: bool
    interrupted: bool = False  # the environment was reset right after it


@dataclass
class Reference:
    """Everything that happened, per environment, and the windows in it by a plain search."""

    capacity: int
    horizon: int
    n_envs: int
    histories: list[list[Step]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.histories = [[] for _ in range(self.n_envs)]

    def windows(self) -> dict[float, Trajectory]:
        """All windows by the observation they start from, padded after a terminal."""
        found = {}
        for history in self.histories:
            held = history[-self.capacity :]
            for start in range(len(held)):
                steps = self._walk(held, start)
                if steps is not None:
                    found[held[start].obs] = self._window(steps)
        return found

    def _walk(self, held: list[Step], start: int) -> list[Step] | None:
        steps: list[Step] = []
        for step in held[start : start + self.horizon]:
            if steps and (steps[-1].truncated or steps[-1].interrupted):
                return None
            steps.append(step)
            if step.terminated:
                return steps
        return steps if len(steps) == self.horizon else None

    def _window(self, steps: list[Step]) -> Trajectory:
        n_padded, last = self.horizon - len(steps), steps[-1]
        observations = [steps[0].obs, *(step.next_obs for step in steps), *[last.next_obs] * n_padded]
        return Trajectory(
            th.tensor(observations)[:, None],
            th.tensor([step.action for step in steps] + [last.action] * n_padded)[:, None],
            th.tensor([step.reward for step in steps] + [0.0] * n_padded),
            th.tensor([float(step.terminated) for step in steps] + [1.0] * n_padded),
            th.tensor([1.0] * len(steps) + [0.0] * n_padded),
        )


class Stream:
    """Feeds the same steps to a buffer and to the reference. Observations count the steps: 1, 2, ..., 1001, 1002, ..."""

    def __init__(self, capacity: int, horizon: int, n_envs: int = 1) -> None:
        self.buffer = TrajectoryBuffer(capacity * n_envs, 1, 1, horizon, n_envs)
        self.reference = Reference(capacity, horizon, n_envs)
        self.count = 0

    def step(self, terminated: list[bool], truncated: list[bool]) -> None:
        self.count += 1
        steps = []
        for env, (ended, cut) in enumerate(zip(terminated, truncated, strict=True)):
            obs = self.count + 1000.0 * env
            steps.append(Step(obs, obs + 0.5, -obs, obs + 0.25, ended, cut))
            self.reference.histories[env].append(steps[-1])
        rows = {name: np.array([getattr(step, name) for step in steps]) for name in vars(steps[0])}
        self.buffer.add(
            rows["obs"][:, None],
            rows["action"][:, None],
            rows["reward"],
            rows["next_obs"][:, None],
            rows["terminated"],
            rows["truncated"],
        )

    def steps(self, kinds: str) -> None:
        """One environment: ``.`` a plain step, ``T`` a terminal, ``L`` a time limit, ``|`` an interruption."""
        for kind in kinds:
            if kind == "|":
                self.interrupt()
            else:
                self.step([kind == "T"], [kind == "L"])

    def interrupt(self) -> None:
        self.buffer.interrupt()
        for history in self.reference.histories:
            if history:
                history[-1].interrupted = True

    def starts(self) -> list[float]:
        """First observations of all windows that can be drawn: enough draws to see each."""
        if self.buffer.n_windows == 0:
            return []
        drawn = self.buffer.sample(40 * self.buffer.n_windows + 100)
        return sorted(drawn.observations[:, 0, 0].unique().tolist())

    def check(self) -> None:
        """The buffer can draw exactly the windows of the reference, each with exactly its content."""
        expected = self.reference.windows()
        assert self.buffer.n_windows == len(expected)
        assert self.starts() == sorted(expected)
        if expected:
            drawn = self.buffer.sample(200)
            for row in range(200):
                window = expected[drawn.observations[row, 0, 0].item()]
                for name in Trajectory._fields:
                    assert th.equal(getattr(drawn, name)[row], getattr(window, name)), f"{name} of a window"


# ---------------------------------------------------------------------- by hand


def test_windows_never_cross_a_time_limit() -> None:
    stream = Stream(capacity=20, horizon=3)
    stream.steps("....L....")
    assert stream.starts() == [1, 2, 3, 6, 7], "4 and 5 would need steps that never happened"


def test_windows_never_cross_an_interruption() -> None:
    stream = Stream(capacity=20, horizon=3)
    stream.steps("....|....")
    assert stream.starts() == [1, 2, 5, 6]


def test_windows_may_cross_a_terminal() -> None:
    stream = Stream(capacity=20, horizon=3)
    stream.steps("....T.")
    assert stream.starts() == [1, 2, 3, 4, 5], "all steps of a finished episode, its last one too"


def test_steps_after_a_terminal_are_padding() -> None:
    stream = Stream(capacity=20, horizon=4)
    stream.steps("T....")
    stream.buffer = pickle.loads(pickle.dumps(stream.buffer))
    drawn = stream.buffer.sample(200)
    window = next(row for row in range(200) if drawn.observations[row, 0] == 1.0)
    assert drawn.observations[window, :, 0].tolist() == [1.0, 1.5, 1.5, 1.5, 1.5], "the last observation is repeated"
    assert drawn.actions[window, :, 0].tolist() == [-1.0, -1.0, -1.0, -1.0], "so is the last action"
    assert drawn.rewards[window].tolist() == [1.25, 0.0, 0.0, 0.0]
    assert drawn.terminals[window].tolist() == [1.0, 1.0, 1.0, 1.0]
    assert drawn.mask[window].tolist() == [1.0, 0.0, 0.0, 0.0], "the ending step itself counts"


def test_last_observation_is_the_true_successor() -> None:
    # After a time limit the next stored observation belongs to another episode; the window must end in next_obs.
    stream = Stream(capacity=20, horizon=2)
    stream.steps(".L.")
    assert stream.buffer.sample(1).observations[0, :, 0].tolist() == [1.0, 1.5, 2.5]


def test_two_environments_are_not_mixed() -> None:
    stream = Stream(capacity=10, horizon=3, n_envs=2)
    for t in range(6):
        stream.step([t == 2, False], [False, t == 3])
    assert stream.starts() == [1, 2, 3, 4, 1001, 1002]
    for row in stream.buffer.sample(50).observations[..., 0]:
        assert (row >= 1000).all() or (row < 1000).all(), "a window is of one environment"
    stream.check()


def test_ring_forgets_the_oldest_and_has_a_seam() -> None:
    stream = Stream(capacity=5, horizon=3)
    stream.steps("." * 7)
    assert len(stream.buffer) == 5
    assert stream.starts() == [3, 4, 5], "1 and 2 are overwritten, 6 and 7 are not yet followed by enough steps"


def test_an_episode_as_long_as_the_ring_and_longer() -> None:
    stream = Stream(capacity=3, horizon=3)
    for kind in "........T.....L..":
        stream.steps(kind)
        stream.check()


# ---------------------------------------------------------------------- any stream


@pytest.mark.parametrize("seed", range(12))
def test_random_streams_against_the_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_envs, horizon = int(rng.integers(1, 4)), int(rng.integers(2, 6))
    stream = Stream(int(rng.integers(horizon, 25)), horizon, n_envs)
    p_terminal, p_limit = rng.uniform(0.0, 0.3, size=2)
    for t in range(120):
        terminated = rng.random(n_envs) < p_terminal
        truncated = (rng.random(n_envs) < p_limit) & ~terminated
        stream.step(terminated.tolist(), truncated.tolist())
        if rng.random() < 0.05:
            stream.interrupt()
        if rng.random() < 0.05:
            stream.buffer = pickle.loads(pickle.dumps(stream.buffer))
        if t % 3 == 0:
            stream.check()


def test_windows_are_drawn_uniformly() -> None:
    stream = Stream(capacity=30, horizon=3)
    stream.steps("....T......L..........")
    n_windows, n_draws = stream.buffer.n_windows, 20_000
    _, counts = stream.buffer.sample(n_draws).observations[:, 0, 0].unique(return_counts=True)
    expected = n_draws / n_windows
    assert len(counts) == n_windows
    assert (counts - expected).abs().max() < 5 * expected**0.5, "five standard deviations of a count"


# ---------------------------------------------------------------------- the rest of its face


@pytest.mark.parametrize("n_steps", [4, 12])
def test_pickle_is_complete_and_goes_on(n_steps: int) -> None:
    kept, copied = Stream(capacity=8, horizon=3), Stream(capacity=8, horizon=3)
    for stream in (kept, copied):
        stream.steps(".." + "." * (n_steps - 2))
    copied.buffer = pickle.loads(pickle.dumps(copied.buffer))
    for kind in "..T..L....T":
        for stream in (kept, copied):
            stream.steps(kind)
        assert copied.starts() == kept.starts()
    copied.check()


def test_pickle_of_a_large_empty_buffer_is_small() -> None:
    stream = Stream(capacity=1_000_000, horizon=3)
    stream.steps("....")
    assert len(pickle.dumps(stream.buffer)) < 10_000, "only the steps held are written"


def test_simulator_states_stand_beside_their_steps() -> None:
    buffer = TrajectoryBuffer(3, 1, 1, horizon=2)
    one = np.zeros((1, 1))
    for t in range(5):
        state = None if t == 3 else np.full((1, 2), float(t))
        buffer.add(np.full((1, 1), float(t)), one, one[0], one, np.array([False]), np.array([False]), state)
    assert buffer.simulator_states is not None
    # A ring of 3: steps 3 (without a state), 4 and 2.
    assert buffer.observations[:, 0].tolist() == [3.0, 4.0, 2.0]
    assert np.isnan(buffer.simulator_states[0]).all(), "an old state must not stand beside a new step"
    assert buffer.simulator_states[1:].tolist() == [[4.0, 4.0], [2.0, 2.0]]
    restored = pickle.loads(pickle.dumps(buffer))
    assert np.array_equal(restored.simulator_states, buffer.simulator_states, equal_nan=True)


def test_latest_are_the_newest_steps_of_all_environments() -> None:
    stream = Stream(capacity=4, horizon=2, n_envs=2)
    for t in range(6):
        stream.step([t == 5, False], [False, False])
    observations, next_observations, actions, outcomes = stream.buffer.latest(2)
    assert sorted(observations[:, 0].tolist()) == [5, 6, 1005, 1006]
    assert th.equal(next_observations, observations + 0.5) and th.equal(actions, -observations)
    assert th.equal(outcomes[:, 0], observations[:, 0] + 0.25)
    assert outcomes[:, 1].tolist() == [float(obs == 6) for obs in observations[:, 0]]
    assert len(stream.buffer.latest(100)[0]) == 8, "no more than it holds"
    assert len(stream.buffer.latest(0)[0]) == 0


def test_start_states_are_observations_in_which_was_acted() -> None:
    stream = Stream(capacity=10, horizon=2)
    stream.steps("..T.")
    assert sorted(stream.buffer.sample_observations(200)[:, 0].unique().tolist()) == [1, 2, 3, 4]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])  # 1e39 is finite in float64 only
@pytest.mark.parametrize("name", ["observation", "action", "reward", "next observation"])
def test_what_is_not_finite_is_refused_and_leaves_no_trace(name: str, value: float) -> None:
    stream = Stream(capacity=10, horizon=2, n_envs=2)
    stream.step([False, False], [False, False])
    values = {key: np.zeros((2, 1)) for key in ("observation", "action", "next observation")}
    values["reward"] = np.zeros(2)
    values[name][1] = value
    no = np.array([False, False])
    with pytest.raises(ValueError, match=rf"index 1\) produced a {name} that is NaN or infinite"):
        stream.buffer.add(values["observation"], values["action"], values["reward"], values["next observation"], no, no)
    assert len(stream.buffer) == 2
    stream.step([False, False], [False, False])
    stream.check()


def test_asks_for_more_where_nothing_can_be_drawn() -> None:
    stream = Stream(capacity=10, horizon=3)
    with pytest.raises(ValueError, match="the buffer is empty"):
        stream.buffer.sample_observations(1)
    stream.steps(".L.L.L")
    with pytest.raises(ValueError, match="no window of horizon=3"):
        stream.buffer.sample(1)


def test_refuses_a_capacity_below_one_window() -> None:
    with pytest.raises(ValueError, match="pass buffer_size >= 8"):
        TrajectoryBuffer(7, 1, 1, horizon=4, n_envs=2)
