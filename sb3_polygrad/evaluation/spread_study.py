"""
Is the spread of imagined trajectories that of the environment? Samplers on a linear-Gaussian system with a known answer.

    python -m sb3_polygrad.evaluation.spread_study --models MODELS --out docs/results/spread_study

Many trajectories are imagined from each of a few states, and their states compared, at every step and in every dimension,
with the true distribution under the same policy (:mod:`~sb3_polygrad.evaluation.linear_gaussian`). Writes ``<out>.csv``, a row
per sampler and step, and ``<out>.json``:

- ``spread``: standard deviation of the samples over the true one,
- ``coverage``: true probability of the central interval that holds 90 % of the samples,
- ``crps``: score over the truth's own, minus 1: 0 at best,
- ``bias``: root mean square error of the mean, in true standard deviations; sampling alone gives 1/sqrt(trajectories).

Each is a mean over start states and dimensions.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch as th

from sb3_polygrad.benchmark.provenance import provenance, write_json
from sb3_polygrad.common.arguments import json_object
from sb3_polygrad.evaluation.command import run_study, study_parser
from sb3_polygrad.evaluation.fitted_model import fitted_model
from sb3_polygrad.evaluation.linear_gaussian import LinearGaussianSystem
from sb3_polygrad.evaluation.policy_guidance import tune_delta
from sb3_polygrad.evaluation.results import beside, write_csv
from sb3_polygrad.evaluation.spread import coverage, crps, optimal_crps
from sb3_polygrad.evaluation.staggered_candidates import Candidate, staggered_candidates
from sb3_polygrad.world_models.diffusion import DiffusionWorldModel

TRAINING_STDS = (0.02, 0.1, 0.5, 1.0)


def compare(
    model: DiffusionWorldModel, system: LinearGaussianSystem, start: th.Tensor, n_samples: int, std: float
) -> list[dict[str, float]]:
    """
    :param model: fitted to the system
    :param system: the truth
    :param start: ``(n, 2)`` states to imagine from
    :param n_samples: trajectories from each
    :param std: of the policy
    :return: a row per step
    """
    imagined = model.imagine(start.repeat_interleave(n_samples, dim=0), system.policy(std))
    samples = imagined.observations[:, 1:].view(len(start), n_samples, model.horizon, -1).transpose(0, 1)
    mean, covariance = system.moments(start, model.horizon, std)
    true_std = covariance.diagonal(dim1=1, dim2=2).sqrt().expand_as(mean)
    measures = {
        "spread": samples.std(dim=0) / true_std,
        "coverage": coverage(samples, mean, true_std),
        "crps": crps(samples, mean, true_std) / optimal_crps(true_std) - 1.0,
        "bias": ((samples.mean(dim=0) - mean) / true_std).square(),
    }
    by_step = {name: values.mean(dim=(0, 2)) for name, values in measures.items()}
    by_step["bias"] = by_step["bias"].sqrt()
    return [{"step": t + 1, **{name: float(values[t]) for name, values in by_step.items()}} for t in range(model.horizon)]


def candidates(args: argparse.Namespace, system: LinearGaussianSystem) -> Iterator[Candidate]:
    """Every sampler asked for."""
    th.manual_seed(args.seed)
    data = system.collect(args.episodes, 50, TRAINING_STDS)
    size = {"width": args.width, "n_layers": args.layers}

    def model(name: str, settings: dict[str, Any]) -> tuple[DiffusionWorldModel, dict[str, Any]]:
        path = args.models / f"linear_gaussian_h{args.horizon}_{name}.pt"
        bounds = system.action_low, system.action_high
        return fitted_model(path, data, *bounds, args.horizon, {**size, **settings}, args.gradient_steps, seed=args.seed)

    for denoiser in args.denoisers:
        yield from staggered_candidates(denoiser, args.staggered.get(denoiser, {}), args.levels, args.lags, model)
    for n_steps in args.diffusion_steps:
        settings = {"sampler": "policy_guided", "n_diffusion_steps": n_steps, **args.policy_guided}
        name = f"policy_guided_{n_steps}"
        guided, training = model(name, {"denoiser": "residual_mlp", **settings})
        start = data.observations[:: len(data.observations) // 200]
        guided = tune_delta(guided, th.as_tensor(start), system.policy(args.std), args.delta_rounds)
        yield Candidate(guided, {"sampler": "policy_guided", "denoiser": "residual_mlp", "N": n_steps}, name, training)


def study(args: argparse.Namespace) -> None:
    """Every candidate beside the system itself."""
    system = LinearGaussianSystem()
    rows, trainings = [], {}
    for candidate in candidates(args, system):
        trainings[candidate.name] = candidate.training
        th.manual_seed(args.seed)
        start = th.randn(args.starts, 2)
        steps = compare(candidate.model, system, start, args.trajectories, args.std)
        rows += [{**candidate.labels, "sigma": args.std, **step} for step in steps]
    write_csv(beside(args.out, ".csv"), rows)
    facts = provenance("sb3_polygrad.evaluation.spread_study", threads=args.threads, training=trainings)
    write_json(beside(args.out, ".json"), facts)


def main() -> None:
    """Command line."""
    parser = study_parser(__doc__)
    parser.add_argument("--models", type=Path, required=True, help="folder for fitted models, used again if they are there")
    parser.add_argument("--horizon", type=int, default=10)
    parser.add_argument("--episodes", type=int, default=1_000, help="of 50 steps, to fit to")
    parser.add_argument("--gradient-steps", type=int, default=5_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--denoisers", nargs="+", default=["markov_mlp", "residual_mlp"], help="of the staggered sampler")
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="K of the staggered sampler")
    parser.add_argument("--lags", type=float, nargs="+", default=[0.0, 0.5, 1.0, 2.0, 4.0], help="L of it (Markov: L = K)")
    parser.add_argument("--staggered", type=json_object, default={}, help="more world_model_kwargs by denoiser, as json")
    parser.add_argument("--diffusion-steps", type=int, nargs="*", default=[128, 32], help="N of the policy-guided sampler")
    parser.add_argument("--policy-guided", type=json_object, default={}, help="more world_model_kwargs of it, as json")
    parser.add_argument("--delta-rounds", type=int, default=40, help="updates of δ before it is measured")
    parser.add_argument("--std", type=float, default=0.1, help="σ of the policy")
    parser.add_argument("--starts", type=int, default=20, help="states to imagine from")
    parser.add_argument("--trajectories", type=int, default=200, help="imagined from each")
    parser.add_argument("--seed", type=int, default=0)
    run_study(parser, study)


if __name__ == "__main__":
    main()
