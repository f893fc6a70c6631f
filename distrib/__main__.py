"""`python -m distrib` is `distrib`."""

from distrib.processes.lifetimes import die_with_launcher

die_with_launcher()  # before anything that takes its time to import

from distrib.cli import main  # noqa: E402

main()
