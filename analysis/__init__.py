"""Reports and figures, made from run folders alone."""
