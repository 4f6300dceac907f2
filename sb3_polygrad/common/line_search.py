"""The paper's line search: a step in parameter space, scaled to a target size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch as th
from torch import nn


def scale_step(
    parameters: Sequence[nn.Parameter],
    origin: Sequence[th.Tensor],
    measure: Callable[[], th.Tensor],
    target: float,
    tolerance: float = 0.2,
    max_trials: int = 1,
    max_scale: float = 3.0,
) -> tuple[th.Tensor, th.Tensor]:
    """
    Scale a step that was just taken so that its measured size meets a target; the paper's line search.

    To first order the size is proportional to the step, so each trial corrects the scale by target / measured: one trial
    is the first-order rule, more of them a search that ends within the tolerance. The paper's release instead shrinks or
    grows by a fixed ratio and lets the optimiser advance at every trial. Here every trial starts from the same saved
    parameters and the optimiser is not touched, so that the search leaves no trace. The first-order rule is reckoned on the
    device; between the trials of a search the host waits for the measure, to know whether to go on.

    :param parameters: they hold origin + step when called, origin + scale * step on return
    :param origin: their values before the step
    :param measure: size of the change for the current parameters, a scalar
    :param target: size that is wanted
    :param tolerance: accepted deviation as a fraction of the target
    :param max_trials: measurements of the size at most
    :param max_scale: the scale never exceeds this
    :return: scalars: the scale (0 if the step was undone because its size was not finite), and the size last measured: with
        one trial that of the step before it was scaled
    """
    steps = [parameter.detach() - start for parameter, start in zip(parameters, origin, strict=True)]
    scale = th.ones((), dtype=th.float64, device=steps[0].device)
    for trials_left in reversed(range(max_trials)):
        size = measure().double()
        close = (size - target).abs() <= tolerance * target
        corrected = th.where(close, scale, (scale * target / size.clamp(min=1e-12)).clamp(max=max_scale))
        corrected = th.where(size < th.inf, corrected, 0.0)  # NaN or infinite: no step at all
        # At its limit, too, it stays what it is: measuring again would say the same.
        settled = corrected == scale
        for parameter, start, step in zip(parameters, origin, steps, strict=True):
            scaled = th.where(corrected == 0.0, start, start + corrected.to(step.dtype) * step)
            parameter.detach().copy_(th.where(settled, parameter.detach(), scaled))
        scale = corrected
        if trials_left and (settled | (scale == 0.0)):
            break
    return scale, size
