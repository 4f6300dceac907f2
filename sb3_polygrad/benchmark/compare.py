"""
Algorithms on equal terms: several algorithms, environments and seeds, and a report on them.

    python -m sb3_polygrad.benchmark.compare run --algos polygrad ppo sac --envs Hopper-v5 Walker2d-v5 --seeds 0 1 2 \
        --steps 20000 --jobs 2 --out runs/comparison
    python -m sb3_polygrad.benchmark.compare report runs/comparison

Settings are those of ``hyperparams/ALGORITHM.yml``. The same command again resumes what was interrupted, more ``--steps``
extend it: a complete run is skipped, PolyGRAD resumes from its checkpoints in ``--store``, the others begin anew (their former
files are kept as ``NAME.csv.before``). ``docs/comparison.md`` explains the protocol and every column.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed

from sb3_polygrad.benchmark.algorithms import NAMES
from sb3_polygrad.benchmark.provenance import provenance
from sb3_polygrad.benchmark.run import Run, execute
from sb3_polygrad.hyperparams_loader import constructor_arguments, load_hyperparams


def runs_of(args: argparse.Namespace) -> list[Run]:
    """All runs that the command line asks for; first one seed of everything, then the next."""
    runs = []
    for seed, env, algorithm in itertools.product(args.seeds, args.envs, args.algos):
        settings = load_hyperparams(args.hyperparams or algorithm, env) | args.kwargs
        protocol = args.steps, args.every, args.episodes
        runs.append(Run(algorithm, env, seed, *protocol, settings, args.label or "", args.threads, args.device))
    return runs


def attempt(run: Run, out: Path, store: Path, facts: dict[str, Any]) -> tuple[str, str, str | None]:
    """Name of the run, what was done, and the error that ended it, if one did: no run takes the others with it."""
    try:
        return run.name, execute(run, out, store, facts), None
    except Exception as error:
        return run.name, f"failed: {type(error).__name__}: {error}", traceback.format_exc()


def run(args: argparse.Namespace) -> None:
    """The command ``run``; it exits with 1 if a run failed."""
    facts, failures = provenance("sb3_polygrad.benchmark.compare"), []
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # read when a process begins
    results = Parallel(args.jobs, return_as="generator_unordered")(
        delayed(attempt)(run, args.out.absolute(), args.store.absolute(), facts) for run in runs_of(args)
    )
    for name, result, error in results:
        print(f"{name}: {result}", flush=True)
        if error is not None:
            failures.append(f"{name}:\n{error}")
    if failures:
        sys.exit("\n".join([f"{len(failures)} failed. The same command goes on with them.", *failures]))


def report(args: argparse.Namespace) -> None:
    """The command ``report``."""
    from sb3_polygrad.benchmark.report import write_report  # here only: runs do without rliable and figures

    facts = provenance("sb3_polygrad.benchmark.compare")
    page = write_report(args.folder, args.out or args.folder / "report", facts, args.at, args.ours)
    print(f"Written: {page}")


def at_least_one(text: str) -> int:
    """An integer of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="{run,report}")

    train = commands.add_parser("run", help="train and evaluate", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    train.set_defaults(command=run)
    train.add_argument("--algos", nargs="+", choices=NAMES, default=["polygrad", "ppo"], help="algorithms")
    train.add_argument("--envs", nargs="+", default=["Hopper-v5"], help="environments")
    train.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds")
    train.add_argument("--steps", type=at_least_one, default=20_000, help="real steps per run")
    train.add_argument("--every", type=at_least_one, default=1_000, help="real steps between evaluations")
    train.add_argument("--episodes", type=at_least_one, default=10, help="episodes per evaluation")
    train.add_argument("--hyperparams", help="another file of hyperparams/ than that of the algorithm, without suffix")
    train.add_argument("--kwargs", type=constructor_arguments, default={}, help="further arguments of the constructor as json")
    train.add_argument("--label", help="name of the variant, if not that of the algorithm")
    train.add_argument("--jobs", type=at_least_one, default=1, help="runs at the same time")
    train.add_argument("--threads", type=at_least_one, default=1, help="torch threads per run")
    train.add_argument("--device", default="cpu", help="of torch")
    train.add_argument("--out", type=Path, required=True, help="folder of the csv and json files")
    train.add_argument("--store", type=Path, default=Path("runs/checkpoints"), help="folder of PolyGRAD's checkpoints")

    tell = commands.add_parser("report", help="compare", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    tell.set_defaults(command=report)
    tell.add_argument("folder", type=Path, help="where the csv files are")
    tell.add_argument("--at", type=int, nargs="+", help="real steps to compare at; if not given, wherever a curve ends")
    tell.add_argument("--ours", default="polygrad", help="label whose probability of improvement over the others is told")
    tell.add_argument("--out", type=Path, help="folder of the report; if not given, report/ beside the csv files")
    return parser


def main() -> None:
    """Command line."""
    parser = arguments()
    args = parser.parse_args()
    if getattr(args, "label", None) and len(args.algos) > 1:
        parser.error("--label names one variant of one algorithm: give one of --algos with it")
    if args.command is run and args.steps < args.every:
        parser.error(f"nothing would be evaluated: --steps {args.steps} is less than --every {args.every}")
    args.command(args)


if __name__ == "__main__":
    main()
