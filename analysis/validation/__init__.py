"""Figures of a validation: real runs beside simulated ones."""
