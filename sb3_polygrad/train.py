"""
``python -m sb3_polygrad.train``: the zoo's train script, knowing PolyGRAD, without the import hook.

    python -m sb3_polygrad.train --algo polygrad --env Hopper-v5
"""

import sys


def main() -> None:
    """The arguments are those of ``python -m rl_zoo3.train``."""
    try:
        from rl_zoo3.train import train
    except ModuleNotFoundError as error:
        sys.exit(f"{error}: install the zoo with pip install 'sb3_polygrad[zoo]'")
    from sb3_polygrad import zoo

    zoo.register()
    train()


if __name__ == "__main__":
    main()
