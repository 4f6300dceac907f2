"""The buffer of real episodes against a slow list of everything that happened, for segments of several lengths."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_polygrad.common.trajectory import Trajectory
from sb3_polygrad.episode_buffer import EpisodeBuffer


@dataclass
class Step:
    """One real step; ``obs`` is unique, so that a segment says which steps it is made of."""

    obs: float
    next_obs: float
    action: float
    reward: float
    terminated: bool
    truncated: bool
    interrupted: bool = False  # the environment was reset right after it


@dataclass
class Reference:
    """Everything that happened, per environment, and the segments in it by a plain search."""

    capacity: int
    n_envs: int
    histories: list[list[Step]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.histories = [[] for _ in range(self.n_envs)]

    def segments(self, length: int) -> dict[float, Trajectory]:
        """All segments of ``length`` steps by the observation they start from, padded after a terminal."""
        found = {}
        for history in self.histories:
            held = history[-self.capacity :]
            for start in range(len(held)):
                steps = self._walk(held[start : start + length], length)
                if steps is not None:
                    found[held[start].obs] = self._segment(steps, length)
        return found

    def _walk(self, held: list[Step], length: int) -> list[Step] | None:
        steps: list[Step] = []
        for step in held:
            if steps and (steps[-1].truncated or steps[-1].interrupted):
                return None
            steps.append(step)
            if step.terminated:
                return steps
        return steps if len(steps) == length else None

    def _segment(self, steps: list[Step], length: int) -> Trajectory:
        n_padded, last = length - len(steps), steps[-1]
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

    def __init__(self, capacity: int, n_envs: int = 1) -> None:
        self.buffer = EpisodeBuffer(capacity * n_envs, 1, 1, n_envs)
        self.reference = Reference(capacity, n_envs)
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
        """One environment: ``.`` a plain step, ``T`` a terminal, ``L`` a time limit, ``|`` a reset for no such reason."""
        for kind in kinds:
            if kind == "|":
                self.end_episodes()
            else:
                self.step([kind == "T"], [kind == "L"])

    def end_episodes(self) -> None:
        self.buffer.end_episodes()
        for history in self.reference.histories:
            if history:
                history[-1].interrupted = True

    def save_and_load(self) -> None:
        """Go on with the buffer that a file of the state dict gives."""
        self.buffer = EpisodeBuffer.from_state_dict(saved_and_loaded(self.buffer.state_dict()))

    def starts(self, length: int) -> list[float]:
        """First observations of all segments that may be drawn."""
        return sorted(self.buffer.observations[self.buffer.segment_starts(length), 0].tolist())

    def drawn(self, length: int) -> list[float]:
        """First observations of all segments that are drawn: enough draws to see each."""
        return sorted(self.buffer.sample(40 * len(self.buffer) + 100, length).observations[:, 0, 0].unique().tolist())

    def check(self, *lengths: int) -> None:
        """The buffer draws exactly the segments of the reference, each with exactly its content."""
        for length in lengths:
            expected = self.reference.segments(length)
            assert self.starts(length) == sorted(expected)
            if expected:
                segments = self.buffer.sample(200, length)
                for row in range(200):
                    segment = expected[segments.observations[row, 0, 0].item()]
                    for name in Trajectory._fields:
                        assert th.equal(getattr(segments, name)[row], getattr(segment, name)), f"{name} of a segment"
            else:
                with pytest.raises(ValueError, match=f"no segment of {length} steps"):
                    self.buffer.sample(1, length)


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    th.save(state, file)
    file.seek(0)
    return th.load(file, weights_only=True)


# ---------------------------------------------------------------------- by hand


def test_segments_never_cross_a_time_limit() -> None:
    stream = Stream(capacity=20)
    stream.steps("....L....")
    assert stream.starts(3) == stream.drawn(3) == [1, 2, 3, 6, 7], "4 and 5 would need steps that never happened"


def test_segments_never_cross_the_end_of_an_episode() -> None:
    stream = Stream(capacity=20)
    stream.steps("....|....")
    assert stream.starts(3) == stream.drawn(3) == [1, 2, 5, 6]


def test_segments_may_cross_a_terminal() -> None:
    stream = Stream(capacity=20)
    stream.steps("....T.")
    assert stream.starts(3) == stream.drawn(3) == [1, 2, 3, 4, 5], "all steps of a finished episode, its last one too"


def test_one_buffer_holds_segments_of_every_length() -> None:
    stream = Stream(capacity=20)
    stream.steps("..L...T...")
    assert stream.drawn(1) == list(range(1, 11)), "every step"
    assert stream.drawn(2) == [1, 2, 4, 5, 6, 7, 8, 9]
    assert stream.drawn(3) == [1, 4, 5, 6, 7, 8]
    assert stream.drawn(10) == [4, 5, 6, 7], "a terminal alone lets a segment be longer than its episode"


def test_steps_after_a_terminal_are_padding() -> None:
    stream = Stream(capacity=20)
    stream.steps("T....")
    segments = stream.buffer.sample(200, 4)
    row = segments.observations[:, 0, 0].tolist().index(1.0)
    assert segments.observations[row, :, 0].tolist() == [1.0, 1.5, 1.5, 1.5, 1.5], "the last observation is repeated"
    assert segments.actions[row, :, 0].tolist() == [-1.0, -1.0, -1.0, -1.0], "so is the last action"
    assert segments.rewards[row].tolist() == [1.25, 0.0, 0.0, 0.0]
    assert segments.terminals[row].tolist() == [1.0, 1.0, 1.0, 1.0]
    assert segments.mask[row].tolist() == [1.0, 0.0, 0.0, 0.0], "the ending step itself counts"


def test_last_observation_is_the_true_successor() -> None:
    # After a time limit the next stored observation belongs to another episode; the segment must end in next_obs.
    stream = Stream(capacity=20)
    stream.steps(".L.")
    assert stream.buffer.sample(1, 2).observations[0, :, 0].tolist() == [1.0, 1.5, 2.5]


def test_two_environments_are_not_mixed() -> None:
    stream = Stream(capacity=10, n_envs=2)
    for t in range(6):
        stream.step([t == 2, False], [False, t == 3])
    assert stream.starts(3) == stream.drawn(3) == [1, 2, 3, 4, 1001, 1002]
    for row in stream.buffer.sample(50, 3).observations[..., 0]:
        assert (row >= 1000).all() or (row < 1000).all(), "a segment is of one environment"
    stream.check(1, 2, 3, 4)


def test_ring_forgets_the_oldest_and_has_a_seam() -> None:
    stream = Stream(capacity=5)
    stream.steps("." * 7)
    assert len(stream.buffer) == 5
    assert stream.starts(3) == stream.drawn(3) == [3, 4, 5], "1 and 2 are gone, 6 and 7 are not yet followed by enough steps"


def test_an_episode_as_long_as_the_ring_and_longer() -> None:
    stream = Stream(capacity=3)
    for kind in "........T.....L..":
        stream.steps(kind)
        stream.check(1, 2, 3)


# ---------------------------------------------------------------------- any stream


@pytest.mark.parametrize("seed", range(12))
def test_random_streams_against_the_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_envs = int(rng.integers(1, 4))
    stream = Stream(int(rng.integers(1, 25)), n_envs)
    p_terminal, p_limit = rng.uniform(0.0, 0.3, size=2)
    for t in range(120):
        terminated = rng.random(n_envs) < p_terminal
        truncated = (rng.random(n_envs) < p_limit) & ~terminated
        stream.step(terminated.tolist(), truncated.tolist())
        if rng.random() < 0.05:
            stream.end_episodes()
        if rng.random() < 0.05:
            stream.save_and_load()
        if t % 6 == 0:
            stream.check(1, 2, int(rng.integers(3, 7)))


@pytest.mark.parametrize("length", [3, 18])  # of 18 steps there is one segment in eleven: more than can be hit at random
def test_segments_are_drawn_uniformly(length: int) -> None:
    stream = Stream(capacity=40)
    stream.steps("....T......L" + "." * 20 if length == 3 else "............L" + "." * 20)
    n_segments, n_draws = len(stream.buffer.segment_starts(length)), 20_000
    _, counts = stream.buffer.sample(n_draws, length).observations[:, 0, 0].unique(return_counts=True)
    expected = n_draws / n_segments
    assert len(counts) == n_segments and (length == 3 or n_segments == 3)
    assert (counts - expected).abs().max() < 5 * expected**0.5, "five standard deviations of a count"


# ---------------------------------------------------------------------- the rest of its face


@pytest.mark.parametrize("n_steps", [4, 12])
def test_state_dict_is_complete_and_goes_on(n_steps: int) -> None:
    kept, copied = Stream(capacity=8), Stream(capacity=8)
    for stream in (kept, copied):
        stream.steps("." * n_steps)
        stream.buffer.take_new_steps()
        stream.steps(".")
    copied.save_and_load()
    for kind in "..T..L....T":
        for stream in (kept, copied):
            stream.steps(kind)
        assert copied.starts(3) == kept.starts(3)
    copied.check(1, 2, 3, 4)
    assert all(th.equal(a, b) for a, b in zip(kept.buffer.take_new_steps(), copied.buffer.take_new_steps(), strict=True))


def test_state_dict_is_a_copy() -> None:
    stream = Stream(capacity=3)
    stream.steps("...")
    state = stream.buffer.state_dict()
    stream.steps("..T")
    buffer = EpisodeBuffer.from_state_dict(state)
    assert buffer.observations[:, 0].tolist() == [1.0, 2.0, 3.0]
    buffer.add(*(np.full((1, 1), 9.0) for _ in range(4)), np.array([True]), np.array([False]))
    assert EpisodeBuffer.from_state_dict(state).observations[:, 0].tolist() == [1.0, 2.0, 3.0]
    assert EpisodeBuffer.from_state_dict(state).segment_starts(3).tolist() == [0]


def test_state_dict_of_a_large_empty_buffer_is_small() -> None:
    stream = Stream(capacity=1_000_000)
    stream.steps("....")
    values = stream.buffer.state_dict().values()
    assert sum(value.numel() for value in values if isinstance(value, th.Tensor)) < 100, "only the steps held are written"


def test_new_steps_are_shown_once() -> None:
    stream = Stream(capacity=4, n_envs=2)
    for t in range(3):
        stream.step([t == 2, False], [False, t == 1])
    steps = stream.buffer.take_new_steps()
    assert steps.observations.shape == (6, 2, 1) and steps.rewards.shape == (6, 1)
    assert sorted(steps.observations[:, 0, 0].tolist()) == [1, 2, 3, 1001, 1002, 1003]
    first = steps.observations[:, :1, 0]
    assert th.equal(steps.observations[:, 1:, 0], first + 0.5), "the true successor, across a time limit too"
    assert th.equal(steps.actions[..., 0], -first) and th.equal(steps.rewards, first + 0.25)
    assert th.equal(steps.terminals, (first == 3.0).float()) and (steps.mask == 1.0).all()
    assert len(stream.buffer.take_new_steps().rewards) == 0
    stream.step([False, False], [False, False])
    assert sorted(stream.buffer.take_new_steps().observations[:, 0, 0].tolist()) == [4, 1004]
    for _ in range(6):
        stream.step([False, False], [False, False])
    newest = [7, 8, 9, 10, 1007, 1008, 1009, 1010]
    assert sorted(stream.buffer.take_new_steps().observations[:, 0, 0].tolist()) == newest, "no more than it holds"


@pytest.mark.parametrize("n_steps", [3, 11])
def test_all_steps_may_count_as_new_again(n_steps: int) -> None:
    stream = Stream(capacity=6, n_envs=2)
    for _ in range(n_steps):
        stream.step([False, False], [False, False])
    stream.buffer.take_new_steps()
    stream.buffer.count_all_as_new()
    steps = stream.buffer.take_new_steps()
    assert sorted(steps.observations[:, 0, 0].tolist()) == stream.starts(1) and len(steps.rewards) == 2 * min(n_steps, 6)
    assert len(stream.buffer.take_new_steps().rewards) == 0


def test_start_states_are_observations_in_which_was_acted() -> None:
    stream = Stream(capacity=10)
    stream.steps("..T.")
    assert sorted(stream.buffer.sample_observations(200)[:, 0].unique().tolist()) == [1, 2, 3, 4]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])  # 1e39 is finite in float64 only
@pytest.mark.parametrize("name", ["observation", "action", "reward", "next observation"])
def test_what_is_not_finite_is_refused_and_leaves_no_trace(name: str, value: float) -> None:
    stream = Stream(capacity=10, n_envs=2)
    stream.step([False, False], [False, False])
    values = {key: np.zeros((2, 1)) for key in ("observation", "action", "next observation")}
    values["reward"] = np.zeros(2)
    values[name][1] = value
    no = np.array([False, False])
    with pytest.raises(ValueError, match=rf"index 1\) produced a {name} that is NaN or infinite"):
        stream.buffer.add(values["observation"], values["action"], values["reward"], values["next observation"], no, no)
    assert len(stream.buffer) == 2
    stream.step([False, False], [False, False])
    stream.check(1, 2, 3)
    assert len(stream.buffer.take_new_steps().rewards) == 4


def test_asks_for_more_where_nothing_can_be_drawn() -> None:
    stream = Stream(capacity=10)
    with pytest.raises(ValueError, match="the buffer is empty"):
        stream.buffer.sample_observations(1)
    with pytest.raises(ValueError, match="holds 0 steps but no segment of 1 steps"):
        stream.buffer.sample(1, 1)
    stream.steps(".L.L.L")
    with pytest.raises(ValueError, match="no segment of 3 steps"):
        stream.buffer.sample(1, 3)
    assert len(stream.buffer.sample(5, 2).rewards) == 5


def test_refuses_a_capacity_below_one_step_of_each_environment() -> None:
    with pytest.raises(ValueError, match="buffer_size=2 cannot hold one step of each of the 3 environments"):
        EpisodeBuffer(2, 1, 1, n_envs=3)
