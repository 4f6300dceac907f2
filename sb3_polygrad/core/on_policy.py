"""How well imagined actions match the policy that should have drawn them."""

from __future__ import annotations

import torch as th

from sb3_polygrad.core.trajectory import Trajectory


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


def ks_distance(samples: th.Tensor) -> float:
    """
    Kolmogorov-Smirnov distance between samples and N(0, 1): the largest gap between the two distribution functions.

    :param samples: any shape
    """
    ordered = samples.flatten().double().sort().values
    exact = th.special.ndtr(ordered)
    steps = th.arange(len(ordered) + 1, dtype=th.float64, device=samples.device) / len(ordered)
    return float(th.maximum(steps[1:] - exact, exact - steps[:-1]).max())


def predictable_share(standardized: th.Tensor, observations: th.Tensor, mask: th.Tensor) -> float:
    """
    Held-out R² of a linear prediction of the standardised actions from the observations in which they were taken.

    Zero (or, by estimation error, a little less) if the actions are draws. Every second trajectory fits, the others test;
    NaN if there are too few of either.

    :param standardized: ``(batch, horizon, action_dim)``
    :param observations: ``(batch, horizon, obs_dim)``
    :param mask: ``(batch, horizon)``
    """
    happened = mask > 0.0
    parts = []
    for half in (slice(0, None, 2), slice(1, None, 2)):
        inputs, outputs = observations[half][happened[half]].double(), standardized[half][happened[half]].double()
        parts.append((inputs, outputs))
    (fit_inputs, fit_outputs), (test_inputs, test_outputs) = parts
    if min(len(fit_inputs), len(test_inputs)) < 2:
        return float("nan")
    center, scale = fit_inputs.mean(dim=0), fit_inputs.std(dim=0).clamp(min=1e-8)

    def features(inputs: th.Tensor) -> th.Tensor:
        return th.nn.functional.pad((inputs - center) / scale, (0, 1), value=1.0)

    # A ridge keeps features that are nearly the same from being told apart by chance.
    design = features(fit_inputs)
    gram = design.T @ design + 1e-6 * len(design) * th.eye(design.shape[1]).to(design)
    weights = th.linalg.solve(gram, design.T @ fit_outputs)
    residual = test_outputs - features(test_inputs) @ weights
    return float(1.0 - residual.square().mean() / (test_outputs - test_outputs.mean(dim=0)).square().mean())


def per_step_std(standardized: th.Tensor, mask: th.Tensor) -> th.Tensor:
    """
    Standard deviation at every step, over trajectories, averaged over action dimensions.

    :param standardized: ``(batch, horizon, action_dim)``
    :param mask: ``(batch, horizon)``
    :return: ``(horizon,)``
    """
    return th.stack([action_std(standardized[:, t : t + 1], mask[:, t : t + 1]) for t in range(mask.shape[1])])


def action_statistics(standardized: th.Tensor, observations: th.Tensor, mask: th.Tensor) -> dict[str, float]:
    """
    Of draws from the policy the first is 1, the others are 0, up to sampling error. Only steps that happened count.

    :param standardized: ``(a - μ(s)) / σ(s)``, ``(batch, horizon, action_dim)``
    :param observations: ``(batch, horizon, obs_dim)`` in which was acted
    :param mask: ``(batch, horizon)``, 1.0 for steps that happened
    """
    return {
        "action_std": float(action_std(standardized, mask)),
        "action_mean": float(standardized[mask > 0.0].mean()),
        "ks": ks_distance(standardized[mask > 0.0]),
        "autocorrelation": float(action_autocorrelation(standardized, mask)),
        "predictable": predictable_share(standardized, observations, mask),
    }


def action_diagnostics(standardized: th.Tensor, trajectory: Trajectory) -> dict[str, float]:
    """
    What a training log says of the actions: :func:`action_statistics`, and the spread at the first and at the last step.

    :param standardized: ``(batch, horizon, action_dim)``
    :param trajectory: the imagined batch
    """
    statistics = action_statistics(standardized, trajectory.observations[:, :-1], trajectory.mask)
    names = {"ks": "action_ks", "autocorrelation": "action_autocorr", "predictable": "action_predictable"}
    diagnostics = {names.get(name, name): value for name, value in statistics.items()}
    for name, t in (("action_std_first", 0), ("action_std_last", -1)):
        mask = trajectory.mask[:, t, None]
        if mask.sum() > 1:
            diagnostics[name] = float(action_std(standardized[:, t, None], mask))
    return diagnostics
