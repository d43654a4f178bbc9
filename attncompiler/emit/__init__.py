"""Plan → torch.fx: the modules of a model, their graphs, and their first weights.

The steps, in order: `modules` builds a model on the meta device, `trace` turns its layers and then the whole into
graphs, `weights` ties, draws and places the parameters, `verify` holds the result against what a graph must be.
"""

from attncompiler.emit.emit import emit
from attncompiler.emit.model import CompiledModel

__all__ = ["CompiledModel", "emit"]
