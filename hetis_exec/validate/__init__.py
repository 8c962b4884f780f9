"""How far the simulator is off: the same requests served for real and in simulated time."""
