"""What holds a layer's tokens: the C++ cache on the CPU, operations on arrays on other devices.

- ``for_torch``: the stores of layers whose tokens are torch's tensors;
- ``for_mlx``: the device store in mlx's arrays;
- ``metal``: attention by Metal kernels, which both launch, each in its own way;
- ``device``: that store, whatever the framework, in operations that each has its own of.

Only ``for_torch`` imports torch, and only ``for_mlx`` mlx.
"""
