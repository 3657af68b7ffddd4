"""What holds tokens: ``layer`` in the place of mlx-lm's caches, ``store`` under it, and ``prompt``,
the list of all layers.

mlx-lm finds the classes of caches that it loads from files by their names; importing this room
makes ours known there.
"""

from mlx_lm.models import cache as _mlx_caches

from tqai.mlx.cache.layer import TqaiKVCache

for _kind in (TqaiKVCache,):
    setattr(_mlx_caches, _kind.__name__, _kind)
