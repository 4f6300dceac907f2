"""The benchmark of speed counts and adds up what it should."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch as th
from torch import nn

from sb3_polygrad.benchmark import arithmetic, speed


def test_flops_of_a_layer_and_its_gradient() -> None:
    layer, x = nn.Linear(5, 7), th.randn(3, 5)
    assert arithmetic.flops(lambda: layer(x)) == 2 * 3 * 5 * 7
    # Backward: the gradient of the weights alone, since nobody asks for that of x.
    assert arithmetic.flops(lambda: layer(x).sum().backward()) == 2 * (2 * 3 * 5 * 7)


def test_a_larger_product_takes_longer_and_rates_are_per_second() -> None:
    small, large = th.randn(32, 32), th.randn(512, 512)
    assert arithmetic.seconds(lambda: large @ large, 0.05) > 10 * arithmetic.seconds(lambda: small @ small, 0.05)
    assert 1e6 < arithmetic.gemm_rate(64, 64, th.float32, "cpu", 0.05) < 1e15


def test_every_part_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"learning_starts": 50, "n_imagined": 8, "horizon": 4, "batch_size": 16, "world_model_kwargs": {"width": 16}}
    arguments = ["--env", "Pendulum-v1", "--settings", "default", "--dtypes", "float32", "--steps", "40"]
    arguments += ["--profiled-steps", "10", "--horizons", "3", "--batches", "4", "--kwargs", json.dumps(tiny)]
    monkeypatch.setattr(sys, "argv", ["speed", *arguments, "--out", str(tmp_path / "speed")])
    speed.main()
    table, facts = pd.read_csv(tmp_path / "speed.csv"), json.loads((tmp_path / "speed.json").read_text())
    assert table["part"].tolist() == ["imagine", "fit", "learn"]
    assert table["share"].to_numpy() == pytest.approx((table["rate"] / table["gemm_rate"]).to_numpy(), rel=1e-3)
    loop = facts["loop"]
    assert set(loop["milliseconds_per_step"]) == {*speed.PARTS, "rest"}
    assert sum(loop["milliseconds_per_step"].values()) == pytest.approx(1e3 / loop["steps_per_second"])
    assert all(value >= 0.0 for value in loop["milliseconds_per_step"].values())
    assert facts["loop_without_arithmetic"]["steps"] == 40
    assert sum(facts["kinds"].values()) == pytest.approx(1.0) and facts["kinds"]["matrix products"] > 0.0
    assert [row["sampler"] for row in facts["growth"]] == ["staggered", "policy_guided"]
    assert facts["peak_memory_gib"]["process"] > 0.0
    spent = dict(zip(table["part"], table["seconds"], strict=True))
    per_update = spent["learn"] + 10 * spent["fit"]  # n_steps=10, a gradient step each
    assert facts["hours_per_million_steps"]["default"] == pytest.approx(per_update * 1e6 / 10 / 3600, rel=1e-3)
