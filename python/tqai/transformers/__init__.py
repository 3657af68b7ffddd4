"""The seam into Hugging Face transformers: what ``tqai.patch`` puts under a PreTrainedModel.

A map, from what is called first down; a room imports only from those below:

- ``attention_paths`` finds out by trying how each layer of a model is read, ``loading`` loads
  models for the command line;
- ``files`` saves and loads caches;
- ``hooks`` puts the caches on a model and takes them off;
- ``serving`` holds the caches of requests that are batched continuously;
- ``cache`` holds tokens, as transformers' own caches do;
- ``basis`` learns what keys are quantised in, where that is asked for;
- ``attention`` reads them;
- ``model`` says what a model looks like to a cache;
- ``weights`` says which weights it computes with.
"""
