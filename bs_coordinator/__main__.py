"""`python -m bs_coordinator`: the same as `wdmoe-bs`."""

from bs_coordinator.cli import main

main()
