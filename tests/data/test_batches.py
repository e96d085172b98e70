"""Tasks and mini-batches: functions of seed and epoch, however they are stacked, chunked and resumed."""

import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import until
from torch import Tensor

from nobackprop.core.random import stream
from nobackprop.data import batches as module
from nobackprop.data.batches import EvalBatches, Task, TrainBatches, task
from nobackprop.data.sources import Dataset, Images


def test_all_classes_keep_their_labels(toy: Dataset) -> None:
    t = task(toy, 3)
    assert t.classes == (0, 1, 2, 3, 4)
    assert t.relabel.tolist() == [0, 1, 2, 3, 4]
    assert t.test.tolist() == list(range(40))
    assert len(t.validation) == 14
    assert sorted(torch.cat([t.train, t.validation]).tolist()) == list(range(137))
    again, other = task(toy, 3), task(toy, 4)
    assert torch.equal(t.train, again.train)
    assert not torch.equal(t.train, other.train)
    assert len(task(toy, 3, validation=37).train) == 100


def test_drawn_classes(toy: Dataset) -> None:
    drawn = {seed: task(toy, seed, classes=3) for seed in range(20)}
    assert len({t.classes for t in drawn.values()}) > 5
    for seed, t in drawn.items():
        assert t.classes == task(toy, seed, classes=3).classes
        assert t.classes == tuple(torch.randperm(5, generator=stream(seed, "classes"))[:3].tolist())
        assert [int(t.relabel[c]) for c in t.classes] == [0, 1, 2]
        assert sorted(t.relabel.tolist()) == [-1, -1, 0, 1, 2]
        everything = sorted(torch.cat([t.train, t.validation]).tolist())
        assert everything == [i for i, y in enumerate(toy.train.labels.tolist()) if y in t.classes]
        assert t.test.tolist() == [i for i, y in enumerate(toy.test.labels.tolist()) if y in t.classes]
    shared = {task(toy, seed, classes=3, classes_seed=7).classes for seed in range(20)}
    assert shared == {drawn[7].classes}


@pytest.mark.parametrize("validation", [137, 200, 0.001, 0.999])
def test_bad_validation(toy: Dataset, validation: float) -> None:
    with pytest.raises(ValueError, match=rf"validation is {validation}[;,]"):
        task(toy, 0, validation=validation)


@pytest.mark.parametrize("split", ["first", "last"])
def test_a_split_by_position(toy: Dataset, split: str) -> None:
    made = task(toy, 3, validation=37, split=split)
    held_out = torch.arange(37) if split == "first" else torch.arange(100, 137)
    assert torch.equal(made.validation.sort().values, held_out)
    assert torch.equal(torch.cat([made.train, held_out]).sort().values, torch.arange(137))
    assert torch.equal(task(toy, 4, validation=37, split=split).train, made.train)  # whatever the seed


def test_a_dataset_that_validates_on_its_test_images_trains_on_all_others(toy: Dataset) -> None:
    assert toy.validation is toy.train
    literal = replace(toy, validate_on_test=True)
    assert literal.validation is toy.test
    for classes in (None, 3):
        ours, t = task(toy, 3, classes=classes), task(literal, 3, classes=classes, validation="test")
        assert t.classes == ours.classes
        assert torch.equal(t.validation, t.test)
        assert torch.equal(t.test, ours.test)
        assert torch.equal(t.train.sort().values, torch.cat([ours.train, ours.validation]).sort().values)


def test_no_test_image_of_the_classes(toy: Dataset) -> None:
    classes = task(toy, 0, classes=2).classes
    keep = torch.tensor([y not in classes for y in toy.test.labels.tolist()])
    without = replace(toy, test=Images(toy.test.pixels[keep], toy.test.labels[keep]))
    with pytest.raises(ValueError, match="toy has no test image of the classes"):
        task(without, 0, classes=2)


# Batches


def batches(toy: Dataset, tasks: list[Task], step: int = 0, **options: Any) -> TrainBatches:
    return TrainBatches(toy, tasks, options.pop("batch_size", 10), lambda: step, "cpu", **options)


def joined(iterable: TrainBatches) -> tuple[Tensor, Tensor]:
    pixels, labels = zip(*iterable, strict=True)
    return torch.cat(pixels), torch.cat(labels)


AUGMENT = pytest.mark.parametrize("options", [{}, {"flip": True, "crop": 2}], ids=["plain", "augmented"])


def test_an_epoch_holds_every_training_image_once(toy: Dataset) -> None:
    t = task(toy, 3, classes=3)
    b = batches(toy, [t], batch_size=len(t.train) // 7)
    pixels, labels = joined(b)
    assert b.per_epoch == len(pixels) == 7
    seen = pixels[..., 0, 0, 0].flatten().tolist()
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(t.train.tolist())
    assert torch.equal(toy.train.pixels[seen], pixels.flatten(0, 2))
    assert [t.classes[y] for y in labels.flatten().tolist()] == toy.train.labels[seen].tolist()
    order = torch.randperm(len(t.train), generator=stream(3, "order", 0))
    assert seen == t.train[order][: len(seen)].tolist()


@AUGMENT
def test_order_is_a_function_of_seed_and_epoch(toy: Dataset, options: dict[str, Any]) -> None:
    def epoch(seed: int, epoch: int) -> Tensor:
        torch.manual_seed(epoch)
        torch.rand(seed + 1)
        return joined(batches(toy, [replace(task(toy, 1), seed=seed)], 12 * epoch, **options))[0]

    assert torch.equal(epoch(1, 0), epoch(1, 0))
    assert torch.equal(epoch(1, 5), epoch(1, 5))
    assert not torch.equal(epoch(1, 0), epoch(1, 1))
    assert not torch.equal(epoch(1, 0), epoch(2, 0))


@AUGMENT
def test_stack_equals_alone(toy: Dataset, options: dict[str, Any]) -> None:
    tasks = [task(toy, seed) for seed in (5, 0, 9)]
    pixels, labels = joined(batches(toy, tasks, **options))
    assert pixels.shape == (12, 3, 10, 2, 4, 6)
    assert labels.shape == (12, 3, 10)
    for s, t in enumerate(tasks):
        alone, alone_labels = joined(batches(toy, [t], **options))
        assert torch.equal(pixels[:, s], alone[:, 0])
        assert torch.equal(labels[:, s], alone_labels[:, 0])


def test_stack_of_unequal_lengths_equals_alone(toy: Dataset) -> None:
    tasks = [task(toy, seed, classes=3) for seed in range(4)]
    assert len({len(t.train) for t in tasks}) > 1
    pixels, _ = joined(batches(toy, tasks, batch_size=60, flip=True, crop=1))
    for s, t in enumerate(tasks):
        assert torch.equal(pixels[:, s], joined(batches(toy, [t], batch_size=60, flip=True, crop=1))[0][:, 0])


@AUGMENT
def test_resumed_epoch_is_the_tail(toy: Dataset, options: dict[str, Any]) -> None:
    tasks = [task(toy, seed) for seed in (0, 1)]
    pixels, labels = joined(batches(toy, tasks, 12, **options))
    for done in range(1, 12):
        tail, tail_labels = joined(batches(toy, tasks, 12 + done, **options))
        assert torch.equal(tail, pixels[done:])
        assert torch.equal(tail_labels, labels[done:])


@AUGMENT
def test_chunks_change_nothing(toy: Dataset, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    b = batches(toy, [task(toy, 0), task(toy, 1)], **options)
    whole = joined(b)
    assert len(list(b)) == 1
    monkeypatch.setattr(module, "CHUNK_STEPS", 5)
    assert [len(labels) for _, labels in b] == [5, 5, 2]
    assert torch.equal(joined(b)[0], whole[0])
    monkeypatch.setattr(module, "CHUNK_BYTES", 2 * 10 * 48 * 3 + 7)
    assert [len(labels) for _, labels in b] == [3] * 4
    assert torch.equal(joined(b)[0], whole[0])
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    assert [len(labels) for _, labels in b] == [1] * 12
    assert torch.equal(joined(b)[1], whole[1])


def test_position_is_asked_again_and_max_steps_ends_it(toy: Dataset) -> None:
    step = 0
    b = TrainBatches(toy, [task(toy, 0)], 10, lambda: step, "cpu", max_steps=29)
    counts = []
    for _ in range(4):
        counts.append(sum(len(labels) for _, labels in b))
        step += counts[-1]
    assert counts == [12, 12, 5, 0]
    assert not hasattr(b, "__len__")


def test_nothing_comes_after_max_steps(toy: Dataset) -> None:
    for step in (29, 30, 35, 36, 50):
        assert list(batches(toy, [task(toy, 0)], step, max_steps=29)) == []


def test_a_batch_that_is_larger_than_the_training_images(toy: Dataset) -> None:
    with pytest.raises(ValueError, match=r"batch_size is 200, but there are only 123 training images"):
        list(batches(toy, [task(toy, 0)], batch_size=200))


# Augmentation


def test_flip_and_crop_of_a_hand_made_image() -> None:
    image = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.uint8)[None, None]
    two = torch.cat([image, image + 10], 1).expand(4, -1, -1, -1)
    flip = torch.tensor([False, True, False, True])
    shift = torch.tensor([[1, 1], [1, 1], [0, 2], [2, 0]])
    out = module._augment(two, flip, shift, crop=1)
    assert out.dtype == torch.uint8
    assert out[:, 0].tolist() == [
        [[1, 2, 3], [4, 5, 6]],
        [[3, 2, 1], [6, 5, 4]],
        [[0, 0, 0], [2, 3, 0]],
        [[5, 4, 0], [0, 0, 0]],
    ]
    assert out[1, 1].tolist() == [[13, 12, 11], [16, 15, 14]]


def test_half_of_the_images_are_flipped_and_crops_are_uniform(toy: Dataset) -> None:
    t = task(toy, 0)
    plain, flipped, both, cropped = (
        joined(batches(toy, [t], flip=flip, crop=crop))[0].flatten(0, 2)
        for flip, crop in ((False, 0), (True, 0), (True, 1), (False, 1))
    )
    mirrored = [bool(torch.equal(a.flip(-1), b)) for a, b in zip(plain, flipped, strict=True)]
    same = [bool(torch.equal(a, b)) for a, b in zip(plain, flipped, strict=True)]
    assert [not m for m in mirrored] == same
    assert 0.35 < sum(mirrored) / len(mirrored) < 0.65
    assert [torch.equal(a.flip(-1), b) for a, b in zip(cropped, both, strict=True)] == mirrored
    shifts = set()
    for a, b in zip(plain, cropped, strict=True):
        padded = torch.nn.functional.pad(a, (1, 1, 1, 1))
        fits = [(y, x) for y in range(3) for x in range(3) if torch.equal(padded[:, y : y + 4, x : x + 6], b)]
        assert len(fits) == 1
        shifts.add(fits[0])
    assert len(shifts) == 9
    later = joined(batches(toy, [t], 12, flip=True))[0].flatten(0, 2)
    assert not torch.equal(later, joined(batches(toy, [t], 12))[0].flatten(0, 2))


# Images that do not fit


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def mapped(images: Images, path: Path) -> Images:
    path.write_bytes(images.pixels.numpy().tobytes())
    array = np.memmap(path, np.uint8, "r+", shape=tuple(images.pixels.shape))
    return Images(torch.from_numpy(array), images.labels, path)


@pytest.fixture(params=["memory", "file"])
def large(request: pytest.FixtureRequest, toy: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """The toy images in chunks of one to three mini-batches, read ahead from memory or from a file."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 2 * 10 * 48 * 3)
    if request.param == "memory":
        images = [replace(toy.train), replace(toy.test)]
        monkeypatch.setattr(module, "_fits", lambda images, _: images not in large)
    else:
        images = [mapped(toy.train, tmp_path / "train"), mapped(toy.test, tmp_path / "test")]
    large = images
    return replace(toy, train=large[0], test=large[1])


@AUGMENT
@pytest.mark.parametrize("ahead", [1, 2, 20])
def test_reading_ahead_changes_nothing(
    toy: Dataset, large: Dataset, monkeypatch: pytest.MonkeyPatch, ahead: int, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(module, "READ_AHEAD", ahead)
    tasks = [task(toy, 0), task(toy, 1)]
    assert module._store(toy.train, torch.device("cpu")).resident
    assert not module._store(large.train, torch.device("cpu")).resident
    for step, steps in ((0, None), (12, None), (17, None), (12, 13), (24, 31), (29, 29)):
        ours = list(batches(toy, tasks, step, max_steps=steps, **options))
        theirs = list(batches(large, tasks, step, max_steps=steps, **options))
        for (a, b), (c, d) in zip(ours, theirs, strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, d)
    tables, relabels = [task(toy, s, classes=3).test for s in (0, 1)], [t.relabel for t in tasks]
    ours, theirs = (EvalBatches(d.test, tables, relabels, "cpu", batch_size=7) for d in (toy, large))
    for _ in range(2):
        for a, b in zip(ours, theirs, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not readers()


def test_reading_stays_a_little_ahead(large: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    read, threads = [], set()
    gather = module._Store._read

    def count(self: Any, index: Tensor) -> Tensor:
        read.append(index)
        threads.add(threading.current_thread())
        return gather(self, index)

    monkeypatch.setattr(module._Store, "_read", count)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    iterator = iter(batches(large, [task(large, 0)]))
    for used in range(1, 8):
        next(iterator)
        until(lambda used=used: len(read) >= used + module.READ_AHEAD, seconds=20)
        time.sleep(0.005)
        assert len(read) == used + module.READ_AHEAD
    assert len(threads) == 1
    assert threading.current_thread() not in threads


def test_reading_ends_with_the_iteration(large: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    train = batches(large, [task(large, 0)])
    evaluation = EvalBatches(large.test, [torch.arange(40)], [torch.arange(5)], "cpu", batch_size=3)
    for loader in (train, evaluation):
        for _ in loader:
            assert len(readers()) == 1
            break
        assert not readers()
        with pytest.raises(KeyError):  # noqa: PT012
            for _ in loader:
                raise KeyError
        assert not readers()
        first, second = iter(loader), iter(loader)  # side by side
        assert torch.equal(next(first)[0], next(second)[0])
        assert len(readers()) == 2
        del first, second
        assert not readers()


def test_a_failure_to_read_is_raised(toy: Dataset, tmp_path: Path) -> None:
    images = mapped(toy.train, tmp_path / "train")
    loader = TrainBatches(replace(toy, train=images), [task(toy, 0)], 10, lambda: 0, "cpu")
    path = tmp_path / "train"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"train was cut short while it was read"):
        list(loader)
    assert not readers()
    path.unlink()
    with pytest.raises(ValueError, match=rf"train: while its images .* the system refused {path}: No such file"):
        list(loader)


# Evaluation


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_evaluation_covers_each_image_once(toy: Dataset, size: int) -> None:
    tasks = [task(toy, seed, classes=3) for seed in range(4)]
    assert len({len(t.validation) for t in tasks}) > 1
    b = EvalBatches(toy.train, [t.validation for t in tasks], [t.relabel for t in tasks], "cpu", batch_size=size)
    pixels, labels, mask = (torch.cat(column, 1) for column in zip(*b, strict=True))
    assert (pixels.dtype, labels.dtype, mask.dtype) == (torch.uint8, torch.int64, torch.bool)
    assert max(m.shape[1] for _, _, m in b) <= size
    assert labels.min() >= 0
    for s, t in enumerate(tasks):
        assert pixels[s, mask[s], 0, 0, 0].tolist() == t.validation.tolist()
        assert torch.equal(pixels[s, mask[s]], toy.train.pixels[t.validation])
        assert [t.classes[y] for y in labels[s, mask[s]].tolist()] == toy.train.labels[t.validation].tolist()
        assert (pixels[s, ~mask[s], 0, 0, 0] == t.validation[0]).all()


def test_evaluation_in_small_chunks(toy: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 2 * 48 * 6)
    t = task(toy, 0)
    b = EvalBatches(toy.test, [t.test, t.test], [t.relabel] * 2, "cpu")
    assert [pixels.shape[:2] for pixels, _, _ in b] == [(2, 6)] * 6 + [(2, 4)]


def test_nothing_to_evaluate(toy: Dataset) -> None:
    with pytest.raises(ValueError, match=r"the seeds have \[3, 0\]"):
        EvalBatches(toy.test, [torch.arange(3), torch.arange(0)], [torch.arange(5)] * 2, "cpu")


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("fits", [True, False])
@AUGMENT
def test_device_holds_the_same_batches(
    toy: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], fits: bool
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    toy = replace(toy, train=mapped(toy.train, tmp_path / "train"), test=mapped(toy.test, tmp_path / "test"))
    if not fits:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2 * toy.test.pixels.nbytes - 1, 1 << 40))
    assert module._store(toy.train, torch.device("cuda")).resident == fits
    tasks = [task(toy, 0), task(toy, 1)]
    here = batches(toy, tasks, **options)
    there = replace(here, device="cuda")
    for (a, b), (c, d) in zip(here, there, strict=True):
        assert c.is_cuda
        assert torch.equal(a, c.cpu())
        assert torch.equal(b, d.cpu())
    there_eval = EvalBatches(toy.test, [t.test for t in tasks], [t.relabel for t in tasks], "cuda")
    here_eval = EvalBatches(toy.test, [t.test for t in tasks], [t.relabel for t in tasks], "cpu")
    for a, b in zip(here_eval, there_eval, strict=True):
        assert all(torch.equal(x, y.cpu()) for x, y in zip(a, b, strict=True))
