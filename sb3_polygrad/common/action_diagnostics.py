"""How well imagined actions match the policy that should have drawn them."""

from __future__ import annotations

import torch as th

from sb3_polygrad.common.trajectory import Trajectory


def standardized_actions(trajectory: Trajectory, mean: th.Tensor, std: th.Tensor) -> th.Tensor:
    """
    Eq. 9: ``(a - μ(s)) / σ(s)``; draws from the policy give independent N(0, 1).

    :param trajectory: imagined trajectories
    :param mean: ``(batch, horizon, action_dim)`` of the policy at the imagined observations
    :param std: like ``mean``
    :return: like ``mean``
    """
    return (trajectory.actions - mean) / std


def action_std(standardized: th.Tensor, mask: th.Tensor) -> th.Tensor:
    """
    σ_ā: standard deviation over batch and time, averaged over action dimensions; steps after an ending do not count.

    :param standardized: ``(batch, horizon, action_dim)``
    :param mask: ``(batch, horizon)``
    :return: scalar
    """
    weight = mask[..., None]
    total = weight.sum().clamp(min=1.0)
    mean = (standardized * weight).sum(dim=(0, 1)) / total
    variance = ((standardized - mean).square() * weight).sum(dim=(0, 1)) / total
    return variance.sqrt().mean()


def action_autocorrelation(standardized: th.Tensor, mask: th.Tensor) -> th.Tensor:
    """
    Lag-1 autocorrelation of the standardised actions, averaged over action dimensions: 0 if they are truly on-policy.

    :param standardized: ``(batch, horizon, action_dim)``
    :param mask: ``(batch, horizon)``
    :return: scalar
    """
    weight = mask[:, 1:, None]  # a pair counts if its later step happened
    before, after = standardized[:, :-1], standardized[:, 1:]
    scale = ((before.square() * weight).sum(dim=(0, 1)) * (after.square() * weight).sum(dim=(0, 1))).sqrt()
    return ((before * after * weight).sum(dim=(0, 1)) / scale.clamp(min=1e-8)).mean()


def ks_distance(samples: th.Tensor, counted: th.Tensor | None = None) -> th.Tensor:
    """
    Kolmogorov-Smirnov distance between samples and N(0, 1): the largest gap between the two distribution functions.

    :param samples: any shape
    :param counted: bool, like ``samples``: which of them count; all if not given
    :return: scalar, float64
    """
    counted = th.ones_like(samples, dtype=th.bool) if counted is None else counted
    ordered = samples.double().masked_fill(~counted, th.inf).flatten().sort().values  # what does not count comes last
    exact, n = th.special.ndtr(ordered), counted.sum()
    rank = th.arange(len(ordered), dtype=th.float64, device=samples.device)
    gaps = th.maximum((rank + 1.0) / n - exact, exact - rank / n)
    return gaps.masked_fill(rank >= n, 0.0).max()


def predictable_share(standardized: th.Tensor, observations: th.Tensor, mask: th.Tensor) -> th.Tensor:
    """
    Held-out R² of a linear prediction of the standardised actions from the observations in which they were taken.

    Zero (or, by estimation error, a little less) if the actions are draws. Every second trajectory fits, the others test;
    NaN if there are too few of either.

    :param standardized: ``(batch, horizon, action_dim)``
    :param observations: ``(batch, horizon, obs_dim)``
    :param mask: ``(batch, horizon)``
    :return: scalar, float64
    """
    happened = (mask > 0.0)[..., None]
    fit, test = slice(0, None, 2), slice(1, None, 2)
    # What did not happen is all zeros, and weighs nothing.
    weight, inputs, outputs = (
        [values[half].double().masked_fill(~happened[half], 0.0).flatten(0, 1) for half in (fit, test)]
        for values in (happened, observations, standardized)
    )
    n = [half.sum() for half in weight]
    center = inputs[0].sum(dim=0) / n[0]
    scale = (((inputs[0] - center) * weight[0]).square().sum(dim=0) / (n[0] - 1.0)).sqrt().clamp(min=1e-8)
    # A constant beside the features.
    design = [th.cat([(x - center) / scale, th.ones_like(w)], dim=1) * w for x, w in zip(inputs, weight, strict=True)]
    # A ridge keeps features that are nearly the same from being told apart by chance.
    gram = design[0].T @ design[0] + 1e-6 * n[0] * th.eye(design[0].shape[1]).to(design[0])
    weights = th.linalg.solve_ex(gram, design[0].T @ outputs[0]).result
    residual = outputs[1] - design[1] @ weights
    spread = (outputs[1] - outputs[1].sum(dim=0) / n[1]) * weight[1]
    share = 1.0 - residual.square().sum() / spread.square().sum()
    return share.masked_fill(th.minimum(n[0], n[1]) < 2, th.nan)


def action_diagnostics(standardized: th.Tensor, trajectory: Trajectory) -> dict[str, th.Tensor]:
    """
    What a training log says of imagined actions. Only steps that happened count.

    For draws from the policy the standard deviations are 1, the others are 0, up to sampling error.

    :param standardized: ``(a - μ(s)) / σ(s)``, ``(batch, horizon, action_dim)``
    :param trajectory: the imagined batch
    :return: scalars on the device, NaN where too few steps happened to say
    """
    mask = trajectory.mask
    happened = (mask > 0.0)[..., None].expand_as(standardized)
    diagnostics = {
        "action_std": action_std(standardized, mask),
        "action_mean": standardized.masked_fill(~happened, 0.0).sum() / happened.sum(),
        "action_ks": ks_distance(standardized, happened),
        "action_autocorr": action_autocorrelation(standardized, mask),
        "action_predictable": predictable_share(standardized, trajectory.observations[:, :-1], mask),
    }
    for name, t in (("action_std_first", 0), ("action_std_last", -1)):
        at_t = mask[:, t, None]
        diagnostics[name] = action_std(standardized[:, t, None], at_t).masked_fill(at_t.sum() <= 1, th.nan)
    return diagnostics
