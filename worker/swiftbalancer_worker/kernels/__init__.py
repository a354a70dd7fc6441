"""The planner's inner loops: plain Python on numpy arrays, compiled by numba where it is installed.

Both ways run the same source, in the same order and without fused or reassociated arithmetic, so they give
the same plans bit for bit. Nothing here allocates per step of a search, validates, or knows of policies.
"""
