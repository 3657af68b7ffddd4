"""The seam into Hugging Face transformers: what ``tqai.patch`` puts under a PreTrainedModel.

- ``weights`` says which weights a model computes with and notices when they change, from what it
  holds (``held``) and the ``digests`` of that;
- ``hooks`` puts it on a model and takes it off; ``geometry`` says what a model looks like to a
  cache, with ``find_rope`` for the rotary embedding of its keys, which tries it out on a
  ``shadow`` of the model, and ``devices`` for where it is; ``positions`` sees where each pass
  stands;
- ``cache``, ``encoder_decoder`` and ``layer`` are the caches as transformers wants them, ``view``
  what they hand out, ``attention`` what reads it, before ``original_attention`` and with
  ``stepwise_prefill``;
- ``files`` saves and loads caches, with ``file_checks``; ``loading`` loads models for the command
  line.
"""
