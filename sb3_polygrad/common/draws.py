"""Actions as a function of the policy's distribution and of given noise."""

from __future__ import annotations

from functools import singledispatch

import torch as th
from torch.distributions import Distribution, Independent, Normal, TransformedDistribution


@singledispatch
def draw(policy: Distribution, noise: th.Tensor) -> th.Tensor:
    """
    The action that a policy makes of standard normal noise; a draw from the policy, since the noise is one.

    Known are Gaussians, transformed ones (squashed by a tanh, say) and ``Independent`` ones. Any other distribution that is
    a function of state and noise is made known by ``draw.register(ItsClass)`` above a function of the two arguments here.

    :param policy: distribution at some states, ``(..., action_dim)``
    :param noise: ``(..., action_dim)``
    :raises TypeError: for a distribution that is not known
    """
    raise TypeError(
        f"no function of state and noise is known for {type(policy).__name__}: write one and decorate it with "
        "sb3_polygrad.common.draws.draw.register, or use the policy-guided sampler"
    )


@draw.register(Normal)
def _(policy: Normal, noise: th.Tensor) -> th.Tensor:
    return policy.mean + policy.stddev * noise


@draw.register(Independent)
def _(policy: Independent, noise: th.Tensor) -> th.Tensor:
    return draw(policy.base_dist, noise)


@draw.register(TransformedDistribution)
def _(policy: TransformedDistribution, noise: th.Tensor) -> th.Tensor:
    actions = draw(policy.base_dist, noise)
    for transform in policy.transforms:
        actions = transform(actions)
    return actions
