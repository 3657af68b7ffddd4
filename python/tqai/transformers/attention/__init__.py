"""What reads the keys and values of a compressed layer.

- ``view`` stands for them where transformers hands them on;
- ``functions`` are called with views, before those that are ``original`` to the model;
- ``compiled`` is what ``torch.compile`` sees, ``stepwise_prefill`` reads a prompt as if it were
  generated, ``padding`` reads masks.
"""
