"""The command that gathers run records; `--help` says how."""

from nobackprop.papers.collect import main

if __name__ == "__main__":
    main()
