"""int8 files for CPUs: ranges from BatchNorm or calibration, weights that can't saturate, and the proof of the file."""
