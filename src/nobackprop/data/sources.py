"""Images and their sources: a `Source` reads a `Dataset`, in memory or mapped from a file."""

import glob
import gzip
import logging
import os
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from hashlib import sha256
from http.client import HTTPException
from importlib.util import find_spec
from io import BytesIO
from math import prod
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nobackprop.data.checksums import Sums, as_folder, digest, locked, reading, some
from nobackprop.data.pixels import Pixels
from nobackprop.mistakes import Missing, Mistake

logger = logging.getLogger(__name__)

ImageShape = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Images:
    """Pixels (n, C, H, W), uint8 or float32, and labels (n,) int64.

    Pixels may be mapped from a file that holds nothing else.
    """

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
        """The images from which the validation images of a task are taken."""
        return self.test if self.validate_on_test else self.train

    @cached_property
    def selecting_on_test(self) -> "Dataset":
        """The same images, for a protocol that selects and reports on those of the test."""
        return replace(self, checksum=self.fingerprint, validate_on_test=True)

    @property
    def plain(self) -> Pixels:
        """Pixels as they are, where uint8 is divided by 255."""
        return Pixels(floats=self.train.pixels.is_floating_point())

    @cached_property
    def normalized(self) -> Pixels:
        """Pixels at mean 0 and deviation 1 over all training images, also of other classes and of validation."""
        return Pixels.normalized(self.train.pixels)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the sha256 sum of all bytes, train before test. They change with any pixel or label."""
        if self.checksum is not None:
            return self.checksum
        digest = sha256()
        for images in (self.train, self.test):
            for tensor in (images.pixels, images.labels):
                digest.update(tensor.reshape(-1).numpy().data)
        return digest.hexdigest()[:16]


class Source(ABC):
    """A data set that can be read. Its name, its shape (C, H, W) and its number of classes are known before."""

    name: str
    shape: ImageShape
    num_classes: int
    dtype: torch.dtype = torch.uint8  # of pixels; or torch.float32
    counts: tuple[int | None, int | None] = (None, None)  # numbers of training and test images; None: any
    checksum: str | None = None  # the fingerprint of what was read; None: made from all bytes when asked for
    validate_on_test: bool = False  # select and report on the same images
    where: str  # the folder it is read from
    remedy: str  # what to do when the images are not as declared

    def load(self) -> Dataset:
        """The checked data set. The last two are kept, so that the runs of a sweep read it once.

        Raises Missing where files are missing, and Mistake where their content is not as declared. Both say what was
        found where, what is allowed and what to do.
        """
        return _load(self)

    def files(self) -> Mapping[str, Path]:
        """Its files that carry no checksums, by their names in `where`. They are downloaded if that is asked for.

        Their content must stay as it was at the first reading.
        """
        return {}

    def official(self) -> bool | None:
        """Whether the `files` are those that the data set's makers published; None where that is not known."""
        return None

    @abstractmethod
    def read(self) -> tuple[Images, Images]:
        """The training and the test images, not checked yet."""


@lru_cache(maxsize=2)
def _load(source: Source) -> Dataset:
    with reading(source.name):
        found = source.files()
        sums = Sums(source.name, Path(source.where), found) if found else None
        known = sums is None or sums.known(source.remedy)
        train, test = source.read()
        check(train, source, "training", source.counts[0])
        check(test, source, "test", source.counts[1])
        dataset = Dataset(source.name, train, test, source.num_classes, source.checksum, source.validate_on_test)
        if sums is not None and not known:
            _keep(sums, source, dataset.fingerprint)
    return dataset


def _keep(sums: Sums, source: Source, fingerprint: str) -> None:
    """Keeps the checksums of a first reading, and says so, unless the published checksums are known."""
    official, kept = source.official(), sums.keep()
    if official:
        return
    what = "are read for the first time" if official is None else "are not the official ones"
    then = f"a change is refused from now on, by the checksums in {kept}" if kept else "no checksums could be kept"
    logger.warning(
        f"{source.name}: the files in {source.where} {what}, with fingerprint {fingerprint} in all records; {then}"
    )


def check(images: Images, source: Source, split: str, count: int | None = None) -> None:
    """Raises Mistake unless the images are what the source declares, `count` of them where that is known."""

    def need(ok: bool, found: str, allowed: str) -> None:
        if not ok:
            raise Mistake(
                f"{source.name}: the {split} images in {source.where} have {found}; allowed: {allowed}. {source.remedy}"
            )

    pixels, labels = images.pixels, images.labels
    n, top = len(pixels), source.num_classes - 1
    need(pixels.dtype == source.dtype, f"pixels of {pixels.dtype}", f"{source.dtype}")
    need(labels.dtype == torch.int64, f"labels of {labels.dtype}", "torch.int64")
    need(pixels.shape[1:] == source.shape, f"the shape {tuple(pixels.shape[1:])}", f"{source.shape}")
    need(labels.shape == (n,), f"labels of shape {tuple(labels.shape)} for {n} images", "one label an image")
    need(n > 0, "no image", "at least one")
    need(count in (None, n), f"{n} images", f"{count}")
    low, high = int(labels.min()), int(labels.max())
    need(low >= 0 and high <= top, f"labels from {low} to {high}", f"0 to {top}")


DIGITS = "6ebb3d2fee246a4e99363262ddf8a00a3c41bee6014c373ed9d9216ba7f651b8"  # of scikit-learn's file, unpacked


@dataclass(frozen=True)
class Digits(Source):
    """scikit-learn's digits: 8x8 pixels with 17 grey levels (here 0..255). They are a part of that package.

    They come without a test split. Here every fifth image of each class, from its first, is a test image. The split, of
    about 20 %, is the same for all seeds.
    """

    name = "digits"
    shape = (1, 8, 8)
    num_classes = 10
    where = "scikit-learn"
    remedy = "Install scikit-learn again."

    def read(self) -> tuple[Images, Images]:
        # The file of sklearn.datasets.load_digits. Importing that takes seconds, since it imports SciPy and pandas.
        package = find_spec("sklearn")
        if package is None or package.origin is None:
            raise Missing(f"digits are a part of scikit-learn, which is not installed. {self.remedy}")
        path = Path(package.origin).parent / "datasets/data/digits.csv.gz"
        try:
            text = gzip.decompress(path.read_bytes())
        except (FileNotFoundError, EOFError, zlib.error, gzip.BadGzipFile) as e:
            raise Mistake(f"{path} is damaged or missing: {e}. {self.remedy}") from e
        if (found := sha256(text).hexdigest()) != DIGITS:
            raise Mistake(f"{path} has the sha256 sum {found} when unpacked, must have {DIGITS}. {self.remedy}")
        rows = np.loadtxt(BytesIO(text), np.float64, delimiter=",")
        values, labels = torch.from_numpy(rows).tensor_split([64], 1)
        pixels = (values * (255 / 16)).round().to(torch.uint8).view(-1, *self.shape)
        labels = labels.flatten().long()
        test = torch.zeros(len(labels), dtype=torch.bool)
        for label in range(self.num_classes):
            test[(labels == label).nonzero()[::5]] = True
        return Images(pixels[~test], labels[~test]), Images(pixels[test], labels[test])


@dataclass(frozen=True)
class Facts:
    """What is known of a torchvision data set.

    `md5` has the published sums of its files in MNIST's format, in the order of `_idx_files`, where they are known.
    (torchvision has the sums of the compressed files.)
    """

    folder: str
    shape: ImageShape
    num_classes: int
    counts: tuple[int, int]  # training and test images
    md5: tuple[str, ...] = ()


TORCHVISION = {
    "MNIST": Facts(
        "MNIST/raw",
        (1, 28, 28),
        10,
        (60_000, 10_000),
        (
            "6bbc9ace898e44ae57da46a324031adb",
            "a25bea736e30d166cdddb491f175f624",
            "2646ac647ad5339dbf082846283269ea",
            "27ae3e4e09519cfbb04c329615203637",
        ),
    ),
    "FashionMNIST": Facts(
        "FashionMNIST/raw",
        (1, 28, 28),
        10,
        (60_000, 10_000),
        (
            "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            "9018921c3c673c538a1fc5bad174d6f9",
            "8181f5470baa50b63fa0f6fddb340f0a",
            "15d484375f8d13e6eb1aabb0c3f46965",
        ),
    ),
    "KMNIST": Facts("KMNIST/raw", (1, 28, 28), 10, (60_000, 10_000)),
    "CIFAR10": Facts("cifar-10-batches-py", (3, 32, 32), 10, (50_000, 10_000)),
    "CIFAR100": Facts("cifar-100-python", (3, 32, 32), 100, (50_000, 10_000)),
}


@dataclass(frozen=True)
class Torchvision(Source):
    """A data set that torchvision downloads: a key of `TORCHVISION`, in torchvision's layout under `root`.

    Files that exist are used as they are, without a network. Missing files are downloaded if `download` is true.
    CIFAR's files must have the published checksums. The other data sets may have their images in another order.
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
        return str(as_folder(as_folder(self.root) / TORCHVISION[self.dataset].folder))

    @property
    def remedy(self) -> str:
        get = "run again to download them" if self.download else "set `dataset.source.download=true`"
        return f"Delete the wrong files and {get}, or {self._elsewhere}."

    @property
    def _elsewhere(self) -> str:
        return f"point `paths.data` at a folder that holds {self.name}"

    def files(self) -> dict[str, Path]:
        self._provide()
        return {name: Path(self.where, name) for name in self._idx_files()}

    def official(self) -> bool | None:
        right = TORCHVISION[self.dataset].md5
        return [digest(Path(self.where, name), "md5") for name in self._idx_files()] == [*right] if right else None

    def read(self) -> tuple[Images, Images]:
        if idx := self._idx_files():
            pixels, labels, test_pixels, test_labels = (_idx(Path(self.where, file), idx[file]) for file in idx)
            return Images(pixels[:, None], labels.long()), Images(test_pixels[:, None], test_labels.long())
        train, test = (self._class(as_folder(self.root), train=train) for train in (True, False))
        return _images(train), _images(test)

    @property
    def _class(self) -> Any:
        import torchvision.datasets  # takes seconds

        return getattr(torchvision.datasets, self.dataset)

    def _provide(self) -> None:
        """Checks the files that exist and downloads the others."""
        missing, wrong = self._faults()
        cause, failed = None, ""
        if (missing or wrong) and self.download:
            try:
                with self._downloading():  # of the jobs of a sweep one downloads, the others wait
                    missing, wrong = self._faults()
                    if missing and not wrong:
                        self._class(as_folder(self.root), download=True)
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

    @contextmanager
    def _downloading(self) -> Iterator[None]:
        """Holds the lock of downloads to `root`. If the download fails, the new files are removed again."""
        root, where = as_folder(self.root), Path(self.where)
        archive = root / getattr(self._class, "filename", "")
        made = [path for path in (root, *root.parents) if not path.exists()]
        root.mkdir(parents=True, exist_ok=True)
        lock = root / f".{self.dataset}.lock"
        with locked(lock, f"downloading {self.name}"):
            new = [path for path in (where, *where.parents, archive) if not path.exists()]
            try:
                yield
            except BaseException:
                with suppress(OSError):
                    if where in new:
                        rmtree(where, ignore_errors=True)
                    if archive in new:
                        archive.unlink(missing_ok=True)
                    if made:
                        lock.unlink()
                    for path in where.parents:
                        if path in (*new, *made):
                            path.rmdir()
                raise

    def _faults(self) -> tuple[list[str], list[str]]:
        """The names of the missing files, and what is wrong with the others."""
        missing, wrong = [], []
        for name, right in (self._idx_files() or _cifar_files(self._class)).items():
            path = Path(self.where, name)
            if not path.exists():
                missing.append(name)
            elif not path.is_file():
                wrong.append(f"{path} is not a regular file")
            elif fault := _md5_fault(path, right) if isinstance(right, str) else _idx_fault(path, right):
                wrong.append(f"{path} {fault}")
        return missing, wrong

    def _idx_files(self) -> dict[str, tuple[int, ...]]:
        """The name of each file in MNIST's format and the sizes in its header; empty for CIFAR."""
        if self.shape[0] > 1:
            return {}
        return {
            f"{split}-{kind}": (count, *sizes)
            for split, count in zip(("train", "t10k"), self.counts, strict=True)
            for kind, sizes in (("images-idx3-ubyte", self.shape[1:]), ("labels-idx1-ubyte", ()))
        }


def _cifar_files(cls: Any) -> dict[str, str]:
    """The name and md5 sum of each file that torchvision's class reads."""
    return dict([*cls.train_list, *cls.test_list, (cls.meta["filename"], cls.meta["md5"])])


def _idx_fault(path: Path, sizes: tuple[int, ...]) -> str:
    """What is wrong with a file in MNIST's format (big-endian magic number and sizes, then bytes), or nothing."""
    header = (0x0800 + len(sizes), *sizes)  # 08: unsigned bytes
    need, have = 4 * len(header) + prod(sizes), path.stat().st_size
    with path.open("rb") as file:
        start = file.read(4 * len(header))
    found = tuple(number for (number,) in struct.iter_unpack(">I", start[: len(start) // 4 * 4]))
    right = found == header and have == need
    return "" if right else f"has {have} bytes and the header {found}, must have {need} bytes and {header}"


def _idx(path: Path, sizes: tuple[int, ...]) -> Tensor:
    """The bytes of a file in MNIST's format."""
    return torch.from_numpy(np.fromfile(path, np.uint8, offset=4 * (1 + len(sizes)))).view(sizes)


def _md5_fault(path: Path, md5: str) -> str:
    found = digest(path, "md5")
    return "" if found == md5 else f"has the md5 sum {found}, must have {md5}"


def _images(split: Any) -> Images:
    """Images of torchvision's CIFAR, which holds an array (n, H, W, C) and a list of labels."""
    return Images(torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets))


@dataclass(frozen=True)
class Parquet(Source):
    """Parquet files in Hugging Face's layout: a column of {bytes, path} with encoded images, and one of int labels.

    `train` and `test` are glob patterns under `root`. The columns are `image_column`, by default `img` or `image`, and
    `label_column`, by default `label` or `fine_label`. Images are converted to RGB, or to grey where shape[0] is 1.
    Paths in the column are not followed.
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
        if len(self.shape) != 3 or self.shape[0] not in (1, 3) or min(self.shape) < 1:
            raise Mistake(f"shape {self.shape} is not allowed; it must be (1, H, W) or (3, H, W)")

    @property
    def where(self) -> str:
        return str(as_folder(self.root))

    @property
    def remedy(self) -> str:
        return "Correct `dataset.source`, or replace the files by whole ones."

    def files(self) -> dict[str, Path]:
        train, test = self._matching(self.train), self._matching(self.test)
        if both := train.keys() & test.keys():
            raise Mistake(
                f"{self.name}: {some(both)} in {self.where} would train and test: the patterns {self.train} and "
                f"{self.test} must match different files"
            )
        return train | test

    def _matching(self, pattern: str) -> dict[str, Path]:
        """The files that a pattern matches, ordered by name. Only a leading dot in a pattern matches one in a name."""
        names = sorted(glob.glob(os.path.expanduser(pattern), root_dir=self.where, recursive=True), key=Path)
        if not names:
            raise Missing(
                f"{self.name}: no file {pattern} in {self.where}. Put it there, or point `paths.data` at a folder "
                "that holds it."
            )
        return {name: Path(self.where, name) for name in names}

    def read(self) -> tuple[Images, Images]:
        return self._split(self.train), self._split(self.test)

    def _split(self, pattern: str) -> Images:
        parts = [part for path in self._matching(pattern).values() for part in self._parts(path)]
        pixels = [torch.empty(0, *self.shape, dtype=torch.uint8), *(part for part, _ in parts)]
        labels = [torch.empty(0, dtype=torch.int64), *(part for _, part in parts)]
        return Images(torch.cat(pixels), torch.cat(labels))

    def _parts(self, path: Path) -> Iterator[tuple[Tensor, Tensor]]:
        """The pixels and labels of a file, some rows at a time."""
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile

        row = 0
        try:
            # Opened here, since pyarrow takes some names for addresses and refuses others as text.
            with path.open("rb") as opened, ParquetFile(opened, page_checksum_verification=True) as file:
                image, label = self._columns(path, file.schema_arrow)
                some_rows = self._rows_at_once(path, file.metadata)
                for rows in file.iter_batches(some_rows, columns=[f"{image}.bytes", label]):
                    labels, blobs = rows.column(label), rows.column(image).flatten()[0].to_pylist()
                    if labels.null_count:
                        first = row + labels.is_null().to_pylist().index(True)
                        raise Mistake(f"{path}, column {label!r}, row {first} has no label. {self.remedy}")
                    pixels = self._decoded(blobs, f"{path}, column {image!r}", row)
                    yield pixels, torch.tensor(labels.cast(pa.int64()).to_pylist())
                    row += len(blobs)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise Mistake(f"{path} is not a readable Parquet file: {error}. {self.remedy}") from error

    def _columns(self, path: Path, schema: Any) -> tuple[str, str]:
        """The names of the columns of images and labels. Raises Mistake where one is missing or has another type."""
        import pyarrow.types as types

        image = self._column(path, schema.names, self.image_column, ("img", "image"))
        label = self._column(path, schema.names, self.label_column, ("label", "fine_label"))
        kind = schema.field(image).type
        if not types.is_struct(kind):
            raise Mistake(f"{path}: column {image!r} is {kind}; allowed: a struct with bytes. {self.remedy}")
        if kind.get_field_index("bytes") < 0:
            raise Mistake(f"{path}: column {image!r} has not one field 'bytes', but {kind}. {self.remedy}")
        content = kind.field("bytes").type
        if not (types.is_binary(content) or types.is_large_binary(content)):  # a text would be taken for a path
            raise Mistake(f"{path}: field 'bytes' of column {image!r} is {content}; allowed: binary. {self.remedy}")
        if not types.is_integer(schema.field(label).type):
            raise Mistake(f"{path}: column {label!r} is {schema.field(label).type}; allowed: an int. {self.remedy}")
        return image, label

    def _column(self, path: Path, found: list[str], name: str | None, usual: tuple[str, ...]) -> str:
        allowed = (name,) if name else usual
        for column in allowed:
            if found.count(column) == 1:
                return column
        raise Mistake(f"{path} has the columns {found}; needed: one {' or '.join(allowed)}. {self.remedy}")

    @property
    def _most(self) -> int:
        """The most bytes that an encoded image may have: uncompressed RGBA of 16 bits, and 256 KB of metadata."""
        return 8 * prod(self.shape[1:]) + 2**18

    def _rows_at_once(self, path: Path, metadata: Any) -> int:
        """How many rows to unpack at once, into 1 GB at most. (Equal values are stored once, so a file tells little.)

        Raises Mistake for a file that would fill the memory in any case, since a few KB can unpack to any size.
        """
        largest = 1
        for i in range(metadata.num_row_groups):
            # Columns are not asked one by one: with a damaged file, pyarrow would then end the process.
            group = metadata.row_group(i)
            size = group.total_byte_size
            if size > group.num_rows * group.num_columns * self._most + 2**20:
                raise Mistake(
                    f"{path}: {group.num_rows:,} rows unpack to {size:,} bytes; allowed for images of shape "
                    f"{self.shape}: {self._most:,} a row and column. {self.remedy}"
                )
            largest = max(largest, size)
        need, have = metadata.num_rows * prod(self.shape), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if need > have:
            raise Mistake(
                f"{path}: {metadata.num_rows:,} images of shape {self.shape} need {need / 1e9:,.0f} GB of memory; this "
                f"machine has {have / 1e9:,.0f} GB. {self.remedy}"
            )
        return min(1024, max(1, 2**30 // largest))

    def _decoded(self, blobs: Sequence[bytes | None], column: str, row: int) -> Tensor:
        """The pixels (n, *shape) of n encoded images. The first is in that row of the column.

        Raises Mistake where an image can't be read or has another shape.
        """
        from nobackprop.data.decoding import open_image, quiet_decoding  # here, since digits need no Pillow

        channels, height, width = self.shape
        pixels = np.empty((len(blobs), height, width, channels), np.uint8)

        def decode(start: int) -> None:
            for i, blob in enumerate(blobs[start : start + 64], start):
                where = f"{column}, row {row + i}"
                if blob is None:
                    raise Mistake(f"{where} is not a readable image: it has no bytes. {self.remedy}")
                if len(blob) > self._most:
                    raise Mistake(f"{where} has {len(blob):,} bytes; allowed: {self._most:,}. {self.remedy}")
                mode = "L" if channels == 1 else "RGB"
                image = open_image(BytesIO(blob), where, self.remedy, mode, (width, height))
                pixels[i] = np.asarray(image).reshape(height, width, channels)

        with quiet_decoding(), ThreadPoolExecutor() as pool:
            for _ in pool.map(decode, range(0, len(blobs), 64)):
                pass
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
