"""A quick start of the command, without modules that Lightning and torch import at once and a run never uses.

torchmetrics, which Lightning imports, imports torchvision, SciPy and matplotlib where they are installed, for metrics
of pictures and sounds. Lightning and torch's optimizers import torch's compiler, only to keep out of its way. These
imports take more than half of the time until the first step. Only the command's own process leaves them out. A program
that imports `nobackprop` as a library finds everything as usual.
"""

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

LIGHTNING = {"pytorch_lightning", "lightning_fabric", "torchmetrics"}
UNUSED = {"torchvision", "scipy", "matplotlib"}  # packages that torchmetrics must not find
COMPILER = "torch._dynamo"


def start() -> None:
    """Makes a later import of Lightning leave out the modules that a run never uses.

    Does nothing where Lightning or the compiler has been imported already.
    """
    if (LIGHTNING | {COMPILER}) & sys.modules.keys():
        return
    import numpy  # noqa: F401 - torch imports it too, and would swallow a Ctrl-C meanwhile
    import torch

    sys.modules[COMPILER] = torch._dynamo = Compiler(COMPILER)  # pyright: ignore[reportAttributeAccessIssue]
    sys.meta_path[:0] = [Submodules, Lightning]


@contextmanager
def _not_found(packages: set[str]) -> Iterator[None]:
    """Within, Lightning and torchmetrics are told that these packages are not installed.

    The packages can be imported all the same, within and after.
    """
    from lightning_utilities.core import imports

    met, available = imports.RequirementCache.__bool__, imports.package_available
    imports.RequirementCache.__bool__ = lambda self: self.requirement not in packages and met(self)
    imports.package_available = lambda package_name: package_name not in packages and available(package_name)
    try:
        yield
    finally:
        imports.RequirementCache.__bool__, imports.package_available = met, available


class Compiler(ModuleType):
    """Stands in for torch's compiler while nothing is compiled. Asked for anything else, it loads the compiler."""

    __path__: Sequence[str] = ()  # it is a package

    class OptimizedModule:
        """The type of a compiled module, of which there is none."""

    @staticmethod
    def disable(function: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        return function

    @staticmethod
    def graph_break() -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system asks for these
            raise AttributeError(name)
        return getattr(make_way(), name)


def make_way() -> ModuleType:
    """Puts torch's compiler in the place of its stand-in."""
    import torch

    if isinstance(sys.modules[COMPILER], Compiler):
        del sys.modules[COMPILER], torch._dynamo
        sys.meta_path.remove(Submodules)
    return importlib.import_module(COMPILER)


class Submodules(MetaPathFinder, Loader):
    """Loads the compiler before any of its own modules is imported."""

    @classmethod
    def find_spec(cls, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, cls()) if fullname.startswith(f"{COMPILER}.") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        make_way()
        return importlib.import_module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass  # it is loaded


class Lightning(MetaPathFinder):
    """Hides the unused packages from Lightning's packages while these are imported."""

    @classmethod
    def find_spec(cls, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname in LIGHTNING else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def without_company(module: ModuleType) -> None:
            with _not_found(UNUSED):
                execute(module)

        spec.loader.exec_module = without_company
        return spec
