"""Names and plain mappings, as they stand in YAML, to world models. Used once, by :class:`~sb3_polygrad.PolyGRAD`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch as th

from sb3_polygrad.core.arguments import check_types, choose
from sb3_polygrad.core.controllers import DeltaController
from sb3_polygrad.denoisers.base import Denoiser
from sb3_polygrad.denoisers.markov_mlp import MarkovMLP
from sb3_polygrad.denoisers.residual_mlp import ResidualMLP
from sb3_polygrad.denoisers.transformer import Transformer
from sb3_polygrad.diffusion.base import Sampler
from sb3_polygrad.diffusion.gaussian import GaussianDiffusion, Prediction
from sb3_polygrad.diffusion.guidance import (
    Guidance,
    NoisyStatesGuidance,
    PolicySampling,
    PolicyScoreGuidance,
    RandomActions,
    StateUpdateGuidance,
)
from sb3_polygrad.diffusion.sampler import PolicyGuidedSampler
from sb3_polygrad.diffusion.schedules import cosine_schedule
from sb3_polygrad.diffusion.staggered import StaggeredSampler
from sb3_polygrad.world_models import autoregressive_diffusion, ensemble, rssm, transformer
from sb3_polygrad.world_models.base import WorldModel
from sb3_polygrad.world_models.diffusion import DiffusionWorldModel
from sb3_polygrad.world_models.standardized import FitSettings, check_sizes


def paper_width(denoiser: str, horizon: int) -> int:
    """
    Width that the paper's tables give a network: Table 3 for the transformer, Table 2 for MLPs.

    :param denoiser: its name
    :param horizon: steps per trajectory
    """
    if denoiser == "transformer":
        return 312
    return 1024 if horizon <= 10 else 2048


def build_guidance(
    name: str, half_range: th.Tensor, delta: float = 0.02, delta_lr: float = 0.1, clip_std: float | None = 3.0
) -> Guidance:
    """
    A rule by which actions follow the policy; see :mod:`sb3_polygrad.diffusion.guidance` and :func:`build_diffusion`.

    :param name: of the rule
    :param half_range: ``(action_dim,)`` half the width of the action box
    :param delta: start value of δ
    :param delta_lr: η of Eq. 10
    :param clip_std: bound on the standardised actions
    """
    choose("world_model_kwargs['guidance']", name, GUIDANCES)
    rule = GUIDANCES[name]
    if issubclass(rule, PolicyScoreGuidance):
        return rule(DeltaController(delta, delta_lr), half_range, clip_std)
    return rule()


GUIDANCES: dict[str, type[PolicyScoreGuidance] | type[RandomActions]] = {
    "policy_score": PolicyScoreGuidance,
    "noisy_states": NoisyStatesGuidance,
    "state_update": StateUpdateGuidance,
    "policy_sampling": PolicySampling,
    "random_actions": RandomActions,
}
"""Rules by name: the paper's, and its ablations (Appendix C.3)."""


def build_diffusion(
    obs_dim: int,
    action_low: th.Tensor,
    action_high: th.Tensor,
    horizon: int,
    *,
    denoiser: str | None = None,
    width: int | None = 256,
    n_layers: int = 4,
    n_heads: int = 4,
    sampler: str = "staggered",
    n_levels: int = 1,
    lag: float | None = None,
    n_diffusion_steps: int = 32,
    noise_tau: float = 1.0,
    prediction: Prediction = "x0",
    guidance: str = "policy_score",
    delta: float = 0.02,
    delta_lr: float = 0.1,
    clip_std: float | None = 3.0,
    final_clip: float | None = None,
    learning_rate: float = 1e-3,
    max_grad_norm: float = 1.0,
    ema_decay: float = 0.99,
    ema_every: int = 1,
    weight_decay: float = 0.0,
    dtype: str = "float32",
) -> DiffusionWorldModel:
    """
    A :class:`DiffusionWorldModel` from plain settings; the keyword arguments are the ``world_model_kwargs`` of PolyGRAD.

    :param obs_dim: length of an observation
    :param action_low: lower bounds of the action box
    :param action_high: upper bounds of the action box
    :param horizon: steps per trajectory
    :param denoiser: network, ``"markov_mlp"``, ``"residual_mlp"`` (Table 2) or ``"transformer"`` (Table 3); by default the
        first for the staggered sampler and the second for the policy-guided one
    :param width: width of the network; None for the paper's, by denoiser and horizon (Tables 2 and 3)
    :param n_layers: number of its blocks (Tables 2 and 3: 6)
    :param n_heads: attention heads of the transformer (Table 3: 4)
    :param sampler: ``"policy_guided"`` (the paper's) or ``"staggered"``
    :param n_levels: K of the staggered sampler, iterations that a state takes from noise to clean
    :param lag: L of the staggered sampler, iterations by which a state is behind its predecessor; by default K for
        ``"markov_mlp"``, which wants the state before clean, and 1 for networks that see all of the trajectory
    :param n_diffusion_steps: N (Table 4: 128)
    :param noise_tau: τ of the cosine schedule (Table 4: 1; 0.1 for Hopper)
    :param prediction: ``"x0"`` as the released runs, or ``"epsilon"`` as the paper writes it
    :param guidance: how actions follow the policy: ``"policy_score"`` (the paper's) or one of its ablations,
        ``"noisy_states"``, ``"state_update"``, ``"policy_sampling"``, ``"random_actions"``
    :param delta: start value of the action update scale δ, in squared half-ranges of the action box
    :param delta_lr: η of Eq. 10, on log δ
    :param clip_std: actions are clipped to this many policy standard deviations (3 in the paper); None for no clipping
    :param final_clip: bound on the change of the states over the last ten diffusion steps (0.25 in the release)
    :param learning_rate: of the denoiser (Table 2: 3e-4)
    :param max_grad_norm: bound on its gradient
    :param ema_decay: of the average of the weights that imagines
    :param ema_every: gradient steps between updates of that average
    :param weight_decay: of the matrices of the denoiser's layers but the last, as AdamW has it
    :param dtype: ``"bfloat16"`` imagines with the large matrix products in half the precision, for wide networks on processors
        and GPUs that have it; fitting, and imagining with gradients (``policy_update="pathwise"``), is in float32 all the same
    """
    choose("world_model_kwargs['sampler']", sampler, SETTINGS_OF["sampler"])
    if denoiser is None:
        denoiser = DENOISER_FOR[sampler]
    choose("world_model_kwargs['denoiser']", denoiser, SETTINGS_OF["denoiser"])
    choose("world_model_kwargs['dtype']", dtype, ("float32", "bfloat16"))
    if lag is None:
        lag = float(n_levels) if denoiser == "markov_mlp" else 1.0
    network_width = paper_width(denoiser, horizon) if width is None else width
    check_sizes(width=network_width, n_layers=n_layers)
    channels, action_dim = obs_dim + 2, len(action_low)
    n_level_inputs = horizon if sampler == "staggered" else 1
    networks: dict[str, Callable[[], Denoiser]] = {
        "residual_mlp": lambda: ResidualMLP(horizon, channels, action_dim, n_level_inputs, network_width, n_layers),
        "markov_mlp": lambda: MarkovMLP(obs_dim, action_dim, network_width, n_layers),
        "transformer": lambda: Transformer(horizon, channels, action_dim, network_width, n_layers, n_heads),
    }

    def policy_guided() -> Sampler:
        follow = build_guidance(guidance, (action_high - action_low) / 2, delta, delta_lr, clip_std)
        process = GaussianDiffusion(cosine_schedule(n_diffusion_steps, noise_tau), prediction)
        return PolicyGuidedSampler(process, follow, final_clip)

    samplers: dict[str, Callable[[], Sampler]] = {
        "policy_guided": policy_guided,
        "staggered": lambda: StaggeredSampler(horizon, n_levels, lag),
    }
    network = networks[denoiser]()
    return DiffusionWorldModel(
        obs_dim,
        action_low,
        action_high,
        horizon,
        denoiser=network,
        sampler=samplers[sampler](),
        fit_settings=FitSettings(learning_rate, max_grad_norm, ema_decay, ema_every, weight_decay),
        # Where the state before is clean whenever it is looked at, single steps are all there is to learn from.
        window=1 if network.markov and sampler == "staggered" and lag >= n_levels else None,
        dtype=getattr(th, dtype),
    )


DENOISER_FOR = {"staggered": "markov_mlp", "policy_guided": "residual_mlp"}
"""What a sampler is given if no denoiser is asked for. Policy-guided diffusion needs one that sees the whole trajectory."""

SETTINGS_OF: dict[str, dict[str, set[str]]] = {
    "denoiser": {"markov_mlp": set(), "residual_mlp": set(), "transformer": {"n_heads"}},
    "sampler": {
        "staggered": {"n_levels", "lag"},
        "policy_guided": {
            *("n_diffusion_steps", "noise_tau", "prediction", "guidance"),
            *("delta", "delta_lr", "clip_std", "final_clip"),
        },
    },
    "guidance": {
        name: {"delta", "delta_lr", "clip_std"} if issubclass(rule, PolicyScoreGuidance) else set()
        for name, rule in GUIDANCES.items()
    },
}
"""For each choice in :func:`build_diffusion` and each of its options: the settings that it alone has a use for."""


def _warn_of_unused(kwargs: Mapping[str, Any]) -> None:
    """Say which of the given settings belong to an option that was not chosen."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(build_diffusion).parameters.items()}
    choices = {choice: kwargs.get(choice, defaults[choice]) for choice in SETTINGS_OF}
    choices["denoiser"] = choices["denoiser"] or DENOISER_FOR.get(choices["sampler"])
    for choice, options in SETTINGS_OF.items():
        chosen = choices[choice]
        foreign = set().union(*(names for option, names in options.items() if option != chosen)) - options.get(chosen, set())
        unused = sorted(foreign & set(kwargs))
        if unused:
            warnings.warn(
                f"world_model_kwargs: {', '.join(unused)} belong to another {choice} than {chosen!r} and have no effect"
            )


BUILDERS: dict[str, Callable[..., WorldModel]] = {
    "diffusion": build_diffusion,
    "ensemble": ensemble.build_ensemble,
    "transformer": transformer.build_transformer,
    "autoregressive_diffusion": autoregressive_diffusion.build_autoregressive_diffusion,
    "rssm": rssm.build_rssm,
}
"""World models by name. Each builder takes obs_dim, action_low, action_high, horizon and its own keyword arguments."""

PAPER_SIZES: dict[str, Mapping[str, Any]] = {
    "ensemble": ensemble.PAPER_SIZE,
    "transformer": transformer.PAPER_SIZE,
    "autoregressive_diffusion": autoregressive_diffusion.PAPER_SIZE,
    "rssm": rssm.PAPER_SIZE,
}
"""The settings that ``size: paper`` stands for. (Those of the paper's own model are in ``hyperparams/polygrad-paper.yml``.)"""


def _with_size(world_model: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with ``size`` replaced by what it stands for; what is given beside it wins."""
    given = dict(kwargs)
    if choose("world_model_kwargs['size']", given.pop("size", "default"), ("default", "paper")) == "default":
        return given
    if world_model not in PAPER_SIZES:
        raise ValueError(
            f"world_model_kwargs: size='paper' is not for world_model={world_model!r}, but for "
            f"{', '.join(map(repr, PAPER_SIZES))}: load_hyperparams('polygrad-paper', ...) has the paper's settings"
        )
    return {**PAPER_SIZES[world_model], **given}


def find_builder(
    world_model: str | Callable[..., WorldModel], kwargs: Mapping[str, Any]
) -> tuple[Callable[..., WorldModel], dict[str, Any]]:
    """
    :param world_model: a name, or a class or function with the signature of the builders
    :param kwargs: its settings; with a name also ``size``, ``"default"`` or ``"paper"`` (Appendix C.2)
    :return: the builder, and the settings with what ``size`` stands for in its place
    :raises ValueError: for an unknown name, naming the nearest known one
    """
    if not isinstance(world_model, str):
        return world_model, dict(kwargs)
    return BUILDERS[choose("world_model", world_model, BUILDERS)], _with_size(world_model, kwargs)


def build_world_model(
    world_model: str | Callable[..., WorldModel],
    obs_dim: int,
    action_low: th.Tensor,
    action_high: th.Tensor,
    horizon: int,
    kwargs: Mapping[str, Any],
) -> WorldModel:
    """
    :param world_model: a name, or a class or function with the signature of the builders
    :param kwargs: its settings; with a name also ``size``, ``"default"`` or ``"paper"`` (Appendix C.2)
    :raises ValueError: for an unknown name or setting, naming the nearest known one
    :raises TypeError: for a setting of another type than the builder's annotation
    """
    builder, kwargs = find_builder(world_model, kwargs)
    parameters = inspect.signature(builder).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        known = set(parameters) - {"obs_dim", "action_low", "action_high", "horizon"}
        for name in kwargs:
            choose("world_model_kwargs", name, known)
    check_types("world_model_kwargs", builder, kwargs)
    if builder is build_diffusion:
        _warn_of_unused(kwargs)
    return builder(obs_dim, action_low, action_high, horizon, **kwargs)
