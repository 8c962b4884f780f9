"""Studies made of many runs: capacity, comparison of policies, and the bound that no policy exceeds."""
