"""
Makes rl_zoo3 know PolyGRAD at the moment rl_zoo3 is imported. What is changed there is written in ``sb3_polygrad/zoo.py``.

Installing sb3_polygrad puts a line into ``sb3_polygrad.pth`` (see ``setup.py``) that calls :func:`install` when ``rl_zoo3`` is
about to be imported, and does nothing in an interpreter that never imports it. This module imports neither sb3_polygrad nor
rl_zoo3 by itself: whatever is wrong with either of them must not keep the other one, or Python, from working.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # not typing's: from Python 3.15 on, this module is imported at every start of the interpreter
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

OPT_OUT = "SB3_POLYGRAD_NO_ZOO"
"""Environment variable: any value but the empty one leaves rl_zoo3 as it is."""

MODULES = ("rl_zoo3.utils", "rl_zoo3.hyperparams_opt", "rl_zoo3.exp_manager")
"""Modules of the zoo that :func:`sb3_polygrad.zoo.complete` completes."""


class ZooFinder:
    """Finds the modules of the zoo as ever, and completes them right after their own code has run."""

    failed = False

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """
        :param name: module to be imported
        :param path: of its package
        :param target: the module itself, when it is reloaded
        :return: what the finders behind this one find; None for anything but :data:`MODULES`
        """
        if name not in MODULES:
            return None
        # Only the finders behind: two hooks of this kind would otherwise ask each other for ever.
        for finder in sys.meta_path[sys.meta_path.index(cls) + 1 :]:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    cls._complete_after_execution(spec.loader)
                return spec
        return None

    @classmethod
    def _complete_after_execution(cls, loader: Loader) -> None:
        # The loader stays what it is (inspect, importlib.resources and runpy look at it); only its method is wrapped.
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            cls.complete(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]

    @classmethod
    def complete(cls, module: ModuleType) -> None:
        """
        Complete a module of the zoo. A failure is told once, as a warning: the zoo's own algorithms do not depend on it.

        :param module: one of :data:`MODULES`
        """
        if cls.failed:
            return
        try:
            from sb3_polygrad import zoo

            zoo.complete(module)
        except Exception as error:
            import warnings

            cls.failed = True
            warnings.warn(
                f"sb3_polygrad could not be added to rl_zoo3, which goes on without it: {type(error).__name__}: {error} "
                f"(set {OPT_OUT}=1 to stop it from trying)",
                stacklevel=2,
            )


def install() -> None:
    """Complete the modules of the zoo that are imported already, and the others as soon as they are."""
    if os.environ.get(OPT_OUT) or ZooFinder in sys.meta_path:
        return
    sys.meta_path.insert(0, ZooFinder)
    for name in MODULES:
        if name in sys.modules:
            ZooFinder.complete(sys.modules[name])
