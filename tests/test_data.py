import os
import pickle
import re
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import md5
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pyarrow as pa
import pytest
import torch
import torchvision.datasets
from conftest import assert_same_images, random_images
from PIL import Image
from pyarrow import parquet
from torch import Tensor

from nobackprop import data
from nobackprop.data import (
    Dataset,
    Digits,
    Images,
    Parquet,
    Source,
    Torchvision,
    check,
)

FOLDERS = {"MNIST": "MNIST/raw", "FashionMNIST": "FashionMNIST/raw", "KMNIST": "KMNIST/raw"}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise URLError("there is no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    data._load.cache_clear()
    yield
    data._load.cache_clear()


def small(monkeypatch: pytest.MonkeyPatch, name: str, train: int, test: int) -> None:
    monkeypatch.setitem(data.TORCHVISION, name, replace(data.TORCHVISION[name], counts=(train, test)))


# Torchvision: MNIST's format


def write_idx(path: Path, values: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">{values.dim() + 1}I", 0x0800 + values.dim(), *values.shape)
    path.write_bytes(header + values.to(torch.uint8).numpy().tobytes())


def write_mnist(root: Path, name: str = "MNIST", train: int = 7, test: int = 3) -> tuple[Images, Images]:
    splits = random_images(train, (1, 28, 28), 10), random_images(test, (1, 28, 28), 10, seed=1)
    for prefix, images in zip(("train", "t10k"), splits, strict=True):
        write_idx(root / FOLDERS[name] / f"{prefix}-images-idx3-ubyte", images.pixels[:, 0])
        write_idx(root / FOLDERS[name] / f"{prefix}-labels-idx1-ubyte", images.labels)
    return splits


@pytest.mark.parametrize("name", FOLDERS)
def test_idx_files_are_read_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    small(monkeypatch, name, 7, 3)
    train, test = write_mnist(tmp_path, name)
    source = Torchvision(name, tmp_path)
    dataset = source.load()
    assert_same_images(dataset.train, train)
    assert_same_images(dataset.test, test)
    assert (dataset.name, dataset.num_classes, source.shape) == (name, 10, (1, 28, 28))
    assert source.load() is dataset
    assert Torchvision(name, tmp_path).load() is dataset


@pytest.mark.parametrize("download", [True, False])
@pytest.mark.parametrize("keep", [0, 3, 16, 100])
def test_cut_idx_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int, download: bool) -> None:
    small(monkeypatch, "MNIST", 7, 3)
    write_mnist(tmp_path)
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} has {keep} bytes .*must have 5504 bytes") as e:
        Torchvision("MNIST", tmp_path, download).load()
    assert "paths.data" in str(e.value)
    assert ("run again" in str(e.value)) == download
    assert "labels" not in str(e.value)


def test_idx_file_of_another_kind_or_count_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path)
    with pytest.raises(ValueError, match=r"the header \(2051, 7, 28, 28\), must have 47040016 bytes"):
        Torchvision("MNIST", tmp_path).load()
    small(monkeypatch, "MNIST", 7, 3)
    raw = tmp_path / "MNIST/raw"
    write_idx(raw / "train-images-idx3-ubyte", torch.zeros(28, 7, 28))
    with pytest.raises(ValueError, match=r"has 5504 bytes and the header \(2051, 28, 7, 28\), must have 5504 bytes"):
        Torchvision("MNIST", tmp_path).load()
    write_mnist(tmp_path)
    (raw / "t10k-labels-idx1-ubyte").write_bytes((raw / "t10k-images-idx3-ubyte").read_bytes())
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte has .* header \(2051, 3\), .* \(2049, 3\)"):
        Torchvision("MNIST", tmp_path).load()


def test_missing_files_without_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, "MNIST", 7, 3)
    write_mnist(tmp_path)
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte").unlink()
    folder = re.escape(str(tmp_path / "MNIST/raw"))
    with pytest.raises(FileNotFoundError, match=rf"files t10k-labels-idx1-ubyte in {folder}\. .*download=true"):
        Torchvision("MNIST", tmp_path, download=False).load()


@pytest.mark.parametrize(
    ("name", "file"), [("MNIST", "train-images-idx3-ubyte"), ("CIFAR10", "data_batch_5"), ("CIFAR100", "meta")]
)
def test_missing_files_without_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, file: str
) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no network.* Run again with a network, copy") as e:
        Torchvision(name, tmp_path / "new").load()
    assert file in str(e.value)
    assert str(tmp_path / "new" / data.TORCHVISION[name].folder) in str(e.value)
    capsys.readouterr()


def test_missing_files_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, "MNIST", 7, 3)
    made = []
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", lambda self: made.append(write_mnist(Path(self.root))))
    dataset = Torchvision("MNIST", tmp_path).load()
    assert len(made) == 1
    assert_same_images(dataset.test, made[0][1])


def test_one_process_downloads_and_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, "MNIST", 7, 3)
    started = []

    def download(self: Any) -> None:
        started.append(self)
        write_mnist(Path(self.root))
        labels = Path(self.root, "MNIST/raw/train-labels-idx1-ubyte")
        whole = labels.read_bytes()
        labels.write_bytes(whole[:9])  # as while it is unpacked
        time.sleep(0.3)
        labels.write_bytes(whole)

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    with ThreadPoolExecutor(4) as pool:
        pairs = list(pool.map(lambda _: Torchvision("MNIST", tmp_path).read(), range(4)))
    assert len(started) == 1
    assert [len(train.labels) for train, _ in pairs] == [7] * 4


def test_label_out_of_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, "MNIST", 7, 3)
    write_mnist(tmp_path)
    write_idx(tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte", torch.tensor([4, 10, 0]))
    with pytest.raises(ValueError, match=r"MNIST: the test images in .* labels from 0 to 10; allowed: 0 to 9\. Delete"):
        Torchvision("MNIST", tmp_path).load()


def test_unknown_torchvision_dataset() -> None:
    with pytest.raises(
        ValueError, match=r"'SVHN' is not known; allowed: MNIST, FashionMNIST, KMNIST, CIFAR10, CIFAR100"
    ):
        Torchvision("SVHN", "data")


# Torchvision: CIFAR


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[Images, Images]:
    """Two images in each of the files that the original has; torchvision is told their md5 sums."""
    cls, classes = getattr(torchvision.datasets, name), data.TORCHVISION[name].num_classes
    folder = root / cls.base_folder
    folder.mkdir(parents=True)

    def write(file: str, content: dict[str, Any]) -> str:
        (folder / file).write_bytes(pickle.dumps(content))
        return md5((folder / file).read_bytes()).hexdigest()

    def batches(files: list[list[str]], seed: int) -> tuple[list[list[str]], Images]:
        images = random_images(2 * len(files), (3, 32, 32), classes, seed)
        key = "labels" if name == "CIFAR10" else "fine_labels"
        sums = []
        for i, (file, _) in enumerate(files):
            rows = slice(2 * i, 2 * i + 2)
            sums.append(
                [file, write(file, {"data": images.pixels[rows].flatten(1).numpy(), key: images.labels[rows].tolist()})]
            )
        return sums, images

    train_list, train = batches(cls.train_list, 0)
    test_list, test = batches(cls.test_list, 1)
    meta = cls.meta | {"md5": write(cls.meta["filename"], {cls.meta["key"]: list(map(str, range(classes)))})}
    for attribute, value in (("train_list", train_list), ("test_list", test_list), ("meta", meta)):
        monkeypatch.setattr(cls, attribute, value)
    small(monkeypatch, name, len(train.labels), len(test.labels))
    return train, test


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_cifar_is_read_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    train, test = write_cifar(tmp_path, monkeypatch, name)
    dataset = Torchvision(name, tmp_path).load()
    assert_same_images(dataset.train, train)
    assert_same_images(dataset.test, test)
    assert dataset.num_classes == (10 if name == "CIFAR10" else 100)


def test_wrong_cifar_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch, "CIFAR10")
    path = tmp_path / "cifar-10-batches-py/data_batch_3"
    path.write_bytes(b"cut")
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} has the md5 sum .*, must have .*Delete") as e:
        Torchvision("CIFAR10", tmp_path).load()
    assert "data_batch_2" not in str(e.value)


def test_missing_cifar_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch, "CIFAR10")
    (tmp_path / "cifar-10-batches-py/data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match=r"the files data_batch_3 in "):
        Torchvision("CIFAR10", tmp_path, download=False).load()


# Parquet


def encoded(pixels: Tensor, format: str = "PNG") -> bytes:
    array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()
    buffer = BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, format)
    return buffer.getvalue()


def write_parquet(
    path: Path, blobs: list[bytes | None], labels: list[Any], image: str = "img", label: str = "label"
) -> None:
    cells = [{"bytes": blob, "path": None} for blob in blobs]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pa.table({image: pa.array(cells, kind), label: labels}), path, row_group_size=2)


def parquet_source(root: Path, **changes: Any) -> Parquet:
    return replace(Parquet(root, "tiny", (3, 5, 4), 10, "p/train-*.parquet", "p/test-*.parquet"), **changes)


def write_tiny(root: Path, image: str = "img", label: str = "label", channels: int = 3) -> tuple[Images, Images]:
    train, test = random_images(7, (channels, 5, 4), 10), random_images(3, (channels, 5, 4), 10, seed=1)
    for file, part, rows in (
        ("train-0", train, slice(0, 4)),
        ("train-1", train, slice(4, 7)),
        ("test-0", test, slice(3)),
    ):
        blobs: list[bytes | None] = [encoded(p) for p in part.pixels[rows]]
        write_parquet(root / f"p/{file}.parquet", blobs, part.labels[rows].tolist(), image, label)
    return train, test


@pytest.mark.parametrize(("image", "label"), [("img", "label"), ("image", "fine_label")])
@pytest.mark.parametrize("channels", [1, 3])
def test_parquet_is_read_in_order(tmp_path: Path, image: str, label: str, channels: int) -> None:
    train, test = write_tiny(tmp_path, image, label, channels)
    dataset = parquet_source(tmp_path, shape=(channels, 5, 4)).load()
    assert_same_images(dataset.train, train)
    assert_same_images(dataset.test, test)


def test_parquet_columns_can_be_named(tmp_path: Path) -> None:
    train, _ = write_tiny(tmp_path, "picture", "coarse_label")
    with pytest.raises(ValueError, match=r"train-0.parquet has the columns \['picture', .*\]; needed: img or image"):
        parquet_source(tmp_path).load()
    with pytest.raises(ValueError, match=r"has the columns .*; needed: label or fine_label\."):
        parquet_source(tmp_path, image_column="picture").load()
    assert_same_images(
        parquet_source(tmp_path, image_column="picture", label_column="coarse_label").load().train, train
    )


def test_parquet_reads_jpeg_grey_and_palette_as_rgb(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    grey = torch.full((1, 5, 4), 77, dtype=torch.uint8)
    palette = BytesIO()
    Image.new("RGB", (4, 5), (10, 200, 30)).quantize().save(palette, "PNG")
    write_parquet(tmp_path / "p/test-0.parquet", [encoded(grey, "JPEG"), encoded(grey), palette.getvalue()], [1, 2, 3])
    pixels = parquet_source(tmp_path).load().test.pixels
    assert (pixels[0].int() - 77).abs().max() <= 1
    assert (pixels[1] == 77).all()
    assert pixels[2, :, 0, 0].tolist() == [10, 200, 30]


def test_parquet_errors_name_file_and_row(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    path = tmp_path / "p/train-1.parquet"
    where = re.escape(str(path))
    good, big = encoded(random_images(1, (3, 5, 4), 2).pixels[0]), encoded(random_images(1, (3, 4, 4), 2).pixels[0])
    Image.fromarray(np.full((5, 4), 40_000, np.uint16)).save(deep := BytesIO(), "PNG")
    source = parquet_source(tmp_path)
    cases: list[tuple[list[bytes | None], list[Any], str]] = [
        ([good, b"no image"], [0, 1], rf"{where}, row 1 is not a readable image: cannot identify.*Correct"),
        ([good, good, good[:70]], [0, 1, 1], rf"{where}, row 2 is not a readable image"),
        ([None, good], [0, 1], rf"{where}, row 0 is not a readable image: it has no bytes"),
        ([good, deep.getvalue()], [0, 1], rf"{where}, row 1 is not a readable image: it has more than 8 bits"),
        ([good, big], [0, 1], rf"{where}, row 1 is 4 x 4 pixels; allowed: 5 x 4\."),
        ([good, good], [0, None], rf"{where}, row 1 has no label"),
        ([good, good], ["a", "b"], rf"{where}: column 'img' is struct.* and 'label' is string; allowed"),
        ([good, good], [0, 10], r"the training images in .* have labels from 0 to 10; allowed: 0 to 9\."),
        ([good, good], [0, -1], r"the training images in .* have labels from -1 to"),
    ]
    for blobs, labels, message in cases:
        write_parquet(path, blobs, labels)
        with pytest.raises(ValueError, match=message):
            source.load()
    parquet.write_table(pa.table({"img": pa.array([{"path": "a"}]), "label": [1]}), path)
    with pytest.raises(ValueError, match=rf"{where}: column 'img' has no field 'bytes'"):
        source.load()
    parquet.write_table(pa.table({"img": ["a"], "label": [1]}), path)
    with pytest.raises(ValueError, match=rf"{where}: column 'img' is string"):
        source.load()
    path.write_bytes(b"PAR1 cut")
    with pytest.raises(ValueError, match=rf"{where} is not a readable Parquet file"):
        source.load()


def test_parquet_without_files_or_images(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=rf"no file p/train-\*.parquet in {re.escape(str(tmp_path))}\. .*paths.data"
    ):
        parquet_source(tmp_path).load()
    write_tiny(tmp_path)
    write_parquet(tmp_path / "p/test-0.parquet", [], pa.array([], pa.int64()))
    with pytest.raises(ValueError, match=r"the test images in .* have no image; allowed: at least one"):
        parquet_source(tmp_path).load()
    with pytest.raises(ValueError, match=r"shape \(2, 5, 4\) is not allowed"):
        parquet_source(tmp_path, shape=(2, 5, 4))


# Digits and the checks that all share


def test_digits() -> None:
    source, dataset = Digits(), Digits().load()
    train, test = dataset.train, dataset.test
    assert (len(train.labels), len(test.labels)) == (1433, 364)
    assert train.pixels.shape[1:] == source.shape == (1, 8, 8)
    levels = torch.cat([train.pixels, test.pixels]).unique()
    assert levels.tolist() == [round(level * 255 / 16) for level in range(17)]
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    rows = {(bytes((row * 255 / 16).round().astype("uint8")), int(label)) for row, label in zip(x, y, strict=True)}
    for images in (train, test):
        found = zip(images.pixels.flatten(1).numpy(), images.labels.tolist(), strict=True)
        assert {(bytes(row), label) for row, label in found} <= rows
        share = images.labels.bincount() / len(images.labels)
        assert (share - 0.1).abs().max() < 0.005
    assert torch.equal(Digits().load().test.labels, test.labels)
    assert (test.labels[:10].tolist(), train.labels[:3].tolist()) == (list(range(10)), [0, 1, 2])


def test_fingerprint_changes_with_every_byte(toy: Dataset) -> None:
    assert re.fullmatch("[0-9a-f]{16}", toy.fingerprint)
    same = Dataset("other", Images(toy.train.pixels.clone(), toy.train.labels.clone()), toy.test, 5)
    assert same.fingerprint == toy.fingerprint
    for split in ("train", "test"):
        for part in ("pixels", "labels"):
            images = getattr(toy, split)
            changed = getattr(images, part).clone()
            changed.view(-1)[-1] += 1
            other = replace(toy, **{split: replace(images, **{part: changed})})
            assert other.fingerprint != toy.fingerprint
    assert replace(toy, checksum="known").fingerprint == "known"


def test_check_says_what_is_wrong() -> None:
    class Declared(Source):
        name, shape, num_classes, where, remedy = "made", (1, 2, 3), 4, "here", "Do this."

        def read(self) -> tuple[Images, Images]:
            raise NotImplementedError

    def images(shape: tuple[int, ...] = (1, 2, 3), n: int = 5, labels: int = 5, dtype: Any = torch.uint8) -> Images:
        return Images(torch.zeros(n, *shape, dtype=dtype), torch.zeros(labels, dtype=torch.int64))

    check(images(), Declared(), "test", 5)
    for bad, count, message in (
        (images(dtype=torch.float32), None, "pixels of torch.float32; allowed: torch.uint8"),
        (Images(images().pixels, torch.zeros(5)), None, "labels of torch.float32; allowed: torch.int64"),
        (images((1, 3, 3)), None, "the shape (1, 3, 3); allowed: (1, 2, 3)"),
        (images(labels=4), None, "labels of shape (4,) for 5 images; allowed: one label an image"),
        (images(n=0, labels=0), None, "no image; allowed: at least one"),
        (images(), 6, "5 images; allowed: 6"),
        (Images(images().pixels, torch.tensor([0, 1, 2, 3, 4])), None, "labels from 0 to 4; allowed: 0 to 3"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"made: the test images in here have {message}. Do this.")):
            check(bad, Declared(), "test", count)


# Real images


@pytest.mark.data
@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "cifar10-jpeg"])
def test_real_images(name: str) -> None:
    root = os.environ.get("NOBACKPROP_DATA")
    if not root:
        pytest.skip("NOBACKPROP_DATA does not name a folder of real images")
    source = (
        Torchvision(name, root, download=False)
        if name in FOLDERS
        else Parquet(root, name, (3, 32, 32), 10, "cifar10-jpeg/train-*.parquet", "cifar10-jpeg/test-*.parquet")
    )
    dataset = source.load()
    train, test = dataset.train, dataset.test
    assert len(train.labels) == (60_000 if name in FOLDERS else 50_000)
    assert len(test.labels) == 10_000
    assert test.labels.bincount().min() >= (800 if name == "MNIST" else 1000)
    mean = train.pixels.float().mean() / 255
    assert mean == pytest.approx({"MNIST": 0.1307, "FashionMNIST": 0.2860, "cifar10-jpeg": 0.4734}[name], abs=2e-3)
