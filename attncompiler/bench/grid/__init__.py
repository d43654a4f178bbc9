"""The grid of `attncompiler bench`: rows × contestants, timed in turns in one process, whatever the mechanism.

`bench` says what the bench of a mechanism gives, `rows` how rows are named, `contestants` what takes part in one,
`cells` what was found, `measure` measures one row, `run` the rows one after the other, and `report` makes tables, in
the `units` of each group. `ours` makes contestants of a mechanism's kernels.
"""
