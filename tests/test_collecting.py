"""Gathering records: nothing lost, nothing doubled, whatever is on disk and whoever else is gathering."""

import fcntl
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import collect as script
import numpy as np
import pandas as pd
import pytest
from test_records import RECORD

from nobackprop.collecting import collect, learning_curves, table, write_table
from nobackprop.records import Record

EPOCHS = [
    {"epoch": e, "step": 100 * e, "train/loss": 1 / (e + 2), "train/accuracy": e / 500, "val/accuracy": e / 7}
    for e in range(1, 8)
]


def made(seed: int = 0, **fields: Any) -> Record:
    values: dict[str, Any] = RECORD | {"seed": seed} | fields
    return Record(**values)


def write(folder: Path, record: Record) -> Path:
    path = folder / f"{record.name}-{record.signature}" / f"seed{record.seed}" / "record.json"
    record.write(path)
    return path


@pytest.mark.parametrize(
    "epochs",
    [
        EPOCHS,
        EPOCHS[:1],
        [],
        [{"epoch": 1, "step": 5, "val/loss": None}, {"epoch": 2, "step": 9, "val/loss": -0.0}],
        [{"epoch": 1, "val/accuracy": 0.0}, {"epoch": 3, "val/accuracy": -0.0}],
        [{"epoch": 2, "angle/W1": 0.1}, {"epoch": 1}],
        [{"epoch": 1, "a": 1}, {"epoch": 2, "a": 1.0}],
    ],
    ids=["seven", "one", "none", "null", "negative_zero", "uneven", "int_and_float"],
)
def test_a_line_gives_the_record_back_to_the_bit(epochs: list[dict[str, Any]]) -> None:
    record = made(epochs=epochs, best_epoch=None, config={"batch_size": 5})
    line = record.line()
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert repr(Record.parse(line, "here", "mend it")) == repr(record)


def test_epochs_are_kept_as_columns_and_accuracies_as_counts() -> None:
    data = RECORD["data"] | {"train": 503, "validation": 7}
    kept = json.loads(made(epochs=EPOCHS, config={"batch_size": 5}, data=data).line())["epochs"]
    assert kept["epoch"] == {"range": [1, 8, 1]}
    assert kept["val/accuracy"] == {"of": 7, "counts": [1, 2, 3, 4, 5, 6, 7]}
    assert kept["train/accuracy"] == {"of": 500, "counts": [1, 2, 3, 4, 5, 6, 7]}  # 100 steps of 5 images
    assert kept["train/loss"] == [epoch["train/loss"] for epoch in EPOCHS]


@pytest.mark.parametrize(
    "epochs",
    [{"a": {"of": 0, "counts": [1]}}, {"a": {"of": 2}}, {"a": [1], "b": []}, {"a": {"range": [1, 2, 0]}}, {"a": 3}],
    ids=str,
)
def test_damaged_columns_are_refused(epochs: dict[str, Any]) -> None:
    line = json.dumps(json.loads(made().line()) | {"epochs": epochs})
    with pytest.raises(ValueError, match=r"here is no valid run record .*damaged columns"):
        Record.parse(line.encode(), "here", "mend it")


def test_gathering_again_adds_only_what_is_new(tmp_path: Path) -> None:
    runs, into = tmp_path / "runs", tmp_path / "records" / "a.jsonl"
    write(runs, made(0))
    write(runs, made(1))
    (runs / "bp_mlp_digits-0123456789ab" / "seed2").mkdir()  # still training
    first = collect([runs], into)
    assert (first.added, len(first.records), first.unreadable, first.conflicts) == (2, 2, [], [])
    before = into.read_bytes()
    again = collect([runs, runs / "bp_mlp_digits-0123456789ab", into], into)
    assert (again.added, len(again.records), again.conflicts) == (0, 2, [])
    assert into.read_bytes() == before
    path = write(runs, made(2))
    assert collect([path.parent], into).added == 1
    assert into.read_bytes().startswith(before)
    assert collect([into]).records == {("0123456789ab", seed): made(seed) for seed in range(3)}


def test_a_file_of_lines_from_elsewhere_is_a_source(tmp_path: Path) -> None:
    write(tmp_path / "runs", made(0))
    write(tmp_path / "runs", made(1, signature="b" * 12))
    collect([tmp_path / "runs"], tmp_path / "there.jsonl")
    assert collect([tmp_path / "there.jsonl"], tmp_path / "here.jsonl").added == 2
    assert (tmp_path / "here.jsonl").read_bytes() == (tmp_path / "there.jsonl").read_bytes()
    assert len(collect([tmp_path]).records) == 2


def test_a_damaged_record_is_named_and_the_others_are_gathered(tmp_path: Path) -> None:
    write(tmp_path, made(0))
    path = write(tmp_path, made(1))
    path.write_bytes(path.read_bytes()[:50])
    found = collect([tmp_path], tmp_path / "a.jsonl")
    assert found.added == 1
    (problem,) = found.unreadable
    assert problem.startswith(f"{path} is no valid run record")


def test_another_record_of_the_same_run_and_seed_is_reported_and_does_not_replace_it(tmp_path: Path) -> None:
    into = tmp_path / "a.jsonl"
    write(tmp_path / "one", made(0))
    write(tmp_path / "two", made(0, test={"accuracy": 0.75}, wall_s=2.0))
    collect([tmp_path / "one"], into)
    before = into.read_bytes()
    found = collect([tmp_path / "two"], into)
    assert into.read_bytes() == before
    assert found.records["0123456789ab", 0] == made(0)
    (problem,) = found.conflicts
    assert "another record of seed 0 of bp_mlp_digits-0123456789ab" in problem
    assert "differ in test (test accuracies 50.00% and 75.00%)" in problem


def test_a_line_cut_off_by_a_crash_is_removed_and_its_record_gathered_again(tmp_path: Path) -> None:
    into = tmp_path / "a.jsonl"
    write(tmp_path / "runs", made(0))
    write(tmp_path / "runs", made(1))
    collect([tmp_path / "runs"], into)
    whole = into.read_bytes()
    into.write_bytes(whole[:-20])
    found = collect([tmp_path / "runs"], into)
    assert found.unreadable == [f"{into}: the last line was cut off and is removed"]
    assert into.read_bytes() == whole
    into.write_bytes(whole[:-1])
    assert collect([into], into).unreadable == []
    assert into.read_bytes() == whole


@pytest.mark.parametrize(
    "content",
    [b"notes of my own", b"\x89PNG\r\n\x1a\nabc", b'{"a": 1}', made(0).line() + b"<<<<<<< HEAD"],
    ids=["notes", "image", "json", "conflict"],
)
def test_what_is_no_record_is_not_taken_for_one_that_was_cut_off(tmp_path: Path, content: bytes) -> None:
    into = tmp_path / "mine.txt"
    into.write_bytes(content)
    write(tmp_path / "runs", made(1))
    with pytest.raises(ValueError, match=r"mine\.txt, line \d is no valid run record"):
        collect([tmp_path / "runs"], into)
    assert into.read_bytes() == content


def test_a_record_of_a_newer_format_is_kept(tmp_path: Path) -> None:
    into = tmp_path / "a.jsonl"
    into.write_text(json.dumps({"format": 2}))
    with pytest.raises(ValueError, match="is of record format 2"):
        collect([], into)
    assert into.read_text() == '{"format": 2}'


def test_learning_curves_are_of_the_same_seeds_throughout() -> None:
    ended = made(1, epochs=EPOCHS[:3])
    diverged = made(2, epochs=EPOCHS[:3], diverged_epoch=3)
    at_once = made(3, epochs=EPOCHS[:1], diverged_epoch=1)
    curves = 7 * learning_curves([made(0, epochs=EPOCHS[:5]), ended, diverged, at_once])
    expected = {0: [1, 2, 3, 4, 5], 1: [1, 2, 3, 3, 3], 2: [1, 2, 2, 2, 2], 3: [np.nan] * 5}
    pd.testing.assert_frame_equal(curves, pd.DataFrame(expected, index=range(1, 6)).astype(float), check_exact=False)


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    into = tmp_path / "a.jsonl"
    into.write_bytes(made(0).line() + b"<<<<<<< HEAD\n" + made(1).line())
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2 is no valid run record"):
        collect([into])
    with pytest.raises(ValueError, match="line 2"):
        collect([], into)


def test_a_source_that_is_not_there_is_an_error_and_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: give a folder of runs"):
        collect([tmp_path / "nowhere"], tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()


def test_one_waits_while_another_gathers_into_the_same_file(tmp_path: Path) -> None:
    into = tmp_path / "a.jsonl"
    with ThreadPoolExecutor(1) as pool:
        with into.open("ab") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            waits = pool.submit(collect, [], into)
            with pytest.raises(TimeoutError):
                waits.result(timeout=0.3)
            other.write(made(0).line())
        assert list(waits.result(timeout=10).records) == [("0123456789ab", 0)]


def test_several_may_gather_into_one_file_at_once(tmp_path: Path) -> None:
    for seed in range(60):
        write(tmp_path / f"runs{seed % 3}", made(seed))
    into = tmp_path / "a.jsonl"

    def gather(i: int) -> int:
        return collect([tmp_path / f"runs{i % 3}", tmp_path / f"runs{(i + 1) % 3}"], into).added

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(gather, range(6))) == 60
    seeds = [json.loads(line)["seed"] for line in into.read_bytes().splitlines()]
    assert sorted(seeds) == list(range(60))


def test_the_table_has_one_row_per_run_and_seed_and_can_be_written(tmp_path: Path) -> None:
    records = [made(1, config={"arch": {"hidden": [3, 4]}, "loss": 1}), made(0, test=None, best_epoch=None)]
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


@pytest.mark.slow
def test_ten_thousand_records_are_gathered_in_ten_seconds(tmp_path: Path) -> None:
    epochs = [
        {"epoch": e, "step": 1160 * e, "train/loss": 1 / (e + 2), "val/loss": 1 / (e + 3), "val/accuracy": e / 2000}
        for e in range(1, 101)
    ]
    for seed in range(10_000):
        path = tmp_path / "runs" / f"bp_mlp_digits-0123456789ab{seed // 10}" / f"seed{seed % 10}" / "record.json"
        path.parent.mkdir(parents=True)
        path.write_bytes(made(seed, epochs=epochs).model_dump_json().encode())
    for added in (10_000, 0):  # also where all are there already
        start = time.perf_counter()
        assert collect([tmp_path / "runs"], tmp_path / "a.jsonl").added == added
        assert time.perf_counter() - start < 10


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
    for again, status in ({"wall_s": 9.0, "commit": "b" * 40}, "0"), ({"steps": 7}, "1"):  # once with the same results
        write(tmp_path / "runs", made(0, **again))
        with pytest.raises(SystemExit, match=status):
            script.main()
    assert "they differ in steps" in capsys.readouterr().out
    (tmp_path / "none").mkdir()
    monkeypatch.setattr(sys, "argv", ["collect.py", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert f"no run records in {tmp_path}/none" in capsys.readouterr().err
