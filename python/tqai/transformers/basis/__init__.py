"""The bases that a model's keys are quantised in with ``codec="adaptive"``.

- ``bases`` has those of a model, layer by layer, and says why a layer has none;
- ``learn`` finds out what a model's keys and queries look like, by running a shadow of it.
"""
