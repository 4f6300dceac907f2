"""The minibatch that policy updates read."""

from __future__ import annotations

from typing import NamedTuple

import torch as th


class ImaginedRolloutBufferSamples(NamedTuple):
    """SB3's ``RolloutBufferSamples`` plus ``mask``: 1.0 for steps that happened, 0.0 after an imagined ending."""

    observations: th.Tensor
    actions: th.Tensor
    old_values: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    mask: th.Tensor
