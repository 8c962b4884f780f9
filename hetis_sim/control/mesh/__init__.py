"""A second kind of instance: requests that each take a way of their own through a graph of nodes.

The verbs are those of the seam. The engine of :mod:`hetis_sim.control.engine` knows pipelines whose
micro-batches stay together; here every node computes whatever waits at it.
"""
