"""Train deep nets without backpropagation."""

import sys
from typing import TYPE_CHECKING, Any

if sys.version_info >= (3, 14):
    sys.exit("nobackprop runs on Python 3.11, 3.12 and 3.13; hydra-core does not start on 3.14 yet")

if TYPE_CHECKING:
    from nobackprop.training.saved import Trained, load

__all__ = ["Trained", "load"]


def __getattr__(name: str) -> Any:  # torch takes seconds to import, so only when it is asked for
    if name in __all__:
        from nobackprop.training import saved

        return getattr(saved, name)
    raise AttributeError(f"module 'nobackprop' has no attribute {name!r}")
