"""Images of one's own that are in memory already: tensors, arrays or a torch Dataset."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from numpy import ndarray
from torch import Tensor

from nobackprop.data.checksums import some
from nobackprop.data.sources import Images, ImageShape, Source
from nobackprop.mistakes import Mistake, Notice

_held: dict[str, tuple[Images, Images]] = {}  # what is given at present, by fingerprint


@contextmanager
def held(data: Any, test: Any) -> Iterator[str]:
    """Within, `Given` reads these images. It gives the fingerprint of their content, by which `Given` finds them.

    Both are a pair (x, y) of tensors or arrays, or a torch Dataset of such pairs. x is (N, D), (N, H, W) or
    (N, C, H, W), uint8 or floats, which become float32; y (N,) are class numbers from 0. Raises Mistake for anything
    else, and where the two do not fit each other.
    """
    if data is None or test is None:
        raise Mistake("data and test belong together: write data=(x, y), test=(x2, y2)")
    train, tested = images_of(data, "data"), images_of(test, "test")
    kinds = [f"images of shape {tuple(i.pixels.shape[1:])} and type {i.pixels.dtype}" for i in (train, tested)]
    if kinds[0] != kinds[1]:
        raise Mistake(f"data has {kinds[0]}, test {kinds[1]}: both must be alike")
    last = max(int(images.labels.max()) for images in (train, tested))
    if never := sorted({*range(min(last, 1000) + 1)} - {*train.labels.tolist()}):
        told = f"data has no images of the classes {some(map(str, never))}, counted from 0, to learn from"
        warnings.warn(told, Notice, stacklevel=3)
    found = sha256(kinds[0].encode())
    for images in (train, tested):
        for tensor in (images.pixels, images.labels):
            found.update(tensor.reshape(-1).numpy().data)
    fingerprint = found.hexdigest()[:16]
    _held[fingerprint] = train, tested
    try:
        yield fingerprint
    finally:
        _held.pop(fingerprint, None)


def images_of(given: Any, name: str) -> Images:
    """The images that were given, as `name`. Raises Mistake, which says what was found and what is allowed."""
    if isinstance(given, tuple | list) and len(given) == 2:
        x, y = given
    elif isinstance(given, Tensor | ndarray):
        raise Mistake(
            f"{name} is a {type(given).__name__} alone: give a pair (x, y), y with the samples' class numbers"
        )
    elif hasattr(given, "__getitem__") and hasattr(given, "__len__"):
        x, y = _columns(given, name)
    else:
        raise Mistake(
            f"{name} is of type {type(given).__name__}: give a pair (x, y) of tensors or arrays, or a torch Dataset "
            "with a length"
        )
    x, y = tensor_of(x, f"{name}: x"), tensor_of(y, f"{name}: y")
    if y.ndim != 1 or len(y) != len(x) or y.is_floating_point() or y.is_complex():
        raise Mistake(
            f"{name}: y has the shape {tuple(y.shape)} and type {y.dtype} for {len(x) if x.ndim else 0} samples; "
            "allowed: a class number from 0 for each"
        )
    if len(y) and int(y.min()) < 0:
        raise Mistake(f"{name}: y has the class number {int(y.min())}; allowed: whole numbers from 0")
    if not 2 <= x.ndim <= 4 or not x.numel() or not (x.dtype == torch.uint8 or x.is_floating_point()):
        raise Mistake(
            f"{name}: x has the shape {tuple(x.shape)} and type {x.dtype}; allowed: uint8 or floats, of shape (N, D), "
            "(N, H, W) or (N, C, H, W), at least one"
        )
    if x.is_floating_point() and not bool(x.float().isfinite().all()):
        raise Mistake(f"{name}: x has NaN or infinite numbers (as float32); allowed: finite ones")
    x = as_images(x)
    if x.shape[1] > 4 and x.shape[3] in (1, 3, 4):
        told = f"{name}: x has the shape {tuple(x.shape)}, read as {x.shape[1]} channels: these come before positions"
        warnings.warn(told, Notice, stacklevel=4)
    return Images((x if x.dtype == torch.uint8 else x.float()).contiguous(), y.long().contiguous())


def as_images(x: Tensor) -> Tensor:
    """Samples (N, D), (N, H, W) or (N, C, H, W), as (N, C, H, W)."""
    return x.reshape(len(x), *(1,) * (4 - x.ndim), *x.shape[1:])


def _columns(dataset: Any, name: str) -> tuple[Tensor, Tensor]:
    """The samples of a torch Dataset, and their labels."""
    try:
        pairs = [(tensor_of(x, name), tensor_of(y, name)) for x, y in (dataset[i] for i in range(len(dataset)))]
        return torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])
    except (TypeError, ValueError, RuntimeError) as e:
        raise Mistake(
            f"{name}: the Dataset must have pairs (x, y) of tensors or arrays, all x of one shape and type "
            f"({str(e).splitlines()[0]}); of pictures, a transform such as torchvision's ToTensor() makes tensors"
        ) from e


def tensor_of(part: Any, name: str) -> Tensor:
    """The tensor or array on the CPU, without its graph."""
    try:
        return torch.as_tensor(part).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as e:
        raise Mistake(f"{name} is of type {type(part).__name__}; allowed: a tensor or an array of numbers") from e


@dataclass(frozen=True, eq=False)  # equal to no other, so that none of before is read where the memory has changed
class Given(Source):
    """The images that were given to `nobackprop.train(data=..., test=...)`, by the fingerprint of their content.

    Raises Mistake where these images are not given in this process at present.
    """

    fingerprint: str | None
    name = "given"
    where = "data and test"
    remedy = "Give others to nobackprop.train."

    def __post_init__(self) -> None:
        if self.fingerprint not in _held:
            raise Mistake(
                "dataset=given is for images in the memory of a Python process, as in nobackprop.train(data=(x, y), "
                "test=(x2, y2)), and these are not in this one's"
            )

    @property
    def _images(self) -> tuple[Images, Images]:
        return _held[self.fingerprint or ""]

    @property
    def shape(self) -> ImageShape:
        channels, height, width = self._images[0].pixels.shape[1:]
        return channels, height, width

    @property
    def dtype(self) -> torch.dtype:
        return self._images[0].pixels.dtype

    @property
    def num_classes(self) -> int:
        """One more than the highest class number."""
        return 1 + max(int(images.labels.max()) for images in self._images)

    @property
    def checksum(self) -> str | None:
        return self.fingerprint

    def read(self) -> tuple[Images, Images]:
        return self._images
