"""The command that runs a paper's experiments; `--help` says how."""

from nobackprop.papers.reproduce import main

if __name__ == "__main__":
    main()
