"""Pure tensor functions: no modules, no configuration, no state.

`reference` is the slow oracle that every fast path is held to.
"""
