"""Benchmarks: each script puts this package beside a peer, or beside itself, in one process.

    attncompiler bench attention --peers        every kernel of attention on this device, and its peers; --save keeps it
    attncompiler bench linear --peers           the same for linear attention, beside fla or the plain causal form
    attncompiler bench mamba --peers            the same for Mamba and Mamba-2, beside mamba-ssm and HF's mixers
    python -m attncompiler.bench.train_step     a training step against HF transformers (needs the extra `hf`), of a
                                                hybrid against the same network by hand
    python -m attncompiler.bench.sparse         sparse patterns against SDPA, masked or causal: time and memory
    python -m attncompiler.bench.blocks         patterns as block lists: time and memory
    python -m attncompiler.bench.decode         `generate` against HF's, and steps early and late in a sequence
    python -m attncompiler.bench.scaling        time per token of the linear-time mixers as the length grows
    python -m attncompiler.bench.startup        `build` of a large spec on meta, and `check`: time and memory

The sides take turns; what is printed are medians with the fastest and slowest turn, or JSON with `--format json`.
"""
