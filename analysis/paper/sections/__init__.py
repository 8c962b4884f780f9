"""The parts of the evaluation, each a function from the evaluation to a section."""
