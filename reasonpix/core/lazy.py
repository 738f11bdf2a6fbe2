"""Packages that export names without importing the modules that define them (PEP 562)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from importlib import import_module
from typing import Any

from reasonpix.errors import require_extra


def lazy_exports(
    package: str, exports: Mapping[str, Sequence[str]], extras: Mapping[str, str] | None = None
) -> Callable[[str], Any]:
    """The `__getattr__` of `package`, which imports a name's submodule when the name is first used.

    `exports` lists the names by submodule; `extras` names the optional extra of `reasonpix` that a
    submodule needs. The package repeats the imports under `if TYPE_CHECKING:`, for type checkers
    and editors.
    """
    modules = {name: module for module, names in exports.items() for name in names}
    extras = extras or {}

    def __getattr__(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = modules[name]
        with require_extra(extras[module]) if module in extras else nullcontext():
            return getattr(import_module(f"{package}.{module}"), name)

    return __getattr__
