"""Parity of a bundle with transformers in eager mode, by numbers.

`doge_deploy.verify` is a function for whoever uses the library, and Python binds this package to the same name as soon
as a module of it is imported. So the package can be called too, and is then that function.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return importlib.import_module("doge_deploy.api").verify(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
