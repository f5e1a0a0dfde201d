"""What a stranger may rely on: what a model, a kernel, a scheme, an adapter, a policy and a format say of themselves.

Nothing here imports torch, so that a plugin module can describe what it offers at no cost. Shape letters: B rows,
T tokens of a rank, S key rows, D model width, N query heads, G key/value heads, H head size, V vocabulary.
"""
