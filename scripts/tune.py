"""The command that searches settings; `--help` says how."""

from nobackprop.papers.tune import main

if __name__ == "__main__":
    main()
