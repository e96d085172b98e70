"""Image files in ImageNet's layout, made into pixels once and kept in a file that is mapped into memory."""

import logging
import os
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from math import prod
from pathlib import Path
from random import SystemRandom
from shutil import disk_usage
from threading import Lock
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from nobackprop.data.checksums import as_folder, locked, reading, some
from nobackprop.data.decoding import open_image, quiet_decoding
from nobackprop.data.sources import Images, ImageShape, Source
from nobackprop.mistakes import Missing, Mistake, Notice
from nobackprop.records.files import write_atomically
from nobackprop.records.machine import cores

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
BLOCK = 256  # images that are made together and share a checksum
SAMPLE = 8  # blocks of each split that are verified at every load
FORMAT = 2  # of the cache; increase it when pixels are made in another way. In 1 they were not turned by EXIF data

FOLDERS = {"train": "train", "test": "val"}  # of each split, under root
Blocks = dict[tuple[str, int], tuple[str, str]]  # of a split's i-th block: hashes of its source and of its pixels


class Index(BaseModel):
    """What a finished cache holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1, 2] = FORMAT
    shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    channels: Literal["RGB", "BGR"]
    classes: list[str]
    root: str  # the folder it was made from
    counts: dict[str, list[PositiveInt]]  # of train and test: the number of images of each class
    fingerprint: str


@dataclass(frozen=True)
class ImageNet(Source):
    """ImageNet's layout: root/train/<class>/<image> and root/val/<class>/<image>; class i is the i-th folder by name.

    Files of `SUFFIXES` are turned upright by their EXIF data, converted to RGB, cut to a square about their centre and
    scaled to (3, size, size). Of several frames the first is taken. Other files are left out, and a line says how many.
    Names with a leading dot and `__MACOSX` belong to the system and are not counted. The first run keeps these pixels
    in the folder `cache`, size * size * 3 bytes for each image (193 GB and 7.5 GB for ImageNet's training and
    validation images). If it is stopped, the next run goes on. After that, `root` is no longer needed. While it exists,
    it must hold files of the same names; a change of their content is not noticed. A load verifies some blocks of the
    cache, drawn at random, or with `verify` all of them.

    `literal` is the mDFA program's protocol. Channels are BGR, as OpenCV reads them. The validation folder serves for
    selection and for the test, so the figures are optimistic.
    """

    name: str
    root: str | Path
    cache: str | Path
    size: int = 224
    literal: bool = False
    verify: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise Mistake(f"size is {self.size}; allowed: 1 pixel or more")

    @property
    def shape(self) -> ImageShape:
        return (3, self.size, self.size)

    @property
    def where(self) -> str:
        return str(as_folder(self.root))

    @property
    def _resolved(self) -> str:
        return str(Path(self.where).resolve())

    @property
    def remedy(self) -> str:
        return "Correct `dataset.source`, or put whole files there."

    @property
    def validate_on_test(self) -> bool:
        return self.literal

    @property
    def checksum(self) -> str | None:
        with reading(self.name):
            index = self._index()
        return index and index.fingerprint

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The classes' names. Raises Missing where neither a folder of training images nor a finished cache exists."""
        with reading(self.name):
            index = self._index()
            return tuple(index.classes if index else self._folders(FOLDERS["train"]))

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def read(self) -> tuple[Images, Images]:
        if self._index() is None:
            self._build()
        index, blocks = self._index(), self._blocks()
        assert index is not None
        if self._resolved != index.root:
            told = f"{self.where} is not there, so {self._cache} is used, which was made from {index.root}"
            warnings.warn(told, Notice, stacklevel=2)
        self._check_pixels(index, blocks)
        self._check_files(index, blocks)
        return self._images(index, "train"), self._images(index, "test")

    def _images(self, index: Index, split: str) -> Images:
        counts = torch.tensor(index.counts[split])
        shape = (int(counts.sum()), *self.shape)
        # Mapped for reading only: a private writable mapping counts as memory, and is refused where it is larger.
        file = self._pixels(split)
        pixels = np.memmap(file, np.uint8, "r", shape=shape)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable")  # nothing writes to a dataset
            return Images(torch.from_numpy(pixels), torch.arange(len(counts)).repeat_interleave(counts), file)

    # What the cache consists of

    @property
    def _cache(self) -> Path:
        return as_folder(self.cache)

    def _pixels(self, split: str) -> Path:
        return self._cache / f"{split}.pixels"

    @property
    def _channels(self) -> Literal["RGB", "BGR"]:
        return "BGR" if self.literal else "RGB"

    @property
    def _redo(self) -> str:
        index = self._cache / "index.json"
        return f"Delete {index}: the next run makes what is wrong again, from the files in {self.where}"

    def _index(self) -> Index | None:
        """The cache's index, or None where it is not finished. Raises Mistake where it is of other images."""
        path = self._cache / "index.json"
        if not path.exists():
            return None
        try:
            index = Index.model_validate_json(path.read_bytes())
        except ValidationError as e:
            raise Mistake(
                f"{path} is damaged, or of another version of this program ({e.errors()[0]['msg']}). {self._redo}."
            ) from None
        if (index.shape, index.channels) != (self.shape, self._channels):
            raise Mistake(
                f"{path.parent} holds {index.channels} images of shape {index.shape}, but {self._channels} of shape "
                f"{self.shape} are asked for: choose another dataset.source.cache"
            )
        if Path(self.where).is_dir() and self._resolved != index.root:
            raise Mistake(
                f"{self.name}: {self._cache} was made from {index.root}, not from {self.where}. For other images "
                f"choose another dataset.source.cache. If these are the same images in a new place: {self._redo}."
            )
        return index

    def _blocks(self) -> Blocks:
        """The blocks that were made. A line that was cut short, when the program was killed, does not count."""
        path = self._cache / "blocks.txt"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        fields = [line.split() for line in lines]
        return {(f[0], int(f[1])): (f[2], f[3]) for f in fields if len(f) == 4 and f[1].isdecimal()}

    def _hash(self, split: str, count: int, block: int) -> str:
        """The hash of the pixels in the file, of `count` images from the start of the block."""
        size = prod(self.shape)
        with self._pixels(split).open("rb") as file:
            file.seek(block * BLOCK * size)
            return _hash(file.read(count * size))

    # Checks of a finished cache

    def _check_files(self, index: Index, blocks: Blocks) -> None:
        """Raises Mistake if the files are not those that the cache was made from."""
        for split, folder in FOLDERS.items():
            if not Path(self.where, folder).is_dir():
                continue
            tree, _ = self._tree(folder)
            made = [blocks[key][0] for key in sorted(blocks) if key[0] == split]
            if made == [self._recipe(paths, index.format) for paths in _divided(tree)]:
                continue
            then = dict(zip(index.classes, index.counts[split], strict=True))
            now = {name: len(files) for name, files in tree.items()}
            differ = sorted(name for name in {*then, *now} if then.get(name, 0) != now.get(name, 0))
            how = f"numbers differ in {some(differ)}" if differ else "some have other names"
            raise Mistake(
                f"{self.name}: the files in {Path(self.where, folder)} are not those that {self._cache} was made from, "
                f"{sum(then.values())} then and {sum(now.values())} now: {how}. Put the old files back, choose another "
                f"dataset.source.cache, or accept the new ones. {self._redo}."
            )

    def _check_pixels(self, index: Index, blocks: Blocks) -> None:
        """Raises Mistake if the cache, or a sample of its blocks, is not what was written."""
        if _fingerprint(index.counts, blocks) != index.fingerprint:
            raise Mistake(f"{self._cache / 'blocks.txt'} is damaged. {self._redo}.")
        for split, counts in index.counts.items():
            n, path = sum(counts), self._pixels(split)
            have, need = path.stat().st_size if path.exists() else 0, n * prod(self.shape)
            if have != need:
                raise Mistake(f"{path} has {have} bytes, must have {need}. {self._redo}.")
            numbers = range(-(-n // BLOCK))
            if not self.verify and len(numbers) > SAMPLE:
                numbers = SystemRandom().sample(numbers, SAMPLE)
            with ThreadPoolExecutor(cores()) as pool:
                hashes = pool.map(partial(self._hash, split, BLOCK), numbers)
                bad = sorted(i for i, found in zip(numbers, hashes, strict=True) if found != blocks[split, i][1])
            if bad:
                raise Mistake(
                    f"{path} is damaged in block {', '.join(map(str, bad))} of {BLOCK} images each. {self._redo}."
                )

    # Making it

    def _folders(self, split: str) -> list[str]:
        folder = Path(self.where, split)
        names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
        if not (shown := sorted(name for name in names if not _hidden(name))):
            raise Missing(
                f"{self.name}: {folder} holds no folder; needed: one folder of images for each class, or a finished "
                f"cache in {self._cache}. {self.remedy}"
            )
        return shown

    def _tree(self, split: str) -> tuple[dict[str, list[str]], Counter[str]]:
        """The image files of each class, both by name, and the number of other files of each kind.

        A million names are listed in seconds.
        """
        tree: dict[str, list[str]] = {name: [] for name in self._folders(split)}
        others = Counter[str]()
        with os.scandir(Path(self.where, split)) as entries:
            others["files beside the classes"] = sum(not (_hidden(e.name) or e.is_dir()) for e in entries)
        for name, images in tree.items():
            with os.scandir(Path(self.where, split, name)) as entries:
                for entry in entries:
                    if _hidden(entry.name):
                        continue
                    if other := _no_image(entry):
                        others[other] += 1
                    else:
                        images.append(entry.name)
            images.sort()
        return tree, others

    def _recipe(self, paths: list[str], format: int = FORMAT) -> str:
        return _hash("\n".join([f"{format} {self.size} {self._channels}", *paths]).encode())

    def _build(self) -> None:
        listed = {split: self._tree(folder) for split, folder in FOLDERS.items()}
        trees = {split: tree for split, (tree, _) in listed.items()}
        if trees["train"].keys() != trees["test"].keys():
            raise Mistake(
                f"{self.name}: the classes in {Path(self.where, FOLDERS['test'])} are not those in {FOLDERS['train']}: "
                f"without {some(trees['train'].keys() - trees['test'].keys())}, with "
                f"{some(trees['test'].keys() - trees['train'].keys())}. {self.remedy}"
            )
        for split, tree in trees.items():
            for name, files in tree.items():
                if not files:
                    folder = Path(self.where, FOLDERS[split], name)
                    raise Missing(f"{self.name}: no file {', '.join(SUFFIXES)} in {folder}. {self.remedy}")
                for text in (name, *files):
                    if "\n" in text or (not text.isascii() and any("\udc80" <= c <= "\udcff" for c in text)):
                        folder = str(Path(self.where, FOLDERS[split], name))
                        raise Mistake(
                            f"{self.name}: in {folder!a} the name {text!a} is not UTF-8, or has a line break: rename it"
                        )
        counts = {split: [len(files) for files in tree.values()] for split, tree in trees.items()}
        self._need_room(counts)
        self._cache.mkdir(parents=True, exist_ok=True)
        with locked(self._cache / "lock", f"making {self._cache}"):
            if self._index() is not None:
                return  # another process made it meanwhile
            index = self._make(trees, counts)
        others = sum((others for _, others in listed.values()), Counter())
        logger.warning(
            f"{self.name}: {self._cache} was made from {sum(counts['train']):,} training and {sum(counts['test']):,} "
            f"test images of {len(index.classes):,} classes in {self.where}, with fingerprint {index.fingerprint} in "
            f"all records; left out there: {', '.join(f'{n:,} {kind}' for kind, n in others.items()) or 'nothing'}"
        )

    def _make(self, trees: dict[str, dict[str, list[str]]], counts: dict[str, list[int]]) -> Index:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        for split, n in counts.items():
            with self._pixels(split).open("ab") as file:
                file.truncate(sum(n) * prod(self.shape))
        old, blocks, lock = self._blocks(), Blocks(), Lock()
        journal = self._cache / "blocks.txt"
        write_atomically(journal, _lines(old))
        console = Console(stderr=True)
        bar = Progress(
            *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("images")),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        task = bar.add_task(f"{self.name}: to {self._cache}", total=sum(map(sum, counts.values())))

        def make(job: tuple[str, int, list[str]]) -> None:
            split, i, paths = job
            recipe = self._recipe(paths)
            made, found = old.get((split, i), ("", ""))
            if made != recipe or found != self._hash(split, len(paths), i):
                pixels = np.empty((len(paths), *self.shape), np.uint8)
                for row, path in zip(pixels, paths, strict=True):
                    row[:] = self._decoded(Path(self.where, FOLDERS[split], path))
                with self._pixels(split).open("r+b") as file:
                    file.seek(i * BLOCK * prod(self.shape))
                    file.write(pixels.data)
                found = _hash(pixels.data)
            with lock:
                blocks[split, i] = recipe, found
                lines.write(_lines({(split, i): (recipe, found)}))
            bar.advance(task, len(paths))

        jobs = [(split, i, paths) for split, tree in trees.items() for i, paths in enumerate(_divided(tree))]
        with (
            quiet_decoding(),
            bar,
            journal.open("ab", buffering=0) as lines,
            ThreadPoolExecutor(cores()) as pool,  # decoding, scaling, hashing and writing let other threads run
        ):
            for _ in pool.map(make, jobs):  # the first block that fails ends it, after those that have begun
                pass
        for split in trees:
            with self._pixels(split).open("rb+") as file:
                os.fsync(file.fileno())
        write_atomically(journal, _lines(blocks))
        index = Index(
            shape=self.shape,
            channels=self._channels,
            classes=list(trees["train"]),
            root=self._resolved,
            counts=counts,
            fingerprint=_fingerprint(counts, blocks),
        )
        write_atomically(self._cache / "index.json", index.model_dump_json().encode())  # last: now it is finished
        return index

    def _need_room(self, counts: dict[str, list[int]]) -> None:
        """Raises Mistake where the disk has no room for that many images."""
        missing = sum(map(sum, counts.values())) * prod(self.shape)
        for split in counts:
            if (path := self._pixels(split)).exists():
                missing -= path.stat().st_blocks * 512  # a hole in a file takes no room
        there = next(path for path in (self._cache, *self._cache.parents) if path.exists())
        if (free := disk_usage(there).free) < missing:
            raise Mistake(
                f"{self.name}: the cache {self._cache} needs another {missing / 1e9:.1f} GB, the disk has "
                f"{free / 1e9:.1f} GB: choose another dataset.source.cache, or a smaller dataset.source.size"
            )

    def _decoded(self, path: Path) -> NDArray[np.uint8]:
        remedy = "Replace it by a whole file, or remove it, and run again: what is done already is kept."
        image = ImageOps.fit(open_image(path, str(path), remedy), (self.size, self.size), Image.Resampling.BILINEAR)
        pixels = np.asarray(image).transpose(2, 0, 1)
        return pixels[::-1] if self._channels == "BGR" else pixels


def _divided(tree: dict[str, list[str]]) -> list[list[str]]:
    """The files, named class/file, in blocks."""
    paths = [f"{name}/{file}" for name, files in tree.items() for file in files]
    return [paths[i : i + BLOCK] for i in range(0, len(paths), BLOCK)]


def _hash(content: bytes | memoryview) -> str:
    return sha256(content).hexdigest()[:32]


def _lines(blocks: Blocks) -> bytes:
    return "".join(f"{split} {i} {made} {found}\n" for (split, i), (made, found) in sorted(blocks.items())).encode()


def _fingerprint(counts: dict[str, list[int]], blocks: Blocks) -> str:
    """16 hex digits that change with any pixel or label."""
    parts = [f"{split} {n}" for split, n in sorted(counts.items())]
    parts += [f"{split} {i} {found}" for (split, i), (_, found) in sorted(blocks.items())]
    return _hash("\n".join(parts).encode())[:16]


def _hidden(name: str) -> bool:
    """Whether a name is that of a file of the system or an editor, and not of a class or an image."""
    return name.startswith(".") or name == "__MACOSX"


def _no_image(entry: os.DirEntry[str]) -> str:
    """The kind of a file, in the folder of a class, that is not an image; empty for an image.

    A broken link counts as an image. Its name is told when it is read.
    """
    if entry.is_dir():
        return "folders in those of classes"
    if not entry.name.lower().endswith(SUFFIXES):
        return repr(Path(entry.name).suffix.lower()) if "." in entry.name else "files without a suffix"
    if entry.is_file() or (entry.is_symlink() and not Path(entry).exists()):
        return ""
    return "pipes or devices"
