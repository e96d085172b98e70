import os
import pickle
import re
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import md5
from io import BytesIO
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError
from zlib import crc32

import numpy as np
import pyarrow as pa
import pytest
import torch
import torchvision.datasets
from conftest import assert_same_images, random_images, run_config, train, until
from filelock import FileLock
from PIL import Image, ImageFile
from pyarrow import parquet
from torch import Tensor

from nobackprop.data import checksums, sources
from nobackprop.data.decoding import open_image, quiet_decoding
from nobackprop.data.sources import Dataset, Digits, Images, Parquet, Source, Torchvision, check
from nobackprop.mistakes import Mistake

FOLDERS = {"MNIST": "MNIST/raw", "FashionMNIST": "FashionMNIST/raw", "KMNIST": "KMNIST/raw"}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Without network, and with a user's cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user's cache"))

    def refuse(*_: Any, **__: Any) -> None:
        raise URLError("there is no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    sources._load.cache_clear()
    yield
    sources._load.cache_clear()


def small(monkeypatch: pytest.MonkeyPatch, name: str, train: int, test: int) -> None:
    monkeypatch.setitem(sources.TORCHVISION, name, replace(sources.TORCHVISION[name], counts=(train, test)))


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
    assert str(tmp_path / "new" / sources.TORCHVISION[name].folder) in str(e.value)
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
        loaded = list(pool.map(lambda _: Torchvision("MNIST", tmp_path).load(), range(4)))
    assert len(started) == 1
    assert [len(dataset.train.labels) for dataset in loaded] == [7] * 4


def test_a_folder_of_kmnist_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, "KMNIST", 70, 30)
    write_mnist(tmp_path / "images", "KMNIST", 70, 30)
    options = ["dataset=kmnist", f"paths.data={tmp_path / 'images'}", "rule=bp", "max_epochs=1", "batch_size=9"]
    (record,) = train(run_config(*options, "logger=none", "arch.hidden=[8]", f"paths.runs={tmp_path / 'runs'}"))
    assert (record.data.name, record.data.train, record.data.validation, record.data.test) == ("KMNIST", 63, 7, 30)
    assert record.steps == 7


def test_what_torchvision_kept_for_itself_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old versions left their own file of images, which it still prefers to those that are checked."""
    small(monkeypatch, "MNIST", 7, 3)
    train, _ = write_mnist(tmp_path)
    processed = tmp_path / "MNIST/processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(7, 28, 28, dtype=torch.uint8), torch.zeros(7, dtype=torch.int64)), processed / name)
    assert_same_images(Torchvision("MNIST", tmp_path).load().train, train)


# Torchvision: downloads that fail, folders that are not there, locks


def tree(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


@pytest.mark.parametrize("name", ["MNIST", "KMNIST", "CIFAR10"])
@pytest.mark.parametrize("download", [True, False])
def test_a_mistyped_folder_does_not_come_into_being(tmp_path: Path, name: str, download: bool) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{name} needs the files .* in {tmp_path}/no/such/folder/"):
        Torchvision(name, tmp_path / "no/such/folder", download).load()
    assert tree(tmp_path) == []


@pytest.mark.parametrize("error", [URLError("broken off"), RuntimeError("corrupted"), KeyboardInterrupt()])
@pytest.mark.parametrize(("name", "part"), [("MNIST", "MNIST/raw/t10k.gz"), ("CIFAR10", "cifar-10-python.tar.gz")])
def test_a_download_that_is_broken_off_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, part: str, error: BaseException
) -> None:
    def download(self: Any) -> None:
        Path(self.root, part).parent.mkdir(parents=True, exist_ok=True)
        Path(self.root, part).write_bytes(b"half")
        raise error

    monkeypatch.setattr(getattr(torchvision.datasets, name), "download", download)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else FileNotFoundError
    with pytest.raises(expected):
        Torchvision(name, tmp_path / "new").load()
    assert tree(tmp_path) == []
    own = tmp_path / "old" / sources.TORCHVISION[name].folder / "own"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"a user's")
    with pytest.raises(expected):
        Torchvision(name, tmp_path / "old").load()
    assert own.read_bytes() == b"a user's"
    assert Path(tmp_path / "old" / f".{name}.lock").exists()  # others may wait for it


def test_a_home_is_found_and_one_that_is_not_known_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, "MNIST", 7, 3)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_mnist(tmp_path / "images")
    write_tiny(tmp_path / "images")
    assert len(Torchvision("MNIST", "~/images", download=False).load().train.labels) == 7
    assert len(parquet_source(Path("~/images")).load().train.labels) == 7
    elsewhere = parquet_source(Path("/nowhere"), train="~/images/p/train-*.parquet", test=f"{tmp_path}/images/p/test*")
    assert len(elsewhere.load().train.labels) == 7
    for source in (Torchvision("MNIST", "~no-such-user/x"), parquet_source(Path("~no-such-user/x"))):
        with pytest.raises(ValueError, match=r"the folder ~no-such-user/x can't be found: .* Write the whole path"):
            source.load()


def test_a_file_where_a_folder_should_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file/below"):
        for source in (Torchvision("MNIST", root), Torchvision("CIFAR10", root, False), parquet_source(root)):
            with pytest.raises(ValueError, match=rf"{tmp_path}/file( is a file, but must be a folder|/below)"):
                source.load()
    (tmp_path / "MNIST").write_text("")
    with pytest.raises(
        ValueError, match=rf"MNIST needs the files .*: \[Errno 20\] Not a directory: '{tmp_path}/MNIST/raw"
    ):
        Torchvision("MNIST", tmp_path).load()


@pytest.mark.parametrize("download", [True, False])
def test_what_is_no_regular_file_is_told_and_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, download: bool
) -> None:
    small(monkeypatch, "MNIST", 7, 3)
    write_mnist(tmp_path)
    write_tiny(tmp_path)
    labels, shard = tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte", tmp_path / "p/train-1.parquet"
    for path in (labels, shard):
        path.unlink()
    for make in (Path.mkdir, os.mkfifo):
        make(labels)
        make(shard)
        with pytest.raises(ValueError, match=rf"{labels} is not a regular file"):
            Torchvision("MNIST", tmp_path, download).load()
        with pytest.raises(ValueError, match=rf"{shard} is not a regular file"):
            parquet_source(tmp_path).load()
        for path in (labels, shard):
            path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / "elsewhere").write_bytes(b"\0\0\x08\1\0\0\0\3\1\2\3")
    labels.symlink_to(tmp_path / "elsewhere")
    assert Torchvision("MNIST", tmp_path, download).load().test.labels.tolist() == [1, 2, 3]


def test_a_file_that_may_not_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, "MNIST", 7, 3)
    write_mnist(tmp_path)
    write_tiny(tmp_path)
    opened = Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name in ("t10k-labels-idx1-ubyte", "train-1.parquet"):
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    for source, name in ((Torchvision("MNIST", tmp_path), "t10k-labels-idx1-ubyte"), (parquet_source(tmp_path), "1.p")):
        with pytest.raises(ValueError, match=rf"the system refused {tmp_path}/.*{name}.*: Permission denied\. Cor"):
            source.load()


def test_waiting_for_a_lock_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small(monkeypatch, "MNIST", 7, 3)
    monkeypatch.setattr(checksums, "WAIT_S", 0.1)
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", lambda self: pytest.fail("downloaded twice"))
    with ThreadPoolExecutor(1) as pool:
        with FileLock(tmp_path / ".MNIST.lock"):
            waiting = pool.submit(Torchvision("MNIST", tmp_path).load)
            until(lambda: caplog.messages)
            write_mnist(tmp_path)
        assert len(waiting.result().train.labels) == 7
    assert caplog.messages == [
        f"waiting for another process that is downloading MNIST: it holds the lock {tmp_path}/.MNIST.lock, and gives "
        "it up when it ends. If no process is at work there, on any machine, the lock is stale: delete that file.",
        *caplog.messages[1:],
    ]


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
    cls, classes = getattr(torchvision.datasets, name), sources.TORCHVISION[name].num_classes
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
    with pytest.raises(
        ValueError, match=r"train-0.parquet has the columns \['picture', .*\]; needed: one img or image"
    ):
        parquet_source(tmp_path).load()
    with pytest.raises(ValueError, match=r"has the columns .*; needed: one label or fine_label\."):
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
    image = f"{where}, column 'img'"
    good, big = encoded(random_images(1, (3, 5, 4), 2).pixels[0]), encoded(random_images(1, (3, 4, 4), 2).pixels[0])
    Image.fromarray(np.full((5, 4), 40_000, np.uint16)).save(deep := BytesIO(), "PNG")
    source = parquet_source(tmp_path)
    cases: list[tuple[list[bytes | None], list[Any], str]] = [
        (
            [good, b"no image"],
            [0, 1],
            rf"{image}, row 1 is not a readable image: it is none of JPEG, PNG,.*Correct",
        ),
        ([good, good, good[:70]], [0, 1, 1], rf"{image}, row 2 is not a readable image"),
        ([None, good], [0, 1], rf"{image}, row 0 is not a readable image: it has no bytes"),
        (
            [good, deep.getvalue()],
            [0, 1],
            rf"{image}, row 1 is not a readable image: it has more than 8 bits",
        ),
        ([good, big], [0, 1], rf"{image}, row 1 is 4 x 4 pixels; allowed: 5 x 4\."),
        ([good, good], [0, None], rf"{where}, column 'label', row 1 has no label"),
        ([good, good], ["a", "b"], rf"{where}: column 'label' is string; allowed: an int"),
        ([good, good], [0, 10], r"the training images in .* have labels from 0 to 10; allowed: 0 to 9\."),
        ([good, good], [0, -1], r"the training images in .* have labels from -1 to"),
    ]
    for blobs, labels, message in cases:
        write_parquet(path, blobs, labels)
        with pytest.raises(ValueError, match=message):
            source.load()
    write_parquet(path, [good] * 3, pa.array([1, 2, 2**63], pa.uint64()))
    with pytest.raises(ValueError, match=rf"{where} is not a readable Parquet file: Integer value"):
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


def test_parquet_types_of_columns_are_checked(tmp_path: Path) -> None:
    """A text would be opened as a path on this machine."""
    train, _ = write_tiny(tmp_path)
    path = tmp_path / "p/train-1.parquet"
    (tmp_path / "secret.png").write_bytes(encoded(train.pixels[0]))
    secret, labels = str(tmp_path / "secret.png"), pa.array([1])
    binary = pa.array([{"bytes": encoded(train.pixels[0])}])
    for columns, names, message in (
        ([pa.array([{"bytes": secret}]), labels], None, "field 'bytes' of column 'img' is string; allowed: binary"),
        ([pa.array([{"bytes": 1}]), labels], None, "field 'bytes' of column 'img' is int64; allowed: binary"),
        ([pa.array([{"bytes": [b"a"]}]), labels], None, "field 'bytes' of column 'img' is list<"),
        (
            [pa.array([{"path": secret}]), labels],
            None,
            "column 'img' has not one field 'bytes', but struct<path: string>",
        ),
        ([pa.array([secret]), labels], None, "column 'img' is string; allowed: a struct with bytes"),
        ([binary, pa.array([0.5])], None, "column 'label' is double; allowed: an int"),
        ([binary, pa.array([True])], None, "column 'label' is bool; allowed: an int"),
        (
            [binary, labels, labels],
            ["img", "label", "label"],
            r" has the columns \['img', .*\]; needed: one label or fine",
        ),
    ):
        parquet.write_table(pa.Table.from_arrays(columns, names or ["img", "label"]), path)
        with pytest.raises(ValueError, match=rf"{path}.*{message}"):
            parquet_source(tmp_path).load()
    table = pa.table({"img": binary.cast(pa.struct([("bytes", pa.large_binary())])), "label": labels.cast(pa.uint8())})
    parquet.write_table(table, path)
    assert torch.equal(parquet_source(tmp_path).load().train.pixels[4], train.pixels[0])


def test_parquet_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = write_tiny(tmp_path)
    path, source, good = tmp_path / "p/train-0.parquet", parquet_source(tmp_path), encoded(train.pixels[0])
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))

    def write(blobs: list[bytes], **options: Any) -> None:
        table = pa.table({"img": pa.array([{"bytes": blob} for blob in blobs]), "label": [1] * len(blobs)})
        parquet.write_table(table, path, compression="zstd", **options)

    write([bytes(2**26)])
    assert path.stat().st_size < 10_000
    with pytest.raises(ValueError, match=rf"{path}: 1 rows unpack to 67,\d+,\d+ bytes; allowed for images of shape"):
        source.load()
    write([bytes(300_000)])
    with pytest.raises(ValueError, match=rf"{path}, column 'img', row 0 has 300,000 bytes; allowed: 262,304"):
        source.load()

    def claiming(width: int, height: int) -> bytes:
        header = good[12:16] + struct.pack(">2I", width, height) + good[24:29]
        return good[:12] + header + struct.pack(">I", crc32(header)) + good[33:]

    write([claiming(8000, 8000)])
    with pytest.raises(ValueError, match=rf"{path}, column 'img', row 0 is 8000 x 8000 pixels; allowed: 5 x 4"):
        source.load()
    with pytest.raises(ValueError, match=r"is not a readable image: Image size \(2500000000 pixels\) exceeds"):
        open_image(BytesIO(claiming(50_000, 50_000)), "it", "")
    with monkeypatch.context() as patch:
        patch.setattr(sources.os, "sysconf", lambda _: 10)
        write([good] * 2)
        with pytest.raises(
            ValueError, match=r"2 images of shape \(3, 5, 4\) need 0 GB of memory; this machine has 0 GB"
        ):
            source.load()
    # 20,000 times the same 10 MB, which are stored once, unpack to 200 GB.
    group = SimpleNamespace(num_rows=20_000, num_columns=2, total_byte_size=10_000_000)
    metadata = SimpleNamespace(num_row_groups=1, row_group=lambda _: group, num_rows=20_000)
    assert source._rows_at_once(path, metadata) == 107


def test_parquet_patterns(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    with pytest.raises(
        ValueError, match=r"\['p/test-0.parquet'\] in .* would train and test: the patterns p/\*.parquet "
    ):
        parquet_source(tmp_path, train="p/*.parquet").load()
    for pattern in ("", "/", "p/[", "..", "**/none"):
        with pytest.raises(ValueError, match=r"no file|not a regular file"):
            parquet_source(tmp_path, train=pattern).load()
    (tmp_path / "p/._train-2.parquet").write_bytes(b"what macOS adds")
    assert len(parquet_source(tmp_path, train="**/*train*").load().train.labels) == 7


# Images of every kind


def picture(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(random_images(1, (3, 5, 4), 2).pixels[0].permute(1, 2, 0).numpy()).convert(mode)


def opened(image: Image.Image, format: str, **options: Any) -> Image.Image:
    image.save(buffer := BytesIO(), format, **options)
    return open_image(buffer, "it", "Do this.")


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("PPM", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"lossless": True, "save_all": True, "append_images": [picture().rotate(180)]}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"save_all": True, "append_images": [picture().rotate(180)]}),
        ("PNG", {"save_all": True, "append_images": [picture().rotate(180)]}),
    ],
)
def test_images_are_the_same_in_every_format_and_of_several_the_first(format: str, options: dict[str, Any]) -> None:
    assert opened(picture(), format, **options).tobytes() == picture().tobytes()


def test_the_first_frame_of_a_gif_is_read() -> None:
    palette = picture().quantize(16)
    frames = {"save_all": True, "append_images": [palette.rotate(180)]}
    assert opened(palette, "GIF", **frames).tobytes() == palette.convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr"])
def test_images_of_every_mode_become_rgb(mode: str) -> None:
    format = "TIFF" if mode in ("PA", "CMYK", "YCbCr") else "PNG"
    assert opened(picture(mode), format).tobytes() == picture(mode).convert("RGB").tobytes()


def test_images_of_more_than_8_bits_a_channel_or_of_other_formats_are_refused() -> None:
    for mode, format in (("I;16", "PNG"), ("I", "TIFF"), ("F", "TIFF"), ("I", "PPM")):
        image = Image.new("I", (4, 5), 700) if format == "PPM" else picture("L").convert(mode)
        with pytest.raises(
            ValueError, match=r"it is not a readable image: it has more than 8 bits a channel\. Do this"
        ):
            opened(image, format)
    for format in ("EPS", "PDF", "ICO", "TGA"):  # to read EPS, Pillow starts another program
        with pytest.raises(ValueError, match=r"it is not a readable image: it is none of JPEG, PNG, .*\. Do this"):
            opened(picture(), format)


TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # as a camera stores an image of each EXIF orientation


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", [1, *TURNED])
def test_images_are_turned_upright(format: str, orientation: int) -> None:
    upright = picture().resize((40, 56))
    stored = upright.transpose(TURNED[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(format, {})
    stored.save(buffer := BytesIO(), format, exif=exif, **options)
    image = open_image(buffer, "it", "", size=(40, 56))
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(upright).astype(int))
    assert difference.max() <= (6 if format == "JPEG" else 0)
    if orientation > 4:
        with pytest.raises(ValueError, match="it is 56 x 40 pixels; allowed: 40 x 56"):
            open_image(buffer, "it", "", size=(56, 40))


def test_damaged_exif_data_says_nothing() -> None:
    for damaged in (b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0nothing", b"\xff" * 40):
        picture().save(buffer := BytesIO(), "JPEG", exif=damaged)
        with quiet_decoding():
            assert open_image(buffer, "it", "").size == (4, 5)


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


def test_damaged_digits_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = sources.find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None
    good = Path(spec.origin).with_name("datasets").joinpath("data/digits.csv.gz").read_bytes()
    path = tmp_path / "datasets/data/digits.csv.gz"
    path.parent.mkdir(parents=True)
    monkeypatch.setattr(sources, "find_spec", lambda _: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for damaged in (None, b"", good[:1000], bytes(flipped), good[:-6] + b"\0" * 6, b"no gzip"):
        if damaged is not None:
            path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"digits.*Install scikit-learn again\."):
            Digits().load()
    path.write_bytes(good)
    assert Digits().load().fingerprint == "dbe5d0da206217cd"


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


# What files held when they were read first


def of_each_kind(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Source, Path]]:
    """A source of each kind whose files carry no checksums, with one of its files."""
    small(monkeypatch, "MNIST", 7, 3)
    write_mnist(root)
    write_tiny(root)
    return {
        "MNIST": (Torchvision("MNIST", root), root / "MNIST/raw/t10k-images-idx3-ubyte"),
        "tiny": (parquet_source(root), root / "p/train-1.parquet"),
    }


def loaded(source: Source) -> Dataset:
    """As another process would load it."""
    sources._load.cache_clear()
    return source.load()


def flip(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["MNIST", "tiny"])
def test_a_change_after_the_first_reading_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    source, path = of_each_kind(tmp_path, monkeypatch)[name]
    first = loaded(source).fingerprint
    kept = Path(source.where) / f"{name}.sha256"
    what = {"MNIST": "are not the official ones", "tiny": "are read for the first time"}[name]
    assert caplog.messages == [
        f"{name}: the files in {source.where} {what}, with fingerprint {first} in all records; a change is refused "
        f"from now on, by the checksums in {kept}"
    ]
    assert subprocess.run(["sha256sum", "--check", "--status", kept.name], cwd=kept.parent).returncode == 0
    assert loaded(source).fingerprint == first
    assert len(caplog.messages) == 1
    good, file = path.read_bytes(), os.path.relpath(path, source.where)
    flip(path, 20)  # in MNIST's file a pixel, in the other an image's own header
    with pytest.raises(
        ValueError, match=rf"not those that were read first \(changed: \['{file}'\]\)\. .* delete {kept}"
    ):
        loaded(source)
    path.write_bytes(good)
    assert loaded(source).fingerprint == first
    flip(kept, 3)
    with pytest.raises(ValueError, match="changed: "):
        loaded(source)
    kept.write_bytes(b"")
    with pytest.raises(ValueError, match="new: "):
        loaded(source)
    kept.unlink()
    assert loaded(source).fingerprint == first
    assert len(caplog.messages) == 2


def test_a_part_that_is_missing_or_new_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    source = parquet_source(tmp_path)
    assert len(loaded(source).train.labels) == 7
    part = (tmp_path / "p/train-1.parquet").rename(tmp_path / "away")
    with pytest.raises(ValueError, match=r"were read first \(missing: \['p/train-1.parquet'\]\)"):
        loaded(source)
    part.rename(tmp_path / "p/train-2.parquet")
    with pytest.raises(ValueError, match=r"\(missing: \['p/train-1.parquet'\]; new: \['p/train-2.parquet'\]\)"):
        loaded(source)


def test_names_of_parts_may_be_odd(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    for name in (b"caf\xe9", b"line\nbreak", b"back\\slash", b"r\rt", b" "):
        os.link(tmp_path / "p/train-1.parquet", tmp_path / os.fsdecode(b"p/train-" + name + b".parquet"))
    assert len(loaded(parquet_source(tmp_path)).train.labels) == 7 + 5 * 3
    assert len(loaded(parquet_source(tmp_path)).train.labels) == 7 + 5 * 3
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/p/train-caf\xe9.parquet")).unlink()
    with pytest.raises(ValueError, match=r"missing: \['p/train-caf"):
        loaded(parquet_source(tmp_path))


def test_official_files_pass_in_silence_until_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, path = of_each_kind(tmp_path, monkeypatch)["MNIST"]
    sums = tuple(md5(file.read_bytes()).hexdigest() for file in source.files().values())
    monkeypatch.setitem(sources.TORCHVISION, "MNIST", replace(sources.TORCHVISION["MNIST"], md5=sums))
    loaded(source)
    assert caplog.messages == []
    flip(path)
    with pytest.raises(
        ValueError, match=r"changed: \['t10k-images-idx3-ubyte'\]\)\. Delete the wrong files and run again"
    ):
        loaded(source)
    (path.parent / "MNIST.sha256").unlink()
    loaded(source)
    assert "are not the official ones" in caplog.messages[0]


@pytest.mark.parametrize("name", ["MNIST", "tiny"])
def test_where_nobody_may_write_checksums_are_kept_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    source, path = of_each_kind(tmp_path / "data", monkeypatch)[name]
    Path(source.where).chmod(0o555)
    loaded(source)
    (kept,) = (tmp_path / "user's cache/nobackprop").iterdir()
    assert caplog.messages[0].endswith(f"by the checksums in {kept}")
    assert not list((tmp_path / "data").rglob("*.sha256"))
    flip(path)
    with pytest.raises(ValueError, match=rf"delete {kept}, which"):
        loaded(source)
    flip(path)
    kept.unlink()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file/cache"))
    for times in (2, 3):
        loaded(source)
        assert len(caplog.messages) == times
        assert caplog.messages[-1].endswith("no checksums could be kept")


DAMAGES = {
    "flip": lambda content, draw: flipped_bits(content, draw, 1),
    "flips": lambda content, draw: flipped_bits(content, draw, 9),
    "cut": lambda content, draw: content[: draw.randrange(len(content))],
    "zeroed": lambda content, draw: zeroed(content, draw),
}


def flipped_bits(content: bytes, draw: Random, count: int) -> bytes:
    damaged = bytearray(content)
    for _ in range(count):
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def zeroed(content: bytes, draw: Random) -> bytes:
    """A sector of a disk that reads as zeros."""
    start = draw.randrange(0, len(content), 512)
    return content[:start] + bytes(len(content[start : start + 512])) + content[start + 512 :]


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["MNIST", "tiny"])
def test_no_damage_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    """Of files that were read before, all damage is refused; of others, what is read all the same is told."""
    source, _ = of_each_kind(tmp_path, monkeypatch)[name]
    first = loaded(source).fingerprint
    kept = Path(source.where) / f"{name}.sha256"
    sums, draw, outcomes = kept.read_bytes(), Random(0), Counter()
    for _ in range(300):
        path = draw.choice([*source.files().values()])
        good = path.read_bytes()
        if (damaged := DAMAGES[damage](good, draw)) == good:
            continue
        path.write_bytes(damaged)
        with pytest.raises(Mistake, match=r"changed: |has \d+ bytes and the header"):
            loaded(source)
        kept.unlink()
        caplog.clear()
        try:
            fingerprint = loaded(source).fingerprint
        except Mistake:
            outcomes["refused"] += 1
        else:
            (told,) = caplog.messages
            assert f"with fingerprint {fingerprint} in all records" in told
            outcomes["told, others" if fingerprint != first else "told, the same"] += 1
        kept.write_bytes(sums)
        path.write_bytes(good)
    assert outcomes.total() > 250
    print(name, damage, dict(outcomes))


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


def test_a_protocol_that_selects_on_test_images_has_the_same_images_and_computes_nothing_twice(toy: Dataset) -> None:
    other = toy.selecting_on_test
    assert other.validate_on_test
    assert (other.train, other.validation, other.fingerprint) == (toy.train, toy.test, toy.fingerprint)
    assert toy.selecting_on_test is other  # with what it has computed
