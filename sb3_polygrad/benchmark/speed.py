"""
Where the time of an iteration goes, for several settings side by side.

    python -m sb3_polygrad.benchmark.speed --env Hopper-v5 --settings '{}' '{"world_model": "diffusion"}' --out speed

For each of the settings (json, arguments of the constructor) a model learns ``--steps`` real steps. Then the parts of an
iteration are timed, ``--repeats`` times, the settings taking turns: noise of the machine falls on all of them alike.
``OUT.csv`` has the median milliseconds per real step and part, ``OUT.json`` the command, versions, and rate of ``learn``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch as th
from stable_baselines3.common.callbacks import CallbackList

from sb3_polygrad.benchmark.provenance import provenance, write_json
from sb3_polygrad.hyperparams_loader import constructor_arguments
from sb3_polygrad.polygrad import PolyGRAD

PARTS = ("collect", "fit", "imagine", "update")


def time_iteration(model: PolyGRAD) -> dict[str, float]:
    """
    One iteration of a model that has learnt already.

    :param model: the model; it learns from this
    :return: seconds per real step, by the names of :data:`PARTS`
    """
    n_steps = model.n_steps * model.n_envs
    n_fits = n_steps if model.gradient_steps < 0 else model.gradient_steps
    assert model.env is not None
    callback = CallbackList([])
    callback.init_callback(model)
    seconds = {}

    def timed(part: str, work: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = work()
        if model.device.type == "cuda":
            th.cuda.synchronize()
        seconds[part] = (time.perf_counter() - begin) / n_steps
        return result

    def fit() -> None:
        model.world_model.observe(model.replay_buffer.take_new_steps())
        model.world_model.train()
        for _ in range(n_fits):
            model.world_model.fit(model.replay_buffer.sample(model.batch_size, model.world_model.window))

    def update() -> None:
        model.rollout_buffer.fill(batch, model.policy)
        model.update(model.policy, model.rollout_buffer)
        model.policy.update_averages()

    timed("collect", lambda: model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps))  # type: ignore[arg-type]
    timed("fit", fit)
    start = model.start_states.draw(model.replay_buffer, model.n_imagined)
    batch = timed("imagine", lambda: model.imagination(start, model.update.differentiable))
    timed("update", update)
    return seconds


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Hopper-v5", help="environment")
    parser.add_argument("--settings", type=constructor_arguments, nargs="+", default=[{}], help="json, one or more")
    parser.add_argument("--steps", type=int, default=2_000, help="real steps before the parts are timed")
    parser.add_argument("--repeats", type=int, default=50, help="iterations that are timed")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--device", default="cpu", help="of torch")
    parser.add_argument("--out", type=Path, required=True, help="csv and json files, without suffix")
    args = parser.parse_args()
    th.set_num_threads(args.threads)
    models, rates = [], []
    for settings in args.settings:
        model = PolyGRAD("MlpPolicy", args.env, seed=0, device=args.device, **settings).learn(args.steps)
        begin = time.perf_counter()
        model.learn(args.steps, reset_num_timesteps=False)
        rates.append(args.steps / (time.perf_counter() - begin))
        models.append(model)
    rows = [
        {"setting": str(settings), "part": part, "milliseconds": 1e3 * seconds}
        for _ in range(args.repeats)
        for settings, model in zip(args.settings, models, strict=True)
        for part, seconds in time_iteration(model).items()
    ]
    table = pd.DataFrame(rows).groupby(["setting", "part"], sort=False)["milliseconds"].median().reset_index()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out.with_suffix(".csv"), index=False, float_format="%.4g")
    facts = provenance("sb3_polygrad.benchmark.speed", threads=args.threads, device=args.device)
    write_json(
        args.out.with_suffix(".json"), {**facts, "steps_per_second": dict(zip(map(str, args.settings), rates, strict=True))}
    )
    print(table.to_string(index=False))
    for settings, rate in zip(args.settings, rates, strict=True):
        print(f"{settings}: {rate:.1f} real steps per second, {1e6 / rate / 3600:.1f} hours per million")


if __name__ == "__main__":
    main()
