"""The Markov denoiser: what it may look at, its units, and that the sampler need only ask about what changes."""

from __future__ import annotations

import pytest
import torch as th
from torch.distributions import Normal

from sb3_polygrad.core.trajectory import Trajectory
from sb3_polygrad.denoisers.markov_mlp import MarkovMLP
from sb3_polygrad.diffusion.base import Sample, Task
from sb3_polygrad.diffusion.staggered import StaggeredSampler
from sb3_polygrad.world_models.factory import build_world_model

OBS_DIM, ACTION_DIM, HORIZON = 3, 2, 6


def network() -> MarkovMLP:
    th.manual_seed(0)
    net = MarkovMLP(OBS_DIM, ACTION_DIM, width=16, n_layers=2)
    net.observe_changes(th.tensor([0.1, 0.5, 1.0]))
    return net


@th.no_grad()
def test_a_state_depends_on_itself_the_one_before_and_the_action_between() -> None:
    net, batch = network(), 5
    noisy, actions = th.randn(batch, HORIZON + 1, OBS_DIM + 2), th.randn(batch, HORIZON, ACTION_DIM)
    level = th.rand(batch, HORIZON)
    output = net(noisy, actions, level)
    for state in range(HORIZON + 1):
        changed = noisy.clone()
        changed[:, state] += 1.0
        moved = (net(changed, actions, level) - output)[:, 1:].abs().amax(dim=(0, 2)) > 1e-6  # of states 1 ... horizon
        assert moved.nonzero().flatten().tolist() == [s - 1 for s in (state, state + 1) if 1 <= s <= HORIZON]
    for step in range(HORIZON):
        changed = actions.clone()
        changed[:, step] += 1.0
        moved = (net(noisy, changed, level) - output)[:, 1:].abs().amax(dim=(0, 2)) > 1e-6
        assert moved.nonzero().flatten().tolist() == [step]


@th.no_grad()
def test_the_reward_and_the_terminal_of_the_step_before_do_not_count() -> None:
    net = network()
    noisy, actions, level = th.randn(5, 2, OBS_DIM + 2), th.randn(5, 1, ACTION_DIM), th.full((5, 1), 0.5)
    alike = noisy.clone()
    alike[:, 0, OBS_DIM:] += 1.0  # single steps start from a state that has none: the network could not learn to ignore them
    assert th.equal(net(noisy, actions, level)[:, 1], net(alike, actions, level)[:, 1])


@th.no_grad()
def test_pure_noise_is_not_looked_at() -> None:
    net = network()
    noisy, actions, level = th.randn(5, 2, OBS_DIM + 2), th.randn(5, 1, ACTION_DIM), th.ones(5, 1)
    other = th.cat([noisy[:, :1], th.randn(5, 1, OBS_DIM + 2)], dim=1)
    assert th.allclose(net(noisy, actions, level)[:, 1], net(other, actions, level)[:, 1], atol=1e-6)


@th.no_grad()
def test_what_it_says_is_relative_to_the_state_before() -> None:
    net = network()
    for parameter in net.parameters():
        parameter.zero_()
    noisy = th.randn(4, 2, OBS_DIM + 2)
    still = net(noisy, th.randn(4, 1, ACTION_DIM), th.ones(4, 1))
    assert th.equal(still[:, 1, :OBS_DIM], noisy[:, 0, :OBS_DIM]), "says nothing: the state does not change"


def test_states_are_noised_and_judged_in_units_of_the_usual_change() -> None:
    kwargs = dict(denoiser="markov_mlp", width=8, n_layers=1)
    model = build_world_model("diffusion", OBS_DIM, -th.ones(ACTION_DIM), th.ones(ACTION_DIM), 5, kwargs)
    th.manual_seed(0)
    seen = linear_system(1_000, 1)
    outcomes = th.stack([seen.rewards[:, 0], seen.terminals[:, 0]], dim=1)
    model.observe(seen.observations[:, 0], seen.observations[:, 1], seen.actions[:, 0], outcomes)
    given: list[th.Tensor] = []
    corrupt = model.sampler.corrupt
    model.sampler.corrupt = lambda clean, actions: given.append(clean) or corrupt(clean, actions)
    model.fit(seen)
    change = given[0][:, 1] - given[0][:, 0]
    assert th.allclose(change.std(dim=0)[:OBS_DIM], th.ones(OBS_DIM), atol=0.01)
    assert change.std(dim=0)[OBS_DIM].item() == pytest.approx(1.0, abs=0.01), "of the reward, which is standardised"


def test_tiny_changes_are_not_blown_up_beyond_reason() -> None:
    net = network()
    net.observe_changes(th.tensor([1e-6, 0.5, 1.0]))
    assert net.units.tolist() == pytest.approx([0.05, 0.5, 1.0, 1.0, 1.0])


@pytest.mark.parametrize(("n_levels", "lag"), [(1, 1.0), (2, 2.0), (4, 4.0), (2, 5.0), (3, 1.0)])
@th.no_grad()
def test_asking_only_about_what_changes_alters_nothing(n_levels: int, lag: float) -> None:
    net, sampler = network(), StaggeredSampler(HORIZON, n_levels, lag)
    calls: list[int] = []

    def denoiser(noisy: th.Tensor, actions: th.Tensor, level: th.Tensor) -> th.Tensor:
        calls.append(actions.shape[1])
        return net(noisy, actions, level)

    def sample(markov: bool) -> Sample:
        th.manual_seed(1)
        task = Task(
            denoiser,
            condition=lambda actions: actions,
            policy=lambda states: Normal(
                0.3 * states[..., :ACTION_DIM], th.tensor(0.5).expand(*states.shape[:-1], ACTION_DIM)
            ),
            bound=lambda clean: clean,
            first=th.randn(7, OBS_DIM + 2),
            noise=th.randn(7, HORIZON, ACTION_DIM),
            action_mean=th.zeros(ACTION_DIM),
            action_std=th.ones(ACTION_DIM),
            markov=markov,
        )
        return sampler.sample(task)

    narrow, whole = sample(markov=True), sample(markov=False)
    assert th.allclose(narrow.states, whole.states, atol=1e-5)
    assert th.allclose(narrow.actions, whole.actions, atol=1e-5)
    n_calls = len(calls) // 2
    assert sum(calls[:n_calls]) == n_levels * HORIZON, "every state is asked about once per level"
    assert n_calls == n_levels * HORIZON if lag >= n_levels else n_calls == n_levels + round(lag * (HORIZON - 1))


def linear_system(n: int, steps: int) -> Trajectory:
    """s' = s + 0.1 (a, s_0, -s_1), reward s'_0, nothing ends."""
    observations, actions = [th.randn(n, OBS_DIM)], th.rand(n, steps, ACTION_DIM) * 2 - 1
    for t in range(steps):
        s = observations[-1]
        observations.append(s + 0.1 * th.stack([actions[:, t].sum(dim=1), s[:, 0], -s[:, 1]], dim=1))
    states = th.stack(observations, dim=1)
    return Trajectory(states, actions, states[:, 1:, 0], th.zeros(n, steps), th.ones(n, steps))


@pytest.mark.parametrize(("n_levels", "lag"), [(1, 1.0), (2, 2.0)])
def test_learns_a_linear_system_from_single_steps(n_levels: int, lag: float) -> None:
    th.manual_seed(0)
    kwargs = dict(denoiser="markov_mlp", width=64, n_layers=1, learning_rate=3e-3, n_levels=n_levels, lag=lag)
    model = build_world_model("diffusion", OBS_DIM, -th.ones(ACTION_DIM), th.ones(ACTION_DIM), 5, kwargs)
    assert model.window == 1
    for _ in range(400):
        batch = linear_system(128, model.window)
        outcomes = th.stack([batch.rewards[:, 0], batch.terminals[:, 0]], dim=1)
        model.observe(batch.observations[:, 0], batch.observations[:, 1], batch.actions[:, 0], outcomes)
        model.fit(batch)
    imagined = model.eval().imagine(
        th.randn(200, OBS_DIM), lambda s: Normal(-0.3 * s[..., :ACTION_DIM], 0.2 + 0 * s[..., :ACTION_DIM])
    )
    s, a = imagined.observations[:, :-1], imagined.actions.clamp(-1, 1)
    change = 0.1 * th.stack([a.sum(dim=2), s[..., 0], -s[..., 1]], dim=2)
    unexplained = (imagined.observations[:, 1:] - s - change).square().mean() / change.square().mean()
    assert unexplained < 0.06


def test_windows_are_longer_where_the_state_before_may_be_noisy() -> None:
    kwargs = dict(denoiser="markov_mlp", width=8, n_layers=1, n_levels=2, lag=1.0)
    assert build_world_model("diffusion", OBS_DIM, -th.ones(ACTION_DIM), th.ones(ACTION_DIM), 5, kwargs).window == 5


def test_randomness_that_is_small_beside_the_states_has_the_right_spread() -> None:
    th.manual_seed(0)
    noise_std = 0.1  # while states are spread with 1
    kwargs = dict(denoiser="markov_mlp", width=32, n_layers=1, learning_rate=3e-3, n_levels=16)
    model = build_world_model("diffusion", 1, -th.ones(1), th.ones(1), 3, kwargs)
    for _ in range(300):
        states = th.randn(256, 1)
        after, none = states + noise_std * th.randn(256, 1), th.zeros(256, 1)
        actions = th.rand(256, 1) * 2 - 1
        model.observe(states, after, actions, th.zeros(256, 2))
        batch = Trajectory(th.stack([states, after], dim=1), actions[:, None], none, none, th.ones(256, 1))
        model.fit(batch)
    imagined = model.eval().imagine(th.zeros(2_000, 1), lambda s: Normal(th.zeros_like(s), th.ones_like(s)))
    spreads = imagined.observations[:, 1:, 0].std(dim=0) / (noise_std * th.tensor([1.0, 2.0, 3.0]).sqrt())
    assert ((0.8 < spreads) & (spreads < 1.1)).all(), spreads  # 16 steps of DDIM have 0.93
