"""The node as it runs on ARM boards: real aarch64 wheels under an emulated processor, against a base station here."""
