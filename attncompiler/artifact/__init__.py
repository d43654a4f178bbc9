"""The artifact: a model as a folder, written in one step and read without executing anything that it holds.

    spec.resolved.yaml   the spec, every default written out
    plan.json            a plan for each listed target, and the one that the model was emitted for
    model.safetensors    the weights, in several files with an index past 5 GB; absent when built on "meta"
    modeling.py          the generated code, for reading only
    report.html          layers, kernels, refusals and costs on one page
    manifest.json        format, origin of the weights, and the hash and size of every other file

Hashes detect damage, not an attacker; against an attacker stands that every file is data to the reader.
"""

from attncompiler.artifact.read import Artifact, read, undisturbed
from attncompiler.artifact.write import write

__all__ = ["Artifact", "read", "undisturbed", "write"]
