"""What comes in: arguments checked, put into rows, and placed on a mesh.

Here arguments become what `_rows` computes with: labels, masks, weights, reductions. No formula of
a loss, and no derivative rule, lives here.
"""
