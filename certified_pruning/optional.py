"""Optional packages, imported when they are first used; a missing one ends in one line that says how to get it."""

from __future__ import annotations

import importlib
from types import ModuleType

from common.config import UserError


class MissingPackageError(UserError, ImportError):
    """A package that this function needs and the house does not."""


def need(name: str, install: str) -> ModuleType:
    """The module `name`. Raises `MissingPackageError`, naming the pip arguments `install`, where it is not there."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and name.split(".")[0] != error.name.split(".")[0]:
            missing = f"{name} needs {error.name}, which is not installed"
        else:
            missing = f"{name} is not installed"
        raise MissingPackageError(f"{missing}; get it with: pip install {install}") from error
