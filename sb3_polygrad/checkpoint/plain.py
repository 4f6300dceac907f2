"""Nested arrays as nested tensors and plain values, which ``torch.load(weights_only=True)`` reads, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th


def to_plain(tree: Any) -> Any:
    """
    :param tree: arrays, numbers, strings and None in dicts, lists and tuples
    :return: the same with tensors for arrays
    :raises TypeError: for anything else
    """
    if isinstance(tree, dict):
        return {key: to_plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(to_plain(value) for value in tree)
    if isinstance(tree, np.ndarray):
        return th.tensor(tree)
    if isinstance(tree, np.generic):
        return tree.item()
    if tree is None or isinstance(tree, (bool, int, float, str, bytes)):
        return tree
    raise TypeError(
        f"only arrays, numbers, strings and None, in dicts, lists and tuples, can be kept, got {type(tree).__name__}"
    )


def from_plain(tree: Any) -> Any:
    """
    :param tree: from :func:`to_plain`
    :return: the same with arrays for tensors
    """
    if isinstance(tree, dict):
        return {key: from_plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(from_plain(value) for value in tree)
    return tree.numpy().copy() if isinstance(tree, th.Tensor) else tree
