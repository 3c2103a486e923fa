"""`wdmoe-bs place`: its options, the files that it reads, and what it prints. `bs_coordinator.placement` decides."""
