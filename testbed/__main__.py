"""`python -m testbed`: the same as `wdmoe-testbed`."""

from testbed.cli import main

main()
