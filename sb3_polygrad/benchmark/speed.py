"""
Where the time goes: matrix products, imagination, fitting, policy update, the whole loop.

    python -m sb3_polygrad.benchmark.speed --out docs/results/speed_cpu
    python -m sb3_polygrad.benchmark.speed --device cuda --paper-batch 1024 --out docs/results/speed_cuda

writes ``<out>.csv``, a row per part, and ``<out>.json`` with the rest, and prints both. The parts, for the settings of
``hyperparams/polygrad.yml`` ("default") and ``polygrad-paper.yml`` ("paper"):

- ``imagine``: a batch of trajectories under the policy (with ``--dtypes``, in each precision),
- ``fit``: a gradient step of the world model,
- ``learn``: a policy update, from imagining the batch (with gradients, if the update is along them) to policy and critic.

``gflops`` counts the matrix products of a part, ``rate`` is that by its time, in GFLOP/s, and ``gemm_rate`` what square
layers of the network's width reach on their own, measured right before and after it. ``share`` is their ratio.

The json adds hours for a million real steps as the parts add up, peak memory, how imagining grows with horizon and batch, and
the whole loop on the real environment: real steps per second, the time of every part of it, the same with next to no numbers
in the batches (what is left is not arithmetic), and the processor's time by kind of operation (torch's profiler, in a run of
its own since it slows what it watches, Python most of all; CPU only). ``--compile`` adds what ``torch.compile`` would bring.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch as th
from torch.profiler import ProfilerActivity, profile

from sb3_polygrad.benchmark.arithmetic import flops, gemm_rate, seconds
from sb3_polygrad.benchmark.provenance import provenance, write_json
from sb3_polygrad.common.arguments import at_least_one
from sb3_polygrad.evaluation.results import beside, readable, write_csv
from sb3_polygrad.evaluation.timing import prepare, some_policy
from sb3_polygrad.hyperparams_loader import constructor_arguments, load_hyperparams
from sb3_polygrad.polygrad import PolyGRAD
from sb3_polygrad.world_models.diffusion import DiffusionWorldModel
from sb3_polygrad.world_models.factory import build_diffusion

SETTINGS = {"default": "polygrad", "paper": "polygrad-paper"}
"""Names of the measured settings and of their files in hyperparams/."""
PARTS = {
    "env": "step",
    "act": "_act",
    "store": "_store_steps",
    "fit": "_fit_world_model",
    "imagine": "_imagine_to_learn",
    "learn": "_learn_from",
}
"""Parts of the loop and the methods that do them: the environment's first, the rest of :class:`PolyGRAD`."""
EMPTY: dict[str, Any] = {
    **{"n_imagined": 2, "batch_size": 2, "world_model_kwargs": {"width": 8}},
    "policy_kwargs": {"net_arch": [8, 8]},
}
"""The same operations with next to no data in them: what is left of the time is Python, dispatch and the environment."""
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "activations and norms": ("elu", "layer_norm", "relu", "threshold", "clamp_min", "tanh", "silu", "gelu"),
    "optimiser": ("_fused_adam", "Optimizer.", "lerp", "linalg_vector_norm"),
}
"""Kinds of operations by parts of their names; the first that fits counts."""


def ready(name: str, args: argparse.Namespace, **overrides: Any) -> PolyGRAD:
    """
    A PolyGRAD that has learnt from a few real steps.

    :param name: of the settings
    :param args: of the command line
    :param overrides: constructor arguments that win
    """
    kwargs = load_hyperparams(SETTINGS[name], args.env) | args.kwargs | overrides
    brief = {"n_steps": 200, "learning_starts": 200, "policy_learning_starts": 0, "gradient_steps": 1}
    model = PolyGRAD("MlpPolicy", args.env, seed=0, device=args.device, **kwargs | brief)
    return model.learn(400)


def part(function: Callable[[], object], rows: int, width: int, dtype: str, device: str) -> dict[str, Any]:
    """
    :param function: does it
    :param rows: what the network sees at once
    :param width: of the network
    :param dtype: precision of its products
    :param device: where
    :return: seconds, FLOPs and rates
    """
    kind: th.dtype = getattr(th, dtype)
    before = gemm_rate(rows, width, kind, device)
    time_taken = seconds(function)
    gemm = (before + gemm_rate(rows, width, kind, device)) / 2.0
    work = flops(function)
    rate = work / time_taken
    return {
        "seconds": time_taken,
        "gflops": work / 1e9,
        "rate": rate / 1e9,
        "gemm_rate": gemm / 1e9,
        "share": rate / gemm,
    }


def parts(name: str, dtype: str, args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """A row for every part under one of the :data:`SETTINGS`; in bfloat16 there is imagining alone."""
    overrides: dict[str, Any] = {"n_imagined": args.paper_batch} if name == "paper" else {}
    if dtype != "float32":
        own = load_hyperparams(SETTINGS[name], args.env).get("world_model_kwargs", {})
        overrides["world_model_kwargs"] = own | {"dtype": dtype}
    model = ready(name, args, **overrides)
    world_model, n, horizon = model.world_model, model.n_imagined, model.horizon
    assert isinstance(world_model, DiffusionWorldModel)
    width = next(parameter.shape[0] for parameter in world_model.denoiser.parameters() if parameter.dim() == 2)
    labels = {"setting": name, "dtype": dtype, "batch": n, "horizon": horizon, "width": width}
    yield {"part": "imagine", **labels, **part(lambda: model.imagine(n), n, width, dtype, args.device)}
    if dtype != "float32":
        return

    def fit() -> None:
        world_model.train()
        world_model.fit(model.replay_buffer.sample(model.batch_size))

    rows = model.batch_size
    yield {"part": "fit", **labels, "batch": rows, **part(fit, rows, width, dtype, args.device)}
    # Of a batch that was just imagined, since there is no going back through the same one twice: not to be added to "imagine".
    update = lambda: model._learn_from(model._imagine_to_learn())  # noqa: E731
    yield {"part": "learn", **labels, **part(update, n, width, dtype, args.device)}


def hours_per_million(rows: Iterable[Mapping[str, Any]], args: argparse.Namespace) -> dict[str, float]:
    """Hours that the parts of a million real steps take, without the environment's own."""
    hours = {}
    for name in args.settings:
        spent = {row["part"]: row["seconds"] for row in rows if row["setting"] == name and row["dtype"] == "float32"}
        model = PolyGRAD(
            "MlpPolicy", args.env, _init_setup_model=False, **load_hyperparams(SETTINGS[name], args.env) | args.kwargs
        )
        per_update = spent["learn"] + spent["fit"] * model._gradient_steps_per_update
        hours[name] = per_update * 1e6 / model.n_steps / 3600.0
    return hours


def growth(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds to imagine, against horizon and batch, for both samplers at the default sizes."""
    rows = []
    space = PolyGRAD("MlpPolicy", args.env, _init_setup_model=False)
    obs_dim, box = space.observation_space.shape[0], space.action_space  # type: ignore[index]
    policy = some_policy(obs_dim, box.shape[0], args.device)  # type: ignore[index]
    low, high = (th.as_tensor(bound) for bound in (box.low, box.high))  # type: ignore[attr-defined]
    for sampler in ("staggered", "policy_guided"):
        for horizon in args.horizons:
            model = prepare(build_diffusion(obs_dim, low, high, horizon, sampler=sampler), args.device)
            for batch in args.batches:
                start = th.randn(batch, obs_dim, device=args.device)
                spent = seconds(lambda m=model, s=start: m.imagine(s, policy), min_run_time=0.2)  # type: ignore[misc]
                rows.append({"sampler": sampler, "horizon": horizon, "batch": batch, "seconds": spent})
                print({key: readable(value) for key, value in rows[-1].items()}, flush=True)
    return rows


def running(args: argparse.Namespace, **overrides: Any) -> PolyGRAD:
    """A default PolyGRAD past its random steps."""
    kwargs = load_hyperparams("polygrad", args.env) | args.kwargs | overrides
    model = PolyGRAD("MlpPolicy", args.env, seed=0, device=args.device, **kwargs)
    return model.learn(model.learning_starts + 2 * model.n_steps)


def loop(args: argparse.Namespace, **overrides: Any) -> dict[str, Any]:
    """Real steps per second of the whole loop, and milliseconds per real step of its parts, on the clock and the processor."""
    model = running(args, **overrides)
    spent: dict[str, float] = defaultdict(float)

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                spent[name] += time.perf_counter() - begin

        return call

    for name, method in PARTS.items():
        owner = model.env if name == "env" else model
        setattr(owner, method, watched(name, getattr(owner, method)))
    clock, processor = time.perf_counter(), time.process_time()
    model.learn(args.steps, reset_num_timesteps=False)
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    spent["rest"] = clock - sum(spent.values())
    return {
        "steps": args.steps,
        "steps_per_second": args.steps / clock,
        "processor_milliseconds_per_step": 1e3 * processor / args.steps,
        "milliseconds_per_step": {name: 1e3 * value / args.steps for name, value in spent.items()},
    }


def kinds(args: argparse.Namespace) -> dict[str, float]:
    """Shares of the loop's time by kind of operation; what no operation accounts for is Python and the environment."""
    model = running(args)
    spent: dict[str, float] = defaultdict(float)
    begin = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        model.learn(args.profiled_steps, reset_num_timesteps=False)
        total = (time.perf_counter() - begin) * 1e6
    for event in profiler.key_averages():
        kind = next((kind for kind, names in KINDS.items() if any(n in event.key for n in names)), "other operations")
        spent[kind] += event.self_cpu_time_total
    spent["Python, environment"] = total - sum(spent.values())
    return {kind: value / total for kind, value in sorted(spent.items(), key=lambda item: -item[1])}


def compiled(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """
    What ``torch.compile`` would bring: loss and gradient of one minibatch as they are and compiled, for the denoiser and for
    actor and critic together, and the seconds that compiling takes. Empty where the machine cannot compile.
    """
    model = running(args)
    model._learn_from(model._imagine_to_learn())
    minibatch = next(model.rollout_buffer.get(model.n_imagined * model.horizon // model.n_minibatches))
    states = th.randn(model.batch_size, 2, model.world_model.obs_dim + 2, device=args.device)
    actions = th.randn(model.batch_size, 1, model.world_model.action_dim, device=args.device)
    level = th.ones(model.batch_size, 1, device=args.device)
    assert isinstance(model.world_model, DiffusionWorldModel)
    denoiser = model.world_model.denoiser

    def denoise() -> th.Tensor:
        return denoiser(states, actions, level).square().mean()

    def evaluate() -> th.Tensor:
        values, log_prob, _ = model.policy.evaluate_actions(minibatch.observations, minibatch.actions)
        return values.square().mean() + log_prob.mean()

    ratios = {}
    for name, function in {"denoiser": denoise, "actor and critic": evaluate}.items():
        fast, begin = th.compile(function), time.perf_counter()
        try:
            fast().backward()
        except Exception as error:  # no compiler, mostly; whatever it is, there is nothing to measure
            print(f"torch.compile failed: {error}")
            return {}
        took = time.perf_counter() - begin
        plain = seconds(lambda f=function: f().backward())  # type: ignore[misc]
        ratios[name] = {
            "seconds": plain,
            "compiled_seconds": seconds(lambda f=fast: f().backward()),  # type: ignore[misc]
            "compiling": took,
        }
    return ratios


def peak_memory(device: str) -> dict[str, float]:
    """Most memory that the process, and it on the device, ever held, in GiB."""
    memory = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if device != "cpu":
        memory["device"] = th.cuda.max_memory_allocated() / 2**30
    return memory


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a markdown table."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([str(readable(row.get(c, ""))) for c in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Hopper-v5")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--paper-batch", type=at_least_one, default=256, help="trajectories of the paper, 1024 there")
    parser.add_argument("--steps", type=int, default=1_000, help="real steps of the whole loop; 0 leaves it out")
    parser.add_argument("--profiled-steps", type=int, default=100, help="of the loop under the profiler; 0 leaves it out")
    parser.add_argument(
        "--horizons", type=at_least_one, nargs="*", default=[10, 50, 200], help="for the growth; none: left out"
    )
    parser.add_argument("--batches", type=at_least_one, nargs="*", default=[256, 1024], help="for the growth")
    parser.add_argument("--compile", action="store_true", help="measure what torch.compile would bring, too")
    parser.add_argument("--kwargs", type=constructor_arguments, default={}, help="further constructor arguments as json")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=at_least_one, help="torch threads; as torch has it if not given")
    parser.add_argument("--out", type=Path, required=True, help="path of the results, without suffix")
    args = parser.parse_args()
    if args.threads is not None:
        th.set_num_threads(args.threads)

    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {"device": args.device, "threads": th.get_num_threads()}
    if args.device != "cpu":
        facts["device_name"] = th.cuda.get_device_name()

    def note(**more: Any) -> None:
        """After every part, so that a run cut short leaves what it has measured."""
        facts.update(more)
        write_csv(beside(args.out, ".csv"), rows)
        write_json(beside(args.out, ".json"), provenance("sb3_polygrad.benchmark.speed", **facts))

    for name, dtype in itertools.product(args.settings, args.dtypes):
        for row in parts(name, dtype, args):
            rows.append(row)
            print({key: readable(value) for key, value in row.items()}, flush=True)
            note()
    note(hours_per_million_steps=hours_per_million(rows, args))
    if args.steps:
        note(loop=loop(args), loop_without_arithmetic=loop(args, **EMPTY))
    if args.profiled_steps and args.device == "cpu":
        note(kinds=kinds(args))
    if args.compile:
        note(compiled=compiled(args))
    note(growth=growth(args), peak_memory_gib=peak_memory(args.device))
    print(table(rows))
    for key in ("hours_per_million_steps", "loop", "loop_without_arithmetic", "kinds", "compiled", "peak_memory_gib"):
        print(key, facts.get(key))


if __name__ == "__main__":
    main()
