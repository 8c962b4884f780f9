"""Decisions of serving systems: pure functions of what they are shown."""
