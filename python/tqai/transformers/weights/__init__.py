"""Which weights a model computes with, so that no cache is read with others.

- ``identity`` notices when they change, and says what they are;
- ``held`` names what a model holds, however it is held;
- ``digests`` are the contents of tensors as short texts.
"""
