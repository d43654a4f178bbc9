"""Flash attention in Triton, forward and backward, under every pattern and option: what the kernel `triton` runs.

What Triton compiles needs Triton to be imported, so nothing but that kernel imports these modules.

- `sight.py`: what a call's visibility is to a GPU: bounds, block lists and tables of rows, made without a host read
- `visible.py`, `tiles.py`, `scores.py`: device functions: who sees whom, which tiles are met, what a score is
- `forward.py`, `backward.py`: the kernels
- `kept.py`: what is made once for a pattern and a device
- `launch.py`: block shapes that fit a device, and launches
- `hopper.py`: the calls that kernels for Hopper serve: `hopper_forward.py`, `hopper_backward.py`, and the tables of
  both, `hopper_tables.py`
- `kernel.py`: which programs run for a call
"""
