"""`python -m dynamics.cli`."""

from dynamics.cli.app import main

main()
