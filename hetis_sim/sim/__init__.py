"""Where time is computed: SimPy processes that carry out what the control plane decides."""
