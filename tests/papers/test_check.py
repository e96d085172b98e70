"""scripts/check.py: what it finds in a folder of runs and files of records."""

import fcntl
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import small, train
from recorded import format_1, made

from nobackprop.papers import check as script
from nobackprop.papers.check import check
from nobackprop.records.gathering import add_checksums, checksums_of, gather
from nobackprop.rules.bp import BP
from nobackprop.training import saved
from nobackprop.training.checkpoints import ResumePoint


class Mine(BP):
    """A rule of somebody's own."""


class Killed(BaseException):
    """Ends a run where it stands, as a power cut does."""


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is recorded, one that was interrupted, and a file of records."""
    top = tmp_path_factory.mktemp("checked")
    train(small(top / "runs", "rule=bp"))
    saves: list[None] = []
    save = ResumePoint.save

    def killed(self: ResumePoint, trainer: Any) -> None:
        saves.append(None)
        if len(saves) == 4:
            raise Killed
        save(self, trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResumePoint, "save", killed)
        with pytest.raises(Killed):
            train(small(top / "runs", "rule=fa", "checkpoint_minutes=0"))
    gather([top / "runs"], top / "records" / "a.jsonl")
    (top / "records" / "old.jsonl").write_bytes(format_1(seed=0) + format_1(seed=1))
    add_checksums(top / "records" / "old.jsonl")
    (top / "runs" / "learning_curves.png").write_bytes(b"")
    (top / "runs" / "wandb" / "offline").mkdir(parents=True)
    return top


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "copy")


def only(folder: Path, pattern: str) -> Path:
    return sorted(folder.rglob(pattern))[-1]


def test_what_is_whole_is_counted(folder: Path) -> None:
    found = check([folder])
    assert found.problems == []
    whole = {"records": 1, "trained nets": 1, "checkpoints": 2, "lines of records": 3}
    assert found.whole == whole
    assert str(found).startswith("whole: ")


def cut(pattern: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = only(folder, pattern)
        path.write_bytes(path.read_bytes()[:-100])

    return change


def added(place: str, name: str, content: bytes = b"x") -> Callable[[Path], None]:
    """A file beside the one that fits the pattern."""

    def change(folder: Path) -> None:
        only(folder, place).with_name(name).write_bytes(content)

    return change


def removed(pattern: str) -> Callable[[Path], None]:
    return lambda folder: only(folder, pattern).unlink()


def moved(folder: Path) -> None:
    run = only(folder, "record.json").parent
    run.rename(run.with_name("seed7"))


def recorded(folder: Path) -> None:
    seed = only(folder, "*.ckpt").parent.parent.parent / "seed0"
    for path in only(folder, "record.json"), only(folder, "best.pt"):
        shutil.copy(path, seed)


def without_checkpoints(folder: Path) -> None:
    shutil.rmtree(only(folder, "*.ckpt").parent.parent)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            cut("record.json"),
            "damaged",
            "record.json is damaged (its checksum does not fit): delete it to run this seed",
        ),
        (cut("best.pt"), "damaged", "best.pt is damaged"),
        (
            cut("*.ckpt"),
            "damaged",
            ".ckpt is damaged (it does not fit its checksum): delete it; the run's command goes on",
        ),
        (
            cut("a.jsonl"),
            "damaged",
            "a.jsonl, line 1 is damaged (its checksum does not fit): take the line from a copy",
        ),
        (cut("old.jsonl"), "damaged", "old.jsonl, line 2 is no valid run record"),
        (cut("old.jsonl.checksums"), "damaged", "old.jsonl.checksums is damaged: take it from a copy"),
        (added("record.json", ".record.json.123"), "orphaned", ".record.json.123 was not written to its end"),
        (added("*.ckpt", ".000.ckpt.host.123"), "orphaned", ".000.ckpt.host.123 was not written to its end"),
        (added("*.ckpt", "000000001.damaged"), "orphaned", "000000001.damaged is a checkpoint that could not be used"),
        (removed("record.json"), "orphaned", "best.pt has no record: the run's command trains this seed again"),
        (removed("best.pt"), "orphaned", "record.json has no weights beside it (best.pt)"),
        (removed("old.jsonl"), "orphaned", "old.jsonl.checksums is of a file that is not there"),
        (removed("old.jsonl.checksums"), "unchecked", "old.jsonl has 2 lines without a checksum"),
        (without_checkpoints, "orphaned", "seed0 has neither a record nor a checkpoint"),
        (lambda folder: (folder / "none").mkdir(), "orphaned", "none is empty: delete it"),
        (added("a.jsonl", "notes.txt"), "foreign", "records holds 1 files that no run wrote: notes.txt"),
        (
            added("a.jsonl", "log.jsonl", b'{"step": 1}\n'),
            "foreign",
            "records holds 1 files that no run wrote: log.jsonl",
        ),
        (added("a.jsonl", "x.ckpt"), "foreign", "records holds 1 files that no run wrote: x.ckpt"),
    ],
)
def test_what_is_not_as_it_should_be_is_told(
    folder: Path, change: Callable[[Path], None], kind: str, message: str
) -> None:
    change(folder)
    ((found, text),) = check([folder]).problems
    assert found == kind
    assert message in text
    assert str(folder) in text


def test_a_record_in_another_runs_folder_is_told(folder: Path) -> None:
    moved(folder)
    ((kind, text),) = check([folder]).problems
    assert kind == "orphaned"
    assert "seed7/record.json is the record of seed 0 of bp_mlp_digits-" in text


def test_checkpoints_of_recorded_seeds_are_told(folder: Path) -> None:
    recorded(folder)
    found = [text for kind, text in check([folder]).problems if kind == "orphaned"]
    assert sum(".ckpt is of seeds that are recorded: delete " in text for text in found) == 2


def test_what_is_being_written_is_left_alone(folder: Path) -> None:
    removed("record.json")(folder)
    added("best.pt", ".record.json.123")(folder)
    without_checkpoints(folder)
    locks = [path.open() for path in folder.rglob(".lock")]
    assert len(locks) == 2
    for lock in locks:
        fcntl.flock(lock, fcntl.LOCK_EX)
    problems = check([folder]).problems
    for lock in locks:
        lock.close()
    assert problems == []
    assert len(check([folder]).problems) == 3


def test_a_net_of_a_rule_that_is_not_here_is_not_called_damaged(folder: Path) -> None:
    path = only(folder, "best.pt")
    net = saved.load(path)
    Mine.__qualname__ = "Gone"
    saved.save(path, net.net, Mine(), net.weights, net.loss, net.pixels, net.classes)
    Mine.__qualname__ = "Mine"
    ((kind, text),) = check([folder]).problems
    assert (kind, text.startswith(f"{path} was trained with test_check.Gone, which is not")) == ("unchecked", True)


def test_the_command_tells_by_its_exit_status_and_adds_checksums(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["check.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            script.main()
        out, err = capsys.readouterr()
        return ended.value.code, out + err

    path = folder / "records" / "old.jsonl"
    checksums_of(path).unlink()
    status, told = run(str(folder))
    assert (status, told.splitlines()[0].split(":")[0]) == (0, "unchecked")
    assert not checksums_of(path).exists()
    assert f"{checksums_of(path)}: 2 checksums" in run(str(folder), "--add-checksums")[1]
    assert run(str(folder))[1].startswith("whole: ")
    path.write_bytes(path.read_bytes().replace(b'"wall_s":1.5', b'"wall_s":2.5', 1))
    status, told = run(str(folder))
    assert status == 1
    assert told.startswith(f"damaged: {path}, line 1 is damaged or was edited")
    assert run(str(folder / "nowhere")) == (
        1,
        f"check.py: {folder}/nowhere is no folder: give folders of runs or of files of records\n",
    )


def test_records_of_before_checksums_are_counted(tmp_path: Path) -> None:
    path = tmp_path / made().run / "seed3" / "record.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(format_1())
    path.with_name("best.pt").write_bytes(b"")
    found = check([tmp_path])
    assert found.whole["of these without a checksum"] == 1
    assert [kind for kind, _ in found.problems] == ["damaged"]  # the weights
