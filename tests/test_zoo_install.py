"""A wheel and an editable install in fresh virtual environments, and the zoo's own commands in them."""

import os
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SMALL = ["-params", "learning_starts:100", "n_imagined:32"]


class Installation:
    """
    sb3_polygrad with its extra ``[zoo]`` in a virtual environment of its own.

    :param kind: ``"wheel"`` or ``"editable"``
    :param folder: where to put it
    """

    def __init__(self, kind: str, folder: Path) -> None:
        self.folder = folder
        self.sources = folder / "sources"
        ignore = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "runs", "logs", "__pycache__")
        shutil.copytree(ROOT, self.sources, ignore=ignore)
        venv.create(folder / "venv", with_pip=True)
        self.python = folder / "venv" / "bin" / "python"
        self.site_packages = Path(self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        if kind == "wheel":
            self.run("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "dist", str(self.sources))
            (wheel,) = (folder / "dist").glob("*.whl")
            self._install(f"{wheel}[zoo]")
        else:
            self._install("--editable", f"{self.sources}[zoo]")
        self.package = Path(self.run("-c", "import sb3_polygrad; print(sb3_polygrad.__path__[0])").strip())

    def _install(self, *what: str) -> None:
        self.run("-m", "pip", "install", "--quiet", "-c", str(self.sources / "constraints.txt"), *what)

    def run(self, *arguments: str, fails: bool = False) -> str:
        """
        Run the environment's Python in ``folder``, where no package of ours lies.

        :param arguments: of the interpreter
        :param fails: whether it has to fail
        :return: what it prints
        """
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SB3_POLYGRAD"))}
        command = [str(self.python), *arguments]
        done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert (done.returncode != 0) == fails, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def train(self, *arguments: str, env_id: str = "Pendulum-v1", algo: str = "polygrad", steps: int = 300) -> str:
        """The literal command."""
        run = ["--algo", algo, "--env", env_id, "-n", str(steps), "--seed", "1", "-f", "logs"]
        return self.run("-m", "rl_zoo3.train", *run, *arguments)


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installation(request, tmp_path_factory):
    return Installation(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def trained(installation):
    """A first run of the zoo, in ``logs/polygrad/Pendulum-v1_1``."""
    output = installation.train(*SMALL, "--save-replay-buffer", "--eval-freq", "150", "--eval-episodes", "1")
    return installation.folder / "logs" / "polygrad" / "Pendulum-v1_1", output


def test_train(trained):
    folder, output = trained
    assert os.path.join("hyperparams", "polygrad.yml") in output
    for name in ("Pendulum-v1.zip", "best_model.zip", "replay_buffer.pkl", "evaluations.npz", "0.monitor.csv"):
        assert (folder / name).exists()


def test_enjoy(installation, trained):
    arguments = ["--algo", "polygrad", "--env", "Pendulum-v1", "-f", "logs", "--exp-id", "1", "--no-render", "-n", "250"]
    assert "Mean reward" in installation.run("-m", "rl_zoo3.enjoy", *arguments)
    assert "Mean reward" in installation.run("-m", "rl_zoo3.cli", "enjoy", *arguments)


def test_continue(installation, trained):
    folder, _ = trained
    output = installation.train(*SMALL, "-i", str(folder / "Pendulum-v1.zip"), steps=100)
    assert "Loading pretrained agent" in output and "Loading replay buffer" in output


def test_optimize_and_train_with_a_trial(installation):
    study = ["--study-name", "study", "--storage", "logs/study.log"]
    search = ["-optimize", "--n-trials", "2", "--sampler", "random", "--n-evaluations", "1", "--eval-episodes", "1"]
    output = installation.train(*study, *search, "--no-optim-plots", "-params", "learning_starts:100", steps=150)
    assert "Number of finished trials:  2" in output
    output = installation.train(*study, "--trial-id", "1", "-params", "learning_starts:100", steps=150)
    assert "Loading from Optuna study..." in output


def test_parallel_environments_and_one_without_settings(installation):
    output = installation.train("--vec-env", "subproc", *SMALL, "n_envs:2", env_id="MountainCarContinuous-v0")
    assert "Using 'default' hyperparameters" in output


def test_train_without_the_hook(installation):
    assert "Saving to" in installation.run(
        *["-m", "sb3_polygrad.train", "--algo", "polygrad", "--env", "Pendulum-v1", "-n", "150", "-f", "logs", *SMALL]
    )


def test_configurations_for_the_baselines(installation):
    output = installation.train("-conf", "hyperparams/a2c.yml", algo="a2c", steps=100)
    assert "('ent_coef', 1e-05)" in output


def test_misspelt_settings(installation):
    arguments = ["--algo", "polygrad", "--env", "Pendulum-v1", "-n", "100", "-f", "logs", "-params", "leraning_rate:0.001"]
    assert "did you mean 'learning_rate'" in installation.run("-m", "rl_zoo3.train", *arguments, fails=True)


def test_a_start_of_the_interpreter_loads_nothing(installation):
    assert "polygrad" not in installation.run("-X", "importtime", "-c", "pass")


def test_a_broken_package_leaves_other_algorithms_alone(installation):
    module = installation.package / "polygrad.py"
    text = module.read_text()
    module.write_text("raise RuntimeError('broken on purpose')\n")
    try:
        output = installation.train(algo="ppo", steps=100)
    finally:
        module.write_text(text)
    assert "Saving to" in output
    assert output.count("could not be added to rl_zoo3") == 1 and "RuntimeError: broken on purpose" in output


def test_leftovers_of_a_package_that_is_gone_stay_silent(installation):
    """As after the clone of an editable install was deleted: only the line in the .pth file is left."""
    module = Path(installation.run("-c", "import _sb3_polygrad_zoo_hook; print(_sb3_polygrad_zoo_hook.__file__)").strip())
    aside = module.rename(module.with_suffix(".aside"))
    try:
        output = installation.run("-c", "import rl_zoo3; print('polygrad' in rl_zoo3.ALGOS)")
    finally:
        aside.rename(module)
    assert output == "False\n"


def test_without_rl_zoo3_and_without_a_trace(installation):
    """The last test: it takes the installation apart."""
    installation.run("-m", "pip", "uninstall", "--quiet", "--yes", "rl_zoo3")
    installation.run(
        "-c",
        "from sb3_polygrad import PolyGRAD\nPolyGRAD('MlpPolicy', 'Pendulum-v1', learning_starts=50, n_imagined=8).learn(100)",
    )
    assert "pip install 'sb3_polygrad[zoo]'" in installation.run("-m", "sb3_polygrad.train", fails=True)
    installation.run("-m", "pip", "uninstall", "--quiet", "--yes", "sb3_polygrad")
    assert not [path for path in installation.site_packages.iterdir() if "polygrad" in path.name]
