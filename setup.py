"""Build definition: the package, its configuration files, and the line that makes rl_zoo3 know PolyGRAD."""

from __future__ import annotations

import base64
import hashlib
import shutil
import zipfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).parent

# rl_zoo3 has no plugin point, so `python -m rl_zoo3.train --algo polygrad` needs a foot in the door of the interpreter.
# Python executes this stub at start-up. It waits for the import of rl_zoo3, removes itself and hands over to
# _sb3_polygrad_zoo_hook.py; everything else it leaves alone. It stands inline since importing a module here would cost
# every start of the interpreter milliseconds.
ZOO_STUB = """\
class SB3PolyGRADZooStub:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "rl_zoo3":
            sys.meta_path.remove(cls)
            try:
                import _sb3_polygrad_zoo_hook
            except ImportError:
                return
            _sb3_polygrad_zoo_hook.install()
sys.meta_path.insert(0, SB3PolyGRADZooStub)
"""

# A line of a .pth file is executed if it starts with "import". Python 3.15 and later use the .start file instead (PEP 829).
STARTUP_FILES = {
    "sb3_polygrad.pth": f'import sys; exec({ZOO_STUB!r}, {{"sys": sys}})\n',
    "sb3_polygrad.start": "_sb3_polygrad_zoo_hook:install\n",
}


class BuildPackage(build_py):
    """Adds ``hyperparams/*.yml`` (as ``sb3_polygrad/hyperparams``) and the start-up files to wheels."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the checkout's own files are used, and the start-up files come with the editable wheel
            return
        for source, target in self._configurations().items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        for name, text in STARTUP_FILES.items():
            Path(self.build_lib, name).write_text(text)

    def _configurations(self) -> dict[Path, Path]:
        folder = Path(self.build_lib, "sb3_polygrad", "hyperparams")
        return {source: folder / source.name for source in sorted((ROOT / "hyperparams").glob("*.yml"))}

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        if self.editable_mode:
            return outputs
        startup = [Path(self.build_lib, name) for name in STARTUP_FILES]
        return [*outputs, *map(str, [*self._configurations().values(), *startup])]


class EditableWheel(editable_wheel):
    """Adds the start-up files to the wheel of ``pip install -e``, which takes nothing else from ``build_py``."""

    def run(self) -> None:
        super().run()
        (wheel,) = Path(self.dist_dir).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            contents = {name: archive.read(name) for name in archive.namelist()}
        (record,) = (name for name in contents if name.endswith(".dist-info/RECORD"))
        for name, text in STARTUP_FILES.items():
            contents[name] = text.encode()
            digest = base64.urlsafe_b64encode(hashlib.sha256(contents[name]).digest()).rstrip(b"=").decode()
            contents[record] = f"{name},sha256={digest},{len(contents[name])}\n".encode() + contents[record]
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in contents.items():
                archive.writestr(name, data)


MUJOCO = ["gymnasium[mujoco]"]
PROGRESS = ["rich", "tqdm"]
PLOTS = ["matplotlib", "pandas", "seaborn"]
# rliable 1.2 wants arch < 8, which does not work with pandas 3 (and does not say so).
BENCHMARK = [*PLOTS, "pandas<3", "joblib", "rliable>=1.2,<2", "sb3_contrib>=2.9,<3"]
OFFLINE = ["minari[hdf5]>=0.5,<0.6"]
STUDY = [*OFFLINE, "pandas<3", "scipy", "seaborn"]
# rl_zoo3 2.9.2 imports requests (enjoy, load_from_hub), moviepy (record_video), tensorboard (-tb) without declaring them.
ZOO = ["rl_zoo3[plots]>=2.9.2,<3", "moviepy", "requests", "tensorboard"]

setup(
    name="sb3_polygrad",
    version=(ROOT / "sb3_polygrad" / "version.txt").read_text().strip(),
    description="World models via policy-guided trajectory diffusion (PolyGRAD) behind the API of Stable-Baselines3",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    keywords="reinforcement-learning world-models diffusion stable-baselines3 mujoco",
    package_dir={"": "."},  # said, it lets editable installs be a plain path, which type checkers understand
    packages=find_packages(include=["sb3_polygrad", "sb3_polygrad.*"]),
    py_modules=["_sb3_polygrad_zoo_hook"],
    package_data={"sb3_polygrad": ["py.typed", "version.txt", "study/configs/*.yml"]},
    cmdclass={"build_py": BuildPackage, "editable_wheel": EditableWheel},
    python_requires=">=3.10",
    install_requires=["stable_baselines3>=2.9,<3", "pyyaml"],
    extras_require={
        "mujoco": MUJOCO,
        "progress": PROGRESS,
        "plots": PLOTS,
        "benchmark": BENCHMARK,
        "offline": OFFLINE,
        "study": STUDY,
        "zoo": ZOO,
        "tests": [*MUJOCO, *PROGRESS, *BENCHMARK, *STUDY, "hypothesis", "pytest", "tensorboard"],
        "dev": ["mypy", "ruff", "types-PyYAML"],
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
