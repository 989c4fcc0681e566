"""What the Redis store runs on the server. Each script is one step there: no other command comes in between.

A session is one list. Its first item is the head, `gr1 <version> <bytes> <updated at> <last write>`, the others are its
entries; so expiring or being evicted takes all of it or nothing. An index, a sorted set of all keys with one score, has
them in the order of their bytes. A script touches a session, the index and its own few keys, whatever there is
beside them: nothing grows with the number of sessions, and what grows with one session is only the loading of it.

`KEYS` of a write: the session, the index, the lease of the session, the index of what expires, the versions.

No version of a session comes again after the session has gone. The versions, a hash, have the highest one of those that
have `gone`, above which new sessions begin; and the highest one of sessions that may expire, the `top`, which takes its
place as soon as one is seen to have expired: before its key leaves the index, or is written to again.
"""

from __future__ import annotations

import hashlib
from typing import Final

from ..transport.resp_client import RedisScript

__all__ = ["ACQUIRE", "DELETE", "DESCRIBE", "HEAD_FORMAT", "RELEASE", "RENEW", "WRITE"]

HEAD_FORMAT: Final = 1
"""Of a session's head and entries; a session of a later one is not touched."""

_HEAD: Final = """
local function head_of(key)
  local head = redis.call('LINDEX', key, 0)
  if not head then return 0, 0, '' end
  local format, version, bytes, last = string.match(head, '^gr(%d+) (%d+) (%d+) %S+ (%S*)$')
  if format == '1' then return tonumber(version), tonumber(bytes), last end
  if string.match(head, '^gr%d+ ') then return -3, 0, '' end
  return -2, 0, ''
end
"""

_VERSIONS: Final = """
local function raise(versions, field, version)
  if version > tonumber(redis.call('HGET', versions, field) or 0) then
    redis.call('HSET', versions, field, string.format('%.0f', version))
  end
end
local function note_expired(versions)
  raise(versions, 'gone', tonumber(redis.call('HGET', versions, 'top') or 0))
end
"""


def _script(source: str) -> RedisScript:
    return RedisScript(source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


WRITE: Final = _script(
    _HEAD
    + _VERSIONS
    + """
local session, index, lease_key, due, versions = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local is_rewrite, expected, at, size, write_id = ARGV[1] == 'r', tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4]), ARGV[5]
local lease, lease_ms, member, ttl_ms, sessions = ARGV[6], ARGV[7], ARGV[8], tonumber(ARGV[9]), ARGV[10]
local version, bytes, last = head_of(session)
if version < 0 then return {version, 0} end
if last == write_id and (expected == 0 or version == expected + 1) then return {1, version} end
local held = redis.call('GET', lease_key)
if held and held ~= lease then return {-1, redis.call('PTTL', lease_key)} end
if version ~= expected then return {0, version} end
if lease ~= '' and not held then redis.call('SET', lease_key, lease, 'PX', lease_ms) end
local is_new = version == 0
if is_new then
  if redis.call('ZSCORE', index, member) then note_expired(versions) end
  version = tonumber(redis.call('HGET', versions, 'gone') or 0)
end
if is_rewrite then
  bytes = 0
  redis.call('UNLINK', session)
end
local head = 'gr1 ' .. string.format('%.0f', version + 1) .. ' ' .. string.format('%.0f', bytes + size)
head = head .. ' ' .. at .. ' ' .. write_id
if is_rewrite or is_new then
  redis.call('RPUSH', session, head)
  redis.call('ZADD', index, 0, member)
else
  redis.call('LSET', session, 0, head)
end
for first = 11, #ARGV, 1000 do
  redis.call('RPUSH', session, unpack(ARGV, first, math.min(first + 999, #ARGV)))
end
if ttl_ms > 0 then
  local now = redis.call('TIME')
  local now_ms = now[1] * 1000 + math.floor(now[2] / 1000)
  raise(versions, 'top', version + 1)
  redis.call('PEXPIRE', session, ttl_ms)
  redis.call('ZADD', due, now_ms + ttl_ms, member)
  for _, other in ipairs(redis.call('ZRANGEBYSCORE', due, '-inf', now_ms, 'LIMIT', 0, 8)) do
    redis.call('ZREM', due, other)
    if redis.call('EXISTS', sessions .. other) == 0 then
      note_expired(versions)
      redis.call('ZREM', index, other)
    end
  end
elseif not is_new and redis.call('PERSIST', session) == 1 then
  redis.call('ZREM', due, member)
end
return {1, version + 1}
"""
)
"""Append to a session or rewrite it. Returns {1, the new version}; {0, the version that it has}; {-1, ms} where
somebody else has it; {-2, 0} where the key holds something else, {-3, 0} where a newer version has written."""

DELETE: Final = _script(
    _HEAD
    + _VERSIONS
    + """
if redis.call('ZREM', KEYS[2], ARGV[1]) == 1 and redis.call('EXISTS', KEYS[1]) == 0 then note_expired(KEYS[4]) end
redis.call('ZREM', KEYS[3], ARGV[1])
if redis.call('TYPE', KEYS[1]).ok == 'list' then raise(KEYS[4], 'gone', (head_of(KEYS[1]))) end
return redis.call('UNLINK', KEYS[1])
"""
)
"""Remove a session (`KEYS` the session, the index, what expires, the versions); 1 when there was one."""

DESCRIBE: Final = _script(
    _VERSIONS
    + """
local found, last, count = {}, '', 0
for _, member in ipairs(redis.call('ZRANGEBYLEX', KEYS[1], ARGV[1], ARGV[2], 'LIMIT', 0, ARGV[3])) do
  count, last = count + 1, member
  local head = redis.call('LINDEX', ARGV[4] .. member, 0)
  if head then
    found[#found + 1] = {member, head, redis.call('LLEN', ARGV[4] .. member) - 1}
  else
    note_expired(KEYS[2])
    redis.call('ZREM', KEYS[1], member)
  end
end
return {count, last, found}
"""
)
"""A page of the index (`KEYS` that and the versions): {keys looked at, the last of them, {{key, head, entries}...}};
what has expired leaves it."""

ACQUIRE: Final = _script(
    _HEAD
    + """
local held, waiting = redis.call('GET', KEYS[1]), redis.call('GET', KEYS[4])
local is_mine = held and string.match(held, '^%d+ (.*)$') == ARGV[1]
if not is_mine and (held or (waiting and waiting ~= ARGV[1])) then
  if not waiting or waiting == ARGV[1] then redis.call('SET', KEYS[4], ARGV[1], 'PX', ARGV[3]) end
  return {0, math.max(redis.call('PTTL', KEYS[1]), 0)}
end
if waiting == ARGV[1] then redis.call('DEL', KEYS[4]) end
local version = head_of(KEYS[2])
if version < 0 then return {version, 0} end
local token = redis.call('INCR', KEYS[3])
redis.call('SET', KEYS[1], string.format('%.0f', token) .. ' ' .. ARGV[1], 'PX', ARGV[2])
return {token, version}
"""
)
"""Take a session (`KEYS` its lease, the session, the counter of tokens, who waits): {token, version}; or {0, ms} while
somebody else has it, or has asked before and comes again within `ARGV[3]` ms: so nobody is always too late."""

RENEW: Final = _script(
    """
local lost = {}
for number, key in ipairs(KEYS) do
  local held = redis.call('GET', key)
  if not held then
    redis.call('SET', key, ARGV[number + 1], 'PX', ARGV[1])
  elseif held == ARGV[number + 1] then
    redis.call('PEXPIRE', key, ARGV[1])
  else
    lost[#lost + 1] = number
  end
end
return lost
"""
)
"""Hold leases on; the numbers, from 1, of those that somebody else has."""

RELEASE: Final = _script(
    """
for number, key in ipairs(KEYS) do
  local held, lease = redis.call('GET', key), ARGV[number]
  if held and (held == lease or '0' .. string.match(held, '^%d+( .*)$') == lease) then redis.call('DEL', key) end
end
return 1
"""
)
"""Give leases up; one with the token 0 whatever its token is."""
