"""`python -m nobackprop`: the command `nobackprop`."""

from nobackprop.cli import main

main()
