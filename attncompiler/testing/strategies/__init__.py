"""Hypothesis strategies of specs, policies, patterns and inputs, each draw of them valid; and of specs that are not.

    @given(specs().flatmap(lambda spec: st.tuples(st.just(spec), inputs_for(spec))))
    def test_mine(drawn):
        spec, inputs = drawn
        logits = attncompiler.build(spec, device="cpu")(**inputs.forward())

A draw that does not validate, plan or build is a bug of this package. What the grammar knows and this version does not
build is not drawn; the planner is asked, so an option is drawn from the day that it is built.
"""

from attncompiler.testing.strategies.inputs import Inputs, inputs_for
from attncompiler.testing.strategies.invalid import invalid_specs
from attncompiler.testing.strategies.policies import patterns, policies
from attncompiler.testing.strategies.specs import specs

__all__ = ["Inputs", "inputs_for", "invalid_specs", "patterns", "policies", "specs"]
