"""Attention over packed tiles by kernels for GPUs, for whichever framework runs them.

``attend.metal`` is the source, which both Metal and CUDA compile. ``kernels`` describes the kernels
and ``attention`` what is launched; ``metal`` and ``cuda`` write the text that is compiled. How a
framework compiles and launches, ``for_torch.metal``, ``for_torch.cuda`` and ``for_mlx.metal`` know.
No framework is imported here.
"""
