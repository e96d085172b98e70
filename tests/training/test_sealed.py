"""Files that end with a checksum: no damage is ever read, and other programs read the file."""

import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Config, folder, interrupt, train
from damage import SECTOR, WAYS

import nobackprop
from nobackprop.mistakes import Mistake
from nobackprop.training import checkpoints, sealed

TRIALS = 300


def damages(content: bytes, kind: str, trials: int) -> Iterator[bytes]:
    """Copies of a file's content with one bit flipped, an end cut off, or a sector of zeros."""
    chance = random.Random(kind)
    for _ in range(trials):
        if (damaged := WAYS[kind](content, chance)) != content:
            yield damaged


def silent(path: Path, read: Callable[[], Any], trials: int = TRIALS) -> dict[str, int]:
    """How many damaged copies of a file, put in its place, `read` takes without naming the file, by kind of damage."""
    content, counts = path.read_bytes(), {}
    for kind in ("flip", "cut", "zero"):
        counts[kind] = 0
        for damaged in damages(content, kind, trials):
            path.write_bytes(damaged)
            try:
                read()
                counts[kind] += 1
            except Mistake as e:
                counts[kind] += str(path) not in str(e)
    path.write_bytes(content)
    read()
    return counts


def test_no_damage_of_weights_is_read(config: Config) -> None:
    cfg = config("max_epochs=1")
    train(cfg)
    path = folder(cfg) / "seed0" / "best.pt"
    assert silent(path, lambda: nobackprop.load(path)) == {"flip": 0, "cut": 0, "zero": 0}
    for byte in range(-sealed.SIZE - sealed.END, 0):  # of the checksum, and of what says that there is one
        damaged = bytearray(path.read_bytes())
        damaged[byte] ^= 1
        (other := path.with_name("other.pt")).write_bytes(damaged)
        with pytest.raises(sealed.Damaged):
            sealed.read(other)


def test_no_damage_of_a_checkpoint_is_read(config: Config) -> None:
    path = interrupt(config())[-1]
    about = checkpoints._peek(path)
    assert about is not None

    def read() -> None:
        sealed.read(path)

    assert silent(path, read) == {"flip": 0, "cut": 0, "zero": 0}
    assert [content["steps"] for _, content in checkpoints.usable(path.parent, about)] == [261, 161]


def test_other_programs_read_the_file(tmp_path: Path) -> None:
    path, content = tmp_path / "a.pt", {"w": torch.randn(1000), "names": ["a", "b"], "rate": 0.5}
    sealed.write(path, content)
    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert torch.equal(loaded.pop("w"), content["w"])
        assert loaded == {"names": ["a", "b"], "rate": 0.5}
    assert zipfile.ZipFile(path).testzip() is None


def test_a_file_from_before_there_were_checksums_is_read_if_its_tensors_are_whole(tmp_path: Path) -> None:
    path, content = tmp_path / "best.pt", {"w": torch.randn(1000), "classes": [0, 1]}
    torch.save(content, path)
    assert torch.equal(sealed.read(path)["w"], content["w"])
    before, refused = path.read_bytes(), 0
    for kind in ("flip", "cut", "zero"):
        for damaged in damages(before, kind, TRIALS):
            path.write_bytes(damaged)
            try:
                loaded = sealed.read(path)
            except sealed.Damaged:
                refused += 1
                continue
            assert torch.equal(loaded.pop("w"), content["w"])  # it is in what the zip file's own checksums leave out
            assert loaded == {"classes": [0, 1]}
    assert refused > TRIALS
    path.write_bytes(before + bytes(SECTOR))
    with pytest.raises(sealed.Damaged):
        sealed.read(path)


def test_a_file_that_is_whole_but_no_file_of_tensors_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    for content in (b"", b"PK", bytes(sealed.SIZE), b"x" * 1000):
        path.write_bytes(content)
        with pytest.raises(sealed.Damaged, match=r"best\.pt is damaged"):
            sealed.read(path)
    path.write_bytes(b"x" + sealed._checksum(memoryview(b"x")))
    with pytest.raises(sealed.Damaged, match=r"best\.pt is damaged \(torch can't load it: "):
        sealed.read(path)
