"""Steps of an optimiser that are only taken if the gradient is worth it."""

from __future__ import annotations

import torch as th

from sb3_polygrad.core.capture import is_captured


def step_if(usable: th.Tensor, optimizer: th.optim.Optimizer) -> None:
    """
    Take a step, or leave no trace of it in parameters, moments and step counts.

    Torch's fused Adam decides on the device (as it does for loss scaling), so that the host need not wait for it; any other
    optimiser makes the host look. (At its very first step Adam makes its moments, zeros, even if the step is not taken.)

    :param usable: whether to take it, a bool scalar on the device of the parameters
    :param optimizer: its gradients are there
    """
    if not decides_on_device(optimizer):
        if usable:
            optimizer.step()
        return
    groups = optimizer.param_groups
    said = [group["capturable"] for group in groups]
    optimizer.found_inf = usable.logical_not().float()  # type: ignore[attr-defined]
    try:
        for group in groups:  # torch wants it said while it is captured, and warns of it otherwise
            group["capturable"] = is_captured()
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]
        for group, capturable in zip(groups, said, strict=True):
            group["capturable"] = capturable


def decides_on_device(optimizer: th.optim.Optimizer) -> bool:
    """Whether it is a fused Adam of torch's own. (What a subclass makes of ``found_inf`` is not known.)"""
    return type(optimizer) in (th.optim.Adam, th.optim.AdamW) and all(group["fused"] for group in optimizer.param_groups)
