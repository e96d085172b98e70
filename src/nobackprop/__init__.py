"""Train deep nets without backpropagation.

    import nobackprop

    runs = nobackprop.train("rule=lra_e,bp", "dataset=digits", seeds=3, max_epochs=20)
    runs.plot()

`train` does what the command `nobackprop` does, and gives a `Record` for each seed. `runs` gives a table of all that is
recorded, and `load` a trained net, `Trained`. `gradients` brings a learning rule for a torch module into a training
loop of your own. `from_torch` makes a net of a torch module, and `to_torch` makes a torch module of a net. The parts of
runs are here, too: nets (`mlp`, `allconv`, or a `Network` of `Dense` and `Conv` layers), learning rules, losses,
initializers and data sets. A mistake of the user raises `Mistake`, whose message says what to do.
"""

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if sys.version_info >= (3, 14):
    sys.exit("nobackprop runs on Python 3.11, 3.12 and 3.13; hydra-core does not start on 3.14 yet")

if TYPE_CHECKING:  # for editors and type checkers; a rule that is not listed is found all the same
    from nobackprop.core.activations import Activation as Activation, activation as activation
    from nobackprop.core.architectures import Residual as Residual, assemble as assemble
    from nobackprop.core.initializers import (
        GlorotNormal as GlorotNormal,
        GlorotUniform as GlorotUniform,
        HeNormal as HeNormal,
        HeUniform as HeUniform,
        Initializer as Initializer,
        LecunNormal as LecunNormal,
        NonnegativeNormal as NonnegativeNormal,
        NonnegativeUniform as NonnegativeUniform,
        Normal as Normal,
        Orthogonal as Orthogonal,
        Uniform as Uniform,
        Zeros as Zeros,
        initial_weights as initial_weights,
    )
    from nobackprop.core.layers import Conv as Conv, Dense as Dense, Shortcut as Shortcut, Tokens as Tokens
    from nobackprop.core.losses import (
        Loss as Loss,
        SigmoidCrossEntropy as SigmoidCrossEntropy,
        SoftmaxCrossEntropy as SoftmaxCrossEntropy,
        SquaredError as SquaredError,
        cross_entropy as cross_entropy,
    )
    from nobackprop.core.maps import (
        Attention as Attention,
        AvgPool as AvgPool,
        Dropout as Dropout,
        Elementwise as Elementwise,
        Flatten as Flatten,
        GroupNorm as GroupNorm,
        LayerNorm as LayerNorm,
        Map as Map,
        MaxPool as MaxPool,
        Mean as Mean,
        Patches as Patches,
        Positions as Positions,
        Shrink as Shrink,
    )
    from nobackprop.core.modules import (
        MapModule as MapModule,
        ResidualModule as ResidualModule,
        from_torch as from_torch,
        to_torch as to_torch,
    )
    from nobackprop.core.network import Network as Network, allconv as allconv, mlp as mlp
    from nobackprop.core.rule import Batch as Batch, Rule as Rule
    from nobackprop.data.folders import ImageNet as ImageNet
    from nobackprop.data.sources import (
        Dataset as Dataset,
        Digits as Digits,
        Images as Images,
        Parquet as Parquet,
        Source as Source,
        Torchvision as Torchvision,
    )
    from nobackprop.interface import Runs as Runs, runs as runs, train as train
    from nobackprop.mistakes import Missing as Missing, Mistake as Mistake
    from nobackprop.records.record import Record as Record
    from nobackprop.rules.bp import BP as BP
    from nobackprop.rules.brsf import BRSF as BRSF
    from nobackprop.rules.dfa import DFA as DFA
    from nobackprop.rules.dfa_two_pass import DFATwoPass as DFATwoPass
    from nobackprop.rules.drtp import DRTP as DRTP
    from nobackprop.rules.dtp import DTP as DTP
    from nobackprop.rules.equilibrium_propagation import EquilibriumPropagation as EquilibriumPropagation
    from nobackprop.rules.fa import FA as FA
    from nobackprop.rules.forward_forward import ForwardForward as ForwardForward
    from nobackprop.rules.frsf import FRSF as FRSF
    from nobackprop.rules.kolen_pollack import KolenPollack as KolenPollack
    from nobackprop.rules.lra_e import LRAE as LRAE
    from nobackprop.rules.mdfa import MDFA as MDFA
    from nobackprop.rules.pepita import PEPITA as PEPITA
    from nobackprop.rules.predictive_coding import PredictiveCoding as PredictiveCoding
    from nobackprop.rules.usf import USF as USF
    from nobackprop.rules.weight_mirror import WeightMirror as WeightMirror
    from nobackprop.training.own_loop import Gradients as Gradients, gradients as gradients
    from nobackprop.training.saved import Trained as Trained, load as load

# The module of each public name. torch takes seconds to import, so it waits until one of them is asked for.
_PUBLIC = {
    "core.activations": "Activation activation",
    "core.initializers": "GlorotNormal GlorotUniform HeNormal HeUniform Initializer LecunNormal NonnegativeNormal "
    "NonnegativeUniform Normal Orthogonal Uniform Zeros initial_weights",
    "core.architectures": "Residual assemble",
    "core.layers": "Conv Dense Shortcut Tokens",
    "core.maps": "Attention AvgPool Dropout Elementwise Flatten GroupNorm LayerNorm Map MaxPool Mean Patches Positions "
    "Shrink",
    "core.losses": "Loss SigmoidCrossEntropy SoftmaxCrossEntropy SquaredError cross_entropy",
    "core.modules": "MapModule ResidualModule from_torch to_torch",
    "core.network": "Network allconv mlp",
    "core.rule": "Batch Rule",
    "data.folders": "ImageNet",
    "data.sources": "Dataset Digits Images Parquet Source Torchvision",
    "interface": "Runs runs train",
    "mistakes": "Missing Mistake",
    "records.record": "Record",
    "training.own_loop": "Gradients gradients",
    "training.saved": "Trained load",
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names.split()}
# And every rule: the class in each file of rules/.
for _file in (Path(__file__).parent / "rules").glob("[!_]*.py"):
    _MODULES |= dict.fromkeys(
        re.findall(r"^class ([A-Z]\w*)\(", _file.read_text(), re.MULTILINE), f"rules.{_file.stem}"
    )
__all__ = sorted(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'nobackprop' has no attribute {name!r}")
    return getattr(import_module(f"nobackprop.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
