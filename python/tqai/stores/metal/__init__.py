"""Attention over packed tiles by Metal kernels, for whichever framework runs them.

``attend.metal`` is the source, ``kernels`` writes the text that a framework compiles, ``attention``
says what is launched. How a framework compiles and launches, ``for_torch.metal`` and
``for_mlx.metal`` know. No framework is imported here.
"""
