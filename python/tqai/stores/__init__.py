"""What holds a layer's tokens: the C++ cache on the CPU, operations on arrays on other devices.

- ``for_torch``: the stores of layers whose tokens are torch's tensors;
- ``device``: the store in operations on arrays, which both frameworks have; imports neither.
"""
