"""Settings of every test run."""

import numpy as np
import pytest
import torch as th

th.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes longer than a few seconds")


@pytest.fixture(autouse=True)
def same_randomness() -> None:
    """Every test starts from the same random state, alone or in company."""
    th.manual_seed(0)
    np.random.seed(0)
