"""A step's gradients as the list of torch's own kernels that they come down to, replayed in memory that is kept.

On small nets a CPU spends much of a step between the kernels: in the rule's and torch's Python, on views, on new
tensors. `Replay` notes which kernels a function of tensors calls, and where in memory each reads and writes. Then
it calls those alone, each into its place in a few kept buffers. A rule that computes a number at several places, such
as the pooled output of a layer, has it computed once, where keeping it costs little memory. They are the same
kernels on the same numbers, so the result is the same to the bit, for any rule that is the same at every step.
Kernels that can't write into given memory make new tensors, as before.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import count
from math import frexp, inf, isfinite
from typing import Any

import torch
from torch import Tensor
from torch._C import TensorBase
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from nobackprop.mistakes import Mistake

AGAIN = 1000  # replays
Outputs = tuple[dict[str, Tensor], list[Tensor]]
COPIES = {"clone", "_to_copy"}  # copy_ does the same into given memory
# The numbers in the tensors that these make depend on no input.
FRESH = {"new_empty", "new_ones", "new_zeros", "new_full", "empty_like", "ones_like", "zeros_like", "full_like"}

# Where torch's Python functions are.
HOMES = (getattr(torch._C, "_VariableFunctions"), getattr(torch._C, "_nn"), TensorBase)  # noqa: B009


class Replay:
    """`function(x, y, noise)`, which gives tensors by name and a list of tensors, from its third call on as a replay.

    The first call notes the kernels, the second computes both ways. Where the two differ in a bit, or `function` does
    what can't be replayed (it branches on a tensor's value, or draws random numbers), it is called as it is from then
    on. Every `AGAIN`-th replay is computed both ways again, and a difference raises Mistake: the function depends on
    something besides tensors, such as a count of steps. Other tensors that it reads, the weights, must stay where they
    are in memory, and inputs keep their shapes. The named tensors of a replay are the same objects at every call, with
    new numbers.
    """

    def __init__(self, function: Callable[[Tensor, Tensor, Mapping[str, Tensor]], Outputs]) -> None:
        # No method of this object: the object would hold itself, and the kept buffers would outlive a run.
        self.function, self.call, self.replayed = function, Replay._first, 0

    def __call__(self, x: Tensor, y: Tensor, noise: Mapping[str, Tensor]) -> Outputs:
        return self.call(self, x, y, noise)

    @property
    def replays(self) -> bool:
        """Whether the next call is a replay."""
        return self.call is Replay._replay

    def _as_written(self, x: Tensor, y: Tensor, noise: Mapping[str, Tensor]) -> Outputs:
        return self.function(x, y, noise)

    def _first(self, x: Tensor, y: Tensor, noise: Mapping[str, Tensor]) -> Outputs:
        self.x, self.y, self.noise = x.clone(), y.clone(), {name: t.clone() for name, t in noise.items()}
        try:
            with _Notes() as notes:
                result = self.function(self.x, self.y, self.noise)
        except _Unfit:
            self.call = Replay._as_written
            return self.function(x, y, noise)
        self.run, self.outputs, self.bytes = _planned(notes, result)
        self.call = Replay._second
        return result

    def _second(self, x: Tensor, y: Tensor, noise: Mapping[str, Tensor]) -> Outputs:
        expected = self.function(x, y, noise)
        self.call = Replay._replay if _same(expected, self._run(x, y, noise)) else Replay._as_written
        return expected

    def _replay(self, x: Tensor, y: Tensor, noise: Mapping[str, Tensor]) -> Outputs:
        self.replayed += 1
        if self.replayed % AGAIN:
            return self._run(x, y, noise)
        expected, found = self.function(x, y, noise), self._run(x, y, noise)
        if not all(alike(a, b) for a, b in zip(tree_leaves(expected), tree_leaves(found), strict=True)):
            raise Mistake(
                "the rule gives other numbers now than in the first steps, for the same images and weights: it must be "
                "the same at every step, so it keeps no count of steps, and no state besides its weights"
            )
        return found

    def _run(self, x: Tensor, y: Tensor, noise: Mapping[str, Tensor]) -> Outputs:
        if x.data_ptr() != self.x.data_ptr():  # else: it was written into that
            self.x.copy_(x)
        self.y.copy_(y)
        for name, t in noise.items():
            self.noise[name].copy_(t)
        self.run()
        named, others = self.outputs
        return named, [t.clone() for t in others]


def _same(one: Outputs, other: Outputs) -> bool:
    """Whether all numbers are equal to the bit."""

    def bits(t: Tensor) -> Tensor:
        return t.flatten().view(torch.uint8)

    return all(torch.equal(bits(a), bits(b)) for a, b in zip(tree_leaves(one), tree_leaves(other), strict=True))


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two results of the same step are equal but for rounding, which may differ on a GPU."""
    if not one.is_floating_point():
        return torch.equal(one, other)
    scale = float(one.abs().max()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=1e-3, atol=1e-3 * scale if isfinite(scale) else 0.0, equal_nan=True)


class _Unfit(Exception):
    """What was called can't be replayed."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor is in memory: the number of its storage, and how it lies there."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, storage: torch.UntypedStorage) -> Tensor:
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)  # pyright: ignore


@dataclass(frozen=True)
class _Call:
    """A kernel with its arguments and what it gives, in which places stand for tensors; and which storages are new."""

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    new: list[int]

    @cached_property
    def storages(self) -> frozenset[int]:
        """All that it reads or writes."""
        leaves = tree_leaves((self.args, self.kwargs, self.result))
        return frozenset(leaf.storage for leaf in leaves if isinstance(leaf, _Place))

    @property
    def changes(self) -> bool:
        """Whether it writes to what is there already."""
        return self.kernel._schema.is_mutable


class _Notes(TorchDispatchMode):
    """Notes all kernels that are called while it is on. Raises _Unfit for one that can't be replayed.

    Views are no calls, but places.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.numbers: dict[int, int] = {}  # of storages, by address
        self.storages: list[StorageWeakRef] = []  # as long as these are there, no address is used twice
        self.there: dict[int, Tensor] = {}  # one of the tensors in each storage that was there before
        self.bytes: dict[int, int] = {}  # of each storage that is made

    def place(self, t: Tensor) -> _Place:
        """Where t is; a storage that was not made by a call was there before."""
        if _address(t) not in self.numbers:
            self.there[self._number(t)] = t
        return _Place(self.numbers[_address(t)], t.dtype, tuple(t.shape), t.stride(), int(t.storage_offset()))

    def _number(self, t: Tensor) -> int:
        self.storages.append(StorageWeakRef(t.untyped_storage()))
        number = self.numbers[_address(t)] = len(self.storages)
        return number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if {torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape} & {*func.tags}:
            raise _Unfit
        args_then, kwargs_then = tree_map_only(Tensor, self.place, (args, kwargs))
        result = func(*args, **kwargs)
        made = [t for t in tree_leaves(result) if t is not None]
        if not all(isinstance(t, Tensor) and t.layout == torch.strided for t in made):
            raise _Unfit
        new = []
        for t in made:
            if _address(t) not in self.numbers:
                new.append(self._number(t))
                self.bytes[new[-1]] = t.untyped_storage().nbytes()
        if new or func._schema.is_mutable:
            result_then = tree_map_only(Tensor, self.place, result)
            self.calls.append(_Call(func, args_then, kwargs_then, result_then, new))
        return result


def _address(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _name(func: Any) -> str:
    return func._schema.name.removeprefix("aten::")


def _planned(notes: _Notes, result: Outputs) -> tuple[Callable[[], None], Outputs, int]:
    """The calls as one function, written out as Python and run once; what holds its outputs; and bytes of buffers."""
    outputs = tree_map_only(Tensor, notes.place, result)
    given = {place.storage for place in tree_leaves(outputs)}
    changed = {storage for call in notes.calls if call.changes for storage in call.storages}
    calls = _without_repeats(notes.calls, given | changed, notes.bytes)
    last = {storage: i for i, call in enumerate(calls) for storage in call.storages}
    last |= dict.fromkeys(given, len(calls))
    constant: set[int] = set()  # storages that hold the same numbers at each run
    script = _Script({storage: t.untyped_storage() for storage, t in notes.there.items()}, notes.bytes)
    for i, call in enumerate(calls):
        reads = call.storages - {*call.new}
        once = (reads <= constant or _name(call.kernel) in FRESH) and not call.storages & changed
        script.add(call, once)
        if once:
            constant |= {*call.new}
        for storage in call.storages - constant:
            if last[storage] == i and storage in notes.bytes:
                script.release(storage)
    kept = tree_map_only(_Place, script.keep, outputs)
    return script.function(), kept, script.bytes


def _without_repeats(calls: Sequence[_Call], own: set[int], sizes: Mapping[int, int]) -> list[_Call]:
    """The calls without those that only give what one before them gave, and with its places where theirs stood.

    What is not computed again stays in memory in between. So it must be no larger than a tensor of this step that it is
    computed from: that one stays there for the repeat anyway, as a layer's output does for the pooled one. Inputs and
    weights do not count, since a rule that goes up from them twice does so to keep no activations. What is computed
    from nothing is kept for the whole run anyway.

    The storages `own` stay apart from all others: they are changed, or given to the caller, who may change them.
    `sizes` are the bytes of those that the step makes.
    """
    kept: list[_Call] = []
    first: dict[str, _Call] = {}
    moved: dict[int, int] = {}  # storages of calls that are left out, and those that stand for them

    def now(place: _Place) -> _Place:
        return replace(place, storage=moved.get(place.storage, place.storage))

    for call in calls:
        args, kwargs, result = tree_map_only(_Place, now, (call.args, call.kwargs, call.result))
        call = replace(call, args=args, kwargs=kwargs, result=result)
        key, apart = repr((call.kernel, args, kwargs)), own & call.storages
        largest = max((sizes.get(storage, 0) for storage in call.storages - {*call.new}), default=inf)
        if not apart and key in first and all(sizes[storage] <= largest for storage in call.new):
            moved |= dict(zip(call.new, first[key].new, strict=True))
            continue
        kept.append(call)
        if not apart:
            first[key] = call
    return kept


class _Script:
    """Lines of Python, one a call, each run once when it is added; tensors and kernels are global names in it.

    Storages that calls write to are buffers that take turns: one is free when its storage was used for the last time.
    `there` are the storages that were there before, `sizes` the bytes of the others.
    """

    def __init__(self, there: dict[int, torch.UntypedStorage], sizes: Mapping[int, int]) -> None:
        self.there, self.sizes = there, sizes
        self.free: list[torch.UntypedStorage] = []
        self.bytes = 0
        self.loose: dict[int, _Place] = {}  # storages that come anew with each run, and which tensor has their name
        self.names: dict[str, Any] = {}
        self.numbers = count()
        self.known: dict[Any, str] = {}
        self.lines: list[str] = []

    def add(self, call: _Call, once: bool) -> None:
        """Adds a call in the quickest form that there is; with `once` it is run now alone."""
        call = _as_product(call)
        results = [call.result] if isinstance(call.result, _Place) else [*(call.result or ())]
        forms: list[str] = []
        if call.changes:
            forms = [*self._forms(call.kernel, *self._arguments(call))]
        elif (into := _into(call.kernel)) and len(call.new) == len(results):
            for number in call.new:
                self.there[number] = self._buffer(self.sizes[number], [] if once else self.free)
            args, kwargs = self._arguments(call)
            outs = [self._tensor(place) for place in results]
            if _name(call.kernel) in COPIES:
                forms = [f"{self._named(TensorBase.copy_)}({outs[0]}, {args[0]})"]
            else:
                given = dict(zip(into[1], outs, strict=True))
                forms = [*self._forms(into[0], args, kwargs | given)]
        else:
            for place in results:
                if place is not None and place.storage in call.new:
                    self.loose.setdefault(place.storage, place)
            names = ", ".join("_" if place is None else f"t{place.storage}" for place in results)
            made = names if isinstance(call.result, _Place) else f"({names},)"
            forms = [f"{made} = {form}" for form in self._forms(call.kernel, *self._arguments(call))]
        line = self._run(forms)
        if not once:
            self.lines.append(line)

    def _run(self, forms: list[str]) -> str:
        """Runs the first of several forms that torch takes, and gives it."""
        for form in forms[:-1]:
            with suppress(TypeError, RuntimeError):  # another signature
                exec(form, self.names)
                return form
        exec(forms[-1], self.names)
        return forms[-1]

    def _forms(self, kernel: Any, args: list[str], kwargs: Mapping[str, str]) -> Iterator[str]:
        """The call by torch's own Python function, which takes half the time, and by the kernel's."""
        given = ", ".join([*args, *(f"{name}={value}" for name, value in kwargs.items())])
        for home in HOMES:
            if function := getattr(home, _name(kernel), None):
                yield f"{self._named(function)}({given})"
        yield f"{self._named(kernel._op)}({given})"

    def _arguments(self, call: _Call) -> tuple[list[str], dict[str, str]]:
        return [self._value(v) for v in call.args], {name: self._value(v) for name, v in call.kwargs.items()}

    def _value(self, value: Any) -> str:
        if isinstance(value, _Place):
            return self._tensor(value)
        if isinstance(value, list | tuple) and any(isinstance(each, _Place) for each in value):
            return f"[{', '.join(self._value(each) for each in value)}]"
        return self._named(value)

    def _tensor(self, place: _Place) -> str:
        if (base := self.loose.get(place.storage)) is not None:
            name = f"t{place.storage}"
            if place == base:
                return name
            return f"{name}.view({self._named(place.dtype)}).as_strided({place.size}, {place.stride}, {place.offset})"
        if place not in self.known:
            self.known[place] = self._named(place.of(self.there[place.storage]))
        return self.known[place]

    def _named(self, value: Any) -> str:
        name = f"g{next(self.numbers)}"
        self.names[name] = value
        return name

    def _buffer(self, size: int, free: list[torch.UntypedStorage]) -> torch.UntypedStorage:
        """The smallest free buffer that is large enough, of equal ones the last used, or a new one.

        One of more than twice the size stays free. Else a small gradient, which is kept to the end, takes the memory of
        a layer's activations from those of the next layer.
        """
        fitting = [buffer for buffer in free if size <= buffer.nbytes() <= 2 * size]
        if not fitting:
            self.bytes += size
            return torch.empty(size, dtype=torch.uint8).untyped_storage()
        best = min(reversed(fitting), key=torch.UntypedStorage.nbytes)
        free.remove(best)
        return best

    def release(self, number: int) -> None:
        if number in self.loose:
            self.lines.append(f"del t{number}")
            del self.names[f"t{number}"]
        else:
            self.free.append(self.there[number])

    def keep(self, place: _Place) -> Tensor:
        """A tensor that holds, after each run, what the script has in that place at its end."""
        if place.storage not in self.loose:
            return self.names[self._tensor(place)]
        tensor = torch.empty_strided(place.size, place.stride, dtype=place.dtype)
        self.lines.append(self._run([f"{self._named(tensor)}.copy_({self._tensor(place)})"]))
        return tensor

    def function(self) -> Callable[[], None]:
        exec("def run():\n" + "\n".join(f"    {line}" for line in [*self.lines, "pass"]), self.names)
        return self.names.pop("run")  # which has the names; with these it would hold itself


def _as_product(call: _Call) -> _Call:
    """A division of floats by a power of two as the product that rounds alike, in half the time; others as they are."""
    if call.kernel is torch.ops.aten.div.Tensor and isinstance(by := call.args[1], int | float):
        floats = isinstance(call.args[0], _Place) and call.args[0].dtype.is_floating_point
        if floats and by > 0 and frexp(by)[0] == 0.5:
            return replace(call, kernel=torch.ops.aten.mul.Tensor, args=(call.args[0], 1 / by))
    return call


@cache
def _into(kernel: Any) -> tuple[Any, list[str]] | None:
    """The form of a kernel that writes into given memory, and what it calls that; None where it has none of its own."""
    if _name(kernel) in COPIES:
        return kernel, ["out"]
    takes = [(a.name, str(a.type)) for a in kernel._schema.arguments]
    for name in kernel.overloadpacket.overloads():
        other = getattr(kernel.overloadpacket, name)
        outs = [a.name for a in other._schema.arguments if a.is_out]
        same = outs and [(a.name, str(a.type)) for a in other._schema.arguments if not a.is_out] == takes
        if same and torch._C._dispatch_has_kernel_for_dispatch_key(other.name(), "CPU"):
            return other, outs
    return None
