"""Drives the control plane with real workers: time is measured, not computed.

The decisions are the simulator's: the controller, the scheduler and the policies are imported
from :mod:`hetis_sim`, and nothing here decides anything. Workers are threads or processes of
this host, or ranks of many; what they compute with is a backend: torch for real models, NumPy for a toy.
"""
