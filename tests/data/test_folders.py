"""Image files through their cache: what is made of them, what interrupts it, and what is noticed afterwards."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from conftest import assert_same_images, run_config, train, until
from filelock import FileLock
from PIL import Image

from nobackprop.data import checksums, folders as module, sources
from nobackprop.data.batches import TrainBatches, task
from nobackprop.data.checksums import some
from nobackprop.data.folders import ImageNet
from nobackprop.data.sources import Dataset, Images
from nobackprop.mistakes import Mistake, Notice

CLASSES = [f"n{i:02}" for i in range(6)]
MODES = {"RGB": "JPEG", "L": "JPEG", "CMYK": "JPEG", "P": "png", "RGBA": "PNG", "LA": "png"}


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    noise = torch.randint(256, (3, 4, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy()).resize(size, Image.Resampling.BICUBIC)


def save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """5 + 2 images of each of six classes: non-square, of every mode."""
    seed = 0
    for split, n in (("train", 5), ("val", 2)):
        for label, name in enumerate(CLASSES):
            for i in range(n):
                mode = list(MODES)[(label + i) % len(MODES)]
                size = (30 + 7 * i, 41 - 6 * i)
                save(tmp_path / "tree" / split / name / f"{i}.{MODES[mode]}", picture(seed, size).convert(mode))
                seed += 1
    (tmp_path / "tree/train/n01/notes.txt").write_text("no image")
    return tmp_path / "tree"


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "BLOCK", 4)
    sources._load.cache_clear()
    yield
    sources._load.cache_clear()


def source(tree: Path, **changes: Any) -> ImageNet:
    return ImageNet("six", tree, **{"cache": tree.parent / "cache", "size": 12, **changes})


def loaded(source: ImageNet) -> Dataset:
    """As another process would load it."""
    sources._load.cache_clear()
    return replace(source).load()


def content(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.iterdir()}


def expected(path: Path, size: int) -> torch.Tensor:
    """The square about the centre, to half a pixel, scaled."""
    image = Image.open(path).convert("RGB")
    w, h = image.size
    side = min(w, h)
    left, top = (w - side) / 2, (h - side) / 2
    box = (left, top, left + side, top + side)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)


# What is made


def test_images_are_cut_scaled_and_in_order(tree: Path) -> None:
    s = source(tree)
    assert (s.shape, s.num_classes, s.classes) == ((3, 12, 12), 6, tuple(CLASSES))
    dataset = s.load()
    for images, split, n in ((dataset.train, "train", 5), (dataset.test, "val", 2)):
        assert (images.pixels.dtype, images.labels.dtype) == (torch.uint8, torch.int64)
        assert images.labels.tolist() == [label for label in range(6) for _ in range(n)]
        files = [p for name in CLASSES for p in sorted((tree / split / name).iterdir()) if p.suffix != ".txt"]
        assert len(files) == len(images.pixels)
        for pixels, path in zip(images.pixels, files, strict=True):
            assert torch.equal(pixels, expected(path, 12)), path
    assert (dataset.name, dataset.num_classes, dataset.validate_on_test) == ("six", 6, False)
    assert sorted(content(tree.parent / "cache")) == ["blocks.txt", "index.json", "lock", "test.pixels", "train.pixels"]


def test_order_is_by_name_whatever_the_file_system_says(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = source(tree).load()
    listed, scan = Path.iterdir, os.scandir
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(sorted(listed(self), reverse=True)))

    class Reversed:
        def __init__(self, path: Path) -> None:
            self.entries = sorted(scan(path), key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> list[Any]:
            return self.entries

        def __exit__(self, *_: Any) -> None:
            pass

    monkeypatch.setattr(module.os, "scandir", Reversed)
    other = source(tree, cache=tree.parent / "other").load()
    assert_same_images(dataset.train, other.train)
    assert dataset.fingerprint == other.fingerprint


def test_a_finished_cache_needs_no_tree_and_decodes_nothing(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = source(tree).load()
    train, test, fingerprint = first.train.pixels.clone(), first.test.pixels.clone(), first.fingerprint
    monkeypatch.setattr(ImageNet, "_decoded", lambda *_: pytest.fail("decoded again"))
    monkeypatch.setattr(module, "cores", lambda: 1)
    loaded(source(tree))
    tree.rename(tree.parent / "gone")
    again = loaded(source(tree))
    assert torch.equal(again.train.pixels, train)
    assert torch.equal(again.test.pixels, test)
    assert again.fingerprint == fingerprint
    assert source(tree).num_classes == 6


def test_fingerprint_is_of_the_pixels(tree: Path) -> None:
    first = source(tree).load().fingerprint
    assert re.fullmatch("[0-9a-f]{16}", first)
    assert replace(source(tree), name="other", cache=tree.parent / "b").load().fingerprint == first
    changed = tree / "val/n05/1.JPEG"
    assert changed.exists()
    save(changed, picture(99, (20, 20)))
    assert source(tree, cache=tree.parent / "c").load().fingerprint != first
    assert source(tree, cache=tree.parent / "d", size=13).load().fingerprint != first


def test_literal_is_bgr_and_validates_on_test(tree: Path) -> None:
    ours, literal = source(tree).load(), source(tree, literal=True, cache=tree.parent / "literal").load()
    assert torch.equal(literal.train.pixels, ours.train.pixels.flip(1))
    assert torch.equal(literal.train.labels, ours.train.labels)
    assert literal.validate_on_test
    t = task(literal, 0, classes=3)
    assert torch.equal(t.validation, t.test)
    assert len(t.train) == 15
    with pytest.raises(
        ValueError, match=r"holds RGB images of shape \(3, 12, 12\), but BGR of .*dataset\.source\.cache"
    ):
        source(tree, literal=True).load()


def test_odd_metadata_passes_in_silence(tree: Path) -> None:
    """Pillow warns of it, and warnings are errors here."""
    image = picture(0, (12, 12)).quantize(4)
    image.info["transparency"] = bytes([0, 128, 255, 255])
    image.save(tree / "train/n00/z.png", transparency=image.info["transparency"])
    assert len(source(tree).load().train.labels) == 31


def test_what_is_no_image_is_left_out_and_counted(
    tree: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = source(tree).load()
    for made in (tree / "train/.ipynb_checkpoints", tree / "val/__MACOSX", tree / "train/n00/__MACOSX"):
        save(made / "0.png", picture(0, (9, 9)))
    for name in ("train/n01/._0.png", "train/n01/.DS_Store", "val/.DS_Store"):
        (tree / name).write_bytes(b"what macOS adds")
    (tree / "train/n02/folder.png").mkdir()
    (tree / "train/n02/deeper").mkdir()
    os.mkfifo(tree / "train/n02/pipe.png")
    monkeypatch.chdir(tree / "val/n02")  # since a socket's path must be short
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind("socket.jpg")
    for name in ("val/n03/a.heic", "val/n03/b.HEIC", "val/n03/LICENSE", "train/labels.csv"):
        (tree / name).write_bytes(b"")
    (tree / "elsewhere").mkdir()
    moved = next((tree / "train/n04").iterdir()).rename(tree / "elsewhere/0.png")
    (tree / "train/n04/0.png").symlink_to(moved)
    assert moved.suffix == ".png"
    caplog.clear()
    again = source(tree, cache=tree.parent / "again").load()
    assert_same_images(again.test, whole.test)
    assert sorted(again.train.pixels.flatten(1).tolist()) == sorted(whole.train.pixels.flatten(1).tolist())
    (told,) = caplog.messages
    start, _, others = told.partition("; left out there: ")
    assert start == (
        f"six: {tree.parent}/again was made from 30 training and 12 test images of 6 classes in {tree}, with "
        f"fingerprint {again.fingerprint} in all records"
    )
    assert {*others.split(", ")} == {
        "1 files beside the classes",
        "2 folders in those of classes",
        "1 '.txt'",
        "2 '.heic'",
        "1 files without a suffix",
        "2 pipes or devices",
    }
    moved.unlink()
    with pytest.raises(ValueError, match=r"n04/0\.png is not a readable image: .*No such file"):
        source(tree, cache=tree.parent / "third").load()


def test_images_of_every_format_are_taken(tmp_path: Path) -> None:
    exact = {".png": {}, ".bmp": {}, ".webp": {"lossless": True}, ".TIF": {}, ".tiff": {}, ".ppm": {}}
    others = {".jpg": {}, ".JPEG": {}, ".gif": {}, ".pgm": {}}
    for split in ("train", "val"):
        for name in ("a", "b"):
            for suffix, options in (exact | others).items():
                path = tmp_path / "tree" / split / name / f"0{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(0, (12, 12)).convert("L" if suffix == ".pgm" else "RGB").save(path, **options)
    assert {*exact, *others} >= {*module.SUFFIXES} - {".tif", ".jpeg"}
    images = source(tmp_path / "tree").load().test
    assert len(images.labels) == 20
    files = sorted([*exact, *others])
    pixels = dict(zip(files, images.pixels.float(), strict=False))
    assert all(torch.equal(pixels[suffix], pixels[".png"]) for suffix in exact)
    assert all((pixels[suffix] - pixels[".png"]).abs().mean() < 30 for suffix in (".jpg", ".JPEG", ".gif"))
    assert torch.equal(pixels[".pgm"][0], pixels[".pgm"][2])


def test_images_are_turned_upright_before_they_are_cut(tree: Path) -> None:
    upright = source(tree).load()
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tree / "val/n03/0.png"
    image = Image.open(path).convert("RGB").transpose(Image.Transpose.ROTATE_90)
    image.save(path, exif=exif)
    turned = source(tree, cache=tree.parent / "turned").load()
    assert turned.fingerprint == upright.fingerprint


def test_thousands_of_classes(tmp_path: Path) -> None:
    save(tmp_path / "one.png", picture(0, (2, 2)))
    names = [f"class {i:04}" for i in range(2000)]
    for split in ("train", "val"):
        for name in names:
            (tmp_path / "tree" / split / name).mkdir(parents=True)
            os.link(tmp_path / "one.png", tmp_path / "tree" / split / name / "1.png")
    s = source(tmp_path / "tree", size=1)
    assert s.num_classes == 2000
    assert s.load().test.labels.tolist() == list(range(2000))
    for name in names[::2]:
        (tmp_path / "tree/val" / name).rename(tmp_path / "tree/val" / f"no {name}")
    with pytest.raises(ValueError, match=r"without \['class 0000', .* \.\.\. 1000 in all\], with \['no class 0000'"):
        source(tmp_path / "tree", cache=tmp_path / "other").load()


# What there is of earlier versions


def as_format_1(s: ImageNet) -> None:
    """Makes a cache into one of the version that did not turn images upright."""
    cache = Path(s.cache)
    blocks = s._blocks()
    for split, folder in module.FOLDERS.items():
        for i, paths in enumerate(module._divided(s._tree(folder)[0])):
            blocks[split, i] = s._recipe(paths, 1), blocks[split, i][1]
    (cache / "blocks.txt").write_bytes(module._lines(blocks))
    index = cache / "index.json"
    index.write_bytes(index.read_bytes().replace(b'"format":2', b'"format":1'))


def test_a_cache_of_an_earlier_format_stays_valid_and_an_unfinished_one_is_made_again(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = source(tree).load().fingerprint
    as_format_1(source(tree))
    assert loaded(source(tree)).fingerprint == first
    save(tree / "train/n00/new.webp", picture(1, (9, 9)))  # which that version did not see
    with pytest.raises(ValueError, match=r"30 then and 31 now: numbers differ in \['n00'\]"):
        loaded(source(tree))
    (tree / "train/n00/new.webp").unlink()
    (tree.parent / "cache/index.json").unlink()
    decoded, decode = [], ImageNet._decoded
    monkeypatch.setattr(ImageNet, "_decoded", lambda self, path: decoded.append(path) or decode(self, path))
    assert loaded(source(tree)).fingerprint == first
    assert len(decoded) == 42


# What interrupts it


def test_a_name_that_is_not_utf8_is_told_before_the_cache_is_made(tree: Path) -> None:
    (tree / os.fsdecode(b"train/n00/caf\xe9.png")).write_bytes(b"")
    with pytest.raises(ValueError, match=r"six: in '.*/train/n00' the name 'caf\\udce9\.png' is not UTF-8, or"):
        source(tree).load()
    (tree / os.fsdecode(b"train/n00/caf\xe9.png")).rename(tree / "train/n00/two\nlines.png")
    with pytest.raises(ValueError, match=r"the name 'two\\nlines\.png' is not UTF-8, or has a line break: rename it"):
        source(tree).load()
    assert not (tree.parent / "cache").exists()


def test_a_corrupt_file_is_named_and_the_build_goes_on(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cores", lambda: 1)
    whole = source(tree, cache=tree.parent / "whole").load()
    (bad,) = (tree / "train/n03").glob("2.*")
    good = bad.read_bytes()
    for damaged in (good[: len(good) // 2], b"no image", b""):
        bad.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=rf"{re.escape(str(bad))} is not a readable image: .*Replace it .*or remove"
        ):
            source(tree).load()
        assert not (tree.parent / "cache/index.json").exists()
    decoded, decode = [], ImageNet._decoded
    monkeypatch.setattr(ImageNet, "_decoded", lambda self, path: decoded.append(path) or decode(self, path))
    bad.write_bytes(good)
    repaired = source(tree).load()
    assert_same_images(repaired.train, whole.train)
    assert len(decoded) <= 42 - 16  # four blocks were made before it
    assert bad in decoded
    assert content(tree.parent / "cache") == content(tree.parent / "whole")
    for name in ("cache", "whole"):
        (tree.parent / name / "index.json").unlink()
    bad.unlink()
    decoded.clear()
    removed = loaded(source(tree))
    assert len(decoded) == 29 - 16  # what comes behind it in the same split has moved
    assert removed.train.pixels.shape[0] == 29
    assert_same_images(removed.train, source(tree, cache=tree.parent / "third").load().train)


CHILD = """
import sys, time
from nobackprop.data import folders
folders.BLOCK = 4
folders.cores = lambda: 2
decode = folders.ImageNet._decoded
def slow(self, path):
    time.sleep(0.02)
    return decode(self, path)
folders.ImageNet._decoded = slow
folders.ImageNet("six", sys.argv[1], sys.argv[2], 12).load()
"""


def started(tree: Path, cache: Path, blocks: int) -> subprocess.Popen[bytes]:
    """A process that is making the cache, slowly, and has made some blocks."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, tree, cache])
    journal = cache / "blocks.txt"
    until(
        lambda: journal.exists() and journal.read_bytes().count(b"\n") >= blocks,
        unless=lambda: child.poll() is not None and "ended too early",
    )
    return child


def test_a_killed_build_goes_on(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tree.parent / "cache"
    child = started(tree, cache, blocks=3)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (cache / "index.json").exists()
    with (cache / "blocks.txt").open("ab") as file:
        file.write(b"train 7 0123")  # cut short
    decoded, decode = [], ImageNet._decoded
    monkeypatch.setattr(ImageNet, "_decoded", lambda self, path: decoded.append(path) or decode(self, path))
    source(tree).load()
    assert 0 < len(decoded) <= 42 - 3 * 4
    source(tree, cache=tree.parent / "alone").load()
    assert content(cache) == content(tree.parent / "alone")


def test_a_half_written_block_is_made_again(tree: Path) -> None:
    source(tree).load()
    cache = tree.parent / "cache"
    before = content(cache)
    (cache / "index.json").unlink()
    with (cache / "train.pixels").open("r+b") as file:
        file.seek(5 * 4 * 3 * 144 + 100)
        file.write(bytes(300))
    (cache / "test.pixels").unlink()
    loaded(source(tree))
    assert content(cache) == before


def test_a_second_process_waits_for_the_cache(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tree.parent / "cache"
    child = started(tree, cache, blocks=1)
    with monkeypatch.context() as patch:
        patch.setattr(ImageNet, "_decoded", lambda *_: pytest.fail("both made it"))
        source(tree).load()
    assert child.wait(120) == 0
    source(tree, cache=tree.parent / "alone").load()
    assert content(cache) == content(tree.parent / "alone")


def test_a_full_disk_is_foreseen(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need = 42 * 3 * 144
    usage = type(module.disk_usage(tree))
    monkeypatch.setattr(module, "disk_usage", lambda _: usage(0, 0, need - 1))
    with pytest.raises(
        ValueError, match=r"needs another 0\.0 GB, the disk has .*choose another dataset\.source\.cache"
    ):
        source(tree).load()
    assert not (tree.parent / "cache").exists()
    monkeypatch.setattr(module, "disk_usage", lambda _: usage(0, 0, need))
    source(tree).load()
    (tree.parent / "cache/index.json").unlink()
    monkeypatch.setattr(module, "disk_usage", lambda _: usage(0, 0, 0))
    loaded(source(tree))  # what is written already needs no more room


# What is noticed afterwards


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_damaged_block_is_named_and_made_again(tree: Path, split: str) -> None:
    source(tree).load()
    cache = tree.parent / "cache"
    before = content(cache)
    path = cache / f"{split}.pixels"
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([before[path.name][-1] ^ 1]))
    block = {"train": 7, "test": 2}[split]
    with pytest.raises(
        ValueError, match=rf"{path} is damaged in block {block} of 4 .*Delete .*index\.json: the next run"
    ):
        loaded(source(tree))
    (cache / "index.json").unlink()
    loaded(source(tree))
    assert content(cache) == before


def test_verify_reads_every_block(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source(tree).load()
    monkeypatch.setattr(module, "SAMPLE", 1)
    hashed, hash_ = [], ImageNet._hash
    monkeypatch.setattr(ImageNet, "_hash", lambda self, *key: hashed.append(key) or hash_(self, *key))
    loaded(source(tree))
    assert [key[0] for key in sorted(hashed)] == ["test", "train"]
    hashed.clear()
    loaded(source(tree, verify=True))
    assert sorted(hashed) == [("test", 4, i) for i in range(3)] + [("train", 4, i) for i in range(8)]


DAMAGES = ("flip", "cut", "zeroed")


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("there", [True, False], ids=["with images", "without images"])
def test_no_damage_of_a_cache_is_silent(tree: Path, damage: str, there: bool) -> None:
    """Each is refused, or changes nothing of the images and labels: the name of a class, or of the folder."""
    cache = tree.parent / "cache"
    first = source(tree).load()
    train, test = (Images(i.pixels.clone(), i.labels) for i in (first.train, first.test))
    if not there:
        tree.rename(tree.parent / "away")
    whole, draw, outcomes = content(cache), Random(0), Counter()
    del whole["lock"]
    for _ in range(320):
        name = draw.choice(sorted(whole))
        damaged, place = bytearray(whole[name]), draw.randrange(len(whole[name]))
        if damage == "flip":
            damaged[place] ^= 1 << draw.randrange(8)
        elif damage == "cut":
            del damaged[place:]
        else:
            start = place // 512 * 512
            damaged[start : start + 512] = bytes(len(damaged[start : start + 512]))
        if damaged == whole[name]:
            continue
        (cache / name).write_bytes(damaged)
        try:
            again = loaded(source(tree, verify=True))
        except Mistake:
            outcomes["refused"] += 1
        else:
            assert_same_images(Images(again.train.pixels, again.train.labels), train)
            assert_same_images(Images(again.test.pixels, again.test.labels), test)
            assert again.fingerprint == first.fingerprint
            outcomes[f"nothing changed, {name}"] += 1
        (cache / name).write_bytes(whole[name])
    print(damage, there, dict(outcomes))
    assert outcomes.total() > 300
    assert outcomes["refused"] > 200


def test_other_damage_is_named(tree: Path) -> None:
    source(tree).load()
    cache = tree.parent / "cache"
    whole = content(cache)
    for name, damaged, message in (
        ("train.pixels", whole["train.pixels"][:-7], r"train.pixels has 12953 bytes, must have 12960\. Delete"),
        ("blocks.txt", whole["blocks.txt"][:-70], r"blocks.txt is damaged\. Delete"),
        ("blocks.txt", whole["blocks.txt"].replace(b"test 1", b"test 9"), r"blocks.txt is damaged\. Delete"),
        ("blocks.txt", b"\xff\n\n a b c d", r"blocks.txt is damaged\. Delete"),
        ("index.json", whole["index.json"][:-5], r"index.json is damaged, or of another version .*Delete"),
        ("index.json", whole["index.json"].replace(b'"format":2', b'"format":3'), r"index.json is .*Delete"),
    ):
        (cache / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            loaded(source(tree))
        (cache / "index.json").unlink()
        loaded(source(tree))
        assert content(cache) == whole
    (cache / "test.pixels").unlink()
    with pytest.raises(ValueError, match=r"test.pixels has 0 bytes, must have 5184"):
        loaded(source(tree))


def test_a_changed_tree_is_noticed(tree: Path) -> None:
    source(tree).load()
    cut = r"not those that .*cache was made from, "
    first, second = tree / "train/n02/0.JPEG", tree / "train/n02/new.jpg"
    assert first.exists()
    first.rename(second)
    with pytest.raises(ValueError, match=cut + r"30 then and 30 now: some have other names\. Put the old files back"):
        loaded(source(tree))
    second.rename(tree / "val/n04/new.jpg")
    with pytest.raises(
        ValueError, match=cut + r"30 then and 29 now: numbers differ in \['n02'\]\..*Delete .*index\.json"
    ):
        loaded(source(tree))
    (tree.parent / "cache/index.json").unlink()
    assert len(loaded(source(tree)).test.labels) == 13
    (tree / "val/n04/new.jpg").rename(first)
    with pytest.raises(ValueError, match="30 now"):
        loaded(source(tree))
    (tree / "train").rename(tree / "elsewhere")  # a split that is not there can't be compared
    with pytest.raises(ValueError, match=r"/val are " + cut + r"13 then and 12 now: numbers differ in \['n04'\]"):
        loaded(source(tree))


def test_the_same_names_in_another_folder_are_not_taken_for_the_same_images(tree: Path) -> None:
    made = source(tree).load()
    moved = tree.rename(tree.with_name("moved"))
    with pytest.raises(ValueError, match=rf"was made from {tree}, not from {moved}\. For other images choose another"):
        source(moved).load()
    with pytest.raises(ValueError, match=rf"was made from {tree}, not from {moved}"):  # also where nothing is loaded
        _ = source(moved).checksum
    with pytest.warns(Notice, match=rf"{tree}s is not there, so .* is used, which was made from {tree}$"):
        source(tree.with_name(f"{tree.name}s")).load()
    (tree.parent / "cache" / "index.json").unlink()  # as it says, for the same images in a new place
    assert source(moved).load().fingerprint == made.fingerprint


def test_paths_that_can_not_be_used_are_told(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ImageNet("six", "~/tree", "~/cache", 12).load().num_classes == 6
    (tmp_path / "file").touch()
    for changes in ({"cache": tmp_path / "file"}, {"root": tmp_path / "file", "cache": tmp_path / "new"}):
        with pytest.raises(ValueError, match=r"/file is a file, but must be a folder: choose another path"):
            replace(source(tree), **changes).load()
    with pytest.raises(
        ValueError, match=r"six: while its images were read, the system refused .*file/below.*Not a dir"
    ):
        source(tree, cache=tmp_path / "file/below").load()
    with pytest.raises(ValueError, match=r"the folder ~no-such-user/x can't be found"):
        _ = source(tree, cache="~no-such-user/x").num_classes
    (tmp_path / "cache/index.json").unlink()
    (tmp_path / "cache/index.json").mkdir()
    for use in (lambda s: s.num_classes, lambda s: s.checksum, lambda s: s.load()):
        with pytest.raises(ValueError, match=r"the system refused .*/cache/index\.json: Is a directory"):
            use(source(tree))
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("n03"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(module.os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"the system refused .*/train/n03: Permission denied\. Correct"):
        source(tree, cache=tmp_path / "new").load()
    assert not (tmp_path / "new").exists()


def test_waiting_for_a_cache_is_told(
    tree: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checksums, "WAIT_S", 0.1)
    cache = tree.parent / "cache"
    cache.mkdir()
    with ThreadPoolExecutor(1) as pool:
        with FileLock(cache / "lock"):
            waiting = pool.submit(source(tree).load)
            until(lambda: caplog.messages)
        assert len(waiting.result().train.labels) == 30
    assert caplog.messages[0].startswith(f"waiting for another process that is making {cache}: it holds the lock")


def test_trees_that_do_not_fit(tree: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"none/train holds no folder; needed: .*or a finished cache in .*cache"
    ):
        _ = source(tree / "none").num_classes
    with pytest.raises(ValueError, match=r"size is 0; allowed: 1"):
        source(tree, size=0)
    for path in (tree / "val/n02").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no file \.jpg, .*\.pgm in .*val/n02\. Correct"):
        source(tree).load()
    (tree / "val/n02").rename(tree / "val/n09")
    with pytest.raises(ValueError, match=r"val are not those in train: without \['n02'\], with \['n09'\]\. Correct"):
        source(tree).load()
    (tree / "val").rename(tree / "away")
    (tree / "val").mkdir()
    with pytest.raises(FileNotFoundError, match=r"val holds no folder; needed: one folder of images for each class"):
        source(tree).load()
    assert some([f"n{i}" for i in range(7)]) == "['n0', 'n1', 'n2', 'n3', 'n4', ... 7 in all]"


# Trained on


def test_batches_are_those_of_images_in_memory(tree: Path) -> None:
    dataset = source(tree).load()
    copy = replace(dataset, train=Images(dataset.train.pixels.clone(), dataset.train.labels))
    t = task(dataset, 1, classes=4, validation=3)
    assert dataset.train.file is not None
    for flip, crop, max_steps in ((False, 0, None), (False, 0, 5), (True, 2, None)):
        for step in (0, 3, 4):
            made = (TrainBatches(d, [t], 4, partial(int, step), "cpu", max_steps, flip, crop) for d in (dataset, copy))
            for (a, b), (c, d) in zip(*made, strict=True):
                assert torch.equal(a, c)
                assert torch.equal(b, d)


RUNS = [
    *[(dataset, ["arch=mlp", "arch.hidden=[16,16,16,16]"]) for dataset in ("folder", "imagenet", "imagenet_literal")],
    ("imagenet", ["arch=allconv_224"]),
    pytest.param("imagenet", ["arch=mlp", "arch.hidden=[1024,1024,1024,1024]"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("dataset", "net"), RUNS)
def test_an_epoch_at_224(tree: Path, dataset: str, net: list[str]) -> None:
    """24 images train, 6 validate, 12 test; the program's protocol has all 30 train, and validates on the 12."""
    overrides = [f"dataset={dataset}", f"dataset.source.root={tree}", "dataset.validation=0.2", *net, "rule=mdfa"]
    runs = [f"paths.data={tree.parent}", f"paths.runs={tree.parent}/runs", "logger=none"]
    small = ["batch_size=4", "max_epochs=1", "init.forward=U1", "init.backward=U1", "optimizer.lr=1e-4"]
    (record,) = train(run_config(*overrides, *runs, *small))
    literal = dataset == "imagenet_literal"
    counts = (record.data.train, record.data.validation, record.data.test)
    assert counts == ((30, 12, 12) if literal else (24, 6, 12))
    assert record.steps == (7 if literal else 6)
    assert record.data.name == dataset
    assert record.diverged_epoch is None
    assert record.test is not None
    assert (tree.parent / f"{dataset}-224" / "index.json").exists()
    if literal:
        assert record.config["dataset"]["source"]["literal"]
        assert record.test["accuracy"] == record.epochs[0]["val/accuracy"]  # of the same images
