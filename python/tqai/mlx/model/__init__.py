"""What a model does with its caches, found out by trying.

``probe`` runs a model and notes it, ``geometry`` says what it means for each layer.
"""
