"""
What the zoo's start-up file costs every start of the interpreter.

    python -m sb3_polygrad.benchmark.startup --out docs/results/startup

starts this interpreter with and without ``sb3_polygrad.pth`` in turn (moving the file aside and back) and writes the medians.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from sb3_polygrad.benchmark.provenance import provenance, write_json


def start() -> float:
    """Seconds that one start takes."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    return time.perf_counter() - begin


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100, help="starts with the file, and as many without")
    parser.add_argument("--out", type=Path, required=True, help="path of the json, without suffix")
    args = parser.parse_args()

    startup = Path(sysconfig.get_path("purelib"), "sb3_polygrad.pth")
    aside = startup.with_suffix(".aside")
    with_file, without_file = [], []
    for _ in range(args.pairs):
        with_file.append(start())
        startup.rename(aside)
        try:
            without_file.append(start())
        finally:
            aside.rename(startup)
    differences = [a - b for a, b in zip(with_file, without_file, strict=True)]
    milliseconds = {
        "with": statistics.median(with_file),
        "without": statistics.median(without_file),
        "difference": statistics.median(differences),
    }
    facts = {name: round(1e3 * seconds, 3) for name, seconds in milliseconds.items()}
    write_json(
        args.out.with_suffix(".json"),
        provenance("sb3_polygrad.benchmark.startup", pairs=args.pairs, median_milliseconds=facts),
    )
    print(facts)


if __name__ == "__main__":
    main()
