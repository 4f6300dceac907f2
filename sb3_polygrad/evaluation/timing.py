"""
What imagining a batch costs, against the horizon, model against model (Figure 4).

    python -m sb3_polygrad.evaluation.timing --env Walker2d-v5 --out docs/results/timing_walker2d

The time depends on sizes, not on weights: each model sees one gradient step on random numbers of the environment's shape, then
imagines under a policy of two layers. Writes ``<out>.csv``, a row per model and horizon: the median of ``--repeats`` batches
after one that is not counted, in seconds by the clock and of the processor, calls of the network that imagines, and
parameters of that network. A horizon that would take longer than ``--max-seconds`` for a batch, judged by the one before it,
is left out, and so are the longer ones. Draw them with ``python -m sb3_polygrad.plots.timing``.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from torch import nn
from torch.distributions import Normal

from sb3_polygrad.benchmark.provenance import provenance, write_json
from sb3_polygrad.common.trajectory import Trajectory
from sb3_polygrad.evaluation.command import run_study, study_parser
from sb3_polygrad.evaluation.contestants import CONTESTANTS
from sb3_polygrad.evaluation.results import beside, readable, write_csv
from sb3_polygrad.world_models.base import PolicyFn
from sb3_polygrad.world_models.standardized import StandardizedWorldModel


def some_policy(obs_dim: int, action_dim: int, device: str) -> PolicyFn:
    """A Gaussian policy of the size that SB3's have."""
    net = nn.Sequential(nn.Linear(obs_dim, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, action_dim)).to(device)

    def policy(observations: th.Tensor) -> Normal:
        mean = net(observations)
        return Normal(mean, th.full_like(mean, 0.5), validate_args=False)

    return policy


def prepare(model: StandardizedWorldModel, device: str) -> StandardizedWorldModel:
    """One gradient step on random numbers, so that it is ready to imagine."""
    windows, steps = 64, model.window
    batch = Trajectory(
        th.randn(windows, steps + 1, model.obs_dim, device=device),
        th.rand(windows, steps, model.action_dim, device=device) * 2 - 1,
        th.randn(windows, steps, device=device),
        th.zeros(windows, steps, device=device),
        th.ones(windows, steps, device=device),
    )
    before, after = batch.observations[:, :-1].flatten(0, 1), batch.observations[:, 1:].flatten(0, 1)
    outcomes = th.stack([batch.rewards, batch.terminals], dim=-1).flatten(0, 1)
    model.to(device).observe(before, after, batch.actions.flatten(0, 1), outcomes)
    model.fit(batch)
    return model.eval()


def clocks(device: str) -> np.ndarray:
    """Seconds by the clock and of the processor, once all that was asked of the device is done."""
    if device != "cpu":
        th.cuda.synchronize(device)
    return np.array([time.perf_counter(), time.process_time()])


def measure(model: StandardizedWorldModel, policy: PolicyFn, batch: int, repeats: int, device: str) -> dict[str, Any]:
    """
    :param model: ready to imagine
    :param policy: to imagine under
    :param batch: trajectories
    :param repeats: batches that are timed
    :param device: of the model
    :return: what the csv says of it
    """
    start = th.randn(batch, model.obs_dim, device=device)
    calls: list[None] = []
    counter = model.average.register_forward_hook(lambda *_: calls.append(None))
    model.imagine(start, policy)
    counter.remove()
    times = []
    for _ in range(repeats):
        before = clocks(device)
        model.imagine(start, policy)
        times.append(clocks(device) - before)
    seconds, cpu_seconds = np.median(times, axis=0)
    return {
        "batch": batch,
        "seconds": float(seconds),
        "cpu_seconds": float(cpu_seconds),
        "calls": len(calls),
        "parameters": sum(parameter.numel() for parameter in model.average.parameters()),
    }


def study(args: argparse.Namespace) -> None:
    """All models and horizons."""
    env = gym.make(args.env)
    assert isinstance(env.observation_space, gym.spaces.Box) and isinstance(env.action_space, gym.spaces.Box)
    obs_dim, box = env.observation_space.shape[0], env.action_space
    policy = some_policy(obs_dim, box.shape[0], args.device)
    rows: list[dict[str, Any]] = []
    for name in args.models:
        contestant, expected = CONTESTANTS[name], 0.0
        for horizon in sorted(args.horizons):
            if expected * horizon > args.max_seconds:
                print(f"{name}: horizon {horizon} would take about {expected * horizon:.0f} seconds, left out", flush=True)
                break
            th.manual_seed(0)
            settings = contestant.settings[args.size]
            model = contestant.build(obs_dim, th.as_tensor(box.low), th.as_tensor(box.high), horizon, settings)
            row = measure(prepare(model, args.device), policy, args.batch, args.repeats, args.device)
            expected = row["seconds"] / horizon
            rows.append({"env": args.env, "size": args.size, "device": args.device, "model": name, "horizon": horizon, **row})
            print({key: readable(value) for key, value in rows[-1].items()}, flush=True)
            write_csv(beside(args.out, ".csv"), rows)
    facts = provenance("sb3_polygrad.evaluation.timing", threads=args.threads)
    write_json(beside(args.out, ".json"), facts)


def main() -> None:
    """Command line."""
    parser = study_parser(__doc__)
    parser.add_argument("--env", default="Walker2d-v5")
    parser.add_argument("--models", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--horizons", type=int, nargs="+", default=[10, 50, 200])
    parser.add_argument("--size", choices=["default", "paper"], default="default")
    parser.add_argument("--batch", type=int, default=1_000, help="trajectories, 1000 in the paper")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-seconds", type=float, default=60.0, help="for a batch")
    parser.add_argument("--device", default="cpu")
    run_study(parser, study)


if __name__ == "__main__":
    main()
