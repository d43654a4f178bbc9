"""`attncompiler bench linear`: every kernel of linear attention's chain, the planned one, and the peers.

`rows` says what is measured, `inputs` makes a row's tensors, `contestants` and `peers` who takes part, and `bench` what
rows count. The grid does the rest.
"""
