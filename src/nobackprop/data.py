"""Images and where they come from: a `Source` reads a `Dataset` of uint8 pixels, in memory or mapped from a file."""

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from http.client import HTTPException
from importlib.util import find_spec
from io import BytesIO
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from nobackprop.mistakes import Missing, Mistake
from nobackprop.pixels import Pixels

if TYPE_CHECKING:
    from PIL import Image

ImageShape = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Images:
    """Pixels (n, C, H, W) uint8 and labels (n,) int64. Pixels may be mapped from a file of nothing else."""

    pixels: Tensor
    labels: Tensor
    file: Path | None = None


@dataclass(frozen=True, eq=False)
class Dataset:
    """The training and test images of a data set; labels are 0..num_classes-1.

    `checksum` is the fingerprint where it is known already. `validate_on_test` marks a protocol that selects and
    reports on the same images.
    """

    name: str
    train: Images
    test: Images
    num_classes: int
    checksum: str | None = None
    validate_on_test: bool = False

    @property
    def validation(self) -> Images:
        """The images that the validation images of a task are among."""
        return self.test if self.validate_on_test else self.train

    @cached_property
    def normalized(self) -> Pixels:
        """Pixels at mean 0 and deviation 1 over all training images, those of other classes and of validation too."""
        return Pixels.normalized(self.train.pixels)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with any pixel or label: of sha256 over all bytes, train before test."""
        if self.checksum is not None:
            return self.checksum
        digest = sha256()
        for images in (self.train, self.test):
            for tensor in (images.pixels, images.labels):
                digest.update(tensor.reshape(-1).numpy().data)
        return digest.hexdigest()[:16]


class Source(ABC):
    """A data set that can be read. What it holds is known before: its name, the shape (C, H, W), how many classes."""

    name: str
    shape: ImageShape
    num_classes: int
    counts: tuple[int | None, int | None] = (None, None)  # training and test images; None: any number
    checksum: str | None = None  # the fingerprint of what was read; None: made from all bytes when asked for
    validate_on_test: bool = False  # select and report on the same images
    where: str  # the folder it is read from
    remedy: str  # what to do when the images are not as declared

    def load(self) -> Dataset:
        """The checked data set; the last two are kept, so that the runs of a sweep read it once.

        Raises Missing where files are missing and Mistake where they hold anything else than they
        should; both say what was found where, what is allowed and what to do.
        """
        return _load(self)

    @abstractmethod
    def read(self) -> tuple[Images, Images]:
        """The training and the test images, not checked yet."""


@lru_cache(maxsize=2)
def _load(source: Source) -> Dataset:
    train, test = source.read()
    check(train, source, "training", source.counts[0])
    check(test, source, "test", source.counts[1])
    return Dataset(source.name, train, test, source.num_classes, source.checksum, source.validate_on_test)


def check(images: Images, source: Source, split: str, count: int | None = None) -> None:
    """Raises Mistake unless the images are what the source declares, `count` of them where that is known."""

    def need(ok: bool, found: str, allowed: str) -> None:
        if not ok:
            raise Mistake(
                f"{source.name}: the {split} images in {source.where} have {found}; allowed: {allowed}. {source.remedy}"
            )

    pixels, labels = images.pixels, images.labels
    n, top = len(pixels), source.num_classes - 1
    need(pixels.dtype == torch.uint8, f"pixels of {pixels.dtype}", "torch.uint8")
    need(labels.dtype == torch.int64, f"labels of {labels.dtype}", "torch.int64")
    need(pixels.shape[1:] == source.shape, f"the shape {tuple(pixels.shape[1:])}", f"{source.shape}")
    need(labels.shape == (n,), f"labels of shape {tuple(labels.shape)} for {n} images", "one label an image")
    need(n > 0, "no image", "at least one")
    need(count in (None, n), f"{n} images", f"{count}")
    low, high = int(labels.min()), int(labels.max())
    need(low >= 0 and high <= top, f"labels from {low} to {high}", f"0 to {top}")


@dataclass(frozen=True)
class Digits(Source):
    """scikit-learn's digits: 8x8 pixels, 17 grey levels (here 0..255), part of the package, so no download.

    They come without a test split. Here every fifth image of each class, from its first, is a test image: the same
    for all seeds, about 20 %.
    """

    name = "digits"
    shape = (1, 8, 8)
    num_classes = 10
    where = "scikit-learn"
    remedy = "Install scikit-learn again."

    def read(self) -> tuple[Images, Images]:
        # What sklearn.datasets.load_digits reads; importing that takes seconds, since it brings SciPy and pandas.
        package = find_spec("sklearn")
        if package is None or package.origin is None:
            raise Missing(f"digits are a part of scikit-learn, which is not installed. {self.remedy}")
        rows = np.loadtxt(Path(package.origin).parent / "datasets/data/digits.csv.gz", np.float64, delimiter=",")
        values, labels = torch.from_numpy(rows).tensor_split([64], 1)
        pixels = (values * (255 / 16)).round().to(torch.uint8).view(-1, *self.shape)
        labels = labels.flatten().long()
        test = torch.zeros(len(labels), dtype=torch.bool)
        for label in range(self.num_classes):
            test[(labels == label).nonzero()[::5]] = True
        return Images(pixels[~test], labels[~test]), Images(pixels[test], labels[test])


@dataclass(frozen=True)
class Facts:
    """What is known of a torchvision data set: its folder, shape, classes, training and test images."""

    folder: str
    shape: ImageShape
    num_classes: int
    counts: tuple[int, int]


TORCHVISION = {
    "MNIST": Facts("MNIST/raw", (1, 28, 28), 10, (60_000, 10_000)),
    "FashionMNIST": Facts("FashionMNIST/raw", (1, 28, 28), 10, (60_000, 10_000)),
    "KMNIST": Facts("KMNIST/raw", (1, 28, 28), 10, (60_000, 10_000)),
    "CIFAR10": Facts("cifar-10-batches-py", (3, 32, 32), 10, (50_000, 10_000)),
    "CIFAR100": Facts("cifar-100-python", (3, 32, 32), 100, (50_000, 10_000)),
}


@dataclass(frozen=True)
class Torchvision(Source):
    """A data set that torchvision downloads and reads: a key of `TORCHVISION`, in torchvision's layout under `root`.

    Files that are there are used as they are, without network. Missing ones are downloaded if `download` is true.
    """

    dataset: str
    root: str | Path
    download: bool = True

    def __post_init__(self) -> None:
        if self.dataset not in TORCHVISION:
            raise Mistake(f"dataset {self.dataset!r} is not known; allowed: {', '.join(TORCHVISION)}")

    @property
    def name(self) -> str:
        return self.dataset

    @property
    def shape(self) -> ImageShape:
        return TORCHVISION[self.dataset].shape

    @property
    def num_classes(self) -> int:
        return TORCHVISION[self.dataset].num_classes

    @property
    def counts(self) -> tuple[int, int]:
        return TORCHVISION[self.dataset].counts

    @property
    def where(self) -> str:
        return str(Path(self.root).expanduser() / TORCHVISION[self.dataset].folder)

    @property
    def remedy(self) -> str:
        get = "run again to download them" if self.download else "set `dataset.source.download=true`"
        return f"Delete the wrong files and {get}, or {self._elsewhere}."

    @property
    def _elsewhere(self) -> str:
        return f"point `paths.data` at a folder that holds {self.name}"

    def read(self) -> tuple[Images, Images]:
        import torchvision.datasets

        cls = getattr(torchvision.datasets, self.dataset)
        root = Path(self.root).expanduser()
        self._provide(cls, root)
        train, test = (_images(cls(root, train=train)) for train in (True, False))
        return train, test

    def _provide(self, cls: Any, root: Path) -> None:
        """Checks the files that are there (torchvision doesn't notice a cut idx file), downloads those that are not."""
        missing, wrong = self._faults(cls)
        cause, failed = None, ""
        if (missing or wrong) and self.download:
            try:
                root.mkdir(parents=True, exist_ok=True)
                with FileLock(root / f".{self.dataset}.lock"):  # of the jobs of a sweep one downloads, the others wait
                    missing, wrong = self._faults(cls)
                    if missing and not wrong:
                        cls(root, download=True)
                        missing = []
            except (OSError, RuntimeError, HTTPException) as error:
                cause, failed = error, " ".join(str(error).split())
        if wrong:
            raise Mistake(f"{self.name} can't be read: {'; '.join(wrong)}. {self.remedy}")
        if missing:
            text = f"{self.name} needs the files {', '.join(missing)} in {self.where}"
            if self.download:
                remedy = f"Run again with a network, copy the files there, or {self._elsewhere}."
                raise Missing(f"{text}, and the download failed: {failed}. {remedy}") from cause
            raise Missing(f"{text}. Set `dataset.source.download=true`, or {self._elsewhere}.")

    def _faults(self, cls: Any) -> tuple[list[str], list[str]]:
        """The names of the files that are missing, and what is wrong with others."""
        needed = _cifar_files(cls) if hasattr(cls, "train_list") else self._idx_files()
        missing, wrong = [], []
        for name, right in needed.items():
            path = Path(self.where, name)
            if not path.is_file():
                missing.append(name)
            elif fault := _md5_fault(path, right) if isinstance(right, str) else _idx_fault(path, right):
                wrong.append(f"{path} {fault}")
        return missing, wrong

    def _idx_files(self) -> dict[str, tuple[int, ...]]:
        """The name of each file of MNIST's format and the sizes in its header."""
        return {
            f"{split}-{kind}": (count, *sizes)
            for split, count in zip(("train", "t10k"), self.counts, strict=True)
            for kind, sizes in (("images-idx3-ubyte", self.shape[1:]), ("labels-idx1-ubyte", ()))
        }


def _cifar_files(cls: Any) -> dict[str, str]:
    """The name and md5 sum of each file that torchvision's class reads."""
    return dict([*cls.train_list, *cls.test_list, (cls.meta["filename"], cls.meta["md5"])])


def _idx_fault(path: Path, sizes: tuple[int, ...]) -> str:
    """What is wrong with a file in MNIST's format, big-endian magic number and sizes, then bytes; empty: nothing."""
    header = (0x0800 + len(sizes), *sizes)  # 08: unsigned bytes
    need, have = 4 * len(header) + prod(sizes), path.stat().st_size
    with path.open("rb") as file:
        start = file.read(4 * len(header))
    found = tuple(number for (number,) in struct.iter_unpack(">I", start[: len(start) // 4 * 4]))
    right = found == header and have == need
    return "" if right else f"has {have} bytes and the header {found}, must have {need} bytes and {header}"


def _md5_fault(path: Path, md5: str) -> str:
    from torchvision.datasets.utils import calculate_md5

    found = calculate_md5(path)
    return "" if found == md5 else f"has the md5 sum {found}, must have {md5}"


def _images(split: Any) -> Images:
    """What a torchvision data set holds: (n, H, W) or (n, H, W, C), tensor or array."""
    pixels = torch.as_tensor(split.data)
    pixels = pixels[:, None] if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
    return Images(pixels.contiguous(), torch.as_tensor(split.targets, dtype=torch.int64))


@dataclass(frozen=True)
class Parquet(Source):
    """Parquet files in Hugging Face's layout: a column of {bytes, path} with JPEG or PNG bytes, one of int labels.

    `train` and `test` are glob patterns under `root`. The columns are `image_column`, else `img` or `image`, and
    `label_column`, else `label` or `fine_label`. Images become RGB, or grey where shape[0] is 1.
    """

    root: str | Path
    name: str
    shape: ImageShape
    num_classes: int
    train: str
    test: str
    image_column: str | None = None
    label_column: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if len(self.shape) != 3 or self.shape[0] not in (1, 3):
            raise Mistake(f"shape {self.shape} is not allowed; it must be (1, H, W) or (3, H, W)")

    @property
    def where(self) -> str:
        return str(Path(self.root).expanduser())

    @property
    def remedy(self) -> str:
        return "Correct `dataset.source`, or replace the files by whole ones."

    def read(self) -> tuple[Images, Images]:
        return self._split(self.train), self._split(self.test)

    def _split(self, pattern: str) -> Images:
        files = sorted(Path(self.where).glob(pattern))
        if not files:
            raise Missing(
                f"{self.name}: no file {pattern} in {self.where}. Put it there, or point `paths.data` at a folder "
                "that holds it."
            )
        pixels, labels = zip(*map(self._file, files), strict=True)
        return Images(torch.cat(pixels), torch.cat(labels))

    def _file(self, path: Path) -> tuple[Tensor, Tensor]:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile

        try:
            with ParquetFile(path) as file:
                schema = file.schema_arrow
                image = self._column(path, schema.names, self.image_column, ("img", "image"))
                label = self._column(path, schema.names, self.label_column, ("label", "fine_label"))
                types = schema.field(image).type, schema.field(label).type
                if not (pa.types.is_struct(types[0]) and pa.types.is_integer(types[1])):
                    raise Mistake(
                        f"{path}: column {image!r} is {types[0]} and {label!r} is {types[1]}; allowed: a struct with "
                        f"bytes, and an int. {self.remedy}"
                    )
                table = file.read(columns=[f"{image}.bytes", label]).flatten()
        except (pa.ArrowException, OSError) as error:
            raise Mistake(f"{path} is not a readable Parquet file: {error}. {self.remedy}") from error
        if f"{image}.bytes" not in table.column_names:
            raise Mistake(f"{path}: column {image!r} has no field 'bytes'. {self.remedy}")
        labels = table[label].to_pylist()
        if None in labels:
            raise Mistake(f"{path}, row {labels.index(None)} has no label. {self.remedy}")
        blobs = table[f"{image}.bytes"].to_pylist()
        pixels = _decode(blobs, self.shape, lambda row: f"{path}, row {row}", self.remedy)
        return pixels, torch.tensor(labels, dtype=torch.int64)

    def _column(self, path: Path, found: list[str], name: str | None, usual: tuple[str, ...]) -> str:
        allowed = (name,) if name else usual
        for column in allowed:
            if column in found:
                return column
        raise Mistake(f"{path} has the columns {found}; needed: {' or '.join(allowed)}. {self.remedy}")


def open_image(source: bytes | Path | None, where: str, remedy: str, mode: str = "RGB") -> "Image.Image":
    """A decoded image file, converted to RGB or, with mode "L", grey; Mistake, with `where`, if it can't be read."""
    from PIL import Image

    try:
        if source is None:
            raise Mistake("it has no bytes")
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as file:
            if file.mode == "F" or file.mode.startswith("I"):  # which Pillow would clip, not scale
                raise Mistake("it has more than 8 bits a channel")
            return file.convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all that Pillow raises for it
        raise Mistake(f"{where} is not a readable image: {error}. {remedy}") from error


def _decode(images: Sequence[bytes | None], shape: ImageShape, where: Callable[[int], str], remedy: str) -> Tensor:
    """The pixels (n, *shape) of encoded images.

    Raises Mistake, with `where` of its index, for an image that can't be read or has another size.
    """
    channels, height, width = shape
    pixels = torch.empty(len(images), height, width, channels, dtype=torch.uint8)
    array = pixels.numpy()

    def decode_some(start: int) -> None:
        for i in range(start, min(start + 256, len(images))):
            image = open_image(images[i], where(i), remedy, "L" if channels == 1 else "RGB")
            if image.size != (width, height):
                raise Mistake(
                    f"{where(i)} is {image.height} x {image.width} pixels; allowed: {height} x {width}. {remedy}"
                )
            array[i] = np.asarray(image).reshape(height, width, channels)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(decode_some, range(0, len(images), 256)):
            pass
    return pixels.permute(0, 3, 1, 2).contiguous()
