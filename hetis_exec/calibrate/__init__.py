"""Measures the machine it runs on, with the code that serves, and fits a profile to it."""
