"""The built-in GPU kernel, `triton`: flash attention, forward and backward, under every pattern and option.

- `sight.py`: what a call's visibility is to a GPU: bounds, block lists and tables of rows, made without a host read
- `visible.py`, `tiles.py`, `scores.py`: device functions: who sees whom, which tiles are met, what a score is
- `forward.py`, `backward.py`: the kernels
- `launch.py`: block shapes that fit a device, and launches
- `kernel.py`: the entry
"""
