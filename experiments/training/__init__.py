"""How models learn: the models, what they are trained for, and the loop over the epochs."""
