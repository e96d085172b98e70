"""Checkpoints: whose they are, which are used, what can't be used blocks nothing, and what is left of them."""

import errno
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Config, Killed, at_save, folder, interrupt, same_results, shown, small, train
from rich.console import Console

from nobackprop.data.sources import Digits
from nobackprop.mistakes import Mistake, about_files
from nobackprop.records import provenance
from nobackprop.records.record import Record
from nobackprop.rules.dfa import DFA
from nobackprop.sweeps import sweep
from nobackprop.sweeps.jobs import Job
from nobackprop.sweeps.local import Basic
from nobackprop.training import checkpoints, sealed
from nobackprop.training.checkpoints import ResumePoint
from nobackprop.training.stopping import Stopped

UNUSED = ": it is not used, but kept as .*unused until these seeds are recorded"


def told(warned: pytest.WarningsRecorder) -> int:
    """How many warnings are of checkpoints."""
    return sum(str(w.message).startswith("checkpoint ") for w in warned)


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes what a checkpoint holds; its checksum is right again."""
    content = sealed.read(path)
    change(content)
    sealed.write(path, content)


# Whose a checkpoint is


@pytest.mark.parametrize("damaged", [1, 2])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_is_used(
    config: Config, tmp_path: Path, console: Console, damaged: int
) -> None:
    train(small(tmp_path / "alone"))
    cfg = config()
    paths = interrupt(cfg)
    assert [path.name for path in paths] == ["000000161.ckpt", "000000261.ckpt"]  # the last two
    for path in paths[-damaged:]:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    message = rf"checkpoint {paths[0].parent}/000000.61\.ckpt is damaged \(it does not fit its checksum\){UNUSED}"
    with pytest.warns(UserWarning, match=message) as warned:
        train(cfg, console)
    assert told(warned) == damaged
    assert ("goes on from step 161" in shown(console)) == (damaged == 1)
    assert same_results(tmp_path / "alone", tmp_path / "runs") == 1
    assert not (folder(cfg) / "checkpoints").exists()


@pytest.mark.parametrize("whose", ["seed", "run", "images", "one epoch more"])
def test_a_checkpoint_of_another_seed_run_or_images_is_not_used(
    config: Config, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    train(small(tmp_path / "alone"))
    cfg = config()
    paths = interrupt(cfg)
    digits = Digits().load()
    other = {"seed": "seeds=[1]", "run": "rule=bp", "images": "seeds=1", "one epoch more": "max_epochs=3"}[whose]
    elsewhere = small(tmp_path / "elsewhere", other)
    with monkeypatch.context() as patched:
        if whose == "images":
            flipped = replace(digits, train=replace(digits.train, labels=digits.train.labels.flip(0)))
            patched.setattr(Digits, "load", lambda _: flipped)
        foreign = interrupt(elsewhere)[-1]
    about = checkpoints._peek(foreign)
    shutil.copy(foreign, paths[-1])
    with pytest.warns(
        UserWarning, match=rf"checkpoint {paths[-1]} is of {about}, not of seed 0 of .*{UNUSED}"
    ) as warned:
        train(cfg, console)
    assert told(warned) == 1
    assert "goes on from step 161" in shown(console)
    assert same_results(tmp_path / "alone", tmp_path / "runs") == 1


def test_seeds_so_large_that_floats_take_them_for_one_do_not_share_a_checkpoint(config: Config) -> None:
    one, other = config(f"seeds=[{2**53}]"), config(f"seeds=[{2**53 + 1}]")
    kept = interrupt(one)[-1]
    about = checkpoints._peek(kept)
    assert about is not None
    into = about.model_copy(update={"seeds": [2**53 + 1]}).folder(folder(other))
    if into != kept.parent:
        shutil.copytree(kept.parent, into)
    with pytest.warns(UserWarning, match=f"is of seed {2**53} of .*, not of seed {2**53 + 1} of"):
        (record,) = train(other)
    assert record.seed == 2**53 + 1


def drop(*keys: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        rewrite(path, lambda content: [content.pop(key) for key in keys])

    return change


STRANGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), r"is damaged \(it does not fit its checksum\)"),
    "cut": (lambda path: os.truncate(path, 1000), r"is damaged \(it does not fit its checksum\)"),
    "no tensors": (
        lambda path: path.write_bytes(b"x" + sealed._checksum(memoryview(b"x"))),
        r"is damaged \(torch can't load it: UnpicklingError\)",
    ),
    "a list": (lambda path: sealed.write(path, [1, 2]), "was written by another version of nobackprop"),  # pyright: ignore
    "of before": (drop("about"), "was written by another version of nobackprop"),
    "without checksum": (
        lambda path: torch.save({"steps": 261, "state_dict": {}}, path),
        "was written by another version of nobackprop",
    ),
    "more about it": (
        lambda path: rewrite(path, lambda content: content["about"].update(gpu="H100")),
        "was written by another version of nobackprop",
    ),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), r"can't be read \(Is a directory\)"),
    "no weights": (drop("state_dict"), r"does not fit this version of the code \(KeyError: 'state_dict'\)"),
    "no optimizer": (
        drop("optimizer_states"),
        r"does not fit this version of the code \(KeyError: 'optimizer_states'\)",
    ),
    "other weights": (
        lambda path: rewrite(path, lambda content: content["state_dict"].pop("w.W1")),
        r'does not fit this version of the code \(RuntimeError: Missing key\(s\) in state_dict: "w.W1".\)',
    ),
    "other progress": (
        lambda path: rewrite(path, lambda content: content["progress"][0].update(worst=0.1)),
        r"does not fit this version of the code \(TypeError: .*'worst'\)",
    ),
    "a later step": (
        lambda path: path.rename(path.with_name("000000300.ckpt")),
        "has another name than it was given",
    ),
}


@pytest.mark.parametrize("what", STRANGE)
def test_a_checkpoint_that_cannot_be_used_blocks_nothing(
    config: Config, tmp_path: Path, console: Console, what: str
) -> None:
    cfg = config()
    path = interrupt(cfg)[-1]
    change, message = STRANGE[what]
    change(path)
    with pytest.warns(UserWarning, match=rf"checkpoint .*/000000\d+\.ckpt {message}{UNUSED}") as warned:
        train(cfg, console)
    assert told(warned) == 1
    assert "goes on from step 161" in shown(console)
    train(small(tmp_path / "alone"))
    assert same_results(tmp_path / "alone", tmp_path / "runs") == 1
    assert not (folder(cfg) / "checkpoints").exists()


def test_files_of_other_names_and_those_of_an_earlier_version_block_nothing(
    config: Config, tmp_path: Path, console: Console
) -> None:
    cfg = config()
    paths = interrupt(cfg)
    beside = paths[0].parent
    (beside / "about.json").touch()
    shutil.copy(paths[1], beside / "last.ckpt")
    paths[1].rename(beside / "000000261-0123456789abcdef.ckpt")
    (beside.parent / "notes").mkdir()
    (beside.parent / "notes" / "1.ckpt").write_bytes(b"none")
    assert sweep.look(Job("a", cfg)).before == "was interrupted, goes on from step 161"
    with pytest.warns(UserWarning, match=rf"was not written by this version of nobackprop{UNUSED}") as warned:
        train(cfg, console)
    assert told(warned) == 2
    assert "goes on from step 161" in shown(console)
    train(small(tmp_path / "alone"))
    assert same_results(tmp_path / "alone", tmp_path / "runs") == 1
    assert not beside.exists()


def test_a_strange_note_of_a_failure_does_not_block_a_sweep(config: Config, console: Console) -> None:
    job = Job("a", config())
    job.file("error").parent.mkdir(parents=True)
    job.file("error").write_bytes(b"\xff\xfe")
    (outcome,) = sweep.run([job], Basic(), console)
    assert outcome.state == "finished"


def test_a_run_whose_code_has_other_weights_now_starts_again(
    config: Config, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config("rule=dfa")
    interrupt(cfg)
    feedback = DFA.feedback
    monkeypatch.setattr(DFA, "feedback", lambda *args: feedback(*args) | {"C1": torch.zeros(1)})
    with pytest.warns(
        UserWarning, match=r"does not fit .*code \(RuntimeError: .*Missing key.*C1.*unused until"
    ) as warned:
        (record,) = train(cfg, console)
    assert told(warned) == 2
    assert "goes on" not in shown(console)
    assert record.steps == 322


# Which code has trained


def test_a_record_names_all_code_that_trained_it(
    config: Config, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config("max_epochs=3")
    for state in (("a" * 40, False), ("b" * 40, True)):
        with monkeypatch.context() as patched:
            patched.setattr(provenance, "source_state", lambda state=state: state)
            at_save(patched, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
            with pytest.raises(Stopped):
                train(cfg, console)
    monkeypatch.setattr(provenance, "source_state", lambda: (None, None))
    (record,) = train(cfg, console)
    a, b = "a" * 40, "b" * 40
    assert record.commits == [a, f"{b}+edits", "unknown"]
    assert record == Record.read(folder(cfg) / "seed0" / "record.json")
    assert f"goes on from step 161, trained so far by commit {a}, from here by {b}+edits\n" in shown(console)
    assert f", trained so far by commit {a}, {b}+edits, from here by unknown\n" in shown(console)


@pytest.mark.parametrize(("state", "commits", "told"), [(("c", False), ["c"], False), (("c", True), ["c+edits"], True)])
def test_the_same_code_is_named_once(
    config: Config,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
    state: tuple[str, bool],
    commits: list[str],
    told: bool,
) -> None:
    """Edits may have changed, so those are told."""
    monkeypatch.setattr(provenance, "source_state", lambda: state)
    cfg = config()
    interrupt(cfg)
    (record,) = train(cfg, console)
    assert record.commits == commits
    assert ("goes on from step 261, trained so far by" in shown(console)) == told


def test_another_form_of_a_rule_of_ones_own_is_told(
    config: Config, console: Console, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(provenance, "source_state", lambda: ("c", False))
    monkeypatch.syspath_prepend(tmp_path)
    source = "from nobackprop.rules.bp import BP\n\nclass Mine(BP):\n    pass\n"
    path = tmp_path / "rule_of_mine.py"
    path.write_text(source)
    cfg = config("rule=bp", "rule._target_=rule_of_mine.Mine")
    interrupt(cfg)
    (record,) = train(cfg, console)
    (code,) = record.commits
    assert re.fullmatch(r"c\+own\w{8}", code)
    assert "trained so far by" not in shown(console)
    train(cfg, console)
    assert "trained by" not in shown(console)
    path.write_text(source + "    # edited\n")
    train(cfg, console)  # with what was imported before
    assert "trained by" not in shown(console)
    del sys.modules["rule_of_mine"]  # as in another process
    train(cfg, console)
    assert "1 of 1 seeds are recorded already" in shown(console)
    assert "trained by commit c and your own code as it was then" in shown(console)


# A full disk


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_checkpoint_that_cannot_be_written_does_not_end_the_training(
    config: Config, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    cfg = config("checkpoint_minutes=0")
    write, full = sealed.write_atomically, [False]

    def fails(path: Path, content: bytes) -> None:
        if full[0] and path.suffix == ".ckpt":
            raise OSError(number, os.strerror(number))
        write(path, content)

    monkeypatch.setattr(sealed, "write_atomically", fails)
    at_save(monkeypatch, 2, lambda: full.__setitem__(0, True))
    at_save(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    message = rf"checkpoint .*/000000.61\.ckpt could not be written \({os.strerror(number)}\): training goes on"
    with pytest.warns(UserWarning, match=message) as warned, pytest.raises(Stopped):
        train(cfg, console)
    assert told(warned) == 2  # 161, and 261 when it was to stop
    assert "stopped; the same command goes on from step 100" in shown(console)
    monkeypatch.setattr(ResumePoint, "save", lambda *_: None)
    train(cfg, console)
    assert "seed 0 (1/1): goes on from step 100" in shown(console)
    train(small(tmp_path / "alone"))
    assert same_results(tmp_path / "alone", tmp_path / "runs") == 1


@pytest.mark.parametrize("name", ["best.pt", "record.json"])
def test_a_result_that_cannot_be_written_is_told_and_not_lost(
    config: Config, monkeypatch: pytest.MonkeyPatch, console: Console, name: str
) -> None:
    cfg = config("checkpoint_minutes=0")
    fsync = os.fsync

    def full(fd: int) -> None:
        if f"/.{name}" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(fd)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        over = rf"seed0/{name} could not be written when the run was over \(No space"
        with pytest.raises(Mistake, match=over) as e, about_files(cfg):
            train(cfg)
    assert str(e.value).endswith("; make room; the same command goes on, from the last checkpoint if there is one")
    assert str(e.value).count("make room") == 1
    (record,) = train(cfg, console)
    assert "goes on from step 322" in shown(console)
    assert record.steps == 322
    assert not (folder(cfg) / "checkpoints").exists()


# What is left


def test_a_dry_run_reads_no_tensors_and_creates_nothing(
    config: Config, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(config())
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sealed, "read", lambda _: pytest.fail("a whole checkpoint was read"))
    jobs = [Job("interrupted", config()), Job("new", config("rule=bp"))]
    sweep.run(jobs, Basic(), console, dry_run=True)
    assert "was interrupted, goes on from step 261" in shown(console)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_mistake_that_the_data_shows_leaves_nothing(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        train(config("batch_size=5000"))
    assert not (tmp_path / "runs").exists()


def test_a_run_that_was_killed_before_it_could_remove_its_checkpoints_is_tidied_up(
    config: Config, monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    cfg = config("checkpoint_minutes=0", "seeds=2", "workers=1")

    def kill(*_: Any) -> None:
        raise Killed

    for starts_again in (lambda: train(cfg), lambda: sweep.run([Job("a", cfg)], Basic(), console)):
        with monkeypatch.context() as patched:
            patched.setattr(checkpoints, "remove", kill)
            with pytest.raises(Killed):
                train(cfg)
        assert (folder(cfg) / "seed0" / "record.json").exists()
        assert list(folder(cfg).glob("checkpoints/*/*.ckpt"))
        sweep.run([Job("a", cfg)], Basic(), console, dry_run=True)
        assert list(folder(cfg).glob("checkpoints/*/*.ckpt"))
        starts_again()
        assert not (folder(cfg) / "checkpoints").exists()
        assert len(train(cfg)) == 2
        shutil.rmtree(folder(cfg))
