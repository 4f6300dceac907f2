"""Whether imagined actions are draws from the policy: statistics of standardised actions over the steps that happened."""

from __future__ import annotations

import torch as th

from sb3_polygrad.core.on_policy import action_autocorrelation, action_std


def ks_distance(samples: th.Tensor) -> float:
    """
    Kolmogorov-Smirnov distance between samples and N(0, 1): the largest gap between the two distribution functions.

    :param samples: any shape
    """
    ordered = samples.flatten().double().sort().values
    exact = th.special.ndtr(ordered)
    steps = th.arange(len(ordered) + 1, dtype=th.float64) / len(ordered)
    return float(th.maximum(steps[1:] - exact, exact - steps[:-1]).max())


def predictable_share(standardized: th.Tensor, observations: th.Tensor, mask: th.Tensor) -> float:
    """
    Held-out R² of a linear prediction of the standardised actions from the observations in which they were taken.

    Zero (or, by estimation error, a little less) if the actions are draws. Every second trajectory fits, the others test.

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
    center, scale = fit_inputs.mean(dim=0), fit_inputs.std(dim=0).clamp(min=1e-8)

    def features(inputs: th.Tensor) -> th.Tensor:
        return th.nn.functional.pad((inputs - center) / scale, (0, 1), value=1.0)

    # A ridge keeps features that are nearly the same from being told apart by chance.
    design = features(fit_inputs)
    gram = design.T @ design + 1e-6 * len(design) * th.eye(design.shape[1], dtype=th.float64)
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
    Of draws from the policy the first is 1, the others are 0, up to sampling error.

    :param standardized: ``(a - μ(s)) / σ(s)``, ``(batch, horizon, action_dim)``
    :param observations: ``(batch, horizon, obs_dim)`` in which was acted
    :param mask: ``(batch, horizon)``, 1.0 for steps that happened
    """
    return {
        "action_std": float(action_std(standardized, mask)),
        "ks": ks_distance(standardized[mask > 0.0]),
        "autocorrelation": float(action_autocorrelation(standardized, mask)),
        "predictable": predictable_share(standardized, observations, mask),
    }
