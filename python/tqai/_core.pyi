"""
The compiled part of tqai: caches and quantisers on addresses and numbers.
"""
from __future__ import annotations
import collections.abc
import enum
import numpy
import numpy.typing
import os
import typing
import typing_extensions
__all__: list[str] = ['CacheFile', 'Codebook', 'DType', 'KeyBasis', 'KeyMoments', 'KeyTrellis', 'KvCache', 'ProdQuantizer', 'Quantizer', 'Trellis', 'VectorQuantizer', 'allocated_bytes', 'append_sequences', 'attend_sequences', 'available_levels', 'borrowed', 'crop_sequences', 'default_level', 'limit_memory', 'openmp_threads', 'seal_sequences', 'write_file']
class KeyMoments:
    """
    Second moments of a layer's keys and queries.
    
    rope: what they have been turned by, as KvCache takes it. Not to be used by several threads at once.
    See include/tqai/key_basis.hpp.
    """
    def __init__(self, kv_heads: typing.SupportsInt | typing.SupportsIndex, head_dim: typing.SupportsInt | typing.SupportsIndex, rope: tuple[collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex], str, typing.SupportsInt | typing.SupportsIndex, collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]] | tuple[collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex], str, typing.SupportsInt | typing.SupportsIndex] | None = None) -> None:
        ...
    def add_keys(self, head: typing.SupportsInt | typing.SupportsIndex, keys: typing.Annotated[numpy.typing.ArrayLike, numpy.float32], positions: typing.Annotated[numpy.typing.ArrayLike, numpy.int64] | None = None) -> None:
        """
        Adds keys of a kv head, [tokens, head_dim], as attention sees them. positions: what they were
        turned by, [tokens] or [sections, tokens]; None: token i stands at i.
        """
    def add_prior(self, head: typing.SupportsInt | typing.SupportsIndex, keys: typing.Annotated[numpy.typing.ArrayLike, numpy.float64], queries: typing.Annotated[numpy.typing.ArrayLike, numpy.float64], tokens: typing.SupportsFloat | typing.SupportsIndex) -> None:
        """
        Adds moments known beforehand, [head_dim, head_dim] each, of keys and queries turned back to
        position 0, as much as so many tokens: scaled to what was added so far.
        """
    def add_queries(self, head: typing.SupportsInt | typing.SupportsIndex, queries: typing.Annotated[numpy.typing.ArrayLike, numpy.float32], positions: typing.Annotated[numpy.typing.ArrayLike, numpy.int64] | None = None) -> None:
        """
        Adds queries that read a kv head, of any of its query heads; as add_keys().
        """
    def keys_until(self, head: typing.SupportsInt | typing.SupportsIndex, last_position: typing.SupportsInt | typing.SupportsIndex) -> numpy.typing.NDArray[numpy.float64]:
        """
        Moments of a head's keys less their mean, as a mean over positions up to this one.
        """
    def queries_until(self, head: typing.SupportsInt | typing.SupportsIndex, last_position: typing.SupportsInt | typing.SupportsIndex) -> numpy.typing.NDArray[numpy.float64]:
        """
        The same of its queries.
        """
    def tokens(self, head: typing.SupportsInt | typing.SupportsIndex) -> float:
        """
        Tokens of a head's keys that were added.
        """
    @property
    def head_dim(self) -> int:
        ...
    @property
    def kv_heads(self) -> int:
        ...
class KeyBasis:
    """
    What a layer's keys are quantised in, in place of a rotation.
    
    Immutable. See include/tqai/key_basis.hpp.
    """
    @staticmethod
    def bytes_of(kv_heads: typing.SupportsInt | typing.SupportsIndex, head_dim: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        nbytes of one for so many heads.
        """
    @staticmethod
    def deserialize(data: bytes) -> KeyBasis:
        """
        The basis that serialize() wrote; ValueError for bytes that it did not write.
        """
    @staticmethod
    def learn(moments: KeyMoments, bits: typing.SupportsInt | typing.SupportsIndex, last_position: typing.SupportsInt | typing.SupportsIndex = 32768) -> KeyBasis:
        """
        The basis for codes of so many bits, good at positions up to last_position. ValueError for a
        head without keys or queries.
        """
    def __copy__(self) -> KeyBasis:
        ...
    def __deepcopy__(self, memo: dict) -> KeyBasis:
        ...
    def __getstate__(self) -> tuple[bytes]:
        ...
    def __setstate__(self, arg0: tuple) -> None:
        ...
    def matrices(self, head: typing.SupportsInt | typing.SupportsIndex) -> tuple:
        """
        A head's E, L and F, float32 [head_dim, head_dim]: a key less its centre, r, is quantised so that
        n L z is near E r, and read as n F z.
        """
    def serialize(self) -> bytes:
        """
        The basis as bytes.
        """
    @property
    def bits(self) -> int:
        ...
    @property
    def head_dim(self) -> int:
        ...
    @property
    def id(self) -> int:
        """
        Tells it from others.
        """
    @property
    def kv_heads(self) -> int:
        ...
    @property
    def largest_ratio(self) -> float:
        """
        |E r| / |L z| is up to this many times |r| / |z|, in any head.
        """
    @property
    def nbytes(self) -> int:
        """
        Bytes of its matrices.
        """
class DType(enum.Enum):
    """
    Element types of tensors; bool for masks alone.
    """
    bfloat16: typing.ClassVar[DType]
    bool: typing.ClassVar[DType]
    float16: typing.ClassVar[DType]
    float32: typing.ClassVar[DType]
    @classmethod
    def __new__(cls, value):
        ...
class KvCache:
    """
    Compressed keys and values of one attention layer.
    
    Tensors are passed as (address, DType, shape, strides in elements), 4-dimensional, the last stride
    1; the caller keeps them alive during the call. The GIL is released while numbers are moved. Any
    thread may call any method at any time: those that change the cache wait for the others. All or
    nothing: a method that raises leaves the cache as it was. rope: (inv_freq, "half_split" or
    "interleaved", rotary_dim) that the keys have gone through, and the section of each frequency.
    key_basis: what keys are quantised in, in place of a rotation. value_codes: "scalar", or "trellis" for
    1 to 4 bits. key_codes: the same of keys in a basis, for 2 to 4 bits. See include/tqai/cache.hpp.
    """
    max_norm: typing.ClassVar[float] = 16376.0
    @staticmethod
    def deserialize(data: typing_extensions.Buffer, *, level: str | None = None, key_bases: collections.abc.Sequence[KeyBasis] = ()) -> KvCache:
        """
        The cache that serialize() wrote; ValueError for bytes that it did not write. key_bases: those
        that its keys may be in.
        """
    def __copy__(self) -> KvCache:
        ...
    def __deepcopy__(self, memo: dict) -> KvCache:
        ...
    def __getstate__(self) -> tuple[bytes, str]:
        ...
    def __init__(self, *, batch: typing.SupportsInt | typing.SupportsIndex, kv_heads: typing.SupportsInt | typing.SupportsIndex, head_dim: typing.SupportsInt | typing.SupportsIndex, value_head_dim: typing.SupportsInt | typing.SupportsIndex = 0, dtype: DType = DType.float32, bits_k: typing.SupportsInt | typing.SupportsIndex = 4, bits_v: typing.SupportsInt | typing.SupportsIndex = 2, sink_tokens: typing.SupportsInt | typing.SupportsIndex = 4, residual_window: typing.SupportsInt | typing.SupportsIndex = 128, rotation: str = 'auto', centering: str = 'auto', rope: tuple[collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex], str, typing.SupportsInt | typing.SupportsIndex, collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]] | tuple[collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex], str, typing.SupportsInt | typing.SupportsIndex] | None = None, seed: typing.SupportsInt | typing.SupportsIndex = 1952541041, level: str | None = None, key_basis: KeyBasis | None = None, value_codes: str = 'scalar', key_codes: str = 'scalar') -> None:
        ...
    def __setstate__(self, arg0: tuple) -> None:
        ...
    def append(self, keys: tuple, values: tuple, positions: tuple | None = None, threads: typing.SupportsInt | typing.SupportsIndex = 0) -> None:
        """
        Adds tokens: keys [batch, kv_heads, n, head_dim], values [.., value_head_dim]. positions:
        (address of int64, shape, strides) of [batch or 1, sections or 1, n], what the keys were turned by;
        None: each token is one further than the one before. threads: at most so many, here and below; 0: as
        many as OpenMP gives.
        """
    def attend(self, queries: tuple, output: tuple, scale: typing.SupportsFloat | typing.SupportsIndex | None = None, soft_cap: typing.SupportsFloat | typing.SupportsIndex = 0.0, causal: bool = True, window: typing.SupportsInt | typing.SupportsIndex = 0, first_token: typing.SupportsInt | typing.SupportsIndex = 0, mask: tuple | None = None, sink_scores: typing.SupportsInt | typing.SupportsIndex = 0, log_sum_exp: tuple | None = None, threads: typing.SupportsInt | typing.SupportsIndex = 0) -> None:
        """
        Softmax attention of the last n tokens' queries [batch, query_heads, n, head_dim] into
        output [batch, n, query_heads, value_head_dim]. mask: [batch or 1, query_heads or 1, n,
        tokens - first_token], bool or float; sink_scores: address of [query_heads] float32, or 0;
        log_sum_exp: [batch, n, query_heads, 1] float32, written: log of the sum of exp(score) over what each
        query saw, by which outputs over different tokens merge.
        """
    def centering(self, row: typing.SupportsInt | typing.SupportsIndex, head: typing.SupportsInt | typing.SupportsIndex) -> str | None:
        """
        What the keys sealed last are centred on; None before anything was sealed.
        """
    def centre(self, row: typing.SupportsInt | typing.SupportsIndex, set: typing.SupportsInt | typing.SupportsIndex, head: typing.SupportsInt | typing.SupportsIndex) -> tuple:
        """
        What keys of a row's blocks of a centre set are centred on: its kind, the constant [head_dim],
        and real and imaginary parts of what turns with the position [pairs].
        """
    def centre_sets(self, row: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        Sets of centres that the tiles of a row refer to.
        """
    def copy(self) -> KvCache:
        """
        A copy that shares the tiles.
        """
    def crop(self, tokens: typing.SupportsInt | typing.SupportsIndex) -> None:
        """
        Forgets all tokens from `tokens` on.
        """
    def discard_before(self, token: typing.SupportsInt | typing.SupportsIndex) -> None:
        """
        Frees what only tokens before `token` need.
        """
    def gather(self, first: typing.SupportsInt | typing.SupportsIndex, keys: tuple, values: tuple) -> None:
        """
        Decompresses the tokens from `first` on; padding and discarded ones become zeros.
        """
    def leave_out(self, hidden: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]) -> None:
        """
        Takes those of the last n tokens out of the rows that no query will ever see. hidden:
        [batch · n] bytes, not 0 for these.
        """
    def left_out(self, row: typing.SupportsInt | typing.SupportsIndex) -> list[tuple[int, int]]:
        """
        What leave_out() has taken out of a row: first token and count, each.
        """
    def memory(self) -> dict:
        """
        Bytes held, by part.
        """
    def packed_tokens(self, row: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        Tokens of a row held as codes.
        """
    def reserve(self, tokens: typing.SupportsInt | typing.SupportsIndex) -> None:
        """
        Sets memory aside in each row for the tiles of `tokens` tokens in all: MemoryError comes now, and
        not when they are sealed.
        """
    def seal(self, threads: typing.SupportsInt | typing.SupportsIndex = 0) -> int:
        """
        Compresses what has left the residual window; returns how many tokens of a row cannot be,
        because of a vector that is too long for a tile.
        """
    def sealed_blocks(self, row: typing.SupportsInt | typing.SupportsIndex) -> list:
        """
        What is sealed of a row, in order: dicts with first_token, tokens (the first ones of 64 that the
        row has), first_position, positions ([sections, 64] int32, or None where they follow one another),
        centre_set, and tiles [kv_heads, bytes] uint8. The arrays are views that cannot be written; they keep
        the tiles, whatever becomes of the cache. What is in a tile: tile_layout, docs/format.md.
        """
    def select(self, rows: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]) -> None:
        """
        Row i becomes a copy of row rows[i]; tiles are shared.
        """
    def serialize(self, with_basis: bool = False) -> bytes:
        """
        The cache as bytes, for files and other processes. Of a basis that keys are in, its id is
        written, and with with_basis all of it.
        """
    def set_padding(self, counts: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]) -> None:
        """
        The first counts[row] tokens of each row are padding.
        """
    @property
    def batch(self) -> int:
        ...
    @property
    def dtype(self) -> DType:
        ...
    @property
    def first_token(self) -> int:
        """
        First token that some row still holds.
        """
    @property
    def head_dim(self) -> int:
        ...
    @property
    def key_basis(self) -> KeyBasis | None:
        """
        What keys are quantised in; None: the rotation.
        """
    @property
    def key_codes(self) -> str:
        """
        What codes of keys stand for: "scalar" or "trellis".
        """
    @property
    def kv_heads(self) -> int:
        ...
    @property
    def level(self) -> str:
        ...
    @property
    def rotations(self) -> tuple[numpy.typing.NDArray[numpy.float32], numpy.typing.NDArray[numpy.float32]]:
        """
        Matrices R [dim, dim] float32 that keys and values are turned by: y = R x. ValueError where keys
        are in a basis.
        """
    @property
    def tile_layout(self) -> dict:
        """
        Bytes of a head's tile, and the offsets of its four parts.
        """
    @property
    def tokens(self) -> int:
        """
        Tokens appended and not cropped, the same for each row.
        """
    @property
    def value_codes(self) -> str:
        """
        What codes of values stand for: "scalar" or "trellis".
        """
    @property
    def value_head_dim(self) -> int:
        ...
class Codebook:
    """
    Lloyd-Max centroids of one coordinate of a random unit vector.
    
    grid "exact": the optimal ones; "int8": the best among integer multiples of one step, as the cache's
    kernels use them. head_dim 8 to 576, bits 1 to 8, else ValueError.
    """
    def __init__(self, head_dim: typing.SupportsInt | typing.SupportsIndex, bits: typing.SupportsInt | typing.SupportsIndex, grid: str = 'exact') -> None:
        ...
    @property
    def bits(self) -> int:
        ...
    @property
    def boundaries(self) -> numpy.typing.NDArray[numpy.float32]:
        """
        [2^bits - 1] float32: code i is nearest from boundary i-1 up to boundary i.
        """
    @property
    def centroids(self) -> numpy.typing.NDArray[numpy.float32]:
        """
        [2^bits] float32, ascending.
        """
    @property
    def distortion(self) -> float:
        """
        Expected squared error of a unit vector.
        """
    @property
    def grid(self) -> str:
        ...
    @property
    def head_dim(self) -> int:
        ...
    @property
    def levels(self) -> numpy.typing.NDArray[numpy.int8]:
        """
        [2^bits] int8 with centroid = step * level; empty for the exact grid.
        """
    @property
    def step(self) -> float:
        """
        Distance of grid points; 0 for the exact grid.
        """
class Trellis:
    """
    The levels of trellis codes, bits 1 to 4, else ValueError.
    
    A code's window is the 8 bits of the stream of codes that end with its own. See
    include/tqai/trellis.hpp.
    """
    def __init__(self, bits: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def step(self, head_dim: typing.SupportsInt | typing.SupportsIndex) -> float:
        """
        What a level of 1 stands for in vectors of length 1.
        """
    @property
    def bits(self) -> int:
        ...
    @property
    def levels(self) -> numpy.typing.NDArray[numpy.int8]:
        """
        [256] int8, by window.
        """
class KeyTrellis:
    """
    The levels of trellis codes of keys, bits 2 to 4, else ValueError.
    
    A code's window is its own bits and, below them, the upper ones of those before it, 6 in all. See
    include/tqai/trellis.hpp.
    """
    def __init__(self, bits: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def step(self, head_dim: typing.SupportsInt | typing.SupportsIndex) -> float:
        """
        What a level of 1 stands for in vectors of length 1.
        """
    @property
    def bits(self) -> int:
        ...
    @property
    def levels(self) -> numpy.typing.NDArray[numpy.int8]:
        """
        [64] int8, by window.
        """
    @property
    def start(self) -> int:
        """
        What stands below the first code's bits.
        """
class CacheFile:
    """
    A file of caches, open for reading.
    
    ValueError for one that is none, or damaged; OSError where it cannot be read.
    """
    def __init__(self, path: os.PathLike | str | bytes) -> None:
        ...
    def load(self, name: str, *, level: str | None = None, mapped: bool = False, key_bases: collections.abc.Sequence[KeyBasis] = ()) -> KvCache:
        """
        The cache that a tensor holds. mapped: tiles stay in the file's pages; nobody may shorten the
        file, or change it in place, while any such cache lives. key_bases: as KvCache.deserialize.
        """
    def read_all(self, name: str, to: typing_extensions.Buffer) -> None:
        """
        Fills a buffer with all of a tensor's bytes; ValueError where their checksum does not fit.
        """
    def read_into(self, name: str, to: typing_extensions.Buffer, first: typing.SupportsInt | typing.SupportsIndex = 0) -> None:
        """
        Fills a buffer with a tensor's bytes from `first` on, without looking at its checksum.
        """
    def verify(self, name: str) -> None:
        """
        ValueError where a tensor's checksum does not fit.
        """
    @property
    def header(self) -> str:
        """
        The JSON object that was written.
        """
    @property
    def tensors(self) -> dict:
        """
        (dtype, shape, bytes) of each tensor by its name, in their order.
        """
    @property
    def version(self) -> int:
        ...
class VectorQuantizer:
    """
    What both quantisers do. Thread-safe; the GIL is released.
    """
    def decode(self, codes: numpy.ndarray[typing.Any, numpy.dtype[typing.Any]], norms: numpy.ndarray[typing.Any, numpy.dtype[typing.Any]]) -> numpy.typing.NDArray[numpy.float32]:
        """
        The inverse, up to the quantisation error: [rows, head_dim] float32.
        """
    def encode(self, vectors: typing.Annotated[numpy.typing.ArrayLike, numpy.float32]) -> tuple:
        """
        vectors [rows, head_dim] to codes [rows, code_bytes] uint8 and norms
        [rows, norm_count] float16. ValueError for NaN, infinity and norms beyond FP16.
        """
    def inner_products(self, queries: typing.Annotated[numpy.typing.ArrayLike, numpy.float32], codes: numpy.ndarray[typing.Any, numpy.dtype[typing.Any]], norms: numpy.ndarray[typing.Any, numpy.dtype[typing.Any]]) -> numpy.typing.NDArray[numpy.float32]:
        """
        [query_rows, rows] float32: each query [query_rows, head_dim] with each vector.
        """
    @property
    def bits(self) -> int:
        ...
    @property
    def code_bytes(self) -> int:
        """
        Bytes of one vector's codes.
        """
    @property
    def head_dim(self) -> int:
        ...
    @property
    def norm_count(self) -> int:
        """
        FP16 norms of one vector.
        """
class Quantizer(VectorQuantizer):
    """
    Smallest mean squared error (arXiv:2504.19874, Alg. 1): a random rotation, then the nearest
    centroid of each coordinate; the norm as FP16. With norm_correction reconstructions keep the length.
    head_dim 8 to 576, bits 1 to 8, rotation "auto", "hadamard" or "haar", grid "exact" or "int8". codes
    "trellis", of 1 to 4 bits, have levels of their own in place of the grid's.
    """
    def __init__(self, head_dim: typing.SupportsInt | typing.SupportsIndex, bits: typing.SupportsInt | typing.SupportsIndex = 4, *, rotation: str = 'auto', seed: typing.SupportsInt | typing.SupportsIndex = 1952541041, grid: str = 'exact', norm_correction: bool = True, codes: str = 'scalar') -> None:
        ...
    @property
    def rotation(self) -> str:
        ...
class ProdQuantizer(VectorQuantizer):
    """
    Unbiased inner products (arXiv:2504.19874, Alg. 2): bits - 1 bits as in Quantizer, and the
    signs of a Gaussian projection of the rest (QJL).
    """
    def __init__(self, head_dim: typing.SupportsInt | typing.SupportsIndex, bits: typing.SupportsInt | typing.SupportsIndex = 4, *, rotation: str = 'auto', seed: typing.SupportsInt | typing.SupportsIndex = 1952541041, projection_seed: typing.SupportsInt | typing.SupportsIndex = 1902799921, grid: str = 'exact') -> None:
        ...
    @property
    def rotation(self) -> str:
        ...
def allocated_bytes() -> int:
    """
    Bytes now held by all caches of this process.
    """
def append_sequences(caches: collections.abc.Sequence[KvCache], counts: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], keys: tuple, values: tuple, positions: tuple | None = None, threads: typing.SupportsInt | typing.SupportsIndex = 0) -> None:
    """
    KvCache.append of many caches of one row and one geometry in one parallel region: the next
    counts[i] tokens of keys [1, kv_heads, sum of counts, head_dim] and values [.., value_head_dim] go to
    caches[i]; positions: [1, sections, sum of counts]. All or nothing, for all of them. A cache may come
    once.
    """
def attend_sequences(caches: collections.abc.Sequence[KvCache], counts: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], queries: tuple, output: tuple, scale: typing.SupportsFloat | typing.SupportsIndex | None = None, soft_cap: typing.SupportsFloat | typing.SupportsIndex = 0.0, causal: bool = True, window: typing.SupportsInt | typing.SupportsIndex = 0, sink_scores: typing.SupportsInt | typing.SupportsIndex = 0, log_sum_exp: tuple | None = None, threads: typing.SupportsInt | typing.SupportsIndex = 0) -> None:
    """
    KvCache.attend of many caches in one parallel region: the next counts[i] of queries
    [1, query_heads, sum of counts, head_dim] read caches[i], into output [1, sum of counts, query_heads,
    value_head_dim]; log_sum_exp: [1, sum of counts, query_heads, 1].
    """
def available_levels() -> list[str]:
    """
    Kernel levels of this build and processor, slowest first.
    """
def borrowed(array: typing.Any, dtype: DType | None = None) -> tuple:
    """
    (address, DType, shape, strides in elements) of an array with the buffer protocol: numpy's,
    or mlx's, which is evaluated for it; and True behind these where it is read-only, and so is no place
    for results. The caller keeps it alive. dtype says what the elements are
    where the buffer does not. ValueError for elements of another kind or size.
    """
def crop_sequences(caches: collections.abc.Sequence[KvCache], tokens: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]) -> None:
    """
    KvCache.crop of many caches, each to its own length.
    """
def default_level() -> str:
    """
    The level that new caches take: the fastest, or the one that TQAI_LEVEL names.
    """
def limit_memory(bytes: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    From now on a call that would make allocated_bytes() more than this raises MemoryError, with
    nothing changed; 0: no limit.
    """
def openmp_threads() -> int:
    """
    Threads that a call takes at most; 0: built without OpenMP.
    """
def seal_sequences(caches: collections.abc.Sequence[KvCache], threads: typing.SupportsInt | typing.SupportsIndex = 0) -> int:
    """
    KvCache.seal of many caches in one parallel region; returns the most that one of them does.
    """
def write_file(path: os.PathLike | str | bytes, tensors: collections.abc.Sequence[tuple[str, str, collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] | None, typing.Any]], header: str = '{}') -> None:
    """
    Writes a file of caches, whole or not at all; see include/tqai/files.hpp. tensors: each
    (name, dtype as safetensors has it, shape, source), source being a KvCache or what gives a buffer of
    bytes when it is called, at its turn; shape None: one dimension of bytes, as many as come. header: a
    JSON object.
    """
__version__: str = '0.1.0'
