"""`attncompiler bench attention`: every kernel of attention's chain, the planned one, and the peers, in one process.

`rows` says what is measured, `inputs` makes a row's tensors, `contestants` and `peers` who takes part, `grid` measures
one row, `report` makes tables of the results, and `keep` turns them into entries of the measured tables.
"""
