"""What a setting costs and brings: fidelity, recall, speed, memory, and the paper's figures.

- ``fidelity`` (KL, perplexity) and ``recall`` (needles), for ``named_settings``, on ``text``;
- ``time_kernels``, ``time_model`` and ``time_prefill``, by ``timing`` and ``resident`` memory;
  ``decoder`` says what ``time_model`` times, ``torch_decoder`` and ``mlx_decoder`` are that;
- ``reproduce``: the paper's figures from the quantisers alone.
"""
