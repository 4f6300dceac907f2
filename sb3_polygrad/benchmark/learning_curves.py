"""
Learning curves: one algorithm, one environment, several seeds.

    python -m sb3_polygrad.benchmark.learning_curves --algo polygrad --env Hopper-v5 --steps 10000 --seeds 0 1 2 \
        --out docs/results/hopper_polygrad

writes ``<out>.csv`` (a row per seed and evaluation) and ``<out>.json`` (command, versions, time per seed). Evaluations are
deterministic, in an environment of their own; the clock includes them. Draw the curves with
``python -m sb3_polygrad.plots.learning_curves``.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3 import A2C, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, StopTrainingOnRewardThreshold
from stable_baselines3.common.env_util import make_vec_env

from sb3_polygrad.benchmark.provenance import provenance, write_json
from sb3_polygrad.hyperparams_loader import load_hyperparams
from sb3_polygrad.polygrad import PolyGRAD

ALGORITHMS: dict[str, type[BaseAlgorithm]] = {"polygrad": PolyGRAD, "ppo": PPO, "a2c": A2C, "sac": SAC}
COLUMNS = ("label", "env", "seed", "timesteps", "mean_reward", "std_reward", "seconds")


class StopwatchCallback(BaseCallback):
    """Notes the seconds since training began; hand it to ``EvalCallback(callback_after_eval=...)``."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self.begin = time.perf_counter()

    def _on_step(self) -> bool:
        self.seconds.append(time.perf_counter() - self.begin)
        return True


def evaluation_callback(env_id: str, seed: int, every: int, n_episodes: int, **kwargs: Any) -> EvalCallback:
    """
    Deterministic evaluation in an environment of its own, seeded apart from the training one.

    :param env_id: environment
    :param seed: seed of the run
    :param every: real steps between evaluations
    :param n_episodes: episodes per evaluation
    :param kwargs: as in ``EvalCallback``
    """
    eval_env = make_vec_env(env_id, n_envs=1, seed=10_000 + seed)
    return EvalCallback(eval_env, n_eval_episodes=n_episodes, eval_freq=every, verbose=0, **kwargs)


def run(args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """One seed: train, evaluate on the way, return a row per evaluation."""
    th.set_num_threads(args.threads)
    model = ALGORITHMS[args.algo]("MlpPolicy", args.env, seed=seed, device=args.device, **args.kwargs)
    stopwatch = StopwatchCallback()
    with tempfile.TemporaryDirectory() as folder:  # EvalCallback keeps the single returns only where it may write them
        stop = None if args.stop_at is None else StopTrainingOnRewardThreshold(args.stop_at)
        callback = evaluation_callback(
            args.env,
            seed,
            args.every,
            args.episodes,
            callback_on_new_best=stop,
            callback_after_eval=stopwatch,
            log_path=folder,
        )
        model.learn(args.steps, callback=callback)
    return [
        {
            "label": args.label or args.algo,
            "env": args.env,
            "seed": seed,
            "timesteps": timesteps,
            "mean_reward": round(float(np.mean(returns)), 2),
            "std_reward": round(float(np.std(returns)), 2),
            "seconds": round(seconds, 1),
        }
        for timesteps, returns, seconds in zip(
            callback.evaluations_timesteps, callback.evaluations_results, stopwatch.seconds, strict=True
        )
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", choices=ALGORITHMS, default="polygrad")
    parser.add_argument("--env", default="Hopper-v5")
    parser.add_argument("--steps", type=int, default=10_000, help="real steps per seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--every", type=int, default=1_000, help="real steps between evaluations")
    parser.add_argument("--episodes", type=int, default=5, help="episodes per evaluation")
    parser.add_argument("--stop-at", type=float, help="a seed is done when an evaluation is as good as this")
    parser.add_argument("--hyperparams", help="take the environment's settings from this file of hyperparams/, e.g. polygrad")
    parser.add_argument("--kwargs", type=json.loads, default={}, help="further constructor arguments as json")
    parser.add_argument("--label", help="name of the curve, if not that of the algorithm")
    parser.add_argument("--threads", type=int, default=1, help="torch threads per seed")
    parser.add_argument("--jobs", type=int, default=1, help="seeds that run at the same time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="path of the results, without suffix")
    args = parser.parse_args()
    if args.hyperparams is not None:
        args.kwargs = load_hyperparams(args.hyperparams, args.env) | args.kwargs

    args.out.parent.mkdir(parents=True, exist_ok=True)
    runs = []
    with (
        ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool,
        args.out.with_suffix(".csv").open("w", newline="") as file,
    ):
        writer = csv.DictWriter(file, COLUMNS)
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
    write_json(args.out.with_suffix(".json"), facts)
    print(f"{args.label or args.algo} on {args.env} after {args.steps} steps: {final}, mean {np.mean(final):.1f}")


if __name__ == "__main__":
    main()
