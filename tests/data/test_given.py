"""Images in memory as a data set: what is taken, what is refused, and what identifies them."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from nobackprop.data.batches import EvalBatches, TrainBatches, task
from nobackprop.data.given import Given, held, images_of
from nobackprop.data.pixels import Pixels
from nobackprop.mistakes import Mistake, Notice

X, Y = torch.rand(40, 3, 5, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4


class Pairs(Dataset[Any]):
    """A Dataset of one's own, of arrays and plain numbers."""

    def __len__(self) -> int:
        return len(Y)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        if i >= len(Y):
            raise IndexError(i)
        return X[i].numpy(), int(Y[i])


@pytest.mark.parametrize(
    "given",
    [(X, Y), [X, Y.int()], (X.numpy(), Y.numpy()), (X.double(), Y.byte()), TensorDataset(X, Y), Pairs()],
    ids=["tensors", "list", "arrays", "doubles", "TensorDataset", "own Dataset"],
)
def test_the_same_images_are_the_same_in_whatever_form(given: Any) -> None:
    with held((X, Y), (X, Y)) as expected:
        pass
    with held(given, (X, Y)) as fingerprint:
        dataset = Given(fingerprint).load()
    assert fingerprint == expected == dataset.fingerprint
    assert torch.equal(dataset.train.pixels, X)
    assert torch.equal(dataset.train.labels, Y)
    assert (dataset.train.pixels.dtype, dataset.train.labels.dtype) == (torch.float32, torch.int64)
    assert dataset.num_classes == 4
    assert dataset.plain == Pixels(floats=True)


@pytest.mark.parametrize(
    ("x", "shape"),
    [(X.flatten(1), (1, 1, 60)), (X[:, 0], (1, 5, 4)), (X, (3, 5, 4)), (X.mT, (3, 4, 5))],
    ids=["vectors", "grey", "colours", "not contiguous"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_images_have_three_axes_after_the_first(x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = x if dtype == torch.float32 else (255 * x).byte()
    with held((x, Y), (x, Y)) as fingerprint:
        source = Given(fingerprint)
        dataset = source.load()
        assert (source.shape, source.dtype) == (shape, dtype)
    assert torch.equal(dataset.train.pixels, x.reshape(40, *shape))


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y: ((x + 1e-6, y), (x, y)),
        lambda x, y: ((x, y), (x + 1e-6, y)),
        lambda x, y: ((x, y.flip(0)), (x, y)),
        lambda x, y: ((x[:39], y[:39]), (x, y)),
        lambda x, y: ((x.reshape(40, 3, 4, 5), y), (x.reshape(40, 3, 4, 5), y)),
        lambda x, y: (((255 * x).byte(), y), ((255 * x).byte(), y)),
    ],
)
def test_other_content_has_another_fingerprint(change: Callable[..., tuple[Any, Any]]) -> None:
    with held((X, Y), (X, Y)) as first, held(*change(X, Y)) as second:
        assert first != second


def test_what_has_changed_in_memory_is_read_anew() -> None:
    x = X.clone()
    with held((x, Y), (X, Y)) as first:
        Given(first).load()
    x += 1
    with held((X.clone(), Y), (X, Y)) as again:
        assert again == first
        assert torch.equal(Given(again).load().train.pixels, X)


def test_batches_and_normalisation_keep_floats() -> None:
    with held((X, Y), (X, Y)) as fingerprint:
        dataset = Given(fingerprint).load()
    seed_0 = task(dataset, 0)
    (pixels, labels), *_ = TrainBatches(dataset, [seed_0], 5, position=lambda: 0, device="cpu", crop=1, flip=True)
    assert (pixels.dtype, labels.dtype) == (torch.float32, torch.int64)
    (pixels, labels, _), *_ = EvalBatches(dataset.train, [seed_0.validation], [seed_0.relabel], "cpu")
    assert torch.equal(pixels[0], X[seed_0.validation])
    assert torch.equal(dataset.plain(X), X)
    x = dataset.normalized(X, torch.float64)
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(x.std((0, 2, 3), correction=0), torch.ones(3, dtype=torch.float64))


NAN = X.clone()
NAN[3, 0, 0, 0] = torch.nan


@pytest.mark.parametrize(
    ("data", "test", "told"),
    [
        ((X, Y), None, r"data and test belong together: write data=\(x, y\), test=\(x2, y2\)"),
        (None, (X, Y), "data and test belong together"),
        (X, (X, Y), r"data is a Tensor alone: give a pair \(x, y\)"),
        (3, (X, Y), r"data is of type int: give a pair \(x, y\) of tensors or arrays, or a torch Dataset"),
        ((X, Y), (X, Y.float()), r"test: y has the shape \(40,\) and type torch.float32 for 40 samples; allowed: a cl"),
        ((X, Y[:5]), (X, Y), r"data: y has the shape \(5,\) and type torch.int64 for 40 samples"),
        ((X, Y - 1), (X, Y), "data: y has the class number -1; allowed: whole numbers from 0"),
        ((X, Y[:, None]), (X, Y), r"data: y has the shape \(40, 1\)"),
        (
            (X.long(), Y),
            (X, Y),
            r"data: x has the shape \(40, 3, 5, 4\) and type torch.int64; allowed: uint8 or floats",
        ),
        ((X[:0], Y[:0]), (X, Y), r"data: x has the shape \(0, 3, 5, 4\) .* at least one"),
        ((X[:, 0, 0, 0], Y), (X, Y), r"data: x has the shape \(40,\)"),
        ((NAN, Y), (X, Y), "data: x has NaN or infinite numbers"),
        ((X.double() * 1e300, Y), (X, Y), "data: x has NaN or infinite numbers"),
        ((["a"] * 40, Y), (X, Y), "data: x is of type list; allowed: a tensor or an array of numbers"),
        (([np.zeros(3), np.zeros(4)], Y), (X, Y), "data: x is of type list; allowed: a tensor"),
        (
            (X, Y),
            (X[:, :1], Y),
            r"data has images of shape \(3, 5, 4\) and type torch.float32, test images of shape \(1,",
        ),
        ((X, Y), (X.byte(), Y), "data has .* both must be alike"),
    ],
)
def test_what_is_no_data_set_is_refused_in_a_sentence(data: Any, test: Any, told: str) -> None:
    with pytest.raises(Mistake, match=told), held(data, test):
        pass


def test_channels_that_come_last_are_told() -> None:
    last = X.repeat(1, 2, 1, 1).permute(0, 2, 1, 3)[..., :3]  # (40, 5, 6, 3)
    with pytest.warns(Notice, match=r"x has the shape \(40, 5, 6, 3\), read as 5 channels: these come before"):
        images_of((last, Y), "data")


@pytest.mark.parametrize(
    ("data", "test", "never"),
    [((X, Y + 1), (X, Y + 1), "['0']"), ((X, Y), (X, torch.full_like(Y, 5)), "['4', '5']")],
    ids=["counted from 1", "only tested"],
)
def test_classes_that_no_net_can_learn_are_told(data: Any, test: Any, never: str) -> None:
    told = f"data has no images of the classes {never}, counted from 0, to learn from"
    with pytest.warns(Notice, match=re.escape(told)), held(data, test):
        pass


def test_images_are_given_only_for_as_long_as_they_are_needed() -> None:
    with held((X, Y), (X, Y)) as fingerprint:
        Given(fingerprint)
    for other in (fingerprint, None, "0" * 16):
        with pytest.raises(Mistake, match="dataset=given is for images in the memory of a Python process"):
            Given(other)
