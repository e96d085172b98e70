"""Checks all that is kept of runs: records, files of records, weights and checkpoints, below any folders.

    python scripts/check.py runs results

Says what is damaged, and what to do about it; what is orphaned, such as the unfinished file of a process that was
killed, or a checkpoint of seeds that are recorded; what is unchecked, since it is from before there were checksums; and
what is foreign. `--add-checksums` makes the checksums of files of lines that have none yet; from then on, nobody can
change a line of theirs unnoticed. Nothing else is changed. Exit status 1 where anything is damaged.
"""

import argparse
from pathlib import Path

from nobackprop.mistakes import Mistake
from nobackprop.papers.check import check
from nobackprop.records.gathering import add_checksums, checksums_of
from nobackprop.records.literal import plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--add-checksums", action="store_true", help="make those that files of lines lack")
    options = parser.parse_args()
    try:
        found = check(options.folders)
        for kind, text in found.problems:
            print(plain(f"{kind}: {text}"))
        for path in found.unchecked if options.add_checksums else ():
            print(plain(f"{checksums_of(path)}: {add_checksums(path)} checksums"))
    except (Mistake, OSError) as e:
        parser.exit(2, f"check.py: {e}\n")
    print(found)
    parser.exit(1 if any(kind == "damaged" for kind, _ in found.problems) else 0)


if __name__ == "__main__":
    main()
