"""`attncompiler bench attention`: every kernel of attention's chain, the planned one, and the peers, in one process.

`rows` says what is measured, `inputs` makes a row's tensors, `contestants` and `peers` who takes part, `bench` what
rows count, and `keep` turns results into entries of the measured tables. The grid does the rest.
"""
