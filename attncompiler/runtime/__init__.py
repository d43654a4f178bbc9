"""Run time: operators, the sites that call them, and the walk along a chain of kernels."""
