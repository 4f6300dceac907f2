"""Optimiser steps that are taken only if the gradient is finite."""

from __future__ import annotations

from collections.abc import Iterable

import torch as th
from torch import nn


def gradient_step(
    optimizer: th.optim.Optimizer, loss: th.Tensor, parameters: Iterable[nn.Parameter], max_grad_norm: float
) -> th.Tensor:
    """
    One step of an optimiser down the gradient of a loss, with the gradient's norm clipped.

    A gradient that is not finite changes nothing: neither parameters nor the optimiser's moments and step counts. (At its very
    first step Adam makes its moments, zeros, even then.) Gradients of other parameters are not computed.

    :param optimizer: of the parameters
    :param loss: scalar
    :param parameters: what to change; the loss depends on some of them
    :param max_grad_norm: bound on the gradient's norm
    :return: scalar on the device: 1 if the step was skipped, else 0
    """
    parameters = list(parameters)
    optimizer.zero_grad(set_to_none=True)
    loss.backward(inputs=parameters)
    finite = th.isfinite(nn.utils.clip_grad_norm_(parameters, max_grad_norm))
    _step_if(finite, optimizer)
    return 1.0 - finite.float()


def _step_if(wanted: th.Tensor, optimizer: th.optim.Optimizer) -> None:
    """
    Take a step if a bool scalar on the device says so.

    Torch's fused Adam reads ``found_inf`` on the device (made for loss scaling); every other optimiser makes the host wait.
    """
    on_device = type(optimizer) in (th.optim.Adam, th.optim.AdamW) and all(group["fused"] for group in optimizer.param_groups)
    if not on_device:
        if wanted:
            optimizer.step()
        return
    optimizer.found_inf = wanted.logical_not().float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]
