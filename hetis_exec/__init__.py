"""Drives the control plane with real workers: time is measured, not computed."""
