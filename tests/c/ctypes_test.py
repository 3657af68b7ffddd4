"""The C functions from Python, with nothing but the standard library: ctypes_test.py LIBRARY."""

from __future__ import annotations

import ctypes as c
import random
import struct
import sys
import tempfile
import unittest
from pathlib import Path

OK, VALUE_ERROR, INDEX_ERROR, FILE_ERROR = 0, 1, 2, 4
HEADS, DIM, TOKENS = 2, 16, 200


class Tensor(c.Structure):
    _fields_ = [
        ("data", c.c_void_p),
        ("dtype", c.c_int32),
        ("shape", c.c_int64 * 4),
        ("strides", c.c_int64 * 4),
    ]


class CacheOptions(c.Structure):
    _fields_ = [
        ("size", c.c_size_t),
        *(
            (name, c.c_int32)
            for name in (
                "batch kv_heads head_dim value_head_dim dtype bits_k bits_v sink_tokens "
                "residual_window rotation centering rotary_dim rope_layout"
            ).split()
        ),
        ("inv_freq", c.POINTER(c.c_float)),
        ("sections", c.POINTER(c.c_uint8)),
        ("seed", c.c_uint64),
        ("level", c.c_char_p),
    ]


class Memory(c.Structure):
    _fields_ = [
        ("size", c.c_size_t),
        ("tokens", c.c_int64),
        ("packed_tokens", c.c_int64),
        *(
            (f"{part}_bytes", c.c_size_t)
            for part in ("packed", "exact", "overhead", "total", "mapped", "uncompressed")
        ),
    ]


def tensor(data: c.Array[c.c_float], heads: int, tokens: int) -> Tensor:
    shape = (1, heads, tokens, DIM)
    strides = (heads * tokens * DIM, tokens * DIM, DIM, 1)
    return Tensor(c.addressof(data), 0, (c.c_int64 * 4)(*shape), (c.c_int64 * 4)(*strides))


class CApi(unittest.TestCase):
    library: c.CDLL

    def setUp(self) -> None:
        self.tqai = self.library
        for name in ("tqai_version", "tqai_last_error"):
            getattr(self.tqai, name).restype = c.c_char_p
        self.caches: list[c.c_void_p] = []
        numbers = random.Random(1)
        count = HEADS * TOKENS * DIM
        self.keys, self.values = (
            (c.c_float * count)(*(numbers.gauss(0.0, 1.0) for _ in range(count))) for _ in range(2)
        )

    def tearDown(self) -> None:
        for cache in self.caches:
            self.tqai.tqai_cache_destroy(cache)

    def check(self, status: int) -> None:
        self.assertEqual(status, OK, self.tqai.tqai_last_error())

    def refused(self, status: int, wanted: int, part: str) -> None:
        self.assertEqual(status, wanted)
        self.assertIn(part, self.tqai.tqai_last_error().decode())

    def filled(self) -> c.c_void_p:
        options = CacheOptions()
        self.tqai.tqai_cache_options_init(c.byref(options), c.c_size_t(c.sizeof(options)))
        self.assertEqual(options.size, c.sizeof(CacheOptions))
        options.kv_heads, options.head_dim, options.residual_window = HEADS, DIM, 16
        cache = c.c_void_p()
        self.check(self.tqai.tqai_cache_create(c.byref(options), c.byref(cache)))
        self.caches.append(cache)
        pair = [tensor(data, HEADS, TOKENS) for data in (self.keys, self.values)]
        self.check(self.tqai.tqai_cache_append(cache, *map(c.byref, pair), None))
        self.check(self.tqai.tqai_cache_seal(cache, None))
        return cache

    def bytes_of(self, cache: c.c_void_p) -> bytes:
        size = c.c_size_t()
        self.check(self.tqai.tqai_cache_serialized_bytes(cache, c.byref(size)))
        data = c.create_string_buffer(size.value)
        self.check(self.tqai.tqai_cache_serialize(cache, data, size))
        return data.raw

    def test_version(self) -> None:
        self.assertEqual(self.tqai.tqai_abi_version(), 1)
        self.assertRegex(self.tqai.tqai_version().decode(), r"^\d+\.\d+\.\d+$")

    def test_attention_is_an_average_of_values(self) -> None:
        cache = self.filled()
        out = (c.c_float * (HEADS * DIM))()
        queries = tensor(self.keys, HEADS, 1)
        output = tensor(out, 1, HEADS)
        self.check(self.tqai.tqai_cache_attend(cache, c.byref(queries), c.byref(output), None))
        self.assertTrue(all(-2.0 < number < 2.0 for number in out))
        self.assertNotEqual(set(out), {0.0})

    def test_memory_falls(self) -> None:
        memory = Memory()
        self.tqai.tqai_memory_init(c.byref(memory), c.c_size_t(c.sizeof(memory)))
        self.assertEqual(memory.size, c.sizeof(Memory))
        self.check(self.tqai.tqai_cache_get_memory(self.filled(), c.byref(memory)))
        self.assertEqual(memory.tokens, TOKENS)
        self.assertEqual(memory.packed_tokens, 128)
        self.assertLess(memory.total_bytes, memory.uncompressed_bytes)

    def test_bytes_and_files(self) -> None:
        cache = self.filled()
        data = self.bytes_of(cache)
        back = c.c_void_p()
        self.check(
            self.tqai.tqai_cache_deserialize(data, c.c_size_t(len(data)), None, c.byref(back))
        )
        self.caches.append(back)
        self.assertEqual(self.bytes_of(back), data)
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "ü.safetensors").encode()
            layers = (c.c_void_p * 1)(cache)
            self.check(self.tqai.tqai_save(path, layers, c.c_size_t(1), None))
            written = Path(path.decode()).read_bytes()
            (length,) = struct.unpack("<Q", written[:8])
            self.assertIn(b'"layers.0.packed"', written[8 : 8 + length])
            self.assertEqual(written[8 + length :], data)
            file, loaded = c.c_void_p(), c.c_void_p()
            self.check(self.tqai.tqai_file_open(path, c.byref(file)))
            self.check(self.tqai.tqai_file_load(file, c.c_size_t(0), None, c.byref(loaded)))
            self.caches.append(loaded)
            self.tqai.tqai_file_destroy(file)
            self.assertEqual(self.bytes_of(loaded), data)

    def test_mistakes(self) -> None:
        cache, none = self.filled(), c.c_void_p()
        self.refused(self.tqai.tqai_cache_crop(None, c.c_int64(1)), VALUE_ERROR, "cache is NULL")
        self.refused(self.tqai.tqai_cache_crop(cache, c.c_int64(-1)), VALUE_ERROR, "crop to -1")
        packed = self.tqai.tqai_cache_packed_tokens(cache, 1, c.byref(c.c_int64()))
        self.refused(packed, INDEX_ERROR, "row 1")
        opened = self.tqai.tqai_file_open(b"/nowhere/at/all", c.byref(none))
        self.refused(opened, FILE_ERROR, "/nowhere/at/all")
        self.assertIsNone(none.value)


if __name__ == "__main__":
    CApi.library = c.CDLL(sys.argv.pop(1))
    unittest.main()
