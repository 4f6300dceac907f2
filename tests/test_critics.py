"""Several critics side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch as th

from sb3_polygrad import PolyGRAD
from tests.toys import PointEnv, tiny_model


def two_critics(**changes: object) -> PolyGRAD:
    kwargs = dict(net_arch=[16], n_critics=2)
    return tiny_model(PointEnv(), policy_kwargs=kwargs, learning_starts=32, **changes)


@pytest.mark.parametrize("share", [True, False])
def test_the_smallest_of_the_targets_is_bootstrapped_from(share: bool) -> None:
    kwargs = dict(net_arch=[16], n_critics=2, share_features_extractor=share)
    policy = tiny_model(PointEnv(), policy_kwargs=kwargs).policy
    observations = th.linspace(-2.0, 2.0, 101)[:, None]
    policy.update_averages()  # the targets are copies now
    with th.no_grad():
        values = policy.predict_values(observations)
        smallest = policy.target_values(observations)
    assert values.shape == (101, 2)
    assert (values[:, 0] < values[:, 1]).any() and (values[:, 0] > values[:, 1]).any(), "they begin with other weights"
    assert th.allclose(smallest, values.min(dim=1).values)
    for deterministic in (True, False):
        assert th.equal(policy(observations, deterministic)[1], policy.predict_values(observations))
    assert th.equal(policy.evaluate_actions(observations, observations)[0], policy.predict_values(observations))


@pytest.mark.parametrize("policy_update", ["pathwise", "ppo", "a2c"])
def test_all_critics_learn_and_no_actor_does_with_them(policy_update: str) -> None:
    model = two_critics(policy_update=policy_update)
    before = [parameter.clone() for parameter in model.policy.critic_parameters()]
    actor = {id(parameter) for parameter in model.policy.actor_parameters()}
    assert len(before) == 2 * 6 and not actor & {id(parameter) for parameter in model.policy.critic_parameters()}
    model.learn(48)
    assert not any(th.equal(old, new) for old, new in zip(before, model.policy.critic_parameters(), strict=True))


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = two_critics().learn(48)
    model.save(tmp_path / "model")
    loaded = PolyGRAD.load(tmp_path / "model")
    observations = th.linspace(-2.0, 2.0, 11)[:, None]
    assert th.equal(loaded.policy.target_values(observations), model.policy.target_values(observations))
    assert loaded.policy.n_critics == 2


def test_without_orthogonal_weights_they_differ_too() -> None:
    kwargs = dict(net_arch=[16], n_critics=3, ortho_init=False)
    policy = tiny_model(PointEnv(), policy_kwargs=kwargs).policy
    values = policy.predict_values(th.linspace(-2.0, 2.0, 11)[:, None])
    assert values.shape == (11, 3) and not th.equal(values[:, 1], values[:, 2])


@pytest.mark.parametrize("n_critics", [0, -1, 1.5, "2", None, True])
def test_a_number_of_critics(n_critics: object) -> None:
    with pytest.raises((TypeError, ValueError), match="n_critics must be"):
        tiny_model(PointEnv(), policy_kwargs=dict(n_critics=n_critics))
