"""The command that makes all that is made from recorded runs; `--help` says how."""

from nobackprop.papers.report import main

if __name__ == "__main__":
    main()
