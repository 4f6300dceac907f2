"""
One loop for all studies: for every dataset, model, seed, variant and standard deviation σ of the policy a world model is
fitted (or loaded), imagines from held-out states, and is measured.

    python -m sb3_polygrad.study errors_h10 --out errors.csv

The first argument is a YAML file, or the name of one in ``sb3_polygrad/study/configs``; its keys are the fields of
:class:`Study`. The table has the columns env, model, variant, sigma, seed, step, measure, value (see
:mod:`sb3_polygrad.study.measures`). It is written after every cell (env, model, variant, sigma, seed), and the cells in it are
skipped: the same command resumes. ``<out>.json`` has the study, the command, versions and seconds; the folder ``<out>_fits``
the fitted models.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch as th
import yaml

from sb3_polygrad.benchmark.provenance import provenance, write_json
from sb3_polygrad.checkpoint.files import whole_file
from sb3_polygrad.episode_buffer import EpisodeBuffer
from sb3_polygrad.study import datasets
from sb3_polygrad.study.measures import MEASURES, Batch, Rows
from sb3_polygrad.study.simulator import Simulator
from sb3_polygrad.world_models.base import WorldModel
from sb3_polygrad.world_models.make import make_world_model

CONFIGS = Path(__file__).parent / "configs"
CELL = ["env", "model", "variant", "sigma", "seed"]
SAMPLER = "sampler."  # the part of a world model that is not fitted


@dataclass(frozen=True)
class Setting:
    """
    One model in one variant.

    :param world_model: its name; the name of the model in the study if not given
    :param world_model_kwargs: what it is fitted with
    :param imagine_with: overrides of ``world_model_kwargs`` that only matter for imagining: the same fitted model is used
    :param horizon: steps that are imagined
    :param fit_horizon: the horizon of the model that is fitted, for models that imagine step by step; ``horizon`` if not given
    :param n_fits: gradient steps
    :param batch_size: segments per gradient step
    :param n_adapts: imagined batches that the model adapts to the policy with before it is measured (δ, Eq. 10)
    """

    world_model: str
    world_model_kwargs: dict[str, Any] = field(default_factory=dict)
    imagine_with: dict[str, Any] = field(default_factory=dict)
    horizon: int = 10
    fit_horizon: int | None = None
    n_fits: int = 5_000
    batch_size: int = 256
    n_adapts: int = 8


@dataclass(frozen=True)
class Study:
    """
    What a YAML file says.

    :param datasets: ids of Minari datasets, each of another environment, see :mod:`sb3_polygrad.study.datasets`
    :param models: settings by name of the model, see :class:`Setting`
    :param measures: names of :data:`~sb3_polygrad.study.measures.MEASURES`
    :param variants: overrides of the settings by name of the variant
    :param defaults: settings of all models
    :param sigmas: standard deviations of the policy, in the environment's units
    :param seeds: of the fit and of what is imagined
    :param n_trajectories: imagined per cell
    :param held_out: share of the episodes that the trajectories begin in
    """

    datasets: list[str]
    models: dict[str, dict[str, Any]]
    measures: list[str]
    variants: dict[str, dict[str, Any]] = field(default_factory=lambda: {"default": {}})
    defaults: dict[str, Any] = field(default_factory=dict)
    sigmas: list[float] = field(default_factory=lambda: [0.5])
    seeds: list[int] = field(default_factory=lambda: [0])
    n_trajectories: int = 500
    held_out: float = 0.1

    def setting(self, model: str, variant: str) -> Setting:
        """The settings of a model in a variant."""
        given = merged(merged({"world_model": model} | self.defaults, self.models[model] or {}), self.variants[variant] or {})
        return _checked(Setting, given, f"{model}, {variant}")


def merged(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with overrides; mappings within both are merged in turn."""
    both = {k: merged(settings[k], v) for k, v in overrides.items() if isinstance(v, dict) and k in settings}
    return {**settings, **overrides, **both}


def _checked(kind: type[Any], given: Mapping[str, Any], where: str) -> Any:
    known = [known.name for known in fields(kind)]
    if set(given) - set(known):
        raise ValueError(f"{where}: unknown {sorted(set(given) - set(known))}, known are {known}")
    return kind(**given)


def read(path: Path) -> Study:
    """The study of a YAML file; fields and measures that do not exist are refused."""
    study: Study = _checked(Study, yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    if set(study.measures) - set(MEASURES):
        raise ValueError(f"{path}: unknown measures in {study.measures}, known are {list(MEASURES)}")
    for model, variant in itertools.product(study.models, study.variants):
        study.setting(model, variant)
    return study


def fitted(setting: Setting, data: EpisodeBuffer, simulator: Simulator, seed: int, path: Path) -> tuple[WorldModel, Rows]:
    """A model that is ready to imagine, fitted to the data or loaded from ``path``, and what fitting it cost."""

    def build(kwargs: dict[str, Any], horizon: int) -> WorldModel:
        th.manual_seed(seed)
        box = simulator.action_low, simulator.action_high
        return make_world_model(setting.world_model, data.obs_dim, *box, horizon, kwargs)

    if not path.exists():
        model = build(setting.world_model_kwargs, setting.fit_horizon or setting.horizon)
        model.observe(data.segments(th.arange(len(data)), 1))
        begin = time.perf_counter(), time.process_time()
        losses = [model.fit(data.sample(setting.batch_size, model.window))["loss"] for _ in range(setting.n_fits)]
        costs = {"fit_seconds": time.perf_counter() - begin[0], "fit_cpu_seconds": time.process_time() - begin[1]}
        costs["fit_loss"] = float(th.stack(losses[-max(1, len(losses) // 10) :]).mean())
        with whole_file(path) as file:
            th.save({"model": model.state_dict(), "costs": costs}, file)
    stored = th.load(path, weights_only=True)
    model = build(merged(setting.world_model_kwargs, setting.imagine_with), setting.horizon)
    state = {name: value for name, value in model.state_dict().items() if name.startswith(SAMPLER)}
    state |= {name: value for name, value in stored["model"].items() if not name.startswith(SAMPLER)}
    model.load_state_dict(state)
    return model.eval(), [(0, name, value) for name, value in stored["costs"].items()]


def cells(study: Study, dataset: Any, fits: Path, done: set[tuple[Any, ...]]) -> Iterator[tuple[tuple[Any, ...], Rows]]:
    """Every cell of one dataset that is not done, and its rows; ``fits`` is the folder of fitted models."""
    env_id = dataset.env_spec.id
    every = itertools.product(study.models, study.seeds, study.variants, study.sigmas)
    todo = [cell for cell in every if (env_id, cell[0], cell[2], cell[3], cell[1]) not in done]
    if not todo:
        return
    fit_data, held_out = datasets.split(dataset, study.held_out)
    simulator, agent, buffer = Simulator(env_id), datasets.load_agent(dataset), datasets.to_buffer(fit_data)
    scale = buffer.observations.std(dim=0) + 1e-8, buffer.rewards.std() + 1e-8
    starts = datasets.draw_starts(held_out, study.n_trajectories, seed=0)
    for name, seed, variant, sigma in todo:
        setting = study.setting(name, variant)
        fit = asdict(setting) | {"horizon": setting.fit_horizon or setting.horizon}
        fit = {key: value for key, value in fit.items() if key not in ("fit_horizon", "imagine_with", "n_adapts")}
        digest = hashlib.sha256(json.dumps([dataset.spec.dataset_id, study.held_out, fit]).encode()).hexdigest()[:10]
        model, rows = fitted(setting, buffer, simulator, seed, fits / f"{env_id}_{name}_{seed}_{digest}.pt")
        policy = datasets.policy_with_std(agent, sigma, simulator.action_low, simulator.action_high)
        th.manual_seed(seed)
        metrics: dict[str, th.Tensor] = {}
        for _ in range(setting.n_adapts):
            metrics = model.adapt(model.imagine(starts.observations[:200], policy), policy)
            if not metrics:  # there is nothing to adapt
                break
        rows += [(0, key, float(value)) for key, value in metrics.items() if key.startswith("delta")]
        batch = Batch(model, policy, starts, model.imagine(starts.observations, policy), simulator, *scale)
        rows += [row for measure in study.measures for row in MEASURES[measure](batch)]
        yield (env_id, name, variant, sigma, seed), rows


def run(study: Study, out: Path, **facts: Any) -> pd.DataFrame:
    """
    Do what is left of a study, and return its table.

    :param out: csv file, with what was done before
    :param facts: what else belongs into the json file beside it
    :raises ValueError: if the table was made by another study (only seeds and sigmas may change), or datasets share an env
    """
    table, before = pd.DataFrame(columns=[*CELL, "step", "measure", "value"]), {"seconds": 0.0}
    if out.exists():
        table, before = pd.read_csv(out), json.loads(out.with_suffix(".json").read_text())
        now = json.loads(json.dumps(asdict(study)))
        changed = [name for name in now if name not in ("seeds", "sigmas") and now[name] != before["study"][name]]
        if changed:
            raise ValueError(f"{out} was made with other {changed}: choose another --out")
    fits = out.with_name(f"{out.stem}_fits")
    fits.mkdir(parents=True, exist_ok=True)
    done, begin = set(table[CELL].itertuples(index=False, name=None)), time.perf_counter()
    sources = {dataset.env_spec.id: dataset for dataset in map(datasets.load, study.datasets)}
    if len(sources) < len(study.datasets):
        raise ValueError(f"datasets {study.datasets} must be of different environments: make a study of each")
    for cell, rows in itertools.chain.from_iterable(cells(study, source, fits, done) for source in sources.values()):
        new = pd.DataFrame([(*cell, *row) for row in rows], columns=table.columns)
        table = pd.concat([table, new], ignore_index=True) if len(table) else new
        seconds = round(before["seconds"] + time.perf_counter() - begin, 1)
        write_json(out.with_suffix(".json"), provenance("sb3_polygrad.study", study=asdict(study), seconds=seconds, **facts))
        with whole_file(out) as file:
            file.write(table.to_csv(index=False, float_format="%.6g").encode())
        print(*cell, f"{seconds} s", flush=True)
    return table


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.stem for path in CONFIGS.glob("*.yml"))
    parser.add_argument("config", type=Path, help=f"YAML file, or one of {names}")
    parser.add_argument("--out", type=Path, required=True, help="csv file to write or to complete")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args()
    th.set_num_threads(args.threads)
    path = args.config if args.config.exists() else CONFIGS / f"{args.config}.yml"
    run(read(path), args.out, threads=args.threads)
