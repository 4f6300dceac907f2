"""
Distribution of imagined actions about the policy's mean, as in Figures 3 and 9 to 12 of the paper, for its guidance and the
ablations of it.

    python -m sb3_polygrad.evaluation.action_distribution --data DIR --models MODELS --out docs/results/distribution_hopper_h10

``DIR`` is the folder of a dataset that ``make_dataset`` wrote. One policy-guided world model is fitted (or taken from
``MODELS``). Then, for every rule of guidance and every standard deviation σ of the policy from large to small (the agent's
mean, its standard deviation replaced), δ is tuned by Eq. 10, trajectories are imagined from held-out states, and some are
replayed in the simulator.

Writes ``<out>.csv`` (a row per rule and σ), ``<out>_steps.csv`` (a row per step of those), ``<out>_histogram.csv`` (densities
of the standardised actions) and ``<out>.json``. Errors and statistics are those of
:mod:`~sb3_polygrad.evaluation.sampler_study`. Besides: ``kurtosis`` (3 for draws), ``at_clip`` (share of actions within 0.05
of ±3 standard deviations; 0.0009 for draws), ``delta_rate`` (δ / σ²; 1 at the controller's bound) and
``cpu_seconds`` of imagining.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3 import PPO

from sb3_polygrad.benchmark.provenance import provenance, write_json
from sb3_polygrad.common.arguments import json_object
from sb3_polygrad.common.on_policy import standardized_actions
from sb3_polygrad.diffusion.guidance import Guidance, PolicyScoreGuidance
from sb3_polygrad.diffusion.sampler import PolicyGuidedSampler
from sb3_polygrad.evaluation import minari_files
from sb3_polygrad.evaluation.command import run_study, study_parser
from sb3_polygrad.evaluation.fitted_model import fitted_model
from sb3_polygrad.evaluation.policy_guidance import tune_delta
from sb3_polygrad.evaluation.results import beside, readable, write_csv
from sb3_polygrad.evaluation.sampler_study import Problem, describe, policy_with_std
from sb3_polygrad.evaluation.simulator import Simulator
from sb3_polygrad.world_models.base import PolicyFn
from sb3_polygrad.world_models.diffusion import DiffusionWorldModel
from sb3_polygrad.world_models.factory import build_guidance

RULES: dict[str, tuple[str, float | None]] = {
    "policy_score": ("policy_score", 3.0),
    "no_clipping": ("policy_score", None),
    "noisy_states": ("noisy_states", 3.0),
    "state_update": ("state_update", 3.0),
    "policy_sampling": ("policy_sampling", None),
    "random_actions": ("random_actions", None),
}
"""The paper's guidance and its ablations: names of the rule and bound on the standardised actions."""

BIN_EDGES = np.linspace(-5.0, 5.0, 101)
"""Of the histograms, in standard deviations of the policy."""


class Tuning(NamedTuple):
    """
    :param start: ``(n, obs_dim)`` to imagine from
    :param batch: trajectories per update of δ
    :param rounds: updates of δ for each σ
    :param learning_rate: η of Eq. 10 in the first round; in round k it is a k-th of that, so that δ settles
    """

    start: th.Tensor
    batch: int
    rounds: int
    learning_rate: float


def follow(model: DiffusionWorldModel, rule: str, learning_rate: float) -> None:
    """Let a policy-guided model follow the policy by another rule, δ not yet tuned."""
    assert isinstance(model.sampler, PolicyGuidedSampler)
    name, clip_std = RULES[rule]
    half_range = (model.action_high - model.action_low) / 2
    model.sampler.guidance = build_guidance(name, half_range, delta_lr=learning_rate, clip_std=clip_std)


def rule_of(model: DiffusionWorldModel) -> Guidance:
    """How a policy-guided model follows the policy."""
    assert isinstance(model.sampler, PolicyGuidedSampler)
    return model.sampler.guidance


def delta_rate(model: DiffusionWorldModel, std: float) -> float | None:
    """δ/σ² for a policy of this standard deviation; None if the rule has no δ."""
    rule = rule_of(model)
    if not isinstance(rule, PolicyScoreGuidance):
        return None
    variance = (std / rule.half_range).square()
    return float(rule.controller.bounded(variance) / variance.amin())


def tuned(model: DiffusionWorldModel, policy: PolicyFn, tuning: Tuning) -> DiffusionWorldModel:
    """A copy whose δ, if it has one, is tuned for a policy, from other start states in every round."""
    for k in range(1, tuning.rounds + 1):
        rule = rule_of(model)
        if isinstance(rule, PolicyScoreGuidance):
            rule.controller.learning_rate = tuning.learning_rate / k
            model = tune_delta(model, tuning.start[th.randperm(len(tuning.start))[: tuning.batch]], policy, rounds=1)
    return model


def shape(standardized: th.Tensor) -> dict[str, float]:
    """What a standard deviation does not say: tails and what sits at the bounds."""
    fourth = (standardized - standardized.mean()).square().square().mean()
    at_clip = ((standardized.abs() - 3.0).abs() <= 0.05).float().mean()
    return {"kurtosis": float(fourth / standardized.var().square()), "at_clip": float(at_clip)}


def study(args: argparse.Namespace) -> None:
    """All rules and standard deviations for one environment and one horizon."""
    data = minari_files.read(args.data)
    args.env = data.env_id
    agent, simulator = PPO.load(data.folder / "policy.zip", device="cpu"), Simulator(args.env)
    fit_data, held_out = data.steps.split(args.held_out)
    chosen = np.random.default_rng(args.seed).choice(len(held_out.rewards), args.trajectories, replace=False)
    start = th.as_tensor(held_out.observations[chosen]).float()
    problem = Problem(simulator, agent, start, held_out.simulator_states[chosen], args.replays)
    tuning = Tuning(start, args.delta_batch, args.delta_rounds, args.delta_lr)
    settings = {"sampler": "policy_guided", "n_diffusion_steps": 128, "final_clip": 0.25, **args.world_model}
    path = args.models / f"{args.env}_h{args.horizon}_{args.name}.pt"
    box = simulator.action_low, simulator.action_high
    model, training = fitted_model(
        path, fit_data, *box, args.horizon, settings, args.gradient_steps, args.batch_size, args.seed
    )

    rows: list[dict[str, Any]] = []
    step_rows: list[dict[str, Any]] = []
    histogram: list[dict[str, Any]] = []
    for rule in args.rules:
        follow(model, rule, tuning.learning_rate)
        for std in sorted(args.stds, reverse=True):  # as in training, where the policy grows narrow
            th.manual_seed(args.seed)
            policy = policy_with_std(agent, std)
            model = tuned(model, policy, tuning)  # from where δ was for the σ before
            processor = time.process_time()
            imagined = model.imagine(problem.start, policy)
            cost = {"cpu_seconds": time.process_time() - processor}
            with th.no_grad():
                normal = policy(imagined.observations[:, :-1])
            standardized = standardized_actions(imagined, normal.mean, normal.stddev)
            happened = standardized[imagined.mask > 0.0]
            row, steps = describe(imagined, standardized, problem, model.state_normalizer.std)
            labels = {"env": args.env, "horizon": args.horizon, "rule": rule, "sigma": std}
            rows.append({**labels, **cost, **row, **shape(happened), "delta_rate": delta_rate(model, std)})
            step_rows += [{**labels, **step} for step in steps]
            counts, _ = np.histogram(happened.numpy(), BIN_EDGES)
            density = counts / happened.numel() / np.diff(BIN_EDGES)
            centers = (BIN_EDGES[1:] + BIN_EDGES[:-1]) / 2
            histogram += [
                {**labels, "z": float(z), "density": float(d)} for z, d in zip(centers, density, strict=True) if d > 0.0
            ]
            print({name: readable(value) for name, value in rows[-1].items()}, flush=True)
        # After every rule, so that a study cut short leaves what it has measured.
        for suffix, table in (("", rows), ("_steps", step_rows), ("_histogram", histogram)):
            write_csv(beside(args.out, f"{suffix}.csv"), table)
        facts = provenance(
            "sb3_polygrad.evaluation.action_distribution",
            threads=args.threads,
            dataset=json.loads((data.folder / "dataset.json").read_text()),
            training=training,
        )
        write_json(beside(args.out, ".json"), facts)


def main() -> None:
    """Command line."""
    parser = study_parser(__doc__)
    parser.add_argument("--data", required=True, help="dataset's folder or Minari id, from make_dataset")
    parser.add_argument("--models", type=Path, required=True, help="folder for fitted models, used again if they are there")
    parser.add_argument("--name", default="policy_guided", help="of the fitted model in that folder")
    parser.add_argument("--horizon", type=int, default=10)
    parser.add_argument("--gradient-steps", type=int, default=5_000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--world-model", type=json_object, default={}, help="more world_model_kwargs, as json")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=["policy_score", "no_clipping"])
    parser.add_argument("--stds", type=float, nargs="+", default=[1.0, 0.5, 0.2, 0.1, 0.05, 0.02], help="σ of the policy")
    parser.add_argument("--delta-rounds", type=int, default=10, help="updates of δ for each σ")
    parser.add_argument("--delta-batch", type=int, default=100, help="trajectories per update of δ")
    parser.add_argument("--delta-lr", type=float, default=2.0, help="η of Eq. 10 in the first round, falling")
    parser.add_argument("--trajectories", type=int, default=1_000, help="imagined for each rule and σ")
    parser.add_argument("--replays", type=int, default=300, help="of these, replayed in the simulator")
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the data that starts are drawn from")
    parser.add_argument("--seed", type=int, default=0)
    run_study(parser, study)


if __name__ == "__main__":
    main()
