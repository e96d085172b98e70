"""What one seed trains on, and the mini-batches of several seeds at once.

A `Task` says which images of a dataset one seed trains, validates and tests on; `TrainBatches` and `EvalBatches` gather
them as uint8, with a leading axis of seeds, on the device. There are no worker processes: images that fit are kept on
the device, and where they don't, a thread reads ahead.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from nobackprop.data import Dataset, Images
from nobackprop.streams import stream

CHUNK_STEPS = 100  # the most mini-batches that are gathered at once
CHUNK_BYTES = 8_000_000  # and about how many bytes of pixels
READ_AHEAD = 2  # chunks that are gathered before they are asked for, where images do not fit


@dataclass(frozen=True, eq=False)
class Task:
    """What one seed trains on.

    `train` are indices (int64) of training images, `validation` of `dataset.validation`, `test` of test images. The
    original label classes[i] became label i; `relabel` (num_classes,) maps each original label to the new one, -1 where
    unused.
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

    `validation` is a fraction of the training images of these classes, or how many; the rest trains. A data set that
    validates on its test images has no use for it: all training images train. Raises ValueError where no image is left
    on one side, or the data set doesn't have that many classes.
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
    if dataset.validate_on_test:
        count = 0
    elif not 0 < count < n:
        raise ValueError(
            f"validation is {validation}, {count} of the {n} training images of {dataset.name}; it must leave at least "
            "one image for training and one for validation"
        )
    if len(test) == 0:
        raise ValueError(f"{dataset.name} has no test image of the classes {chosen.tolist()}")
    mixed = selected[torch.randperm(n, generator=stream(seed, "split"))]
    held_out = test if dataset.validate_on_test else mixed[:count]
    return Task(seed, tuple(chosen.tolist()), mixed[count:], held_out, test, relabel)


def batches_per_epoch(task: Task, batch_size: int) -> int:
    """Whole mini-batches in an epoch; an incomplete last one is left out. Raises ValueError where there is none."""
    if batch_size > len(task.train):
        raise ValueError(f"batch_size is {batch_size}, but there are only {len(task.train)} training images")
    return len(task.train) // batch_size


def _memory(device: torch.device) -> int:
    """Bytes that are free on a GPU; elsewhere all memory that this process may have."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    membership = Path("/proc/self/cgroup")  # Linux: "0::/path", of version 1 "4:memory:/path"
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, path = line.split(":", 2)
        top, name = (
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes") if controllers else ("/sys/fs/cgroup", "memory.max")
        )
        for folder in (Path(top + path), *Path(top + path).parents):  # the limits of all groups above hold as well
            if (limit := folder / name).exists() and (text := limit.read_text().strip()).isdigit():
                limits.append(int(text))
    return min(limits)


@dataclass(frozen=True, eq=False)
class _Store:
    """Pixels to gather from: `resident` on the device, or where they are, to be moved there as they are gathered."""

    pixels: Tensor
    device: torch.device
    resident: bool

    def chunks(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        """For each index, of any shape and on the device of `pixels`, its images (..., C, H, W) on `device`."""
        if self.resident:
            yield from map(self._gather, indices)
            return
        pool, ahead = ThreadPoolExecutor(1, "read-ahead"), deque[Future[Tensor]]()
        try:
            for index in indices:
                ahead.append(pool.submit(self._gather, index))
                if len(ahead) > READ_AHEAD:
                    yield ahead.popleft().result().to(self.device, non_blocking=True)
            while ahead:
                yield ahead.popleft().result().to(self.device, non_blocking=True)
        finally:  # also where the consumer stops early
            pool.shutdown(cancel_futures=True)

    def _gather(self, index: Tensor) -> Tensor:
        pinned = not self.resident and self.device.type == "cuda"
        out = torch.empty(
            index.numel(), *self.pixels.shape[1:], dtype=torch.uint8, device=self.pixels.device, pin_memory=pinned
        )
        return torch.index_select(self.pixels, 0, index.reshape(-1), out=out).view(*index.shape, *self.pixels.shape[1:])


@lru_cache(maxsize=4)
def _store(images: Images, device: torch.device) -> _Store:
    """The pixels on the device if they take at most half of its memory: moved once, whoever asks."""
    resident = images.pixels.nbytes <= _memory(device) // 2
    return _Store(images.pixels.to(device).contiguous() if resident else images.pixels, device, resident)


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
        lengths = {task.seed: batches_per_epoch(task, self.batch_size) for task in self.tasks}
        if len({*lengths.values()}) > 1:
            raise ValueError(
                f"seeds trained together need equally many mini-batches an epoch, but have (by seed) {lengths}; train "
                "them one by one, or give them the same classes with `dataset.classes_seed`"
            )

    @property
    def per_epoch(self) -> int:
        """Mini-batches an epoch."""
        return batches_per_epoch(self.tasks[0], self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device, images = torch.device(self.device), self.dataset.train
        store = _store(images, device)
        epoch, start = divmod(self.position(), self.per_epoch)
        end = self.per_epoch
        if self.max_steps is not None:
            end = min(end, self.max_steps - epoch * self.per_epoch)
        tables = (torch.stack(column) for column in zip(*self._epoch(epoch), strict=True))
        # with the seed first; chunks have the mini-batch first
        index, labels, flip, shift = (table[:, start:end].transpose(0, 1).contiguous() for table in tables)
        bytes_a_step = len(self.tasks) * self.batch_size * images.pixels[0].numel()
        size = max(1, min(CHUNK_STEPS, CHUNK_BYTES // bytes_a_step))
        others = (table.to(device).split(size) for table in (labels, flip, shift))
        with closing(store.chunks(index.to(store.pixels.device).split(size))) as chunks:
            for chunk, labels, flip, shift in zip(chunks, *others, strict=True):
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
        self._store = _store(images, torch.device(device))
        self._index = index.to(self._store.pixels.device)
        self._labels, self._mask = labels.to(device), mask.to(device)
        self._size = max(1, min(batch_size, CHUNK_BYTES // (len(tables) * images.pixels[0].numel())))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        index, labels, mask = (table.split(self._size, dim=1) for table in (self._index, self._labels, self._mask))
        with closing(self._store.chunks(index)) as chunks:
            yield from zip(chunks, labels, mask, strict=True)
