"""Functions of tensors that a GPU runs as CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import torch as th
from torch.utils._pytree import tree_map_only

WARM_UP = 3
"""Calls that are run as they are before one is captured; torch's documentation takes as many."""

MAX_GRAPHS = 16
"""Graphs of one function; if more seem to be needed, something in its keys never comes back."""


class _Graph(NamedTuple):
    """
    :param replay: runs what was captured
    :param inputs: where it reads
    :param outputs: where it writes, of any structure
    """

    replay: Callable[[], None]
    inputs: tuple[th.Tensor, ...]
    outputs: Any


class Captured:
    """
    Calls a function of tensors. On a GPU it is captured as a CUDA graph, which the host launches as a whole instead of kernel
    by kernel; on other devices it is simply called.

    The function must do the same operations whatever the values are, never ask the device for one, and write in place what
    outlasts the call. For each shape of the inputs the first calls are ordinary ones; the next one is captured and from then
    on replayed. Inputs are copied to where the graph reads, outputs are copies. If a tensor that the function relies on has
    moved (a model on another device, an optimiser whose state was loaded), all is captured anew. A function that cannot be
    captured is called as it is from then on, after a warning that says why. Graphs are neither pickled nor copied.

    Random numbers: a replay draws from torch's default generator of the device, from where that stands now, and moves it as
    far as the function would have. So a seed means the same with and without graphs, and a generator's state that is saved
    between two calls and restored gives the same draws. That all else is the same to the last bit, too, is torch's and CUDA's
    to keep: which kernels are taken may depend on whether they are captured.

    :param function: of tensors, to tensors in any nesting of tuples and dicts
    :param relies_on: the tensors that it reads or writes besides inputs and outputs
    """

    def __init__(self, function: Callable[..., Any], relies_on: Callable[[], Iterable[th.Tensor]]) -> None:
        self.function = function
        self.relies_on = relies_on
        self.unsuitable = False
        self._addresses: tuple[int, ...] = ()
        self._n_calls: dict[Hashable, int] = {}
        self._graphs: dict[Hashable, _Graph] = {}

    def __call__(self, *inputs: th.Tensor, key: Hashable = None) -> Any:
        """
        :param inputs: at least one
        :param key: everything else that the function depends on
        """
        if self.unsuitable or not can_capture(inputs[0].device):
            return self.function(*inputs)
        addresses = tuple(tensor.data_ptr() for tensor in self.relies_on())
        if addresses != self._addresses or len(self._n_calls) > MAX_GRAPHS:
            self.drop()
            self._addresses = addresses
        key = (key, *((tensor.shape, tensor.dtype, tensor.device) for tensor in inputs))
        if key not in self._graphs:
            n_calls = self._n_calls[key] = self._n_calls.get(key, 0) + 1
            if n_calls <= WARM_UP:
                result, reason = warm_up(self.function, inputs)
                if reason is not None:
                    self._give_up(reason)
                return result
            try:
                self._graphs[key] = capture(self.function, inputs)
            except Exception as error:
                cause = error.__context__ or error  # torch's own error at the end of a failed capture says nothing
                self._give_up(f"{type(cause).__name__}: {cause}")
                return self.function(*inputs)
        graph = self._graphs[key]
        with th.no_grad():
            for kept, given in zip(graph.inputs, inputs, strict=True):
                kept.copy_(given)
        graph.replay()
        return _copies(graph.outputs)

    def drop(self) -> None:
        """Forget all graphs."""
        self._graphs.clear()
        self._n_calls.clear()

    def _give_up(self, reason: str) -> None:
        self.unsuitable = True
        self.drop()
        name = getattr(self.function, "__qualname__", repr(self.function))
        warnings.warn(f"{name} runs without a CUDA graph, which is slower: {reason}", RuntimeWarning)

    def __getstate__(self) -> dict[str, Any]:
        return {"function": self.function, "relies_on": self.relies_on}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Captured.__init__(self, **state)


def can_capture(device: th.device) -> bool:
    """Whether work on a device can be captured now (not if it is being captured already)."""
    return device.type == "cuda" and not _broken and not is_captured()


def is_captured() -> bool:
    """Whether what is called now is not run but captured."""
    return th.cuda.is_available() and th.cuda.is_current_stream_capturing()


_broken: list[str] = []
"""Why a capture failed, if one did. Torch does not promise to be ready for another one then."""


def warm_up(function: Callable[..., Any], inputs: tuple[th.Tensor, ...]) -> tuple[Any, str | None]:
    """
    An ordinary call, on a stream of its own as torch wants it before a capture.

    :param function: what is called
    :param inputs: its arguments
    :return: its result; and why it cannot be captured, if it made the host wait for the device
    """
    present, beside = th.cuda.current_stream(inputs[0].device), th.cuda.Stream(inputs[0].device)
    mode = th.cuda.get_sync_debug_mode()
    beside.wait_stream(present)
    with warnings.catch_warnings(record=True) as caught, th.cuda.stream(beside):
        warnings.simplefilter("always")
        th.cuda.set_sync_debug_mode("warn")
        try:
            result = function(*inputs)
        finally:
            th.cuda.set_sync_debug_mode(mode)
    present.wait_stream(beside)
    waits = [each for each in caught if "synchronizing CUDA operation" in str(each.message)]
    for other in caught:
        if other not in waits and "prototype" not in str(other.message):
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    return result, f"the host waits for the device in {waits[0].filename}:{waits[0].lineno}" if waits else None


def capture(function: Callable[..., Any], inputs: tuple[th.Tensor, ...]) -> _Graph:
    """
    Capture a call. Nothing is run: neither data nor random generators change.

    :param function: what is captured
    :param inputs: like its arguments
    :raises Exception: any that the function, torch or CUDA make of it
    """
    present, beside = th.cuda.current_stream(inputs[0].device), th.cuda.Stream(inputs[0].device)
    graph, kept = th.cuda.CUDAGraph(), tuple(tensor.detach().clone() for tensor in inputs)
    generator = th.cuda.default_generators[present.device_index]
    state = generator.get_state()
    try:
        # Torch's own context leaves its stream behind if a capture fails at its end; the one around it does not.
        with th.cuda.stream(present), th.cuda.graph(graph, stream=beside):
            outputs = function(*kept)
    except Exception as error:
        _broken.append(str(error))
        # The generator, too, would wait for the end of the capture for ever.
        fresh = th.Generator(generator.device)
        fresh.set_state(state)
        generator.graphsafe_set_state(fresh)
        raise
    return _Graph(graph.replay, kept, outputs)


def _copies(tree: Any) -> Any:
    return tree_map_only(th.Tensor, lambda tensor: tensor.detach().clone(), tree)
