"""Jobs of the comparison: each simulates one measured run and returns plain figures."""
