"""The caches, as transformers wants them.

- ``cache`` is a decoder's, ``encoder_decoder`` that and what the decoder reads of an encoder;
- ``layer`` holds the tokens of one attention layer;
- ``report`` is what ``memory_report`` says of the layers;
- ``passes`` undoes a forward pass that never ended.
"""
