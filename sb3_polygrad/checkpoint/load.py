"""Loading a saved model, with errors that say what does not fit."""

from __future__ import annotations

import inspect
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from sb3_polygrad.checkpoint.archive import PathOrFile, existing, require_whole
from sb3_polygrad.common.validation import choose

if TYPE_CHECKING:
    from sb3_polygrad.polygrad import PolyGRAD

Model = TypeVar("Model", bound="PolyGRAD")

FIXED = {"world_model": "world_model_class", "world_model_kwargs": "world_model_kwargs", "horizon": "horizon"}
"""Arguments that shape the networks and cannot be changed, and the attributes that hold them."""


def load_model(
    sb3_load: Callable[..., Model], cls: type[Model], path: PathOrFile, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Model:
    """
    Load a saved model; see SB3. What shapes the networks cannot be changed, as SB3 has it for ``policy_kwargs``.

    :param sb3_load: SB3's ``load``
    :param cls: PolyGRAD, or a subclass
    :param path: file; it contains pickles, so only load one that you trust
    :param args: further arguments of ``sb3_load``
    :param kwargs: keyword arguments of ``sb3_load``, among them arguments of the constructor to change
    :raises ValueError: if the file is damaged or its networks are those of another version, or another ``world_model``,
        ``world_model_kwargs`` or ``horizon`` is given than was saved
    """
    known = set(inspect.signature(cls.__init__).parameters) - {"self"}
    if isinstance(path, (str, pathlib.Path)):
        path = existing(path, "zip")
        require_whole(path)
    given = {name: kwargs.pop(name) for name in FIXED if name in kwargs}
    of_load = inspect.signature(sb3_load).parameters
    for name in kwargs:
        if name not in of_load:
            choose("load", name, known)
    try:
        model = sb3_load(path, *args, **kwargs)
    except (RuntimeError, ValueError, KeyError) as error:
        # torch and SB3 have no types for a misfit of networks; at one of an optimiser SB3 looks in vain for "policy.optimizer"
        misfit = str(error.__context__ if isinstance(error, KeyError) else error)
        if "state_dict" not in misfit and "parameter group" not in misfit:
            raise
        raise ValueError(
            f"the networks in {path}, or their optimiser, are not those of this version of sb3_polygrad: load it with the "
            "one that saved it, with classes of your own as they were, and custom_objects that change no shapes"
        ) from error
    for name, value in given.items():
        saved = getattr(model, FIXED[name])
        if (value or {}) != (saved or {}):
            raise ValueError(
                f"the saved model has {name}={saved!r}, which cannot be changed to {value!r}: leave it out, or where a "
                f"settings file of the zoo has it, pass -params {name}:{saved!r}"
            )
    # Custom objects are placeholders (the zoo's enjoy puts 0 for every schedule): not to be judged.
    if known & set(kwargs) and not kwargs.get("custom_objects"):
        model.check_arguments()
    return model
