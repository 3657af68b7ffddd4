"""LMCache's command line, with the serde "tqai" registered."""

from __future__ import annotations

from lmcache.cli.main import main

import tqai.lmcache  # noqa: F401

main()
