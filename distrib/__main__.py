"""Makes `python -m distrib` the same as the command `distrib`."""

from distrib.processes.lifetimes import die_with_launcher

die_with_launcher()  # before the slow imports

from distrib.cli import main  # noqa: E402

main()
