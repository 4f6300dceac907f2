"""
Learning curves: one algorithm, one environment, several seeds.

    python -m sb3_polygrad.benchmark.learning_curves --algo polygrad --env Hopper-v5 --steps 10000 --seeds 0 1 2 \
        --out docs/results/hopper_polygrad

writes ``<out>.csv`` (a row per seed and evaluation) and ``<out>.json`` (command, versions, time per seed). Evaluations are
deterministic, in an environment of their own; the clock includes them. Draw the curves with
``python -m sb3_polygrad.plots.learning_curves``. For several algorithms and environments, and runs that can be interrupted:
``python -m sb3_polygrad.benchmark.compare``.
"""

from __future__ import annotations

import argparse
import csv
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import StopTrainingOnRewardThreshold

from sb3_polygrad.benchmark.algorithms import NAMES, algorithm_class
from sb3_polygrad.benchmark.evaluations import Evaluations
from sb3_polygrad.benchmark.provenance import provenance, write_json
from sb3_polygrad.common.arguments import at_least_one
from sb3_polygrad.evaluation.results import beside
from sb3_polygrad.hyperparams_loader import constructor_arguments, load_hyperparams

COLUMNS = ("label", "env", "seed", "timesteps", "mean_reward", "std_reward", "seconds")


def run(args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """One seed: train, evaluate on the way, return a row per evaluation."""
    th.set_num_threads(args.threads)
    model = algorithm_class(args.algo)("MlpPolicy", args.env, seed=seed, device=args.device, **args.kwargs)
    rows: list[dict[str, Any]] = []
    stop = None if args.stop_at is None else StopTrainingOnRewardThreshold(args.stop_at)
    model.learn(
        args.steps, callback=Evaluations(args.env, seed, args.every, args.episodes, rows.append, callback_on_new_best=stop)
    )
    return [{"label": args.label or args.algo, "env": args.env, "seed": seed, **row} for row in rows]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", choices=NAMES, default="polygrad")
    parser.add_argument("--env", default="Hopper-v5")
    parser.add_argument("--steps", type=at_least_one, default=10_000, help="real steps per seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--every", type=at_least_one, default=1_000, help="real steps between evaluations")
    parser.add_argument("--episodes", type=at_least_one, default=5, help="episodes per evaluation")
    parser.add_argument("--stop-at", type=float, help="a seed is done when an evaluation is as good as this")
    parser.add_argument("--hyperparams", help="take the environment's settings from this file of hyperparams/, e.g. polygrad")
    parser.add_argument("--kwargs", type=constructor_arguments, default={}, help="further constructor arguments as json")
    parser.add_argument("--label", help="name of the curve, if not that of the algorithm")
    parser.add_argument("--threads", type=at_least_one, default=1, help="torch threads per seed")
    parser.add_argument("--jobs", type=at_least_one, default=1, help="seeds that run at the same time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="path of the results, without suffix")
    args = parser.parse_args()
    if args.hyperparams is not None:
        args.kwargs = load_hyperparams(args.hyperparams, args.env) | args.kwargs

    args.out.parent.mkdir(parents=True, exist_ok=True)
    runs = []
    with (
        ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool,
        beside(args.out, ".csv").open("w", newline="") as file,
    ):
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for rows in pool.map(partial(run, args), args.seeds):  # a seed that is done is kept, whatever happens to the next
            writer.writerows(rows)
            file.flush()
            runs.append(rows)
    final = [rows[-1]["mean_reward"] for rows in runs]
    facts = provenance(
        "sb3_polygrad.benchmark.learning_curves",
        settings=args.kwargs,
        final_mean_reward=dict(zip(map(str, args.seeds), final, strict=True)),
        seconds=dict(zip(map(str, args.seeds), [rows[-1]["seconds"] for rows in runs], strict=True)),
    )
    write_json(beside(args.out, ".json"), facts)
    print(f"{args.label or args.algo} on {args.env} after {args.steps} steps: {final}, mean {np.mean(final):.1f}")


if __name__ == "__main__":
    main()
