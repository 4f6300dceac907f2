"""
Train on one environment, watch it learn, keep everything.

    python examples/train.py --env Hopper-v5 --steps 10000
    python examples/train.py --env Hopper-v5 --steps 10000 --resume runs/Hopper-v5_1

Settings are those of ``hyperparams/polygrad.yml``. Each run gets a folder of its own under ``runs/``: learning curve (csv and
png), model, the best model met on the way, and the latest checkpoints, from which a run goes on exactly, whatever ended it.
Ctrl-C stops early and keeps what was learnt.
"""

import argparse
import csv
import sys
import time
from pathlib import Path
from typing import Any

from stable_baselines3.common.utils import get_latest_run_id

from sb3_polygrad import PolyGRAD, ResumableCheckpoints, load_hyperparams
from sb3_polygrad.benchmark.evaluations import Evaluations
from sb3_polygrad.benchmark.learning_curves import COLUMNS
from sb3_polygrad.plots.learning_curves import plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Hopper-v5", help="a gymnasium environment with Box observations and actions")
    parser.add_argument("--steps", type=int, default=10_000, help="real steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--resume", type=Path, help="folder of an earlier run to go on from")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the folder of this run is made")
    args = parser.parse_args()

    if args.resume is None:
        settings = load_hyperparams("polygrad", args.env)
        model = PolyGRAD("MlpPolicy", args.env, seed=args.seed, verbose=1, device=args.device, **settings)
    else:
        model = PolyGRAD.resume(args.resume / "checkpoints", args.env, device=args.device)
    begin = model.num_timesteps

    folder = args.runs / f"{args.env}_{get_latest_run_id(str(args.runs), args.env) + 1}"
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    every = max(args.steps // 10, 1)
    evaluation = Evaluations(args.env, args.seed, every, 5, rows.append, best_model_save_path=str(folder), verbose=1)
    checkpoints = ResumableCheckpoints(every, folder / "checkpoints", keep=2)
    callbacks = [evaluation, checkpoints]
    start = time.perf_counter()
    try:
        model.learn(args.steps, callback=callbacks, progress_bar=True, reset_num_timesteps=args.resume is None)
    except KeyboardInterrupt:
        print("\nstopped early; keeping what was learnt")
    finally:  # whatever ended the run: what was learnt and seen is kept
        model.save(folder / "model")
        model.save_checkpoint(folder / "checkpoints", keep=2)
    seconds = time.perf_counter() - start

    print(f"\n{model.num_timesteps - begin} real steps of {args.env} in {seconds / 60:.1f} minutes.")
    if rows:
        with (folder / "learning_curve.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows({"label": "polygrad", "env": args.env, "seed": model.seed, **row} for row in rows)
        plot([folder / "learning_curve.csv"], folder / "learning_curve.png")
        means = [row["mean_reward"] for row in rows]
        print(
            f"Mean deterministic return of 5 episodes: {means[0]:.0f} at first, {means[-1]:.0f} now, {max(means):.0f} at best."
        )
    print(f"Saved in {folder}/: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    steps = model.timesteps_left or args.steps
    print(f"Go on:  {sys.executable} examples/train.py --env {args.env} --steps {steps} --resume {folder}")


if __name__ == "__main__":
    main()
