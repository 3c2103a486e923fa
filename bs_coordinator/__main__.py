"""`python -m bs_coordinator`: the same as `wdmoe-bs`."""

from bs_coordinator.commands.main import main

main()
