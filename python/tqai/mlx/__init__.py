"""The seam into mlx-lm: what ``tqai.patch`` puts under one of its models.

A map, from what is called first down; a room imports only from those below:

- ``loading`` loads models for the command line;
- ``hooks`` makes a model's prompt caches compressed ones, and plain again;
- ``calls`` tells caches of a model's forward passes;
- ``cache`` holds tokens, as mlx-lm's own caches do, in the compiled module's cache or, on other
  devices than the CPU, in ``tqai.stores.for_mlx``;
- ``attention`` reads them, in the place of the function that mlx-lm's models call;
- ``model`` finds out what a model does with its caches, by trying;
- ``arrays`` hands mlx's arrays to the compiled module.
"""
