"""What a model looks like to a cache.

- ``geometry`` says it as a whole: the decoder, its layers, and of each the ``heads`` and the rotary
  embedding of its keys, which ``find_rope`` tries out on a ``shadow`` of the model;
- ``positions`` sees where each pass stands;
- ``parts`` finds the models inside a model, ``other_layers`` the layers without keys and values,
  ``names`` what a cache is called, ``devices`` where a model computes.
"""
