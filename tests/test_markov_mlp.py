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


def test_output_and_error_are_in_units_of_the_usual_change() -> None:
    net = network()
    for parameter in net.parameters():
        parameter.data.zero_()
    noisy = th.randn(4, 2, OBS_DIM + 2)
    still = net(noisy, th.randn(4, 1, ACTION_DIM), th.ones(4, 1))
    assert th.allclose(still[:, 1, :OBS_DIM], noisy[:, 0, :OBS_DIM]), "says nothing: the state does not change"
    net.head.bias.data.fill_(1.0)
    output = net(noisy, th.randn(4, 1, ACTION_DIM), th.ones(4, 1))
    assert th.allclose((output - still)[:, 1], th.tensor([0.1, 0.5, 1.0, 1.0, 1.0]).expand(4, -1))
    assert net.loss(output[:, 1:], still[:, 1:]).item() == pytest.approx(1.0, rel=1e-5)


def test_tiny_changes_are_not_blown_up_beyond_reason() -> None:
    net = network()
    net.observe_changes(th.tensor([1e-6, 0.5, 1.0]))
    assert net.change.tolist() == pytest.approx([0.05, 0.5, 1.0, 1.0, 1.0])


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
