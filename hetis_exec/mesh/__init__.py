"""A mesh under the real clock: nodes that compute whoever waits there, and requests on paths of their own."""
