"""What every package uses and no protocol depends on: console entry, files, sizes, devices, CPU idle states."""
