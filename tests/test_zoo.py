"""The zoo's side: import hook, configuration files, search space. (tests/test_zoo_install.py runs the zoo's own commands.)"""

import argparse
import inspect
import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import pytest
from stable_baselines3 import A2C, PPO, SAC

from sb3_polygrad import PolyGRAD, zoo
from sb3_polygrad.diffusion.residual_mlp import ResidualMLP
from sb3_polygrad.hyperparams_loader import HYPERPARAMS, ZOO_ONLY, load_hyperparams
from sb3_polygrad.updates import A2CUpdate

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parent.parent

V5 = ("InvertedPendulum", "InvertedDoublePendulum", "Reacher", "Swimmer", "Hopper", "Walker2d", "HalfCheetah", "Ant")
ENVS = (*(f"{name}-v5" for name in V5), "Pendulum-v1")


# ---------------------------------------------------------------------- import hook, with stand-ins for both packages


@pytest.fixture
def run(tmp_path):
    """Runs code beside a stand-in for rl_zoo3 and one for sb3_polygrad, whose zoo.complete() only leaves a mark."""
    files = {
        "rl_zoo3/__init__.py": "import rl_zoo3.utils",
        "rl_zoo3/utils.py": "ALGOS = {}",
        "rl_zoo3/hyperparams_opt.py": "TABLE = {}",
        "rl_zoo3/exp_manager.py": "import rl_zoo3.hyperparams_opt",
        "rl_zoo3/train.py": "import rl_zoo3.exp_manager",
        "sb3_polygrad/__init__.py": "import _sb3_polygrad_zoo_hook; _sb3_polygrad_zoo_hook.install()",
        "sb3_polygrad/zoo.py": "def complete(module): module.completed = len(vars(module)) and module.__name__",
        "_sb3_polygrad_zoo_hook.py": (ROOT / "_sb3_polygrad_zoo_hook.py").read_text(),
    }

    def run(code: str, replace: dict[str, str] | None = None, **environment: str) -> str:
        for name, text in {**files, **(replace or {})}.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        env = {**os.environ, "SB3_POLYGRAD_NO_ZOO": "", **environment}
        done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return run


INSTALL = "import sys, _sb3_polygrad_zoo_hook as hook; hook.install(); "
COMPLETED = "print(sorted(n for n, m in sys.modules.items() if n.startswith('rl_zoo3') and hasattr(m, 'completed')))"
ALL = "['rl_zoo3.exp_manager', 'rl_zoo3.hyperparams_opt', 'rl_zoo3.utils']\n"


def test_modules_of_the_zoo_are_completed_when_imported(run):
    assert run(INSTALL + "import rl_zoo3.train; " + COMPLETED) == ALL
    assert run(INSTALL + "import rl_zoo3; " + COMPLETED) == "['rl_zoo3.utils']\n"


def test_modules_imported_before_are_completed_too(run):
    assert run("import sys, rl_zoo3.train, sb3_polygrad; " + COMPLETED) == ALL


def test_nothing_is_imported_before_the_zoo_is(run):
    assert run(INSTALL + "import json; print([n for n in sys.modules if n in ('sb3_polygrad', 'rl_zoo3')])") == "[]\n"


def test_reloading_completes_again(run):
    code = "import importlib, rl_zoo3.utils as u; del u.completed; importlib.reload(u); print(u.completed)"
    assert run(INSTALL + code) == "rl_zoo3.utils\n"


def test_the_loader_stays_the_same_kind(run):
    code = "import rl_zoo3.utils as u; print(type(u.__loader__).__name__, u.__loader__.get_source('rl_zoo3.utils'))"
    assert run(INSTALL + code) == "SourceFileLoader ALGOS = {}\n"


def test_two_hooks_of_this_kind_do_not_ask_each_other_for_ever(run):
    second = {"other_hook.py": (ROOT / "_sb3_polygrad_zoo_hook.py").read_text()}
    assert run(INSTALL + "import other_hook; other_hook.install(); import rl_zoo3.train; " + COMPLETED, second) == ALL


def test_opting_out(run):
    assert run(INSTALL + "import rl_zoo3.train; " + COMPLETED, SB3_POLYGRAD_NO_ZOO="1") == "[]\n"


@pytest.mark.parametrize("broken", ["raise RuntimeError('no luck')", "def ("])
def test_a_broken_package_is_told_once_and_leaves_the_zoo_working(run, broken):
    output = run(INSTALL + "import rl_zoo3.train; " + COMPLETED, {"sb3_polygrad/__init__.py": broken})
    assert output.startswith("[]\n")
    assert output.count("could not be added to rl_zoo3") == 1
    assert "no luck" in output or "SyntaxError" in output


# ---------------------------------------------------------------------- configuration files


def entries_of(name):
    return yaml.safe_load((HYPERPARAMS / f"{name}.yml").read_text())


@pytest.mark.parametrize("name", ["ppo", "trpo", "a2c", "sac", "crossq"])
def test_every_file_of_a_baseline_has_a_default_and_the_present_environments(name):
    entries = entries_of(name)
    assert set(entries) == {"default", *ENVS}
    assert all(entry["policy"] == "MlpPolicy" and entry["n_timesteps"] > 0 for entry in entries.values())


def test_our_file_changes_the_length_of_runs_alone():
    """The constructor's defaults are the setting, for every environment."""
    entries = entries_of("polygrad")
    assert set(entries) <= {"default", *ENVS}
    for env_id, entry in entries.items():
        assert set(entry) == {"policy", "n_timesteps"} and entry["n_timesteps"] > 0
        assert load_hyperparams("polygrad", env_id) == {}


OURS = sorted(path.stem for path in HYPERPARAMS.glob("polygrad*.yml"))


@pytest.mark.parametrize(("name", "env_id"), [(name, env_id) for name in OURS for env_id in entries_of(name)])
def test_every_entry_of_our_files_makes_a_model(name, env_id):
    env_id_of_model = "Pendulum-v1" if env_id == "default" else env_id
    if env_id_of_model.endswith("-v5"):
        pytest.importorskip("mujoco")
    model = PolyGRAD("MlpPolicy", env_id_of_model, **load_hyperparams(name, env_id))
    assert model.world_model_class == ("ensemble" if name == "polygrad" else "diffusion")


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [
        ("polygrad", PolyGRAD),
        ("polygrad-paper", PolyGRAD),
        ("polygrad-paper-transformer", PolyGRAD),
        ("ppo", PPO),
        ("a2c", A2C),
        ("sac", SAC),
    ],
)
def test_the_constructors_know_every_setting(name, algorithm):
    known = set(inspect.signature(algorithm.__init__).parameters)
    for env_id in entries_of(name):
        assert set(load_hyperparams(name, env_id)) <= known


def test_paper_settings_are_accepted_and_differ_on_hopper():
    """Tables 1 to 4."""
    settings = load_hyperparams("polygrad-paper", "Hopper-v5")
    elsewhere = load_hyperparams("polygrad-paper", "Walker2d-v5")
    assert elsewhere["world_model_kwargs"]["sampler"]["noise_tau"] == 1.0
    assert settings["world_model_kwargs"]["sampler"].pop("noise_tau") == 0.1
    assert elsewhere["world_model_kwargs"]["sampler"].pop("noise_tau") and settings == elsewhere, "nothing else differs"
    model = PolyGRAD("MlpPolicy", "Pendulum-v1", **elsewhere)
    assert (model.n_imagined, model.horizon) == (1024, 10)
    assert (model.gae_lambda, model.gamma, model.ent_coef) == (0.9, 0.99, 1e-5)
    assert (model.n_steps, model.gradient_steps, model.batch_size) == (4, 4, 256)
    update = model.update
    assert isinstance(update, A2CUpdate) and (update.target_step_size, update.line_search_max_iter) == (0.01, 50)
    assert model.world_model.sampler.diffusion.n_steps == 128
    network = model.world_model.network
    assert isinstance(network, ResidualMLP) and (network.head.in_features, len(network.blocks)) == (1024, 6)
    assert model.policy.n_critics == 1 and not model.policy.average_actor


def test_the_papers_transformer_differs_in_the_denoiser_alone():
    """Table 3."""
    mlp, transformer = (load_hyperparams(name, "Walker2d-v5") for name in ("polygrad-paper", "polygrad-paper-transformer"))
    mlp["world_model_kwargs"] = {**mlp["world_model_kwargs"], "denoiser": "transformer", "width": 312, "learning_rate": 1e-4}
    assert transformer == mlp
    assert load_hyperparams("polygrad-paper-transformer", "Hopper-v5") == transformer, "τ = 0.1 is for the MLP on Hopper"
    PolyGRAD("MlpPolicy", "Pendulum-v1", **{**transformer, "horizon": 200})


def test_an_unknown_environment_gets_the_default():
    assert load_hyperparams("a2c", "Humanoid-v5") == {"learning_rate": 3e-4, "ent_coef": 1e-5}


def test_an_unknown_file_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'polygrad-paper'"):
        load_hyperparams("polygrad-papr", "Hopper-v5")


def test_what_only_the_zoo_needs_is_left_out():
    assert not set(ZOO_ONLY) & set(load_hyperparams("polygrad", "Hopper-v5"))


def test_where_configurations_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = str(HYPERPARAMS / "ppo.yml")
    assert zoo.find_configuration("ppo.yml") == ours
    assert zoo.find_configuration("hyperparams/ppo.yml") == ours
    assert zoo.find_configuration("elsewhere/ppo.yml") == "elsewhere/ppo.yml"  # a slip is not to be papered over
    assert zoo.find_configuration("hyperparams/dqn.yml") == "hyperparams/dqn.yml"
    assert zoo.find_configuration("hyperparams.python.ppo_config_example") == "hyperparams.python.ppo_config_example"
    (tmp_path / "ppo.yml").write_text("default: {}")
    assert zoo.find_configuration("ppo.yml") == "ppo.yml"


def test_misspelt_settings_are_refused_with_the_nearest_name():
    zoo.check_names(["n_timesteps", "policy", "normalize", "learning_rate", "world_model_kwargs"])
    with pytest.raises(ValueError, match="did you mean 'learning_rate'"):
        zoo.check_names(["leraning_rate"])
    with pytest.raises(ValueError, match="'seed' is not known"):  # the zoo passes it already
        zoo.check_names(["seed"])


# ---------------------------------------------------------------------- search space


class CornerTrial:
    """Draws given choices, and the lowest or the highest value of everything else."""

    def __init__(self, corner: int, chosen: set[str]) -> None:
        self.corner, self.chosen, self.params = corner, chosen, {}

    def suggest_float(self, name, low, high, log=False):
        return self.params.setdefault(name, (low, high)[self.corner])

    def suggest_int(self, name, low, high, step=1):
        return self.params.setdefault(name, (low, high)[self.corner])

    def suggest_categorical(self, name, choices):
        (choice,) = self.chosen & set(choices)
        return self.params.setdefault(name, choice)

    def set_user_attr(self, name, value):
        pass


CHOICES = [("ensemble", update) for update in ("pathwise", "ppo", "a2c")] + [("diffusion", "ppo"), ("diffusion", "a2c")]


@pytest.mark.parametrize("corner", [0, 1])
@pytest.mark.parametrize(("world_model", "update"), CHOICES)
def test_the_corners_of_the_search_space_are_valid_models(corner, world_model, update):
    trial = CornerTrial(corner, {world_model, update})
    params = zoo.sample_polygrad_params(trial, n_actions=1, n_envs=1, additional_args={})
    assert params == zoo.convert_polygrad_params(trial.params)
    zoo.check_names(params)
    model = PolyGRAD("MlpPolicy", "Pendulum-v1", **params)
    assert (model.world_model_class, model.policy_update) == (world_model, update)
    assert model.gamma == pytest.approx((0.999, 0.97)[corner])
    assert model.n_steps == (4, 32)[corner] and model.n_imagined == (64, 512)[corner]
    kwargs = model.world_model_kwargs
    assert (kwargs["width"], kwargs["n_layers"], kwargs["learning_rate"]) == ((64, 2, 1e-4), (512, 6, 3e-3))[corner]
    if world_model == "ensemble":
        assert model.world_model.n_members == (1, 7)[corner]
    else:
        assert model.world_model.sampler.diffusion.n_steps == (8, 64)[corner]
    expected = {
        "pathwise": {"n_epochs": (1, 6)},
        "ppo": {"n_epochs": (1, 6), "clip_range": (0.05, 0.2)},
        "a2c": {"target_step_size": (0.005, 0.05)},
    }[update]
    assert model.policy_update_kwargs == {name: values[corner] for name, values in expected.items()}


# ---------------------------------------------------------------------- the zoo itself


@pytest.fixture
def manager(tmp_path):
    """Makes experiments of the real zoo."""
    pytest.importorskip("rl_zoo3", reason="needs the extra [zoo]")
    from rl_zoo3.exp_manager import ExperimentManager

    fixed = {"eval_freq": -1, "log_interval": -1}  # as on the command line

    def manager(env_id="Pendulum-v1", algo="polygrad", **kwargs):
        return ExperimentManager(argparse.Namespace(), algo, env_id, str(tmp_path), n_timesteps=100, **fixed, **kwargs)

    return manager


def test_the_zoo_knows_polygrad(manager):
    from rl_zoo3 import hyperparams_opt, utils

    assert utils.ALGOS["polygrad"] is PolyGRAD
    assert hyperparams_opt.HYPERPARAMS_SAMPLER["polygrad"] is zoo.sample_polygrad_params
    assert hyperparams_opt.HYPERPARAMS_CONVERTER["polygrad"] is zoo.convert_polygrad_params


def test_the_zoo_reads_our_files(manager):
    pytest.importorskip("mujoco")
    model, settings = manager("Reacher-v5").setup_experiment()
    assert isinstance(model, PolyGRAD)
    assert settings == entries_of("polygrad")["Reacher-v5"] != entries_of("polygrad")["default"]


def test_the_zoo_falls_back_to_the_default(manager, capsys):
    manager("MountainCarContinuous-v0").setup_experiment()
    assert "Using 'default' hyperparameters" in capsys.readouterr().out


def test_other_algorithms_keep_the_zoo_s_own_files(manager):
    import rl_zoo3

    assert Path(manager(algo="ppo").config) == Path(rl_zoo3.__file__).parent / "hyperparams" / "ppo.yml"
    assert Path(manager(algo="ppo", config="hyperparams/ppo.yml").config).samefile(HYPERPARAMS / "ppo.yml")


def test_the_zoo_refuses_misspelt_settings(manager):
    with pytest.raises(ValueError, match="did you mean 'learning_rate'"):
        manager(hyperparams={"leraning_rate": 1e-3}).setup_experiment()
    with pytest.raises(ValueError, match="did you mean 'width'"):
        manager(hyperparams={"world_model_kwargs": {"witdh": 64}}).setup_experiment()


def test_schedules_of_the_zoo_are_accepted(manager):
    """It makes schedule objects of numbers and of such strings."""
    settings = {"learning_rate": "lin_0.001", "learning_starts": 40, "n_imagined": 8}
    experiment = manager(hyperparams=settings)
    model, _ = experiment.setup_experiment()
    experiment.learn(model)
    assert model.num_timesteps >= 100 and model._n_updates > 0
    assert model.policy.actor_optimizer.param_groups[0]["lr"] < 1e-4, "it has followed its schedule towards 0"


def test_every_environment_of_our_files_exists():
    assert all(env_id in gym.registry for env_id in ENVS)
