"""What the studies of this folder have in common on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch as th

from sb3_polygrad.common.arguments import at_least_one


def study_parser(description: str | None) -> argparse.ArgumentParser:
    """
    :param description: docstring of the study's module, shown by ``--help`` as it is
    :return: a parser with ``--threads`` and ``--out``, to be given the study's own arguments
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=at_least_one, default=1, help="of torch")
    parser.add_argument("--out", type=Path, required=True, help="path of the results, without suffix")
    return parser


def run_study(parser: argparse.ArgumentParser, study: Callable[[argparse.Namespace], None]) -> None:
    """
    :param parser: of :func:`study_parser`
    :param study: called with the arguments, once torch has its threads
    """
    args = parser.parse_args()
    th.set_num_threads(args.threads)
    study(args)
