"""Settings of every test run."""

import numpy as np
import pytest
import torch as th

th.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_randomness() -> None:
    """Every test starts from the same random state, alone or in company."""
    th.manual_seed(0)
    np.random.seed(0)
