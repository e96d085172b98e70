"""The command that makes papers' tables, figures and verdicts; `--help` says how."""

from nobackprop.papers.tables import main

if __name__ == "__main__":
    main()
