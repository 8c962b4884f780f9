"""Fits the coefficients of the cost models to public kernel timings."""
