"""What one seed trains on, and the mini-batches of several seeds at once.

A `Task` says which images of a dataset one seed trains, validates and tests on; `TrainBatches` and `EvalBatches` gather
them as they are, with a leading axis of seeds, on the device. There are no worker processes: images that fit are kept
on the device, and of those that don't, or are in a file, a thread reads the next chunks while the last one is used.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from nobackprop.core.random import stream
from nobackprop.data.checksums import reading
from nobackprop.data.sources import Dataset, Images
from nobackprop.mistakes import Mistake

CHUNK_STEPS = 100  # the most mini-batches that are gathered at once
CHUNK_BYTES = 8_000_000  # and about how many bytes of pixels
READ_AHEAD = 2  # chunks that are read before they are asked for, where images do not fit


@dataclass(frozen=True, eq=False)
class Task:
    """What one seed trains on.

    `train` has indices (int64) of training images, `validation` of `dataset.validation`, and `test` of test images. The
    original label classes[i] became label i. `relabel` (num_classes,) maps each original label to the new one, or to -1
    where it is unused.
    """

    seed: int
    classes: tuple[int, ...]
    train: Tensor
    validation: Tensor
    test: Tensor
    relabel: Tensor


# The order in which images are taken for validation.
SPLITS: dict[str, Callable[[int, int], Tensor]] = {
    "random": lambda n, seed: torch.randperm(n, generator=stream(seed, "split")),
    "first": lambda n, _: torch.arange(n),
    "last": lambda n, _: torch.arange(n).flip(0),
}


def task(
    dataset: Dataset,
    seed: int,
    *,
    classes: int | None = None,
    classes_seed: int | None = None,
    validation: float | str = 0.1,
    split: str = "random",
) -> Task:
    """The task of a seed: all classes, or `classes` of them drawn from `classes_seed` (the seed itself if None).

    `validation` is a fraction of the training images of these classes, or a number of them. The others are trained on.
    With the `split` "random" the seed draws them; "first" and "last" take them from the file's start or end. A data set
    that validates on its test images uses neither setting, whatever `validation` says, and all its training images are
    trained on. Raises Mistake where no image is left on one side.
    """
    if classes is None:
        chosen = torch.arange(dataset.num_classes)
    else:
        draw = stream(seed if classes_seed is None else classes_seed, "classes")
        chosen = torch.randperm(dataset.num_classes, generator=draw)[:classes]
    relabel = torch.full((dataset.num_classes,), -1)
    relabel[chosen] = torch.arange(len(chosen))
    selected, test = ((relabel[images.labels] >= 0).nonzero().flatten() for images in (dataset.train, dataset.test))
    n = len(selected)
    count = 0
    if not dataset.validate_on_test:
        count = round(validation * n) if isinstance(validation, float) else int(validation)
        if not 0 < count < n:
            raise Mistake(
                f"validation is {validation}, {count} of the {n} training images of {dataset.name}; it must leave at "
                "least one image for training and one for validation"
            )
    if len(test) == 0:
        raise Mistake(f"{dataset.name} has no test image of the classes {chosen.tolist()}")
    mixed = selected[SPLITS[split](n, seed)]
    held_out = test if dataset.validate_on_test else mixed[:count]
    return Task(seed, tuple(chosen.tolist()), mixed[count:], held_out, test, relabel)


def batches_per_epoch(task: Task, batch_size: int) -> int:
    """Whole mini-batches in an epoch; an incomplete last one is left out. Raises Mistake where there is none."""
    if batch_size > len(task.train):
        raise Mistake(f"batch_size is {batch_size}, but there are only {len(task.train)} training images")
    return len(task.train) // batch_size


def _fits(images: Images, device: torch.device) -> bool:
    """Whether to keep the pixels on the device: up to half of a GPU's free memory, or if they are in memory anyway."""
    if device.type == "cuda":
        return images.pixels.nbytes <= torch.cuda.mem_get_info(device)[0] / 2
    return images.file is None  # the system keeps as much of a file in memory as fits


@dataclass(frozen=True, eq=False)
class _Store:
    """Images to gather chunks from: `resident` on the device, or read, and moved there, as they are needed."""

    images: Images
    device: torch.device
    resident: bool

    @property
    def index_device(self) -> torch.device:
        """The device that indices must be on."""
        return self.images.pixels.device

    def chunks(self, indices: Iterable[Tensor]) -> Generator[Tensor, None, None]:
        """The pixels (..., C, H, W), on the device, of indices of any shape."""
        if self.resident:
            pixels = self.images.pixels
            for index in indices:
                yield pixels.index_select(0, index.flatten()).view(*index.shape, *pixels.shape[1:])
            return
        pool, ahead = ThreadPoolExecutor(1, "read-ahead"), deque[Future[Tensor]]()
        try:
            for index in indices:
                ahead.append(pool.submit(self._read, index))
                if len(ahead) > READ_AHEAD:
                    yield ahead.popleft().result().to(self.device, non_blocking=True)
            while ahead:
                yield ahead.popleft().result().to(self.device, non_blocking=True)
        finally:  # also where the consumer stops early
            pool.shutdown(cancel_futures=True)

    def _read(self, index: Tensor) -> Tensor:
        """The pixels in memory. For a GPU the memory is pinned, so that nothing waits for the copy."""
        shape, file = self.images.pixels.shape[1:], self.images.file
        out = torch.empty(index.numel(), *shape, dtype=self.images.pixels.dtype, pin_memory=self.device.type == "cuda")
        if file is None:
            torch.index_select(self.images.pixels, 0, index.flatten(), out=out)
        else:  # The map would read pages one by one, which is five times slower where the system has not kept them.
            with reading(file.name), file.open("rb", buffering=0) as opened:
                for row, i in zip(out.numpy(), index.flatten().tolist(), strict=True):
                    opened.seek(i * row.nbytes)
                    if opened.readinto(row) != row.nbytes:
                        raise Mistake(f"{file} was cut short while it was read: start again")
        return out.view(*index.shape, *shape)


@lru_cache(maxsize=4)
def _store(images: Images, device: torch.device) -> _Store:
    """The images, on the device if they fit. They are moved there once, however many ask."""
    if not _fits(images, device):
        return _Store(images, device, resident=False)
    return _Store(replace(images, pixels=images.pixels.to(device).contiguous(), file=None), device, resident=True)


def _augment(pixels: Tensor, flip: Tensor, shift: Tensor, crop: int) -> Tensor:
    """Images (n, C, H, W), shifted and mirrored.

    They get `crop` zeros on each side, are cut out at `shift` (n, 2), and mirrored left to right where `flip` (n,).
    """
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

    Iterating yields pixels (k, S, N, C, H, W) and labels (k, S, N) int64 on the device. `position()` is the
    number of mini-batches done before, over all epochs. It is called once for each iteration, so that a resumed run
    goes on in mid-epoch. The order of the images, and the augmentation by `flip` (half of the images) and `crop`
    (pixels of zero padding), depend only on each task's seed and on the epoch. An incomplete last mini-batch is left
    out, and iterating ends after `max_steps` mini-batches in all. Process `rank` of `ranks` gets its part of each
    mini-batch, N = batch_size / ranks images.

    Raises Mistake for a batch size above the number of training images. All tasks must have the same number of
    mini-batches in an epoch.
    """

    dataset: Dataset
    tasks: Sequence[Task]
    batch_size: int
    position: Callable[[], int]
    device: torch.device | str
    max_steps: int | None = None
    flip: bool = False
    crop: int = 0
    rank: int = 0
    ranks: int = 1

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
        if end <= start:
            return
        tables = (torch.stack(column) for column in zip(*self._epoch(epoch), strict=True))
        part = slice(self.rank * self.batch_size // self.ranks, (self.rank + 1) * self.batch_size // self.ranks)
        # with the seed first; chunks have the mini-batch first
        index, labels, flip, shift = (table[:, start:end, part].transpose(0, 1).contiguous() for table in tables)
        bytes_a_step = index[0].numel() * images.pixels[0].nbytes
        size = max(1, min(CHUNK_STEPS, CHUNK_BYTES // bytes_a_step))
        others = (table.to(device).split(size) for table in (labels, flip, shift))
        with closing(store.chunks(index.to(store.index_device).split(size))) as chunks:
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
    """Images to evaluate S seeds on, in the order of their index tables: one for each seed, of any length.

    Iterating yields pixels (S, M, C, H, W), labels (S, M) int64 by each seed's `relabels`, and a mask (S, M) bool. The
    mask is False where a seed has no more images, and its first image fills the place. M is at most `batch_size`.
    Process `rank` of `ranks` gets every `ranks`-th image, and all get the same number. Raises Mistake for an empty
    table.
    """

    def __init__(
        self,
        images: Images,
        tables: Sequence[Tensor],
        relabels: Sequence[Tensor],
        device: torch.device | str,
        batch_size: int = 1000,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        lengths = torch.tensor([len(table) for table in tables])
        if not lengths.all():
            raise Mistake(f"there must be an image to evaluate for each seed, but the seeds have {lengths.tolist()}")
        position = torch.arange(rank, -(-int(lengths.max()) // ranks) * ranks, ranks)
        mask = position < lengths[:, None]
        index = torch.stack([table[position * row] for table, row in zip(tables, mask, strict=True)])
        labels = torch.stack([relabel[images.labels[row]] for relabel, row in zip(relabels, index, strict=True)])
        self._store = _store(images, torch.device(device))
        self._index = index.to(self._store.index_device)
        self._labels, self._mask = labels.to(device), mask.to(device)
        self._size = max(1, min(batch_size, CHUNK_BYTES // (len(tables) * images.pixels[0].nbytes)))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        index, labels, mask = (table.split(self._size, dim=1) for table in (self._index, self._labels, self._mask))
        with closing(self._store.chunks(index)) as chunks:
            yield from zip(chunks, labels, mask, strict=True)
