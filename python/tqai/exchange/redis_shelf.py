"""A shelf in a Redis server, which several machines may share.

Beside the entries there are the order of use and the sizes. All that changes them is done by the
server at once, so that no writer leaves half of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tqai.exchange.shelf import said, too_large, without_password

_PREFIX = "{tqai}:"
"""Braces: in a cluster all of it is on one server."""
_CONNECT, _ANSWER = 2.0, 15.0
"""Seconds that a server gets."""
_AT_ONCE = 16
"""Entries that one request asks for."""

_USE = """
local names = ARGV
for i = #names, 1, -1 do
  redis.call('ZADD', KEYS[1], 'XX', redis.call('INCR', KEYS[2]), names[i])
end
"""
_PUT = """
local entry, order, clock, sizes, used = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local name, prefix, most = ARGV[1], ARGV[2], tonumber(ARGV[3])
local now = redis.call('INCR', clock)
local kind = redis.call('TYPE', entry).ok
if kind == 'string' then
  redis.call('ZADD', order, now, name)
  return 0
elseif kind ~= 'none' then  -- somebody else's
  redis.call('DEL', entry)
end
local sum = tonumber(redis.call('GET', used) or '0')
if not sum then  -- not a number that this has written
  sum = 0
  for _, held in ipairs(redis.call('HVALS', sizes)) do sum = sum + tonumber(held) end
end
sum = sum - tonumber(redis.call('HGET', sizes, name) or '0')  -- the server itself dropped it
local size = #ARGV[4]
while sum + size > most do
  local oldest = redis.call('ZPOPMIN', order)[1]
  if not oldest then
    redis.call('DEL', sizes)
    sum = 0
    break
  end
  redis.call('DEL', prefix .. oldest)
  sum = sum - tonumber(redis.call('HGET', sizes, oldest) or '0')
  redis.call('HDEL', sizes, oldest)
end
redis.call('SET', entry, ARGV[4])
redis.call('ZADD', order, now, name)
redis.call('HSET', sizes, name, size)
redis.call('SET', used, string.format('%.0f', sum + size))
return 1
"""
_REMOVE = """
redis.call('DEL', KEYS[1])
redis.call('ZREM', KEYS[2], ARGV[1])
local size = redis.call('HGET', KEYS[3], ARGV[1])
if size then
  redis.call('HDEL', KEYS[3], ARGV[1])
  redis.call('DECRBY', KEYS[4], size)
end
"""


class RedisShelf:
    """See ``Shelf``; errors of the package redis are ``ShelfError``."""

    def __init__(self, url: str, max_bytes: int) -> None:
        self.url = url
        self.max_bytes = max_bytes
        # Once more at once: the server may have been started anew since the last request.
        self._client: Any = redis.Redis.from_url(
            url,
            socket_connect_timeout=_CONNECT,
            socket_timeout=_ANSWER,
            retry=Retry(NoBackoff(), 1),
        )
        self._use, self._put, self._remove = map(
            self._client.register_script, (_USE, _PUT, _REMOVE)
        )
        self._order, self._clock, self._sizes, self._used = (
            f"{_PREFIX}{name}" for name in ("order", "clock", "sizes", "used")
        )

    def fetch(self, names: Sequence[str]) -> list[bytes | None]:
        found: list[bytes | None] = []
        with self._said():
            for start in range(0, len(names), _AT_ONCE):
                found += self._client.mget(map(self._key, names[start : start + _AT_ONCE]))
        return found

    def held(self, names: Sequence[str]) -> list[bool]:
        with self._said():
            asked = self._client.pipeline(transaction=False)
            for name in names:
                asked.exists(self._key(name))
            return [answer == 1 for answer in asked.execute()]

    def use(self, names: Sequence[str]) -> None:
        if names:
            with self._said():
                self._use(keys=[self._order, self._clock], args=list(names))

    def put(self, name: str, entry: bytes | bytearray) -> None:
        if len(entry) > self.max_bytes:
            raise too_large(len(entry), self.max_bytes)
        keys = [self._key(name), self._order, self._clock, self._sizes, self._used]
        with self._said():
            self._put(keys=keys, args=[name, _PREFIX, self.max_bytes, bytes(entry)])

    def remove(self, name: str) -> None:
        keys = [self._key(name), self._order, self._sizes, self._used]
        with self._said():
            self._remove(keys=keys, args=[name])

    def used(self) -> int:
        with self._said():
            return int(self._client.get(self._used) or 0)

    def _key(self, name: str) -> str:
        return f"{_PREFIX}{name}"

    def _said(self) -> AbstractContextManager[None]:
        return said(without_password(self.url), redis.RedisError, OSError)
