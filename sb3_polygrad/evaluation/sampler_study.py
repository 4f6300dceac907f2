"""
Samplers side by side: how far imagined trajectories are from the simulator, whether their actions are the policy's, and what
they cost.

    python -m sb3_polygrad.evaluation.sampler_study --data DIR --models MODELS --out docs/results/sampler_study/hopper_h10

``DIR`` is a dataset's folder, from ``make_dataset``. World models are fitted, or taken from ``MODELS``: for the staggered
sampler one for each denoiser, which serves all levels K and lags L (a Markov one for each K), and one for each number N of
diffusion steps of the policy-guided sampler. Then, for every sampler and every standard deviation σ of the policy (the
agent's mean, its standard deviation replaced), trajectories are imagined from held-out states and their actions replayed in
the simulator from the stored simulator states.

Writes ``<out>.csv`` (a row per sampler and σ), ``<out>_steps.csv`` (a row per step of those) and ``<out>.json``.

Errors are squared, standardised by the data's standard deviation, averaged over dimensions; mean and median are over
trajectories. A step counts if it happened both in imagination and in the simulator; ``ending_error`` is the share of steps
that happened in one of the two only. ``future_influence`` is how much a state in the middle of the trajectory moves when only
the noise of the actions *after* it is drawn anew, relative to when all noise of the actions is: 0 if the future has no
influence on the past.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3 import PPO
from torch.distributions import Normal

from sb3_polygrad.benchmark.provenance import provenance, write_json
from sb3_polygrad.common.arguments import json_object
from sb3_polygrad.common.on_policy import action_statistics, per_step_std, standardized_actions
from sb3_polygrad.common.trajectory import Trajectory
from sb3_polygrad.diffusion.base import Sample, Sampler, Task
from sb3_polygrad.evaluation import minari_files
from sb3_polygrad.evaluation.command import run_study, study_parser
from sb3_polygrad.evaluation.dataset import Dataset
from sb3_polygrad.evaluation.fitted_model import fitted_model
from sb3_polygrad.evaluation.policy_guidance import tune_delta
from sb3_polygrad.evaluation.results import beside, readable, write_csv
from sb3_polygrad.evaluation.simulator import Simulator
from sb3_polygrad.evaluation.staggered_candidates import Candidate, staggered_candidates
from sb3_polygrad.world_models.base import PolicyFn
from sb3_polygrad.world_models.diffusion import DiffusionWorldModel


class Problem(NamedTuple):
    """
    :param simulator: the environment
    :param agent: whose mean the policies have
    :param start: ``(batch, obs_dim)`` observations to imagine from
    :param states: ``(batch, state_dim)`` their simulator states
    :param n_replays: how many of the trajectories are replayed
    """

    simulator: Simulator
    agent: PPO
    start: th.Tensor
    states: np.ndarray
    n_replays: int


def policy_with_std(agent: PPO, std: float) -> PolicyFn:
    """The agent's mean with a standard deviation of ours, in the environment's units."""

    def policy(observations: th.Tensor) -> Normal:
        normal = agent.policy.get_distribution(observations.flatten(0, -2)).distribution
        assert isinstance(normal, Normal)
        mean = normal.mean.view(*observations.shape[:-1], -1)
        return Normal(mean, th.full_like(mean, std), validate_args=False)

    return policy


def errors_by_step(imagined: Trajectory, real: Trajectory, std: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    :param imagined: trajectories
    :param real: the same actions in the simulator
    :param std: ``(obs_dim,)`` that differences are standardised by
    :return: squared errors after every step, ``(batch, horizon)``, and which of them count
    """
    difference = (imagined.observations[:, 1:] - real.observations[:, 1:]) / std
    return difference.square().mean(dim=-1), (imagined.mask * real.mask) > 0.0


class _Recorder:
    """Stands in for a sampler, to get hold of the task that the world model gives it."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def sample(self, task: Task) -> Sample:
        self.task = task
        return self.sampler.sample(task)


def future_influence(model: DiffusionWorldModel, start: th.Tensor, policy: PolicyFn) -> float:
    """
    How much the state in the middle depends on actions that are taken later; see the head of this file.

    Only for samplers whose actions are a function of the noise in the task, as the staggered one's are.

    :param model: a fitted world model
    :param start: ``(batch, obs_dim)``
    :param policy: the policy
    """
    model = copy.deepcopy(model)
    recorder = _Recorder(model.sampler)
    model._modules.pop("sampler")
    model.sampler = recorder  # type: ignore[assignment]
    model.imagine(start, policy)
    middle = model.horizon // 2
    later = recorder.task.noise.clone()
    later[:, middle:] = th.randn_like(later[:, middle:])
    states = []
    for noise in (recorder.task.noise, later, th.randn_like(later)):
        th.manual_seed(0)  # the same noise for the states
        with th.no_grad():
            states.append(recorder.sampler.sample(recorder.task._replace(noise=noise)).states[:, middle])
    before, future_changed, all_changed = states
    return float((future_changed - before).square().mean().sqrt() / (all_changed - before).square().mean().sqrt())


def describe(
    imagined: Trajectory, standardized: th.Tensor, problem: Problem, std: th.Tensor
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """
    What imagined trajectories are worth.

    :param imagined: one from every start of the problem
    :param standardized: their standardised actions
    :param problem: where they are replayed
    :param std: ``(obs_dim,)`` that errors are standardised by
    :return: a row on the whole and a row per step
    """
    statistics = action_statistics(standardized, imagined.observations[:, :-1], imagined.mask)
    spreads = per_step_std(standardized, imagined.mask)
    replayed = Trajectory(*(tensor[: problem.n_replays] for tensor in imagined))
    real = problem.simulator.replay(problem.states[: problem.n_replays], replayed.actions)
    errors, counts = errors_by_step(replayed, real, std)
    steps = [
        {
            "step": t + 1,
            "mse_mean": float(errors[counts[:, t], t].mean()),
            "mse_median": float(errors[counts[:, t], t].median()),
            "action_std": float(spreads[t]),
            "n": int(counts[:, t].sum()),
        }
        for t in range(imagined.horizon)
    ]
    ending_error = float((replayed.mask != real.mask).float().mean())
    at_nine = steps[min(9, imagined.horizon) - 1]
    errors_at = {"mse1_median": steps[0]["mse_median"], "mse9_mean": at_nine["mse_mean"], "mse9_median": at_nine["mse_median"]}
    return {**statistics, "ending_error": ending_error, **errors_at}, steps


def measure(model: DiffusionWorldModel, problem: Problem, policy: PolicyFn) -> tuple[dict[str, float], list[dict[str, float]]]:
    """
    :param model: a fitted world model
    :param problem: where to imagine and to replay
    :param policy: the policy
    :return: a row on the whole and a row per step
    """
    calls: list[None] = []
    counter = model.average.register_forward_hook(lambda *_: calls.append(None))
    clock, processor = time.perf_counter(), time.process_time()
    imagined = model.imagine(problem.start, policy)
    cost = {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - processor}
    counter.remove()
    with th.no_grad():
        normal = policy(imagined.observations[:, :-1])
    standardized = standardized_actions(imagined, normal.mean, normal.stddev)
    row, steps = describe(imagined, standardized, problem, model.state_normalizer.std)
    return {"calls": len(calls), **cost, **row}, steps


def candidates(args: argparse.Namespace, data: Dataset, simulator: Simulator) -> Iterator[Candidate]:
    """Every sampler asked for."""
    size = {"width": args.width, "n_layers": args.layers}

    def model(name: str, settings: dict[str, Any]) -> tuple[DiffusionWorldModel, dict[str, Any]]:
        path = args.models / f"{args.env}_h{args.horizon}_{name}.pt"
        low, high = simulator.action_low, simulator.action_high
        return fitted_model(path, data, low, high, args.horizon, {**size, **settings}, args.gradient_steps, seed=args.seed)

    for denoiser in args.denoisers:
        yield from staggered_candidates(denoiser, args.staggered.get(denoiser, {}), args.levels, args.lags, model)
    for n_steps in args.diffusion_steps:
        settings = {"sampler": "policy_guided", "n_diffusion_steps": n_steps, **args.policy_guided}
        name = f"policy_guided_{n_steps}"
        guided, training = model(name, {"denoiser": "residual_mlp", **settings})
        yield Candidate(guided, {"sampler": "policy_guided", "denoiser": "residual_mlp", "N": n_steps}, name, training)


def study(args: argparse.Namespace) -> None:
    """The whole study of one environment and one horizon."""
    data = minari_files.read(args.data)
    args.env = data.env_id
    agent = PPO.load(data.folder / "policy.zip", device="cpu")
    simulator = Simulator(args.env)
    fit_data, held_out = data.steps.split(args.held_out)
    chosen = np.random.default_rng(args.seed).choice(len(held_out.rewards), args.trajectories, replace=False)
    start = th.as_tensor(held_out.observations[chosen]).float()
    problem = Problem(simulator, agent, start, held_out.simulator_states[chosen], args.replays)

    rows, step_rows, trainings = [], [], {}
    for candidate in candidates(args, fit_data, simulator):
        trainings[candidate.name] = candidate.training
        for std in args.stds:
            th.manual_seed(args.seed)
            policy, model = policy_with_std(agent, std), candidate.model
            labels = {"env": args.env, "horizon": args.horizon, **candidate.labels, "sigma": std}
            if "N" in candidate.labels:
                model = tune_delta(model, start[: args.delta_batch], policy, args.delta_rounds)
            row, steps = measure(model, problem, policy)
            if "K" in candidate.labels:
                row["future_influence"] = future_influence(model, start[:200], policy)
            rows.append({**labels, **row})
            step_rows += [{**labels, **step} for step in steps]
            print({name: readable(value) for name, value in rows[-1].items()}, flush=True)
        # After every sampler, so that a study cut short leaves what it has measured.
        write_csv(beside(args.out, ".csv"), rows)
        write_csv(beside(args.out, "_steps.csv"), step_rows)
        facts = provenance(
            "sb3_polygrad.evaluation.sampler_study",
            threads=args.threads,
            dataset=json.loads((data.folder / "dataset.json").read_text()),
            training=trainings,
        )
        write_json(beside(args.out, ".json"), facts)


def main() -> None:
    """Command line."""
    parser = study_parser(__doc__)
    parser.add_argument("--data", required=True, help="dataset's folder or Minari id, from make_dataset")
    parser.add_argument("--models", type=Path, required=True, help="folder for fitted models, used again if they are there")
    parser.add_argument("--horizon", type=int, default=10)
    parser.add_argument("--gradient-steps", type=int, default=5_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--denoisers", nargs="*", default=["markov_mlp", "residual_mlp"], help="of the staggered sampler")
    parser.add_argument("--levels", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32], help="K of the staggered sampler")
    parser.add_argument("--lags", type=float, nargs="*", default=[0.0, 0.5, 1.0, 2.0, 4.0], help="L of it (Markov: L = K)")
    parser.add_argument("--staggered", type=json_object, default={}, help="more world_model_kwargs by denoiser, as json")
    parser.add_argument("--diffusion-steps", type=int, nargs="*", default=[128, 32], help="N of the policy-guided sampler")
    parser.add_argument("--policy-guided", type=json_object, default={}, help="more world_model_kwargs of it, as json")
    parser.add_argument("--delta-rounds", type=int, default=40, help="updates of δ before it is measured")
    parser.add_argument("--delta-batch", type=int, default=200, help="trajectories per update of δ")
    parser.add_argument("--stds", type=float, nargs="+", default=[1.0, 0.5, 0.1, 0.02], help="σ of the policy")
    parser.add_argument("--trajectories", type=int, default=1_000, help="imagined for each sampler and σ")
    parser.add_argument("--replays", type=int, default=1_000, help="of these, replayed in the simulator")
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the data that starts are drawn from")
    parser.add_argument("--seed", type=int, default=0)
    run_study(parser, study)


if __name__ == "__main__":
    main()
