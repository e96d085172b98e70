"""The command that compares the runs in a folder; `--help` says how."""

from nobackprop.papers.compare import main

if __name__ == "__main__":
    main()
