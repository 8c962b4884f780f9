"""Hetis: dense work on primary workers, decode attention split by head over all (SC '25)."""
