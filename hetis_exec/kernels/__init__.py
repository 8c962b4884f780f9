"""Attention in torch: a plain reference, and what CPUs compute."""
