"""The benchmark of speed times every part of an iteration."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import pytest

from sb3_polygrad.benchmark import speed
from tests.toys import PointEnv, tiny_model


def test_an_iteration_is_one_of_the_algorithm() -> None:
    model = tiny_model(PointEnv()).learn(120)
    n_fits, n_rows = model.world_model.n_fits, model.replay_buffer.n_rows
    seconds = speed.time_iteration(model)
    assert tuple(seconds) == speed.PARTS and all(value > 0.0 for value in seconds.values())
    assert model.world_model.n_fits == n_fits + 4 and model.replay_buffer.n_rows == n_rows + 8


def test_settings_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"learning_starts": 50, "n_imagined": 8, "batch_size": 16}
    settings = [json.dumps({**small, "n_steps": n_steps}) for n_steps in (5, 10)]
    arguments = ["--env", "Pendulum-v1", "--settings", *settings, "--steps", "60", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", ["speed", *arguments, "--out", str(tmp_path / "out" / "speed")])
    speed.main()
    table, facts = pd.read_csv(tmp_path / "out" / "speed.csv"), json.loads((tmp_path / "out" / "speed.json").read_text())
    assert table["part"].tolist() == [*speed.PARTS, *speed.PARTS] and (table["milliseconds"] > 0.0).all()
    assert len(facts["steps_per_second"]) == 2 and "torch" in facts["versions"]
