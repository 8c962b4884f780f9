"""What the processes of the evaluation work out, one job each.

A job's figures depend on its arguments and on the code that is hashed with them
(:func:`analysis.paper.store.code_hash`): this package and the simulator. What only arranges figures lies
outside it.
"""
