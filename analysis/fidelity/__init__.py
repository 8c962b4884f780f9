"""How far the simulator is off: measured runs of others, simulated as their engines are documented."""
