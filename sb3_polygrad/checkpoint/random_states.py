"""The states of all global random generators, to go on with the same draws later."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch as th


def random_states() -> dict[str, Any]:
    """The states of python, numpy, torch and its CUDA devices, as tensors and plain values."""
    state = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {**state, "state": {**state["state"], "key": th.tensor(state["state"]["key"].astype(np.int64))}},
        "torch": th.get_rng_state(),
        "cuda": th.cuda.get_rng_state_all() if th.cuda.is_available() and th.cuda.is_initialized() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """
    Make all generators go on from given states.

    :param states: from :func:`random_states`; states of CUDA devices that are not here are left out
    """
    random.setstate(states["python"])
    state = states["numpy"]
    key = state["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**state, "state": {**state["state"], "key": key}})
    th.set_rng_state(states["torch"])
    if th.cuda.is_available():
        for device, cuda_state in enumerate(states["cuda"][: th.cuda.device_count()]):
            th.cuda.set_rng_state(cuda_state, device)
