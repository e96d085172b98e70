"""Gathers run records into a file of lines, one per run and seed, that the tables and figures are made from.

    python scripts/collect.py runs/lra_e --into results/records/lra_e.jsonl
    python scripts/collect.py runs/lra_e /elsewhere/lra_e.jsonl --table all.parquet

Sources are folders of runs, of one run or of one seed, and such files from other machines. Only new records are
appended, and old ones stay as they are. So the command can be repeated at any time, also while runs train. `--table`
writes all records that were found as a table, .csv or .parquet. The exit status is 1 if a record could not be read or
differs from an earlier one.
"""

import argparse
from pathlib import Path

from nobackprop.mistakes import Mistake
from nobackprop.records.gathering import Collected, collect, gather, table, write_table
from nobackprop.records.literal import plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs, or .jsonl files")
    parser.add_argument("--into", type=Path, metavar="FILE.jsonl", help="where to append what is new")
    parser.add_argument("--table", type=Path, metavar="FILE", help="a table of all records: .csv or .parquet")
    options = parser.parse_args()
    try:
        if options.into:
            found = gather(options.runs, options.into)
            new = f", {found.added} of them new in {options.into}"
        else:
            found, new = collect(options.runs), ""
        if options.table:
            every = found if isinstance(found, Collected) else collect([options.into])
            write_table(table(every.records.values()), options.table)
    except (Mistake, OSError) as e:
        parser.exit(1, f"{parser.prog}: {e}\n")
    if not found.results and not found.unreadable:
        parser.exit(1, f"{parser.prog}: no run records in {', '.join(map(str, options.runs))}\n")
    for problem in found.unreadable + found.conflicts:
        print(plain(problem))
    print(f"{len(found.results)} records of {len({signature for signature, _ in found.results})} runs{new}")
    parser.exit(1 if found.unreadable or found.conflicts else 0)
