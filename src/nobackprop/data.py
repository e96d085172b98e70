"""Images: where they come from, what one seed trains on, and the mini-batches of several seeds at once.

Everything is held in memory as uint8. A `Source` reads a `Dataset`; a `Task` says which of its images one seed trains,
validates and tests on; `TrainBatches` and `EvalBatches` gather them, with a leading axis of seeds, on the device.
"""

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from http.client import HTTPException
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from nobackprop.streams import stream

CHUNK_STEPS = 100  # the most mini-batches that are gathered at once
CHUNK_BYTES = 8_000_000  # and about how many bytes of pixels

Shape = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Images:
    """Pixels (n, C, H, W) uint8 and labels (n,) int64."""

    pixels: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Dataset:
    """The training and test images of a data set; labels are 0..num_classes-1."""

    name: str
    train: Images
    test: Images
    num_classes: int

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with any pixel or label: of sha256 over all bytes, train before test."""
        digest = sha256()
        for images in (self.train, self.test):
            for tensor in (images.pixels, images.labels):
                digest.update(tensor.reshape(-1).numpy().data)
        return digest.hexdigest()[:16]


class Source(ABC):
    """A data set that can be read. What it holds is known before: its name, the shape (C, H, W), how many classes."""

    name: str
    shape: Shape
    num_classes: int
    counts: tuple[int | None, int | None] = (None, None)  # training and test images; None: any number
    where: str  # the folder it is read from
    remedy: str  # what to do when the images are not as declared

    def load(self) -> Dataset:
        """The checked data set; the last two are kept, so that the runs of a sweep read it once.

        Raises FileNotFoundError where files are missing and ValueError where they hold anything else than they
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
    return Dataset(source.name, train, test, source.num_classes)


def check(images: Images, source: Source, split: str, count: int | None = None) -> None:
    """Raises ValueError unless the images are what the source declares, `count` of them where that is known."""

    def need(ok: bool, found: str, allowed: str) -> None:
        if not ok:
            raise ValueError(
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
        from sklearn.datasets import load_digits

        values, targets = load_digits(return_X_y=True)
        pixels = (torch.from_numpy(values) * (255 / 16)).round().to(torch.uint8).view(-1, *self.shape)
        labels = torch.from_numpy(targets).long()
        test = torch.zeros(len(labels), dtype=torch.bool)
        for label in range(self.num_classes):
            test[(labels == label).nonzero()[::5]] = True
        return Images(pixels[~test], labels[~test]), Images(pixels[test], labels[test])


@dataclass(frozen=True)
class Facts:
    """What is known of a torchvision data set: its folder, shape, classes, training and test images."""

    folder: str
    shape: Shape
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
            raise ValueError(f"dataset {self.dataset!r} is not known; allowed: {', '.join(TORCHVISION)}")

    @property
    def name(self) -> str:
        return self.dataset

    @property
    def shape(self) -> Shape:
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
        needed = _cifar_files(cls) if hasattr(cls, "train_list") else self._idx_files()
        missing, wrong = [], []
        for name, right in needed.items():
            path = Path(self.where, name)
            if not path.is_file():
                missing.append(name)
            elif fault := _md5_fault(path, right) if isinstance(right, str) else _idx_fault(path, right):
                wrong.append(f"{path} {fault}")
        if wrong:
            raise ValueError(f"{self.name} can't be read: {'; '.join(wrong)}. {self.remedy}")
        if not missing:
            return
        need = f"{self.name} needs the files {', '.join(missing)} in {self.where}"
        if not self.download:
            raise FileNotFoundError(f"{need}. Set `dataset.source.download=true`, or {self._elsewhere}.")
        try:
            cls(root, download=True)
        except (OSError, RuntimeError, HTTPException) as error:
            said = " ".join(str(error).split())
            remedy = f"Run again with a network, copy the files there, or {self._elsewhere}."
            raise FileNotFoundError(f"{need}, and the download failed: {said}. {remedy}") from error

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
    shape: Shape
    num_classes: int
    train: str
    test: str
    image_column: str | None = None
    label_column: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if len(self.shape) != 3 or self.shape[0] not in (1, 3):
            raise ValueError(f"shape {self.shape} is not allowed; it must be (1, H, W) or (3, H, W)")

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
            raise FileNotFoundError(
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
                    raise ValueError(
                        f"{path}: column {image!r} is {types[0]} and {label!r} is {types[1]}; allowed: a struct with "
                        f"bytes, and an int. {self.remedy}"
                    )
                table = file.read(columns=[f"{image}.bytes", label]).flatten()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is not a readable Parquet file: {error}. {self.remedy}") from error
        if f"{image}.bytes" not in table.column_names:
            raise ValueError(f"{path}: column {image!r} has no field 'bytes'. {self.remedy}")
        labels = table[label].to_pylist()
        if None in labels:
            raise ValueError(f"{path}, row {labels.index(None)} has no label. {self.remedy}")
        blobs = table[f"{image}.bytes"].to_pylist()
        pixels = _decode(blobs, self.shape, lambda row: f"{path}, row {row}", self.remedy)
        return pixels, torch.tensor(labels, dtype=torch.int64)

    def _column(self, path: Path, found: list[str], name: str | None, usual: tuple[str, ...]) -> str:
        allowed = (name,) if name else usual
        for column in allowed:
            if column in found:
                return column
        raise ValueError(f"{path} has the columns {found}; needed: {' or '.join(allowed)}. {self.remedy}")


@dataclass(frozen=True)
class Folder(Source):
    """ImageNet's layout: root/train/<class>/*.jpg and root/val/<class>/*.jpg; class i is the i-th folder by name.

    Each image becomes RGB, its shorter side `size`, and is cropped about its centre to (3, size, size). All are held
    in memory, size * size * 3 bytes each.
    """

    root: str | Path
    name: str
    size: int
    train: str = "train"
    test: str = "val"

    @property
    def shape(self) -> Shape:
        return (3, self.size, self.size)

    @property
    def where(self) -> str:
        return str(Path(self.root).expanduser())

    @property
    def remedy(self) -> str:
        return "Correct `dataset.source`, or put whole files there."

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; raises FileNotFoundError without a folder of training images."""
        return self._classes(self.train)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def _classes(self, split: str) -> tuple[str, ...]:
        folder = Path(self.where, split)
        names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        if not names:
            raise FileNotFoundError(
                f"{self.name}: {folder} holds no folder; needed: one folder of images for each class. {self.remedy}"
            )
        return tuple(names)

    def read(self) -> tuple[Images, Images]:
        names = self._classes(self.test)
        if names != self.classes:
            raise ValueError(
                f"{self.name}: the classes in {Path(self.where, self.test)} are not those in {self.train}: without "
                f"{sorted({*self.classes} - {*names})}, with {sorted({*names} - {*self.classes})}. {self.remedy}"
            )
        return self._split(self.train), self._split(self.test)

    def _split(self, split: str) -> Images:
        files: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(self.classes):
            folder = Path(self.where, split, name)
            found = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
            if not found:
                raise FileNotFoundError(f"{self.name}: no .jpg, .jpeg or .png file in {folder}. {self.remedy}")
            files += found
            labels += [label] * len(found)
        pixels = _decode(files, self.shape, lambda i: str(files[i]), self.remedy, fit=True)
        return Images(pixels, torch.tensor(labels, dtype=torch.int64))


def _decode(
    images: Sequence[bytes | Path | None],
    shape: Shape,
    where: Callable[[int], str],
    remedy: str,
    fit: bool = False,
) -> Tensor:
    """The pixels (n, *shape) of encoded images; `fit` scales and crops them to the shape.

    Raises ValueError, with `where` of its index, for an image that can't be read or, without `fit`, has another size.
    """
    import numpy as np
    from PIL import Image, ImageOps

    channels, height, width = shape
    pixels = torch.empty(len(images), height, width, channels, dtype=torch.uint8)
    array = pixels.numpy()

    def decode(i: int) -> None:
        source = images[i]
        try:
            if source is None:
                raise ValueError("it has no bytes")
            with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as file:
                image = file.convert("L" if channels == 1 else "RGB")
        except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three for broken files
            raise ValueError(f"{where(i)} is not a readable image: {error}. {remedy}") from error
        if fit:
            image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
        elif image.size != (width, height):
            raise ValueError(
                f"{where(i)} is {image.height} x {image.width} pixels; allowed: {height} x {width}. {remedy}"
            )
        array[i] = np.asarray(image).reshape(height, width, channels)

    def decode_some(start: int) -> None:
        for i in range(start, min(start + 256, len(images))):
            decode(i)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(decode_some, range(0, len(images), 256)):
            pass
    return pixels.permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True, eq=False)
class Task:
    """What one seed trains on.

    `train` and `validation` are indices (int64) of training images, `test` of test images. The original label
    classes[i] became label i; `relabel` (num_classes,) maps each original label to the new one, -1 where unused.
    """

    seed: int
    classes: tuple[int, ...]
    train: Tensor
    validation: Tensor
    test: Tensor
    relabel: Tensor


def task(
    dataset: Dataset,
    seed: int,
    *,
    classes: int | None = None,
    classes_seed: int | None = None,
    validation: float = 0.1,
) -> Task:
    """The task of a seed: all classes, or `classes` of them drawn from `classes_seed` (the seed itself if None).

    `validation` is a fraction of the training images of these classes, or how many; the rest trains. Raises ValueError
    where that leaves no image on one side, or the data set doesn't have that many classes.
    """
    if classes is None:
        chosen = torch.arange(dataset.num_classes)
    elif 2 <= classes <= dataset.num_classes:
        draw = stream(seed if classes_seed is None else classes_seed, "classes")
        chosen = torch.randperm(dataset.num_classes, generator=draw)[:classes]
    else:
        raise ValueError(f"classes is {classes}; {dataset.name} allows 2 to {dataset.num_classes}, or null for all")
    relabel = torch.full((dataset.num_classes,), -1)
    relabel[chosen] = torch.arange(len(chosen))
    selected, test = ((relabel[images.labels] >= 0).nonzero().flatten() for images in (dataset.train, dataset.test))
    n = len(selected)
    if isinstance(validation, float) and not 0 < validation < 1:
        raise ValueError(f"validation is {validation}; allowed: a fraction between 0 and 1, or a number of images")
    count = round(validation * n) if isinstance(validation, float) else validation
    if not 0 < count < n:
        raise ValueError(
            f"validation is {validation}, {count} of the {n} training images of {dataset.name}; it must leave at least "
            "one image for training and one for validation"
        )
    if len(test) == 0:
        raise ValueError(f"{dataset.name} has no test image of the classes {chosen.tolist()}")
    mixed = selected[torch.randperm(n, generator=stream(seed, "split"))]
    return Task(seed, tuple(chosen.tolist()), mixed[count:], mixed[:count], test, relabel)


@lru_cache(maxsize=4)
def _resident(images: Images, device: torch.device) -> Tensor:
    """The pixels on the device: moved once, whoever asks."""
    return images.pixels.to(device).contiguous()


def _gather(pixels: Tensor, index: Tensor) -> Tensor:
    """The pixels (..., C, H, W) of images (n, C, H, W) by an index of any shape."""
    return pixels.index_select(0, index.reshape(-1)).view(*index.shape, *pixels.shape[1:])


def _augment(pixels: Tensor, flip: Tensor, shift: Tensor, crop: int) -> Tensor:
    """Images (n, C, H, W) cropped at `shift` (n, 2) of their copies with `crop` zeros on each side, then mirrored
    left to right where `flip` (n,)."""
    _, channels, height, width = pixels.shape
    rows = shift[:, :1] + torch.arange(height, device=pixels.device)
    across = torch.arange(width, device=pixels.device)
    columns = shift[:, 1:] + torch.where(flip[:, None], width - 1 - across, across)
    index = (rows[:, :, None] * (width + 2 * crop) + columns[:, None]).flatten(1)
    padded = pad(pixels, (crop,) * 4).flatten(2)
    return padded.gather(2, index[:, None].expand(-1, channels, -1)).view_as(pixels)


@dataclass(frozen=True, eq=False)
class TrainBatches:
    """The rest of the current epoch of S tasks, in chunks of k mini-batches of N = batch_size images.

    Iterating yields pixels (k, S, N, C, H, W) uint8 and labels (k, S, N) int64 on the device. `position()` is the
    number of mini-batches done before, over all epochs; it is asked once an iteration, so that a resumed run goes on
    in mid-epoch. The order of the images, and the augmentation by `flip` (half of the images) and `crop` (pixels of
    zero padding), depend on each task's seed and the epoch alone. An incomplete last mini-batch is left out, and
    nothing comes after `max_steps` mini-batches in all.

    Raises ValueError for a batch size above the number of training images, and for tasks whose epochs are not equally
    many mini-batches.
    """

    dataset: Dataset
    tasks: Sequence[Task]
    batch_size: int
    position: Callable[[], int]
    device: torch.device | str
    max_steps: int | None = None
    flip: bool = False
    crop: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.crop < 0:
            raise ValueError(f"batch_size is {self.batch_size} and crop {self.crop}; allowed: at least 1 and 0")
        fewest = min(len(task.train) for task in self.tasks)
        if self.batch_size > fewest:
            raise ValueError(f"batch_size is {self.batch_size}, but there are only {fewest} training images")
        lengths = {task.seed: len(task.train) // self.batch_size for task in self.tasks}
        if len({*lengths.values()}) > 1:
            raise ValueError(
                f"seeds trained together need equally many mini-batches an epoch, but have (by seed) {lengths}; train "
                "them one by one, or give them the same classes with `dataset.classes_seed`"
            )

    @property
    def per_epoch(self) -> int:
        """Mini-batches an epoch."""
        return len(self.tasks[0].train) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device, images = torch.device(self.device), self.dataset.train
        pixels = _resident(images, device)
        epoch, start = divmod(self.position(), self.per_epoch)
        end = self.per_epoch
        if self.max_steps is not None:
            end = min(end, self.max_steps - epoch * self.per_epoch)
        tables = [torch.stack(column).to(device) for column in zip(*self._epoch(epoch), strict=True)]
        bytes_a_step = len(self.tasks) * self.batch_size * pixels[0].numel()
        size = max(1, min(CHUNK_STEPS, CHUNK_BYTES // bytes_a_step))
        for first in range(start, end, size):
            last = min(first + size, end)
            # tables have the seed first, chunks the mini-batch
            index, labels, flip, shift = (table[:, first:last].transpose(0, 1).contiguous() for table in tables)
            chunk = _gather(pixels, index)
            if self.flip or self.crop:
                flat = chunk.flatten(0, 2)
                chunk = _augment(flat, flip.flatten(), shift.flatten(0, 2), self.crop).view_as(chunk)
            yield chunk, labels

    def _epoch(self, epoch: int) -> Iterator[tuple[Tensor, ...]]:
        """For each task the images of an epoch: indices, labels, flips (each steps, N) and shifts (steps, N, 2)."""
        for task in self.tasks:
            n = len(task.train)
            index = task.train[torch.randperm(n, generator=stream(task.seed, "order", epoch))]
            labels = task.relabel[self.dataset.train.labels[index]]
            augment = stream(task.seed, "augment", epoch)
            flip = (torch.rand(n, generator=augment) < 0.5) & self.flip
            shift = torch.randint(2 * self.crop + 1, (n, 2), generator=augment)
            used = self.per_epoch * self.batch_size
            yield tuple(
                column[:used].unflatten(0, (self.per_epoch, self.batch_size)) for column in (index, labels, flip, shift)
            )


class EvalBatches:
    """Images to evaluate S seeds on, in the order of their index tables (one a seed, of any length).

    Iterating yields pixels (S, M, C, H, W) uint8, labels (S, M) int64 by each seed's `relabels`, and a mask (S, M)
    bool: False where a seed has no more images and its first one stands in. M is at most `batch_size`. Raises
    ValueError for an empty table.
    """

    def __init__(
        self,
        images: Images,
        tables: Sequence[Tensor],
        relabels: Sequence[Tensor],
        device: torch.device | str,
        batch_size: int = 1000,
    ) -> None:
        lengths = torch.tensor([len(table) for table in tables])
        if not lengths.all():
            raise ValueError(f"there must be an image to evaluate for each seed, but the seeds have {lengths.tolist()}")
        position = torch.arange(int(lengths.max()))
        mask = position < lengths[:, None]
        index = torch.stack([table[position * row] for table, row in zip(tables, mask, strict=True)])
        labels = torch.stack([relabel[images.labels[row]] for relabel, row in zip(relabels, index, strict=True)])
        self._pixels = _resident(images, torch.device(device))
        self._index, self._labels, self._mask = (table.to(device) for table in (index, labels, mask))
        self._size = max(1, min(batch_size, CHUNK_BYTES // (len(tables) * self._pixels[0].numel())))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        tables = (table.split(self._size, dim=1) for table in (self._index, self._labels, self._mask))
        for index, labels, mask in zip(*tables, strict=True):
            yield _gather(self._pixels, index), labels, mask
