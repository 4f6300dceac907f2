"""The policy: where its mean may go, how wide it is, and what SB3's arguments do to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch import nn

from sb3_polygrad.common.averaging import MovingAverage
from sb3_polygrad.policies import ACTIVATIONS, PolyGRADPolicy

BOXES = [
    spaces.Box(-1.0, 1.0, (2,)),
    spaces.Box(np.array([-3.0, 10.0], dtype=np.float32), np.array([1.0, 10.5], dtype=np.float32)),
    spaces.Box(np.array([-1e-3, -500.0], dtype=np.float32), np.array([1e-3, 100.0], dtype=np.float32)),
]


def make_policy(box: spaces.Box = BOXES[1], obs_dim: int = 3, **kwargs: Any) -> PolyGRADPolicy:
    kwargs = {"net_arch": [16], **kwargs}
    return PolyGRADPolicy(spaces.Box(-np.inf, np.inf, (obs_dim,)), box, lambda _: 1e-3, **kwargs)


def half_range(box: spaces.Box) -> th.Tensor:
    return th.as_tensor(box.high - box.low) / 2


def distribution(policy: PolyGRADPolicy, observations: th.Tensor) -> th.distributions.Normal:
    return policy.get_distribution(observations).distribution  # type: ignore[return-value]


# ---------------------------------------------------------------------- the distribution


@pytest.mark.parametrize("box", BOXES)
def test_mean_covers_the_box_and_no_more(box: spaces.Box) -> None:
    policy, observations = make_policy(box), th.randn(2_000, 3)
    with th.no_grad():
        policy.action_net.weight.mul_(1e4)  # as far as it can go
    mean = distribution(policy, observations).mean
    low, high, slack = th.as_tensor(box.low), th.as_tensor(box.high), 1e-5 * half_range(box)
    assert (mean >= low - slack).all() and (mean <= high + slack).all()
    assert th.allclose(mean.amin(dim=0), low, atol=slack.max().item()), "both ends of every dimension are reached"
    assert th.allclose(mean.amax(dim=0), high, atol=slack.max().item())


@pytest.mark.parametrize("box", BOXES)
def test_mean_starts_near_the_centre(box: spaces.Box) -> None:
    mean = distribution(make_policy(box), th.randn(100, 3)).mean
    center = th.as_tensor(box.high + box.low) / 2
    assert ((mean - center).abs() < 0.1 * half_range(box)).all()


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize(("log_std_init", "min_std"), [(0.0, 0.1), (-1.0, 0.1), (-2.0, 0.0)])
def test_initial_std_is_what_was_asked_for(box: spaces.Box, log_std_init: float, min_std: float) -> None:
    policy = make_policy(box, log_std_init=log_std_init, min_std=min_std)
    expected = np.exp(log_std_init) * half_range(box)
    assert th.allclose(distribution(policy, th.randn(5, 3)).stddev, expected.expand(5, 2), rtol=1e-5)
    assert th.allclose(policy.relative_std, th.tensor(np.exp(log_std_init), dtype=th.float32), rtol=1e-5)


@pytest.mark.parametrize("box", BOXES)
def test_std_has_a_floor_in_half_ranges(box: spaces.Box) -> None:
    policy = make_policy(box, min_std=0.1)
    with th.no_grad():
        policy.log_std.fill_(-100.0)
    assert th.allclose(distribution(policy, th.randn(1, 3)).stddev, 0.1 * half_range(box), rtol=1e-5)


def test_std_does_not_depend_on_the_state() -> None:
    std = distribution(make_policy(), th.randn(50, 3)).stddev
    assert th.equal(std, std[:1].expand_as(std))


def test_log_prob_and_entropy_are_those_of_the_gaussian() -> None:
    policy, observations, actions = make_policy(), th.randn(7, 3), th.randn(7, 2)
    _, log_prob, entropy = policy.evaluate_actions(observations, actions)
    normal = distribution(policy, observations)
    expected = -0.5 * ((actions - normal.mean) / normal.stddev) ** 2 - normal.stddev.log() - 0.5 * np.log(2 * np.pi)
    assert th.allclose(log_prob, expected.sum(dim=1), rtol=1e-4)
    assert entropy is not None
    assert th.allclose(entropy, (normal.stddev.log() + 0.5 * np.log(2 * np.pi * np.e)).sum(dim=1), rtol=1e-4)


@pytest.mark.parametrize("box", BOXES)
def test_predicted_actions_lie_in_the_box(box: spaces.Box) -> None:
    policy = make_policy(box)
    for deterministic in (True, False):
        actions, _ = policy.predict(np.random.randn(100, 3).astype(np.float32), deterministic=deterministic)
        assert all(box.contains(action) for action in actions)


# ---------------------------------------------------------------------- the networks


@pytest.mark.parametrize(
    ("net_arch", "n_pi", "n_vf"),
    [([], 0, 0), ([4], 1, 1), (dict(pi=[8, 4], vf=[16]), 2, 1), (dict(vf=[8]), 0, 1), (None, 2, 2)],
)
def test_net_arch(net_arch: Any, n_pi: int, n_vf: int) -> None:
    policy = make_policy(net_arch=net_arch)
    # The layers of a critic are a hidden part and a head.
    critics = [critic[0] for critic in policy.value_net.critics]  # type: ignore[union-attr]
    assert len(critics) == policy.n_critics == 2

    def count(net: nn.Module, kind: type[nn.Module]) -> int:
        return sum(isinstance(layer, kind) for layer in net)  # type: ignore[attr-defined]

    for kind in (nn.Linear, nn.LayerNorm, nn.ReLU):
        assert count(policy.mlp_extractor.policy_net, kind) == n_pi, "Linear, LayerNorm, ReLU per hidden layer"
        assert all(count(hidden, kind) == n_vf for hidden in critics)
    actions, values, log_prob = policy(th.randn(5, 3))
    assert actions.shape == (5, 2) and values.shape == (5, 2) and log_prob.shape == (5,)


def test_hidden_layers_are_normalised_before_the_activation() -> None:
    policy = make_policy(net_arch=[8], activation_fn=nn.Tanh)
    assert [type(layer) for layer in policy.mlp_extractor.policy_net] == [nn.Linear, nn.LayerNorm, nn.Tanh]
    for critic in policy.value_net.critics:  # type: ignore[union-attr]
        assert [type(layer) for layer in critic[0]] == [nn.Linear, nn.LayerNorm, nn.Tanh]


def test_activations_have_names() -> None:
    for name, kind in {"relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU, "tanh": nn.Tanh}.items():
        policy = make_policy(net_arch=[8], activation_fn=name)
        assert isinstance(policy.mlp_extractor.policy_net[-1], kind) and ACTIVATIONS[name] is kind
    with pytest.raises(ValueError, match="did you mean 'relu'"):
        make_policy(activation_fn="rellu")


# ---------------------------------------------------------------------- optimiser and target critic


@pytest.mark.parametrize("share", [True, False])
def test_actor_and_critic_share_nothing_and_miss_nothing(share: bool) -> None:
    policy = make_policy(share_features_extractor=share)
    actor, log_std = ({id(p) for p in group["params"]} for group in policy.actor_optimizer.param_groups)
    (critic,) = ({id(p) for p in group["params"]} for group in policy.critic_optimizer.param_groups)
    trainable = {id(p) for p in policy.parameters() if p.requires_grad}
    assert actor | critic | log_std == trainable and not actor & critic and not log_std & (actor | critic)
    assert log_std == {id(policy.log_std)} and all(id(p) in critic for p in policy.value_net.parameters())
    assert actor | log_std == {id(p) for p in policy.actor_parameters()}
    assert critic == {id(p) for p in policy.critic_parameters()}


def test_every_part_has_its_learning_rate() -> None:
    policy = make_policy(log_std_learning_rate=0.25)
    policy.set_learning_rates(0.5, 0.125)
    assert [group["lr"] for group in policy.actor_optimizer.param_groups] == [0.5, 0.25]
    assert [group["lr"] for group in policy.critic_optimizer.param_groups] == [0.125]


def test_optimizer_class_and_kwargs() -> None:
    policy = make_policy(optimizer_class=th.optim.SGD, optimizer_kwargs=dict(momentum=0.5))
    for optimizer in (policy.actor_optimizer, policy.critic_optimizer):
        assert isinstance(optimizer, th.optim.SGD)
        assert all(group["momentum"] == 0.5 for group in optimizer.param_groups)


def test_target_critic_starts_as_the_critic_and_follows_by_tau() -> None:
    policy, observations = make_policy(tau=0.25), th.randn(6, 3)
    smallest = policy.predict_values(observations).amin(dim=1)
    assert th.allclose(policy.target_values(observations), smallest)
    policy.update_averages()  # the first update copies, as torch's AveragedModel has it
    before = policy.target_values(observations)
    with th.no_grad():
        for critic in policy.value_net.critics:  # type: ignore[union-attr]
            critic[-1].bias += 8.0  # values rise by 8
    policy.update_averages()
    assert th.allclose(policy.target_values(observations), before + 2.0, atol=1e-5), "a quarter of the way"


def test_deterministic_predictions_are_of_the_averaged_actor() -> None:
    policy, observations = make_policy(), th.randn(6, 3)
    mean = lambda: policy.get_distribution(observations).distribution.mean  # noqa: E731
    before = mean()
    assert th.allclose(policy._predict(observations, deterministic=True), before), "it starts as the actor"
    policy.update_averages()
    with th.no_grad():
        policy.action_net.bias += 1.0
    assert not th.allclose(mean(), before) and th.allclose(policy._predict(observations, deterministic=True), before)
    for _ in range(18):
        policy.update_averages()  # up to the tenth the average is the newest actor
    assert th.allclose(policy._predict(observations, deterministic=True), mean(), atol=1e-6)
    with th.no_grad():
        policy.action_net.bias += 1.0
    policy.update_averages()  # the twentieth: half way
    output = lambda bias: policy.action_net(policy.mlp_extractor.forward_actor(observations)) - 1.0 + bias  # noqa: E731
    assert th.allclose(policy._predict(observations, deterministic=True), policy._mean(output(0.5)), atol=1e-6)
    policy.log_std.data.fill_(-20.0)
    assert th.allclose(policy._predict(observations), mean(), atol=1.0), "exploring is of the actor itself"


def test_the_average_is_of_the_latest_tenth_of_all_updates() -> None:
    network = nn.Linear(1, 1)
    average, n = MovingAverage(network), 2000
    for update in range(n):
        nn.init.constant_(network.weight, update)
        if update == n // 2:  # saved and loaded it goes on as it would have done
            saved, average = average, MovingAverage(network)
            average.load_state_dict(saved.state_dict())
        average.update_parameters(network)
    # In closed form: weights that grow as the 9th power of the update have their mean at n / 1.1.
    assert float(average.module.weight) == pytest.approx(n / 1.1, rel=0.002)


def test_without_averaging_deterministic_predictions_are_the_mean() -> None:
    policy, observations = make_policy(average_actor=False), th.randn(6, 3)
    with th.no_grad():
        policy.action_net.bias += 1.0
    policy.update_averages()
    assert th.allclose(policy._predict(observations, deterministic=True), policy.get_distribution(observations).mode())


def test_target_critic_gets_no_gradient() -> None:
    policy = make_policy()
    policy.predict_values(th.randn(4, 3)).sum().backward()
    assert all(not p.requires_grad and p.grad is None for p in policy.critic_target.parameters())


# ---------------------------------------------------------------------- saving, bad arguments


def test_saved_alone_it_acts_the_same(tmp_path: Path) -> None:
    policy = make_policy(
        net_arch=dict(pi=[8], vf=[4]),
        activation_fn=nn.Tanh,
        min_std=0.02,
        log_std_init=-1.0,
        log_std_learning_rate=0.25,
        average_actor=False,
        tau=0.5,
        n_critics=3,
    )
    policy.save(tmp_path / "policy")
    loaded = PolyGRADPolicy.load(tmp_path / "policy")
    observations = np.random.randn(20, 3).astype(np.float32)
    assert np.array_equal(
        loaded.predict(observations, deterministic=True)[0], policy.predict(observations, deterministic=True)[0]
    )
    assert th.equal(distribution(loaded, th.zeros(1, 3)).stddev, distribution(policy, th.zeros(1, 3)).stddev)
    settings = (loaded.min_std, loaded.log_std_learning_rate, loaded.average_actor, loaded.tau, loaded.n_critics)
    assert settings == (0.02, 0.25, False, 0.5, 3)
    tensor = th.as_tensor(observations)
    assert th.equal(loaded.target_values(tensor), policy.target_values(tensor))


def test_rejects_bad_arguments() -> None:
    with pytest.raises(ValueError, match="use_sde=True is not supported"):
        make_policy(use_sde=True)
    with pytest.raises(ValueError, match="min_std"):
        make_policy(min_std=0.5, log_std_init=-1.0)  # the floor is above the start
    with pytest.raises(ValueError, match="min_std"):
        make_policy(min_std=-0.1)
    for value in (None, "2", True, float("nan")):
        with pytest.raises(TypeError, match="policy_kwargs: tau must be a finite number"):
            make_policy(tau=value)
    with pytest.raises(TypeError, match="average_actor must be True or False"):
        make_policy(average_actor=0.1)
    with pytest.raises(ValueError, match="log_std_learning_rate"):
        make_policy(log_std_learning_rate=-1.0)
    with pytest.raises(ValueError, match="tau"):
        make_policy(tau=0.0)
    with pytest.raises(TypeError, match="no_such_argument"):
        make_policy(no_such_argument=1)
