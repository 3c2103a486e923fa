"""What experts get as input on a calibration text, for quantisation with the least error on it."""
