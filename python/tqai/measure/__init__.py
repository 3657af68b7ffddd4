"""What a setting costs and brings: fidelity, recall, speed, memory, and the paper's figures.

- ``fidelity`` (KL, perplexity) and ``recall`` (needles), for ``named_settings``, on ``text``;
  ``readers`` read it with a model of either framework, ``stretches`` of it with the uncompressed
  one, whose continuation they may be; ``equal_bytes`` and ``statistics`` are what they say;
- ``time_kernels``, ``time_model`` and ``time_prefill``, by ``timing`` and ``resident`` memory;
  ``decoder`` says what ``time_model`` times, ``torch_decoder`` and ``mlx_decoder`` are that;
- ``reproduce``: the paper's figures from the quantisers alone.
"""
