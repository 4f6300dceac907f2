"""CUDA graphs: what is captured stays right while everything else moves on, and what cannot be captured still runs."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_polygrad import PolyGRAD, Trajectory
from sb3_polygrad.core import capture
from sb3_polygrad.core.capture import Captured
from sb3_polygrad.core.on_policy import action_diagnostics
from sb3_polygrad.core.precision import tensor_cores
from sb3_polygrad.world_models.factory import BUILDERS
from tests.graphs import recorded_graph
from tests.test_polygrad import VARIANTS, equal_trajectories
from tests.toys import TINY, PointEnv, equal_trees, tiny_model

GUIDED = VARIANTS["a2c, policy guided"]
SMALL: dict[str, dict[str, Any]] = {
    "diffusion": dict(width=16, n_layers=1),
    "ensemble": dict(width=16, n_layers=1, n_members=3, n_elites=2, fit_steps=16),
    "transformer": dict(width=16, n_layers=1, n_heads=2, context=3, fit_windows=8),
    "autoregressive_diffusion": dict(width=16, n_layers=1, n_diffusion_steps=2),
    "rssm": dict(width=16, n_variables=2, n_classes=4, fit_windows=8),
}
BFLOAT16 = dict(sampler="policy_guided", n_diffusion_steps=3, width=256, n_layers=1, dtype="bfloat16")


@pytest.fixture
def graphs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Everything that would be captured on a GPU is; the names of what was."""
    captured: list[str] = []

    def take_down(function: Callable[..., Any], inputs: tuple[th.Tensor, ...]) -> Any:
        captured.append(getattr(function, "__qualname__", ""))
        return recorded_graph(function, inputs)

    monkeypatch.setattr(capture, "can_capture", lambda device: True)
    monkeypatch.setattr(capture, "warm_up", lambda function, inputs: (function(*inputs), None))
    monkeypatch.setattr(capture, "capture", take_down)
    return captured


def normalized_env() -> VecNormalize:
    return VecNormalize(make_vec_env(PointEnv, 1))


def small_model(world_model: str = "diffusion", **changes: Any) -> PolyGRAD:
    """A tiny PolyGRAD whose world model is of any kind, and whose average moves at every other gradient step."""
    settings = {**TINY, "world_model": world_model, "world_model_kwargs": {**SMALL[world_model], "ema_every": 2}}
    return PolyGRAD("MlpPolicy", normalized_env(), **{**settings, **changes})


# ---------------------------------------------------------------------- without a GPU nothing is captured


class Doubler:
    """A function with a tensor of its own, which counts how often it is really called."""

    def __init__(self) -> None:
        self.factor, self.n_calls = th.tensor(2.0), 0

    def __call__(self, x: th.Tensor) -> dict[str, th.Tensor]:
        self.n_calls += 1
        return {"product": self.factor * x}

    def tensors(self) -> list[th.Tensor]:
        return [self.factor]


def captured_doubler() -> tuple[Doubler, Captured]:
    doubler = Doubler()
    return doubler, Captured(doubler.__call__, doubler.tensors)


def test_on_a_cpu_it_is_the_function() -> None:
    doubler, captured = captured_doubler()
    for n in range(1, 8):
        assert captured(th.tensor([float(n)]))["product"].tolist() == [2.0 * n] and doubler.n_calls == n
    assert not captured._graphs


def test_with_graphs_it_is_called_a_few_times(graphs_on_a_cpu: list[str]) -> None:
    doubler, captured = captured_doubler()
    outputs = [captured(th.tensor([float(n)]))["product"] for n in range(10)]
    assert [output.item() for output in outputs] == [2.0 * n for n in range(10)], "each output is a copy"
    assert doubler.n_calls == capture.WARM_UP + 1
    doubler.factor.fill_(3.0)
    assert captured(th.tensor([1.0]))["product"].item() == 3.0, "what it relies on is read when it is replayed"


def test_other_shapes_and_keys_are_other_graphs(graphs_on_a_cpu: list[str]) -> None:
    _, captured = captured_doubler()
    for _ in range(capture.WARM_UP + 2):
        for n in (1, 2):
            for key in ("a", "b"):
                assert captured(th.ones(n), key=key)["product"].tolist() == [2.0] * n
    assert len(graphs_on_a_cpu) == 4


def test_tensors_that_move_are_captured_anew(graphs_on_a_cpu: list[str]) -> None:
    doubler, captured = captured_doubler()
    for n in range(20):
        if n == 10:
            doubler.factor = th.tensor(5.0)
        assert captured(th.ones(1))["product"].item() == doubler.factor.item()
    assert len(graphs_on_a_cpu) == 2


def test_graphs_do_not_pile_up(graphs_on_a_cpu: list[str]) -> None:
    _, captured = captured_doubler()
    for n in range(3 * capture.MAX_GRAPHS):
        for _ in range(capture.WARM_UP + 1):
            captured(th.ones(1), key=n)
        assert len(captured._graphs) <= capture.MAX_GRAPHS + 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_no_graphs(graphs_on_a_cpu: list[str], duplicate: Callable[[Any], Any]) -> None:
    doubler, captured = captured_doubler()
    for _ in range(capture.WARM_UP + 1):
        captured(th.ones(1))
    other = duplicate(captured)
    assert captured._graphs and not other._graphs
    doubler.factor.fill_(7.0)
    assert other(th.ones(1))["product"].item() == 2.0, "it has an owner of its own"


# ---------------------------------------------------------------------- what cannot be captured


def test_a_host_that_asks_is_noticed() -> None:
    read = (lambda x: x * float(x), lambda x: x if x > 0.0 else -x, lambda x: x[x > 0.0])
    for function in (*read, lambda x: x + th.tensor(1.0)):
        with pytest.raises(RuntimeError, match=r"the host (asks|brings)"):
            recorded_graph(function, (th.ones(()),))


def test_a_failing_capture_warns_once_and_goes_on(graphs_on_a_cpu: list[str]) -> None:
    calls = []

    def asks(x: th.Tensor) -> th.Tensor:
        calls.append(1)
        return x * float(x)

    captured = Captured(asks, list)
    with pytest.warns(RuntimeWarning, match="asks runs without a CUDA graph, which is slower: .*the host asks") as caught:
        for n in range(10):
            assert captured(th.tensor(float(n))).item() == n * n
    assert len(caught) == 1
    assert len(calls) == 10 + 1, "every call and the attempt"


def test_a_host_that_waits_is_warned_of_before_anything_is_captured(
    graphs_on_a_cpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "warm_up", lambda function, inputs: (function(*inputs), "the host waits in x.py:3"))
    doubler, captured = captured_doubler()
    with pytest.warns(RuntimeWarning, match=r"slower: the host waits in x\.py:3") as caught:
        assert [captured(th.ones(1))["product"].item() for _ in range(10)] == [2.0] * 10
    assert len(caught) == 1 and doubler.n_calls == 10 and not graphs_on_a_cpu


def test_errors_of_the_function_are_its_own(graphs_on_a_cpu: list[str]) -> None:
    model = tiny_model(PointEnv())
    model.replay_buffer = tiny_model(PointEnv()).learn(64).replay_buffer
    with pytest.raises(RuntimeError, match="never fitted"):
        model.imagine(4)


def test_a_model_that_cannot_be_captured_learns_the_same(graphs_on_a_cpu: list[str]) -> None:
    def spoilt(model: PolyGRAD) -> PolyGRAD:
        sample = model.world_model.sampler.sample  # type: ignore[union-attr]
        model.world_model.sampler.sample = lambda task: sample(task._replace(noise=task.noise * float(th.ones(()))))  # type: ignore[union-attr]
        return model

    with pytest.warns(RuntimeWarning, match="_imagine_from runs without a CUDA graph"):
        learnt = spoilt(small_model()).learn(160)
    assert equal_trees(learnt.get_parameters(), spoilt(small_model(cuda_graphs=False)).learn(160).get_parameters())


# ---------------------------------------------------------------------- replays among everything that goes on


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("diffusion", dict(policy_update="ppo")),
        ("diffusion", dict(policy_update="a2c", learning_rate_adaptation=0.2)),
        *((name, {}) for name in SMALL if name != "diffusion"),
    ],
)
def test_learning_with_graphs_is_learning_without(graphs_on_a_cpu: list[str], name: str, changes: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        replayed = small_model(name, **changes).learn(160)
    assert {"Imagining._imagine_from", "StandardizedWorldModel._fit_tensors"} == set(graphs_on_a_cpu)
    plain = small_model(name, **changes, cuda_graphs=False).learn(160)
    assert equal_trees(replayed.get_parameters(), plain.get_parameters())
    assert replayed.world_model._n_fitted == plain.world_model._n_fitted > 30  # type: ignore[union-attr]


@pytest.mark.parametrize("guidance", ["policy_score", "noisy_states", "state_update", "policy_sampling", "random_actions"])
def test_guided_imagination_is_captured_whole(graphs_on_a_cpu: list[str], guidance: str) -> None:
    def learnt(cuda_graphs: bool) -> PolyGRAD:
        kwargs = dict(sampler="policy_guided", n_diffusion_steps=3, width=16, n_layers=1, guidance=guidance)
        settings = dict(world_model_kwargs=kwargs, policy_update="a2c", gradient_steps=1, learning_starts=16)
        return tiny_model(normalized_env(), **{**settings, "cuda_graphs": cuda_graphs}).learn(96)

    assert equal_trees(learnt(True).get_parameters(), learnt(False).get_parameters())
    assert "Imagining._imagine_from" in graphs_on_a_cpu


@pytest.mark.parametrize("kwargs", [GUIDED["world_model_kwargs"], VARIANTS["ppo, staggered"]["world_model_kwargs"], BFLOAT16])
def test_an_old_record_of_imagining_sees_what_was_learnt_since(kwargs: dict[str, Any]) -> None:
    model = tiny_model(normalized_env(), policy_update="a2c", world_model_kwargs=dict(kwargs)).learn(80)
    model.imagine(16)
    start = model.replay_buffer.sample_observations(16)
    graph = recorded_graph(model._imagine_from, (start,))
    graph.replay()  # the recording itself
    before = Trajectory(*(tensor.clone() for tensor in graph.outputs))
    model.learn(80, reset_num_timesteps=False)  # network, policy, δ, statistics of buffer and VecNormalize
    th.manual_seed(1)
    now = model.imagine(16, start)
    th.manual_seed(1)
    graph.replay()
    assert equal_trajectories(graph.outputs, now) and not equal_trajectories(before, now)


@pytest.mark.parametrize("world_model", BUILDERS)
def test_an_old_record_of_a_gradient_step_is_one_now(world_model: str) -> None:
    model = small_model(world_model).learn(80)
    world = model.world_model
    graph = recorded_graph(world._fit_tensors, model.replay_buffer.sample(16))  # type: ignore[union-attr]
    graph.replay()
    model.learn(32, reset_num_timesteps=False)
    twin, batch = copy.deepcopy(world), model.replay_buffer.sample(16)
    assert twin._is_averaging == world._is_averaging  # type: ignore[union-attr]
    assert world._is_averaging, "as it was when recorded"  # type: ignore[union-attr]
    th.manual_seed(1)
    metrics = twin.fit(batch)
    th.manual_seed(1)
    for kept, given in zip(graph.inputs, batch, strict=True):
        kept.copy_(given)
    graph.replay()
    assert equal_trees(graph.outputs, metrics)
    assert equal_trees(world.state_dict(), twin.state_dict())
    assert equal_trees(world.optimizer.state_dict(), twin.optimizer.state_dict())


def test_a_loaded_state_is_captured_anew(graphs_on_a_cpu: list[str]) -> None:
    """An optimiser's state has new addresses once it is loaded."""

    def learnt(cuda_graphs: bool) -> dict[str, Any]:
        model = small_model(cuda_graphs=cuda_graphs).learn(80)
        parameters = copy.deepcopy(model.get_parameters())
        model.learn(40, reset_num_timesteps=False)
        model.set_parameters(parameters)
        return model.learn(80, reset_num_timesteps=False).get_parameters()

    assert equal_trees(learnt(True), learnt(False))
    assert graphs_on_a_cpu.count("StandardizedWorldModel._fit_tensors") == 4, "with and without averaging, before and after"


def test_another_dtype_is_captured_anew(graphs_on_a_cpu: list[str]) -> None:
    model = tiny_model(PointEnv(), world_model_kwargs=BFLOAT16).learn(160)
    model.world_model.imagine_in(th.float32)  # type: ignore[operator, union-attr]
    start = model.replay_buffer.sample_observations(16)
    th.manual_seed(1)
    replayed = model.imagine(16, start)
    th.manual_seed(1)
    assert equal_trajectories(replayed, model._imagine_from(start))


def test_saving_and_copying_leave_graphs_behind(graphs_on_a_cpu: list[str], tmp_path: Path) -> None:
    model = small_model().learn(160)
    assert model._imagining._graphs
    model.save(tmp_path / "model")
    loaded = PolyGRAD.load(tmp_path / "model", env=normalized_env(), device="cpu")
    assert loaded.cuda_graphs and not loaded._imagining._graphs
    assert not PolyGRAD.load(tmp_path / "model", device="cpu", cuda_graphs=False).world_model.cuda_graphs
    twin = copy.deepcopy(model.world_model)
    assert twin._captured_fit.function.__self__ is twin  # type: ignore[union-attr]
    assert not twin._captured_fit._graphs  # type: ignore[union-attr]


def test_graphs_can_be_switched_off(graphs_on_a_cpu: list[str]) -> None:
    small_model(cuda_graphs=False).learn(160)
    assert not graphs_on_a_cpu
    with pytest.raises(TypeError, match="cuda_graphs must be True or False"):
        small_model(cuda_graphs="no")


# ---------------------------------------------------------------------- precision


def settings() -> tuple[Any, ...]:
    matmul = th.backends.cuda.matmul
    return matmul.fp32_precision, matmul.allow_tf32, th.get_float32_matmul_precision()


def test_precision_is_put_back() -> None:
    before = settings()
    with tensor_cores(), tensor_cores():
        assert settings() == ("tf32", True, "high")
    assert settings() == before
    with pytest.raises(KeyError), tensor_cores():
        raise KeyError
    assert settings() == before


@pytest.mark.parametrize("chosen", ["ieee", "tf32"])
def test_a_precision_that_the_user_has_chosen_is_left_alone(chosen: str) -> None:
    matmul = th.backends.cuda.matmul
    matmul.fp32_precision = chosen
    try:
        with tensor_cores():
            assert matmul.fp32_precision == chosen
        assert matmul.fp32_precision == chosen
    finally:
        matmul.fp32_precision = "none"


# ---------------------------------------------------------------------- on a real GPU

on_a_gpu = pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU")


@on_a_gpu
@pytest.mark.parametrize("name", [name for name in VARIANTS if not name.startswith("pathwise")])  # its own has gradients
def test_gpu_replays_draw_as_calls_do(name: str) -> None:
    model = tiny_model(normalized_env(), device="cuda", **VARIANTS[name]).learn(160)
    assert model._imagining._graphs and not model._imagining.unsuitable
    start = model.replay_buffer.sample_observations(16)
    th.manual_seed(1)
    replayed = model.imagine(16, start)
    after = th.cuda.get_rng_state()
    th.manual_seed(1)
    called = model._imagine_from(start)
    assert th.equal(th.cuda.get_rng_state(), after), "the generator has moved as far"
    assert all(th.allclose(a, b, atol=1e-3) for a, b in zip(replayed, called, strict=True))


@on_a_gpu
@pytest.mark.parametrize("world_model", BUILDERS)
def test_gpu_learning_with_graphs_is_learning_without(world_model: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        replayed = small_model(world_model, device="cuda").learn(64 + 5 * 8)
    plain = small_model(world_model, device="cuda", cuda_graphs=False).learn(64 + 5 * 8)
    assert replayed.world_model._captured_fit._graphs, "captured"  # type: ignore[union-attr]
    for name, value in replayed.world_model.state_dict().items():
        assert th.allclose(value, plain.world_model.state_dict()[name], rtol=1e-2, atol=1e-2), name


@on_a_gpu
@pytest.mark.parametrize(("first", "second"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_gpu_runs_go_on_elsewhere(tmp_path: Path, first: str, second: str) -> None:
    model = small_model(device=first).learn(120)
    path = model.save_checkpoint(tmp_path)
    resumed = PolyGRAD.resume(path, normalized_env(), device=second)
    for name, value in model.world_model.state_dict().items():
        assert th.equal(value.cpu(), resumed.world_model.state_dict()[name].cpu()), name
    resumed.learn(80, reset_num_timesteps=False)
    assert resumed.num_timesteps == 200 and resumed.world_model.optimizer.state_dict()["state"][0]["step"] > 0


@on_a_gpu
def test_gpu_is_not_waited_for() -> None:
    model = small_model(device="cuda").learn(160)
    start = model.replay_buffer.sample_observations(16)
    th.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            model.world_model.fit(model.replay_buffer.sample(16))
        trajectory = model.imagine(16, start)
        action_diagnostics(model.standardized_actions(trajectory), trajectory)
    finally:
        th.cuda.set_sync_debug_mode("default")


@on_a_gpu
def test_gpu_host_that_waits_is_named() -> None:
    captured = Captured(lambda x: x * float(x), list)
    with pytest.warns(RuntimeWarning, match=r"the host waits for the device in .*test_capture\.py"):
        assert captured(th.tensor(3.0, device="cuda")).item() == 9.0
    assert th.rand(3, device="cuda").isfinite().all()


@on_a_gpu
def test_gpu_random_numbers_survive_a_failed_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_broken", [])
    th.manual_seed(0)
    expected = th.rand(3, device="cuda")
    th.manual_seed(0)
    with pytest.raises(Exception):  # noqa: B017
        capture.capture(lambda x: th.rand_like(x) * float(x), (th.ones((), device="cuda"),))
    assert not capture.can_capture(th.device("cuda"))
    assert th.equal(th.rand(3, device="cuda"), expected)
    assert th.cuda.current_stream() == th.cuda.default_stream()
