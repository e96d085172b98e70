"""The command that checks all that is kept of runs; `--help` says how."""

from nobackprop.papers.check import main

if __name__ == "__main__":
    main()
