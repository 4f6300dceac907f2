"""What all figures share: how they are written."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure


def save(figure: Figure, out: Path) -> None:
    """
    Write a figure and close it.

    :param figure: the finished figure
    :param out: picture to write; its folder is made
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)
