"""Gathering records: nothing lost, nothing doubled, whatever is on disk and whoever else is gathering."""

import fcntl
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from recorded import CONFIG, RECORD, format_1, made as made_of

from nobackprop.mistakes import Mistake
from nobackprop.papers import collect as script
from nobackprop.records.files import checksum
from nobackprop.records.gathering import (
    add_checksums,
    checksums_of,
    collect,
    gather,
    learning_curves,
    table,
    write_table,
)
from nobackprop.records.record import Record

EPOCHS = [
    {"epoch": e, "step": 100 * e, "train/loss": 1 / (e + 2), "train/accuracy": e / 500, "val/loss": 1 / e}
    | {"val/accuracy": e / 7}
    for e in range(1, 8)
]
RUN, OTHER = RECORD["signature"], CONFIG | {"batch_size": 6}


def made(seed: int = 0, **fields: Any) -> Record:
    return made_of(seed=seed, **fields)


def write(folder: Path, record: Record) -> Path:
    path = folder / f"{record.name}-{record.signature}" / f"seed{record.seed}" / "record.json"
    record.write(path)
    return path


@pytest.mark.parametrize(
    "further",
    [
        [{}] * 7,
        [{}],
        [{"val/loss": None}, {"val/loss": -0.0}],
        [{"val/accuracy": 0.0}, {"val/accuracy": -0.0}],
        [{"angle/W1": 0.1}, {}],
        [{"a": 1}, {"a": 1.0}],
        [{"a": 1}, {"a": 2}, {"a": 4}],
    ],
    ids=["seven", "one", "null", "negative_zero", "uneven", "int_and_float", "no_range"],
)
def test_a_line_gives_the_record_back_to_the_bit(further: list[dict[str, Any]]) -> None:
    record = made(epochs=[epoch | more for epoch, more in zip(EPOCHS, further, strict=False)])
    line = record.line()
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert repr(Record.parse(line, "here", "mend it")) == repr(record)


def test_epochs_are_kept_as_columns_and_accuracies_as_counts() -> None:
    data = RECORD["data"] | {"train": 503, "validation": 7}
    kept = json.loads(made(epochs=EPOCHS, data=data).line())["epochs"]
    assert kept["epoch"] == {"range": [1, 8, 1]}
    assert kept["val/accuracy"] == {"of": 7, "counts": [1, 2, 3, 4, 5, 6, 7]}
    assert kept["train/accuracy"] == {"of": 500, "counts": [1, 2, 3, 4, 5, 6, 7]}  # 100 steps of 5 images
    assert kept["train/loss"] == [epoch["train/loss"] for epoch in EPOCHS]


def test_gathering_again_adds_only_what_is_new(tmp_path: Path) -> None:
    runs, into = tmp_path / "runs", tmp_path / "records" / "a.jsonl"
    write(runs, made(0))
    write(runs, made(1))
    (runs / f"bp_mlp_digits-{RUN}" / "seed2").mkdir()  # still training
    first = gather([runs], into)
    assert (first.added, len(first.results), first.unreadable, first.conflicts) == (2, 2, [], [])
    before = into.read_bytes()
    again = gather([runs, runs / f"bp_mlp_digits-{RUN}", into], into)
    assert (again.added, len(again.results), again.conflicts) == (0, 2, [])
    assert into.read_bytes() == before
    path = write(runs, made(2))
    assert gather([path.parent], into).added == 1
    assert into.read_bytes().startswith(before)
    assert collect([into]).records == {(RUN, seed): made(seed) for seed in range(3)}


def test_a_file_of_lines_from_elsewhere_is_a_source(tmp_path: Path) -> None:
    write(tmp_path / "runs", made(0))
    write(tmp_path / "runs", made(1, config=OTHER))
    gather([tmp_path / "runs"], tmp_path / "there.jsonl")
    assert gather([tmp_path / "there.jsonl"], tmp_path / "here.jsonl").added == 2
    assert (tmp_path / "here.jsonl").read_bytes() == (tmp_path / "there.jsonl").read_bytes()
    assert len(collect([tmp_path]).records) == 2


def test_a_damaged_record_is_named_and_the_others_are_gathered(tmp_path: Path) -> None:
    write(tmp_path, made(0))
    path = write(tmp_path, made(1))
    path.write_bytes(path.read_bytes()[:50])
    found = gather([tmp_path], tmp_path / "a.jsonl")
    assert found.added == 1
    (problem,) = found.unreadable
    assert problem.startswith(f"{path} is damaged (its checksum does not fit): delete it")


def test_another_record_of_the_same_run_and_seed_is_reported_and_does_not_replace_it(tmp_path: Path) -> None:
    into = tmp_path / "a.jsonl"
    write(tmp_path / "one", made(0))
    write(tmp_path / "two", made(0, test={"accuracy": 0.75, "loss": 0.5}, wall_s=2.0))
    gather([tmp_path / "one"], into)
    before = into.read_bytes()
    gathered, collected = gather([tmp_path / "two"], into), collect([into, tmp_path / "two"])
    assert into.read_bytes() == before
    assert collected.records[RUN, 0] == made(0)
    assert gathered.conflicts == collected.conflicts
    (problem,) = gathered.conflicts
    assert f"another record of seed 0 of bp_mlp_digits-{RUN}" in problem
    assert "differ in test (test accuracies 50.00% and 75.00%)" in problem


def test_a_line_cut_off_by_a_crash_is_removed_and_its_record_gathered_again(tmp_path: Path) -> None:
    into = tmp_path / "a.jsonl"
    write(tmp_path / "runs", made(0))
    write(tmp_path / "runs", made(1, command="nobackprop ±", dirty=True))
    gather([tmp_path / "runs"], into)
    whole = into.read_bytes()
    for end in range(whole.index(b"\n") + 2, len(whole) - 1, 11):
        into.write_bytes(whole[:end])
        found = gather([tmp_path / "runs"], into)
        assert found.unreadable == [f"{into}: the last line was cut off and is removed"]
        assert into.read_bytes() == whole
    into.write_bytes(whole[:-1])
    assert gather([into], into).unreadable == []
    assert into.read_bytes() == whole


@pytest.mark.parametrize(
    "content",
    [
        b"notes of my own",
        b"\x89PNG\r\n\x1a\nabc",
        b'{"a": 1}',
        made(0).line() + b"<<<<<<< HEAD",
        made(0).line().rstrip() + b"J",  # one bit of its end was flipped
        made(0).line().rstrip() + b"\x8a",
        made(0).line()[:-30] + b"\0" * 30,
    ],
    ids=["notes", "image", "json", "conflict", "flipped", "flipped_high", "zeros"],
)
def test_what_is_no_record_is_not_taken_for_one_that_was_cut_off(tmp_path: Path, content: bytes) -> None:
    into = tmp_path / "mine.txt"
    into.write_bytes(content)
    write(tmp_path / "runs", made(1))
    with pytest.raises(
        Mistake, match=r"mine\.txt, line \d is (no valid run record|damaged) .*: take the line from a copy"
    ):
        gather([tmp_path / "runs"], into)
    assert into.read_bytes() == content


def test_a_record_of_a_newer_format_is_kept(tmp_path: Path) -> None:
    into = tmp_path / "a.jsonl"
    into.write_text(json.dumps({"format": 3}))
    with pytest.raises(Mistake, match="is of record format 3"):
        gather([], into)
    assert into.read_text() == '{"format": 3}'


# Checksums of lines of record format 1


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A file of two lines of before there were checksums, with its file of checksums, and then one of today."""
    path = tmp_path / "old" / "a.jsonl"
    path.parent.mkdir()
    path.write_bytes(format_1(seed=0) + format_1(seed=1))
    assert add_checksums(path) == 2
    write(tmp_path / "new", made(2))
    assert gather([tmp_path / "new"], path).added == 1
    return path


def test_a_file_of_old_lines_has_a_checksum_for_each_and_goes_on_with_new_ones(old: Path) -> None:
    first, second, third = old.read_bytes().splitlines()
    assert checksums_of(old).read_text().split() == [checksum(first), checksum(second)]
    assert third.startswith(b'{"format":2,"checksum":')
    assert list(collect([old]).records.values()) == [made(0), made(1), made(2)]


def test_old_lines_gathered_elsewhere_get_their_checksum(old: Path, tmp_path: Path) -> None:
    into = tmp_path / "b.jsonl"
    assert gather([old], into).added == 3
    assert into.read_bytes().count(b'{"format":2,"checksum":') == 3
    assert collect([into]).records == collect([old]).records


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "a.jsonl",
            lambda content: content.replace(b'"wall_s":1.5', b'"wall_s":2.5', 1),
            r"a\.jsonl, line 1 is damaged or was edited .*a\.jsonl\.checksums\): take both files from a copy",
        ),
        (
            "a.jsonl",
            lambda content: content[content.index(b"\n") + 1 :],
            r"a\.jsonl lacks 1 lines whose checksums are in .*a\.jsonl\.checksums: take it from a copy",
        ),
        ("a.jsonl", lambda content: b"", r"a\.jsonl lacks 2 lines .*: take it from a copy"),
        ("a.jsonl", lambda content: content[: content.index(b"\n") + 90], r"a\.jsonl.*: take .* from a copy"),
        ("a.jsonl", lambda content: content + format_1(seed=7), r"a\.jsonl, line 4 is damaged or was edited"),
        ("a.jsonl.checksums", lambda content: content[:17], r"a\.jsonl, line 2 is damaged or was edited"),
        ("a.jsonl.checksums", lambda content: content[:20], r"a\.jsonl\.checksums is damaged: take it from a copy"),
        ("a.jsonl.checksums", lambda content: b"", r"a\.jsonl\.checksums is damaged: take it from a copy"),
        ("a.jsonl.checksums", lambda content: content.replace(b"\n", b"\0"), r"a\.jsonl\.checksums is damaged"),
    ],
    ids=["edited", "lost", "empty", "cut", "added", "fewer", "cut_checksums", "no_checksums", "zeros"],
)
def test_damage_to_old_lines_or_their_checksums_is_told_and_left_as_it_is(
    old: Path, name: str, change: Callable[[bytes], bytes], message: str
) -> None:
    path = old.with_name(name)
    path.write_bytes(change(path.read_bytes()))
    before = old.read_bytes()
    for read in (lambda: collect([old]), lambda: collect([old.parent]), lambda: gather([], old)):
        with pytest.raises(Mistake, match=message):
            read()
    assert old.read_bytes() == before


def test_two_that_gathered_into_copies_of_a_file_may_put_their_lines_together(old: Path) -> None:
    old.write_bytes(b"".join(reversed(old.read_bytes().splitlines(keepends=True))))
    assert len(collect([old]).records) == 3


def test_a_foreign_file_of_old_lines_needs_no_checksums(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(format_1(seed=0))
    assert len(collect([tmp_path]).records) == 1


def test_checksums_are_made_once_of_lines_that_can_be_read(old: Path, tmp_path: Path) -> None:
    with pytest.raises(
        Mistake, match=r"a\.jsonl\.checksums is there already: delete it to trust .*a\.jsonl as it is now"
    ):
        add_checksums(old)
    damaged = tmp_path / "b.jsonl"
    damaged.write_bytes(format_1(seed=0)[:-10])
    with pytest.raises(Mistake, match=r"b\.jsonl, line 1 is no valid run record"):
        add_checksums(damaged)
    new = tmp_path / "c.jsonl"
    new.write_bytes(made(0).line())
    assert add_checksums(new) == 0
    assert not checksums_of(damaged).exists()
    assert not checksums_of(new).exists()


@pytest.mark.parametrize("folder", ["records", "trials"])
def test_every_old_line_of_the_recorded_runs_has_its_checksum(folder: str) -> None:
    for path in sorted((ROOT / "results" / folder).glob("*.jsonl")):
        old = sum(line.startswith(b'{"format":1,') for line in path.read_bytes().splitlines())
        assert checksums_of(path).exists() == (old > 0)
        collect([path])


def test_learning_curves_are_of_the_same_seeds_throughout() -> None:
    ended = made(1, epochs=EPOCHS[:3])
    diverged = made(2, epochs=EPOCHS[:3], diverged_epoch=3)
    at_once = made(3, epochs=EPOCHS[:1], diverged_epoch=1, test=None)
    curves = learning_curves([made(0, epochs=EPOCHS[:5]), ended, diverged, at_once])
    np.testing.assert_allclose(7 * curves.T, [[1, 2, 3, 4, 5], [1, 2, 3, 3, 3], [1, 2, 2, 2, 2]])
    assert np.isnan(learning_curves([at_once])).tolist() == [[True]]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    into = tmp_path / "a.jsonl"
    into.write_bytes(made(0).line() + b"<<<<<<< HEAD\n" + made(1).line())
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2 is no valid run record"):
        collect([into])
    with pytest.raises(ValueError, match="line 2"):
        gather([], into)


def test_a_source_that_is_not_there_is_an_error_and_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: give a folder of runs"):
        gather([tmp_path / "nowhere"], tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()


def test_one_waits_while_another_gathers_into_the_same_file(tmp_path: Path) -> None:
    into = tmp_path / "a.jsonl"
    with ThreadPoolExecutor(1) as pool:
        with into.open("ab") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            waits = pool.submit(gather, [], into)
            with pytest.raises(TimeoutError):
                waits.result(timeout=0.3)
            other.write(made(0).line())
        assert list(waits.result(timeout=10).results) == [(RUN, 0)]


def test_several_may_gather_into_one_file_at_once(tmp_path: Path) -> None:
    for seed in range(60):
        write(tmp_path / f"runs{seed % 3}", made(seed))
    into = tmp_path / "a.jsonl"

    def added(i: int) -> int:
        return gather([tmp_path / f"runs{i % 3}", tmp_path / f"runs{(i + 1) % 3}"], into).added

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(added, range(6))) == 60
    seeds = [json.loads(line)["seed"] for line in into.read_bytes().splitlines()]
    assert sorted(seeds) == list(range(60))


def test_the_table_has_one_row_per_run_and_seed_and_can_be_written(tmp_path: Path) -> None:
    records = [made(1, config=CONFIG | {"arch": CONFIG["arch"] | {"hidden": [3, 4]}}), made(0, test=None)]
    frame = table(records)
    assert list(frame["seed"]) == [0, 1]
    assert frame.loc[1, "config.arch.hidden"] == "[3, 4]"
    assert frame.loc[1, "best.val/accuracy"] == 0.5
    assert pd.isna(frame.loc[0, "test.accuracy"])
    for name in ("t.csv", "t.parquet"):
        write_table(frame, tmp_path / name)
    read = pd.read_parquet(tmp_path / "t.parquet")
    assert list(read.columns) == list(frame.columns)
    assert read.loc[1, "test.accuracy"] == pd.read_csv(tmp_path / "t.csv").loc[1, "test.accuracy"] == 0.5
    with pytest.raises(ValueError, match=r"a table is written as \.csv or \.parquet"):
        write_table(frame, tmp_path / "t.xls")


def test_text_in_a_table_is_no_formula(tmp_path: Path) -> None:
    init = {"a": "=1+1", "b": "@SUM(A1)", "c": "-1", "d": "U1", "e": -1.5}
    write_table(table([made(0, config=CONFIG | {"init": init})]), tmp_path / "t.csv")
    row = pd.read_csv(tmp_path / "t.csv").loc[0]
    assert [row[f"config.init.{name}"] for name in init] == ["'=1+1", "'@SUM(A1)", "'-1", "U1", -1.5]


@pytest.mark.slow
def test_ten_thousand_records_are_gathered_in_ten_seconds_and_little_memory(tmp_path: Path) -> None:
    epochs = [
        {"epoch": e, "step": 1160 * e, "train/loss": 1 / (e + 2), "val/loss": 1 / (e + 3), "val/accuracy": e / 2000}
        for e in range(1, 101)
    ]
    for number in range(1000):
        config = CONFIG | {"l2": number, "max_epochs": 100}
        record = made(epochs=epochs, config=config)
        for seed in range(10):
            path = tmp_path / "runs" / record.run / f"seed{seed}" / "record.json"
            record.model_copy(update={"seed": seed}).write(path)
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom nobackprop.collecting import gather\n"
        "start, runs, into = time.process_time(), *map(Path, sys.argv[1:])\nprint(gather([runs], into).added)\n"
        "status = dict(line.split(':\\t') for line in Path('/proc/self/status').read_text().splitlines())\n"
        "print(time.process_time() - start, int(status['VmHWM'].split()[0]) / 1024)"
    )
    for added in (10_000, 0):  # also where all are there already
        command = [sys.executable, "-c", code, str(tmp_path / "runs"), str(tmp_path / "a.jsonl")]
        found, seconds, mib = map(
            float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        )
        print(f"{seconds:.1f} s, {mib:.0f} MiB")
        assert found == added
        assert seconds < 10
        assert mib < 150


def test_the_command_says_what_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "runs", made(0))
    arguments = ["collect.py", str(tmp_path / "runs"), "--into", str(tmp_path / "a.jsonl")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--table", str(tmp_path / "t.csv")])
    for new in (1, 0):
        with pytest.raises(SystemExit, match="0"):
            script.main()
        assert f"1 records of 1 runs, {new} of them new in {tmp_path}/a.jsonl" in capsys.readouterr().out
    assert (tmp_path / "t.csv").exists()
    for again, status in (
        ({"wall_s": 9.0, "commit": "b" * 40}, "0"),
        ({"epochs": EPOCHS[:2]}, "1"),
    ):  # once with the same results
        write(tmp_path / "runs", made(0, **again))
        with pytest.raises(SystemExit, match=status):
            script.main()
    assert "they differ in steps, epochs (test" in capsys.readouterr().out
    (tmp_path / "none").mkdir()
    monkeypatch.setattr(sys, "argv", ["collect.py", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="1"):
        script.main()
    assert f"no run records in {tmp_path}/none" in capsys.readouterr().err
