"""
Train on one environment, watch it learn, keep everything.

    python examples/train.py --env Hopper-v5 --steps 10000
    python examples/train.py --env Hopper-v5 --steps 10000 --resume runs/Hopper-v5_1

Settings are those of ``hyperparams/polygrad.yml``. Each run gets a folder of its own under ``runs/``: evaluations
(``evaluations.npz``), learning curve (png), model, best model, and the latest checkpoints, from which a run can be resumed.
Ctrl-C stops early and keeps what was learnt.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import seaborn as sns
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import get_latest_run_id

from sb3_polygrad import PolyGRAD, ResumableCheckpoints, load_hyperparams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Hopper-v5", help="a gymnasium environment with Box observations and actions")
    parser.add_argument("--steps", type=int, default=10_000, help="real steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--resume", type=Path, help="folder of an earlier run to resume")
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
    every = max(args.steps // 10, 1)
    evaluation = EvalCallback(
        make_vec_env(args.env, seed=args.seed + 10_000),
        n_eval_episodes=5,
        eval_freq=every,
        log_path=str(folder),
        best_model_save_path=str(folder),
    )
    callbacks = [evaluation, ResumableCheckpoints(every, folder / "checkpoints", keep=2)]
    start = time.perf_counter()
    try:
        model.learn(args.steps, callback=callbacks, progress_bar=True, reset_num_timesteps=args.resume is None)
    except KeyboardInterrupt:
        print("\nstopped early; keeping what was learnt")
    finally:  # whatever ended the run: what was learnt is kept
        model.save(folder / "model")
        model.save_checkpoint(folder / "checkpoints", keep=2)
    minutes = (time.perf_counter() - start) / 60

    print(f"\n{model.num_timesteps - begin} real steps of {args.env} in {minutes:.1f} minutes.")
    if evaluation.evaluations_results:
        returns = np.array(evaluation.evaluations_results)
        axes = sns.lineplot(x=np.repeat(evaluation.evaluations_timesteps, returns.shape[1]), y=returns.flatten())
        axes.set(title=args.env, xlabel="real steps", ylabel="return of deterministic episodes")
        axes.figure.savefig(folder / "learning_curve.png", dpi=130)
        means = returns.mean(axis=1)
        print(f"Mean return of 5 episodes: {means[0]:.0f} at first, {means[-1]:.0f} now, {means.max():.0f} at best.")
    print(f"Saved in {folder}/: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    steps = model.timesteps_left or args.steps
    print(f"Go on:  {sys.executable} examples/train.py --env {args.env} --steps {steps} --resume {folder}")


if __name__ == "__main__":
    main()
