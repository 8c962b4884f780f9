"""Helix (ASPLOS '25): layers placed for the largest flow, and a path for each request."""
