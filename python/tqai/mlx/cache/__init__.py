"""What holds tokens: ``layer`` in the place of mlx-lm's caches, ``batch`` in that of those for rows
of different lengths, ``store`` under both, and ``prompt``, the list of all layers; ``passes`` over
these, and the ``weights`` that they go with.

mlx-lm finds the classes of caches that it loads from files by their names; importing this room
makes ours known there.
"""

from mlx_lm.models import cache as _mlx_caches

from tqai.mlx.cache.batch import TqaiBatchKVCache
from tqai.mlx.cache.layer import TqaiKVCache

for _kind in (TqaiKVCache, TqaiBatchKVCache):
    setattr(_mlx_caches, _kind.__name__, _kind)
