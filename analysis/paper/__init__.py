"""The evaluation of the Hetis paper (SC '25), run anew in the simulator."""
