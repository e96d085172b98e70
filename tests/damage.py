"""Damages files of every kind again and again, and counts what their readers say: nothing may be silent.

    python tests/damage.py [--trials 300] [KIND ...]

One bit is flipped, the file is cut short, or one sector of 512 bytes is zeroed, each so many times and in each file of
its kind. *told*: the reader names the file, in an error or a warning. *harmless*: it reads what was written. *silent*:
it reads something else and says nothing. *unclear*: it says something, but not which file.
"""

import argparse
import io
import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from pyarrow import parquet

from nobackprop.core.initializers import Uniform, initial_weights
from nobackprop.core.losses import SoftmaxCrossEntropy
from nobackprop.core.network import mlp
from nobackprop.data import sources
from nobackprop.data.pixels import Pixels
from nobackprop.mistakes import Mistake
from nobackprop.records.gathering import add_checksums, collect, gather
from nobackprop.records.record import Record
from nobackprop.rules.bp import BP
from nobackprop.training import sealed
from nobackprop.training.saved import load, save

SECTOR = 512
RECORDED = Path(__file__).parents[1] / "results" / "records" / "compare.jsonl"


def flip(content: bytes, chance: random.Random) -> bytes:
    bit = chance.randrange(8 * len(content))
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def zero(content: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(0, len(content), SECTOR)
    return content[:start] + bytes(len(content[start : start + SECTOR])) + content[start + SECTOR :]


WAYS: dict[str, Callable[[bytes, random.Random], bytes]] = {"flip": flip, "cut": cut, "zero": zero}


class Kind(NamedTuple):
    """A kind of file: `make` fills an empty folder and gives the files to be damaged, `read` gives what is in them.

    What `read` gives can be compared. It raises Mistake or OSError, or warns, where it finds damage.
    """

    make: Callable[[Path], Sequence[Path]]
    read: Callable[[Path], Any]


def count_silent(
    make: Callable[[Path], Sequence[Path]], read: Callable[[Path], Any], trials: int
) -> dict[tuple[str, str], Counter[str]]:
    """What was said of so many damaged files, for each file (by its name) and each way of damage."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {path: path.read_bytes() for path in make(folder)}
        good = read(folder)
        for path, content in files.items():
            for way, change in WAYS.items():
                chance = random.Random(f"{path.name} {way}")
                counts[path.name, way] = Counter(
                    _said(folder, path, changed, read, good)
                    for changed in _changed(path, content, change, trials, chance)
                )
                for other, whole in files.items():  # a reader may have put some aside
                    other.write_bytes(whole)
    return counts


def _changed(path: Path, content: bytes, change: Any, trials: int, chance: random.Random) -> Iterator[bytes]:
    while trials:
        changed = change(content, chance)
        # What is cut between two lines of a file that grows by its end is an earlier state of it, and no damage.
        earlier = path.suffix == ".jsonl" and content.startswith(changed) and changed[-1:] in (b"", b"\n")
        if changed != content and not earlier:
            yield changed
            trials -= 1


def _said(folder: Path, path: Path, changed: bytes, read: Callable[[Path], Any], good: Any) -> str:
    path.write_bytes(changed)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            found = read(folder)
        except (Mistake, OSError) as e:
            return "told" if path.name in str(e) else "unclear"
    if warned:
        return "told" if any(path.name in str(w.message) for w in warned) else "unclear"
    return "harmless" if found == good else "silent"


def _lines() -> list[bytes]:
    return RECORDED.read_bytes().splitlines(keepends=True)[:4]


def _records() -> list[Record]:
    return [Record.parse(line, str(RECORDED), "mend it") for line in _lines()]


def _record(folder: Path) -> list[Path]:
    path = folder / "record.json"
    _records()[0].write(path)
    return [path]


def _old_record(folder: Path) -> list[Path]:
    path = folder / "record.json"
    path.write_bytes(b'{"format":1,' + _records()[0].model_dump_json(exclude={"commits"}).encode()[1:] + b"\n")
    return [path]


def _new_lines(folder: Path) -> list[Path]:
    path = folder / "a.jsonl"
    path.write_bytes(b"".join(record.line() for record in _records()))
    return [path]


def _old_lines(folder: Path) -> list[Path]:
    """As they are in results/records, and two lines of today."""
    path = folder / "a.jsonl"
    path.write_bytes(b"".join(_lines()[:2]))
    add_checksums(path)
    with path.open("ab") as file:
        file.writelines(record.line() for record in _records()[2:])
    return [path, *folder.glob("*.checksums")]


def _gathered(folder: Path) -> Any:
    """As one gathers into a file, which mends a last line that is cut off, and says so."""
    found = gather([], folder / "a.jsonl")
    for problem in found.unreadable:
        warnings.warn(problem, stacklevel=1)
    return found.results


def _weights(folder: Path) -> list[Path]:
    net = mlp((1, 8, 8), 4, hidden=[16], activation="tanh")
    w = initial_weights(net, BP(), Uniform(1.0), Uniform(1.0), seed=0)
    save(folder / "best.pt", net, BP(), w, SoftmaxCrossEntropy(4), Pixels(), (0, 1, 2, 3))
    return [folder / "best.pt"]


def _read_weights(folder: Path) -> Any:
    net = load(folder / "best.pt")
    return {name: t.tolist() for name, t in net.weights.items()}, net.net, net.rule, net.loss, net.classes


def _checkpoint(folder: Path) -> list[Path]:
    path = folder / "000000100.ckpt"
    sealed.write(path, {"steps": 100, "state_dict": {"W1": torch.arange(1000.0)}})
    return [path]


def _read_checkpoint(folder: Path) -> Any:
    content = sealed.read(folder / "000000100.ckpt")
    return content["steps"], content["state_dict"]["W1"].tolist()


def _images(folder: Path) -> list[Path]:
    """In Parquet files, read once: the checksums of that reading lie beside them."""
    chance = np.random.default_rng(0)
    for part, n in (("train", 12), ("test", 4)):
        rows = []
        for i in range(n):
            file = io.BytesIO()
            Image.fromarray(chance.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(file, "PNG")
            rows.append({"img": {"bytes": file.getvalue()}, "label": i % 4})
        parquet.write_table(pa.Table.from_pylist(rows), folder / f"{part}-0.parquet")
    _read_images(folder)
    return [folder / "train-0.parquet"]


def _read_images(folder: Path) -> Any:
    sources._load.cache_clear()
    data = sources.Parquet(folder, "images", (3, 8, 8), 4, "train-*.parquet", "test-*.parquet").load()
    return data.fingerprint, data.train.pixels.tolist(), data.train.labels.tolist()


KINDS = {
    "record.json": Kind(_record, lambda folder: Record.read(folder / "record.json")),
    "lines": Kind(_new_lines, lambda folder: collect([folder]).records),
    "lines_gathered_into": Kind(_new_lines, _gathered),
    "old_lines": Kind(_old_lines, lambda folder: collect([folder]).records),
    "old_lines_gathered_into": Kind(_old_lines, _gathered),
    "weights": Kind(_weights, _read_weights),
    "checkpoint": Kind(_checkpoint, _read_checkpoint),
    "images": Kind(_images, _read_images),
}
# Files of before there were checksums, some of whose damage nobody can tell.
UNPROTECTED = {"record.json_of_format_1": Kind(_old_record, KINDS["record.json"].read)}


def main() -> None:
    every = KINDS | UNPROTECTED
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(every)} (default: all)")
    parser.add_argument("--trials", type=int, default=300)
    options = parser.parse_args()
    for name in options.kinds or every:
        for (file, way), counts in count_silent(*every[name], options.trials).items():
            told = ", ".join(f"{counts[what]} {what}" for what in ("told", "harmless", "silent", "unclear"))
            print(f"{name}: {file}, {way}: {told}")


if __name__ == "__main__":
    main()
