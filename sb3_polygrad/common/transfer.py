"""From the host to a device."""

from __future__ import annotations

import numpy as np
import torch as th


def to_device(values: np.ndarray | th.Tensor, device: th.device) -> th.Tensor:
    """
    Bring values of the host to a device. A GPU fetches them when it gets there, and the host does not wait for that.

    :param values: on the host
    :param device: where they are wanted
    """
    tensor = th.as_tensor(values)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
