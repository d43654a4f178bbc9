"""What a wrong spec is told: every fault at once, each with its place and its remedy."""

from __future__ import annotations

import pytest

from attncompiler.mechanisms.base import discover

from .samples import BASE, changed, errors

KINDS = ", ".join(discover())
TARGET = (
    "{{name: {}, title: Mine, device_type: cuda, vendor: nvidia, memory_bytes: 8589934592, bandwidth: 1e12, "
    "matrix_flops: {{float32: 1e13}}, vector_flops: 1e13, multiprocessors: 8, shared_memory_bytes: 65536}}"
)

TABLE: list[tuple[str, str, list[str]]] = [
    # keys and kinds
    ("num_attention_heads: 4", "num_attention_heads: 4\n    num_kv_heads: 2", [
        "f:10:5: E012 unknown key 'num_kv_heads'; did you mean 'num_key_value_heads'?",
    ]),
    ("hidden_size: 64", "d_model: 64", [
        "f:2:1: E010 'hidden_size' is missing in model",
        "f:4:3: E012 unknown key 'd_model'; did you mean 'hidden_size'?",
    ]),
    ("kind: attention", "kind: atention", [
        f"f:8:11: E013 unknown kind 'atention'; did you mean 'attention'? (the kinds are {KINDS})",
    ]),
    ("kind: attention", "size: 3", [f"f:7:3: E010 'kind' is missing in policies.full; the kinds are {KINDS}"]),
    ("kind: attention", "kind: 3", [f"f:8:11: E011 policies.full.kind must be text, not 3; the kinds are {KINDS}"]),
    ("kind: attention", "kind: mla", [
        "f:8:11: E150 multi-head latent attention (kind mla) is understood, but not offered",
    ]),
    ("kind: attention", "kind: attention\n    kv_lora_rank: 512", [
        "f:9:5: E150 multi-head latent attention (kv_lora_rank) is understood, but not offered",
    ]),
    ("kind: gated", "kind: moe", ["f:5:15: E150 a mixture of experts (kind moe) is understood, but not offered"]),
    ("kind: causal", "kind: casual", [
        "f:10:21: E013 unknown kind 'casual'; did you mean 'causal'? (the kinds are full, causal, sliding_window, "
        "strided, local_global, random, chunked)",
    ]),
    ("kind: causal", "kind: causal, causal: true", ["f:10:29: E012 unknown key 'causal'"]),
    ("pattern: {kind: causal}", "sliding_window: 4096", [
        "f:10:5: E012 unknown key 'sliding_window'; write pattern: {kind: sliding_window, window: ...}",
    ]),
    # types
    ("hidden_size: 64", "hidden_size: '64'", [
        "f:4:16: E011 model.hidden_size must be a whole number, not the text '64'; remove the quotes",
    ]),
    ("hidden_size: 64", "hidden_size: 64.0", [
        "f:4:16: E011 model.hidden_size must be a whole number, not 64.0; write 64",
    ]),
    ("hidden_size: 64", "hidden_size: 1_000", [
        "f:4:16: E011 model.hidden_size must be a whole number, not the text '1_000'; write 1000",
    ]),
    ("hidden_size: 64", "hidden_size: true", ["f:4:16: E011 model.hidden_size must be a whole number, not true"]),
    ("hidden_size: 64", "hidden_size:", ["f:4:15: E011 model.hidden_size must be a whole number, not null"]),
    ("name: base", "name: base\ndeterministic: yes", [
        "f:2:16: E011 deterministic must be true or false, not the text 'yes'; write true",
    ]),
    ("name: base", "name: 12", ["f:1:7: E011 name must be text, not 12"]),
    ("pattern: {kind: causal}", "kernel: 3", ["f:10:13: E011 policies.full.kernel must be text or a list, not 3"]),
    ("pattern: {kind: causal}", "kernel: [sdpa, 3]", [
        "f:10:20: E011 policies.full.kernel[1] must be text, not 3",
    ]),
    ("pattern: {kind: causal}", "pattern: causal", [
        "f:10:14: E011 policies.full.pattern must be a mapping, not the text 'causal'",
    ]),
    ("layers:\n  - {policy: full}", "layers: {policy: full}", ["f:11:9: E011 layers must be a list, not a mapping"]),
    ("{policy: full}", "full", ["f:12:5: E011 layers[0] must be a mapping, not the text 'full'"]),
    # values
    ("hidden_size: 64", "hidden_size: 0", ["f:4:16: E014 model.hidden_size must be at least 1, not 0"]),
    ("vocab_size: 256", "vocab_size: 256\n  dtype: float8", [
        "f:4:10: E014 model.dtype must be 'float32', 'bfloat16', 'float16' or 'float64', not the text 'float8'; "
        "did you mean 'float64'?",
    ]),
    ("vocab_size: 256", "vocab_size: 256\n  norm: {eps: .inf}", ["f:4:15: E014 model.norm.eps must be finite"]),
    ("name: base", "spec_version: true\nname: base", [
        "f:1:15: E011 spec_version must be a whole number, not true",
    ]),
    ("num_attention_heads: 4", "num_attention_heads: 4\n    head_dim: 100000000000000000000", [
        "f:10:15: E014 policies.full.head_dim must be less than 1,048,576, not 100000000000000000000",
    ]),
    ("targets: [cpu]", "targets: []", ["f:13:10: E014 the spec lists no target; leave targets out for cpu"]),
    ("name: base", "spec_version: 2\nname: base", ["f:1:15: E014 spec_version must be at most 1, not 2"]),
    ("policies:\n  full:", "policies:\n  a.b: {kind: attention, num_attention_heads: 4}\n  full:", [
        "f:7:3: E014 the policy name 'a.b' may hold only letters, digits, dashes and underscores",
    ]),
    # relations
    ("hidden_size: 64", "hidden_size: 66", [
        "f:9:26: E101 hidden_size 66 is not divisible by num_attention_heads 4; "
        "give head_dim, or change one of the two",
    ]),
    ("pattern: {kind: causal}", "num_key_value_heads: 3", [
        "f:10:26: E101 num_attention_heads 4 is not divisible by num_key_value_heads 3",
    ]),
    ("pattern: {kind: causal}", "head_dim: 7\n    rope_theta: 10000", [
        "f:11:5: E101 the rotary part of a head is 7 wide, and must be a positive even number; "
        "change head_dim or partial_rotary_factor",
    ]),
    ("pattern: {kind: causal}", "rope_scaling: {type: linear}", [
        "f:10:5: E105 rope_type 'linear' needs 'factor'",
    ]),
    ("pattern: {kind: causal}", "rope_parameters: {factor: 2.0}", [
        "f:10:31: E105 'factor' means nothing to rope_type 'default'; remove it, or change rope_type",
    ]),
    ("pattern: {kind: causal}", "rope_scaling: {type: linear, factor: 0.5}", [
        "f:10:42: E014 policies.full.rope_parameters.factor must be at least 1, not 0.5",
    ]),
    ("pattern: {kind: causal}", "rope_theta: 1e-300", [
        "f:10:17: E014 policies.full.rope_parameters.rope_theta must be greater than 1e-30, not 1e-300",
    ]),
    ("pattern: {kind: causal}", "rope_parameters: {rope_type: dynamic, factor: 2, partial_rotary_factor: 0.125}", [
        "f:10:22: E101 rope_type 'dynamic' stretches the slowest pair and keeps the fastest, and a head has one pair "
        "alone; change head_dim or partial_rotary_factor",
    ]),
    ("pattern: {kind: causal}", "rope_parameters: {rope_type: yarn, factor: 2, beta_fast: 0.5}", [
        "f:10:62: E105 beta_fast 0.5 must not be less than beta_slow 1",
    ]),
    ("pattern: {kind: causal}", "rope_parameters: {rope_type: yarn, factor: 2, beta_slow: 33}", [
        "f:10:62: E105 beta_fast 32 must not be less than beta_slow 33",
    ]),
    ("pattern: {kind: causal}", "rope_theta: 1\n    rope_scaling: {type: yarn, factor: 2}", [
        "f:10:17: E105 yarn needs frequencies that fall from pair to pair, and with rope_theta 1 none do; "
        "give a rope_theta above 1",
    ]),
    ("pattern: {kind: causal}", "rope_parameters: {rope_type: yarn, factor: 2, mscale: 0.7}", [
        "f:10:59: E105 'mscale' means something only with both mscale and mscale_all_dim; give the other too, or "
        "neither",
    ]),
    ("pattern: {kind: causal}", "rope_parameters: {rope_type: yarn, factor: 2, mscale_all_dim: 1, mscale: 1, "
        "attention_factor: 1}", [
        "f:10:78: E105 attention_factor is given, and 'mscale' would say it again; remove one of the two",
    ]),
    ("pattern: {kind: causal}", "rope_parameters: {rope_type: linear, factor: 2, truncate: false}", [
        "f:10:63: E105 'truncate' means nothing to rope_type 'linear'; remove it, or change rope_type",
    ]),
    ("pattern: {kind: causal}", "rope_parameters: {rope_type: llama3, factor: 8, low_freq_factor: 4, "
        "high_freq_factor: 4, original_max_position_embeddings: 8192}", [
        "f:10:70: E105 low_freq_factor 4 must be less than high_freq_factor 4",
    ]),
    ("pattern: {kind: causal}", "rope_parameters: {rope_type: llama3, factor: 8, low_freq_factor: 1}", [
        "f:10:22: E105 rope_type 'llama3' needs 'high_freq_factor'",
        "f:10:22: E105 rope_type 'llama3' needs 'original_max_position_embeddings'",
    ]),
    ("{policy: full}", "{policy: ful}", ["f:12:14: E102 unknown policy 'ful'; did you mean 'full'?"]),
    ("layers:\n  - {policy: full}", "layers: []", ["f:11:9: E103 the model has no layers"]),
    ("{policy: full}", "{repeat: 3, layers: []}", ["f:12:3: E103 the model has no layers"]),
    ("{policy: full}", "{repeat: 101, layers: [{repeat: 100, policy: full}]}", [
        "f:12:3: E004 the layers are 10,100; at most 10,000 are taken",
    ]),
    ("{policy: full}", "{repeat: 0, policy: full}", ["f:12:14: E014 layers[0].repeat must be at least 1, not 0"]),
    ("name: base", "name: a/b", [
        "f:1:7: E104 name 'a/b' is not usable as a folder name; use up to 100 letters, digits, dots, dashes and "
        "underscores, with a letter or digit first",
    ]),
    ("pattern: {kind: causal}", "kernel: tritn", [
        "f:10:13: E106 unknown kernel 'tritn' of attention; did you mean 'triton'?",
    ]),
    ("pattern: {kind: causal}", "kernel: []", ["f:10:13: E014 policies.full.kernel lists no kernel"]),
    ("targets: [cpu]", "targets: [cpu, h2000]", ["f:13:16: E107 unknown target 'h2000'; did you mean 'h200'?"]),
    ("targets: [cpu]", "targets: [cpu, cpu]", ["f:13:16: E105 the target 'cpu' is listed twice"]),
    ("targets: [cpu]", f"targets: [{TARGET.format('cpu')}]", [
        "f:13:18: E105 the target 'cpu' is built in, and other facts are given for it; give it a name of its own",
    ]),
    ("targets: [cpu]", "targets: [3]", ["f:13:11: E011 targets[0] must be text or a mapping, not 3"]),
    ("targets: [cpu]", "fallback: {order: {atention: auto}}", [
        "f:13:20: E012 unknown mechanism 'atention'; did you mean 'attention'?",
    ]),
    ("targets: [cpu]", "fallback: {order: {attention: sdpa}}", [
        "f:13:31: E011 fallback.order.attention must be 'auto' or a list, not the text 'sdpa'",
    ]),
    ("targets: [cpu]", "fallback: {order: {attention: [sdpa, eagr]}}", [
        "f:13:38: E106 unknown kernel 'eagr' of attention; did you mean 'eager'?",
    ]),
    ("vocab_size: 256", "input: tokens", ["f:2:1: E010 'vocab_size' is missing in model: its input is tokens"]),
    ("vocab_size: 256", "vocab_size: 256\n  input: embeds\n  head: {kind: none}", [
        "f:3:3: E105 a model fed with embeds has no vocabulary; remove vocab_size, or write input: tokens",
    ]),
    ("vocab_size: 256", "input: embeds\n  head: {kind: lm, tie_word_embeddings: true}", [
        "f:4:9: E105 a head of kind lm needs a vocabulary to tie, and a model fed with embeds has none; "
        "write head: {kind: none} or a classifier, or input: tokens",
    ]),
    ("vocab_size: 256", "vocab_size: 256\n  head: {kind: classifier}", [
        "f:4:3: E010 'num_labels' is missing in model.head",
    ]),
    ("{policy: full}", "{policy: full, mlp: {kind: none, bias: true}}", [
        "f:12:25: E105 an mlp of kind none takes no bias",
    ]),
    ("{policy: full}", "{policy: full, share: a}\n  - {policy: full, share: a, mlp: {bias: true}}", [
        "f:13:27: E105 layers that share 'a' must be equal, and this one differs from layers[0]",
    ]),
    # routes
    ("pattern: {kind: causal}", "routes: [{when: 'batch_size > 1', pattern: {kind: full}}]", [
        "f:10:21: E108 a route that changes the pattern may test only seq_len and training, not batch_size; "
        "what decides the pattern must be known before decoding starts",
    ]),
    ("pattern: {kind: causal}", "routes: [{when: seq_len > 9, pattern: {kind: strided, windw: 3}}]", [
        "f:10:34: E010 'stride' is missing in policies.full.routes[0].pattern",
        "f:10:34: E010 'window' is missing in policies.full.routes[0].pattern",
        "f:10:59: E012 unknown key 'windw'; did you mean 'window'?",
    ]),
    ("pattern: {kind: causal}", "routes: [{when: seq_len > 9}]", [
        "f:10:14: E105 a route changes pattern, kernel or packing, and this one nothing",
    ]),
    ("pattern: {kind: causal}", "routes: [{when: seqlen > 9, kernel: sdpa}]", [
        "f:10:21: E108 unknown name 'seqlen'; the names are seq_len, training, batch_size, padding_fraction, dtype, "
        "device_type",
    ]),
    # aliases
    ("pattern: {kind: causal}", "rope_theta: 3\n    rope_parameters: {rope_theta: 4}", [
        "f:10:5: E105 'rope_theta' is also given in rope_parameters",
    ]),
    ("pattern: {kind: causal}", "rope_scaling: {type: yarn, rope_type: default}", [
        "f:10:20: E105 rope_scaling gives both 'type' and 'rope_type', and they differ; remove one of the two",
    ]),
    ("pattern: {kind: causal}", "rope_scaling: 3", ["f:10:19: E011 rope_scaling must be a mapping"]),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "expected"), TABLE, ids=[new.replace("\n", " ") for _, new, _ in TABLE])
def test_one_fault(old: str, new: str, expected: list[str]) -> None:
    assert errors(changed((old, new))) == expected


def test_all_faults_come_at_once_with_relations_over_what_is_valid() -> None:
    text = changed(
        ("hidden_size: 64", "hidden_size: 66"),
        ("kind: gated", "kind: gatd"),
        ("targets: [cpu]", "targets: [cpus]\nseeed: 3\nseed: 'x'\nseed: 4"),
    )
    assert errors(text) == [
        "f:5:15: E013 unknown kind 'gatd'; did you mean 'gated'? (the kinds are gated, plain, none)",
        "f:9:26: E101 hidden_size 66 is not divisible by num_attention_heads 4; "
        "give head_dim, or change one of the two",
        "f:13:11: E107 unknown target 'cpus'; did you mean 'cpu'?",
        "f:14:1: E012 unknown key 'seeed'; did you mean 'seed'?",
        "f:15:7: E011 seed must be a whole number, not the text 'x'",
        "f:16:1: E005 the key 'seed' was given before on line 15",
    ]


@pytest.mark.parametrize("value", [".nan", "9" * 500])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("hidden_size: 64", "hidden_size: {}"),
        ("num_attention_heads: 4", "num_attention_heads: {}"),
        ("kind: attention", "kind: {}"),
        ("kind: causal", "kind: sliding_window, window: {}"),
        ("pattern: {kind: causal}", "kernel: {}"),
        ("pattern: {kind: causal}", "kernel: [sdpa, {}]"),
        ("pattern: {kind: causal}", "rope_theta: {}"),
        ("pattern: {kind: causal}", "rope_scaling: {}"),
        ("pattern: {kind: causal}", "rope_parameters: {}"),
        (
            "pattern: {kind: causal}",
            "routes: [{{when: seq_len > 9, pattern: {{kind: chunked, chunk: {}}}}}]",
        ),
        ("{policy: full}", "{{policy: {}}}"),
        ("{policy: full}", "{}"),
        ("targets: [cpu]", "targets: [cpu, {}]"),
        ("targets: [cpu]", "fallback: {{order: {{attention: {}}}}}"),
        ("name: base", "name: {}"),
        ("name: base", "name: base\nseed: {}"),
    ],
)
def test_a_value_that_cannot_be_read_is_one_fault(old: str, new: str, value: str) -> None:
    """Nothing is said about a stand-in, where the value is or in a relation to it."""
    [fault] = errors(changed((old, new.format(value))))
    assert "E014 '.nan' is not a value" in fault or "E014 a number of 500 digits is too long" in fault


def test_other_faults_of_an_override_are_said_beside_a_value_that_cannot_be_read() -> None:
    option = "policies.full.pattern={kind: sliding_window, window: .nan, global_tokens: x}"
    assert errors(BASE, option) == [
        f"--set {option}: E014 '.nan' is not a value",
        f"--set {option}: E011 policies.full.pattern.global_tokens must be a whole number, not the text 'x'",
    ]


def test_a_relation_over_a_wrong_value_says_nothing() -> None:
    assert len(errors(changed(("hidden_size: 64", "hidden_size: 'x'")))) == 1
    assert len(errors(changed(("vocab_size: 256", "vocabsize: 256")))) == 1


def test_each_wrong_layer_and_policy_is_told() -> None:
    text = BASE + "fallback: 3\n"
    text = text.replace("{policy: full}", "{policy: full, repeat: x}\n  - {policy: nope}\n  - {polcy: full}")
    text = text.replace("full:\n", "other: {kind: attention, num_attention_heads: 5}\n  full:\n")
    found = errors(text)
    assert [message.split(": ")[1][:4] for message in found] == ["E101", "E011", "E102", "E010", "E012", "E011"]


def test_a_kind_that_every_mechanism_lacks_lists_the_kinds() -> None:
    assert errors(changed(("kind: attention", "kind: zzz"))) == [
        f"f:8:11: E013 unknown kind 'zzz'; the kinds are {KINDS}"
    ]


def test_a_fault_that_an_override_brings_is_placed_at_the_override() -> None:
    """The value it stands on in the file is right."""
    assert errors(BASE, "seed=1", "model.hidden_size=66") == [
        "--set model.hidden_size=66: E101 hidden_size 66 is not divisible by num_attention_heads 4; "
        "give head_dim, or change one of the two"
    ]
    assert errors(BASE, "layers[0].repeat=10001", "targets=[]") == [
        "--set layers[0].repeat=10001: E004 the layers are 10,001; at most 10,000 are taken",
        "--set targets=[]: E014 the spec lists no target; leave targets out for cpu",
    ]
    # an override that is the place already stays it
    assert errors(
        BASE, "layers[0].repeat=5001", "layers=[{policy: full, repeat: 5000}, {policy: full, repeat: 5001}]"
    ) == [
        "--set layers=[{policy: full, repeat: 5000}, {policy: full, repeat: 5001}]: "
        "E004 the layers are 10,001; at most 10,000 are taken"
    ]
    # what is wrong without them keeps its place
    assert errors(changed(("targets: [cpu]", "targets: [cpus]")), "seed=1")[0].startswith("f:13:11: E107 ")


def test_a_spec_must_fit_an_artifact_with_its_defaults_written_out() -> None:
    """Else it could be saved, trained, and not be loaded."""
    many = "\n".join(f"  p{i}: {{kind: mamba2}}" for i in range(800))
    text = BASE.replace("policies:\n", f"policies:\n{many}\n")
    assert len(text) < 2**15
    assert errors(text) == [
        "f: E004 the spec is larger than 256 KiB with its defaults written out, as artifacts hold it"
    ]
