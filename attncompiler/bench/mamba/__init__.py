"""`attncompiler bench mamba`: every kernel of Mamba's and Mamba-2's chains, the planned ones, and the peers.

`rows` says what is measured, `inputs` makes a row's tensors, `contestants` and `peers` who takes part, and `bench` what
rows count. The grid does the rest. What is measured are the operators, the scan and the state space duality, and in the
group `mixer` whole mixers: what an emitted module's layer does between its norm and its residual.
"""
