"""A small model to save, and the artifact it makes."""

from __future__ import annotations

import attncompiler
from attncompiler import spec as specs
from attncompiler.emit import CompiledModel

SPEC = """
name: small
seed: 3
model:
  vocab_size: 31
  hidden_size: 16
  mlp: {kind: gated, intermediate_size: 24}
  head: {kind: lm, tie_word_embeddings: true}
policies:
  near: {kind: attention, num_attention_heads: 2, rope_parameters: {}, pattern: {kind: sliding_window, window: 4}}
  far: {kind: attention, num_attention_heads: 4, num_key_value_heads: 2, attention_bias: qkv}
layers: [{policy: near, repeat: 2, share: twice}, {policy: far}]
targets: [h200, cpu]
"""


def build(*overrides: str, text: str = SPEC, **options: object) -> CompiledModel:
    return attncompiler.build(specs.parse(text, overrides=overrides), device=options.pop("device", "cpu"), **options)
