"""`python -m distrib` is `distrib`."""

from distrib.cli import main

main()
