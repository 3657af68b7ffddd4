"""How models read compressed layers.

``patching`` puts tqai's function in the place of mlx-lm's, ``functions`` is that function, ``view``
is what it recognises, ``soft_cap`` is what Gemma 2 calls in its place, and ``masks`` knows what the
masks that our caches made say.
"""
