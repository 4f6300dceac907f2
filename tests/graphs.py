"""Stands in for CUDA graphs on a CPU: what they do to memory, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch as th
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sb3_polygrad.core import capture

ASKING = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique")
"""Operations whose result the host needs to go on."""


class Operations(TorchDispatchMode):
    """
    Takes down all operations, forward and backward, with the tensors that they read and wrote, and does them again on the
    same memory. As in the capture of a CUDA graph, the host may not ask for values, nor bring new ones to the device.

    :param may_bring: let the host bring values, which it need not wait for
    """

    def __init__(self, may_bring: bool = False) -> None:
        super().__init__()
        self.may_bring = may_bring
        self.done: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(index is not None and index.dtype == th.bool for index in args[1])
        if by_mask or name in ASKING:
            raise RuntimeError(f"the host asks by {name}")
        if name == "lift_fresh" and not self.may_bring:
            raise RuntimeError("the host brings values of its own")
        out = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, out))
        return out

    @th.no_grad()
    def repeat(self) -> None:
        """Do everything again; random numbers are new ones."""
        with th._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, out in self.done:
                again = func(*args, **kwargs)
                read = {_memory(tensor) for tensor in _tensors((args, kwargs))}
                for kept, new in zip(_tensors(out), _tensors(again), strict=True):
                    if _memory(kept) not in read:  # neither a view nor written in place
                        kept.copy_(new)


def _tensors(tree: Any) -> list[th.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, th.Tensor)]


def _memory(tensor: th.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def recorded_graph(function: Callable[..., Any], inputs: tuple[th.Tensor, ...]) -> Any:
    """
    What :func:`sb3_polygrad.core.capture.capture` gives, by :class:`Operations`. To take them down they have to be done, so
    that the first replay is that already.
    """
    kept, operations, replays = tuple(tensor.detach().clone() for tensor in inputs), Operations(), []
    state = th.get_rng_state()
    try:
        with operations:
            outputs = function(*kept)
    except RuntimeError:
        th.set_rng_state(state)  # a capture that fails has drawn nothing
        raise

    def replay() -> None:
        replays.append(1)
        if len(replays) > 1:
            operations.repeat()

    return capture._Graph(replay, kept, outputs)


@contextmanager
def asking_is_an_error() -> Iterator[None]:
    """Within, the host may ask for no value, but bring some."""
    with Operations(may_bring=True):
        yield
