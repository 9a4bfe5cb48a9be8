"""Arguments: checked, arranged in rows, and placed on a mesh.

This package turns arguments into the input of `_rows`: labels, masks, weights, reductions. It
contains no formula of a loss and no derivative rule.
"""
