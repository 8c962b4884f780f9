"""Hydra configuration groups, found as ``pkg://conf``."""
