"""Readers of the data sets, one file each: what was measured, and how the run is simulated."""
