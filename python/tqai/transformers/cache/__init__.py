"""The caches, as transformers wants them.

- ``cache`` is a decoder's, ``encoder_decoder`` that and what the decoder reads of an encoder;
- ``layer`` holds the tokens of one attention layer;
- ``passes`` undoes a forward pass that never ended.
"""
