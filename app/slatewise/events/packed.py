"""The stored form of a history: one value per user, which Redis extends in a script and the server reads at once.

    h1 | offset | count | newest time | item | action | time | id | item | action | ...      oldest first
    d1 | time of the deletion                                                               a deleted user

Each part ends with the byte 255, which UTF-8 never contains. An id is the byte 254 and 16 hexadecimal digits.
`offset` is the number of older events that were trimmed. The value of a deleted user refuses events that were received
before the deletion. If a newer event makes it a history, its first part is `h1`, a space and the time of the deletion,
and it refuses them still. `merge` is the reference for `EXTEND`, and the embedded histories use it.

Called by: `histories.py`, `redis_histories.py`. Calls: `schemas.py`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from slatewise.events.event import Event
from slatewise.schemas import History

END = b"\xff"
HISTORY = b"h1"
DELETED = b"d1"
PARTS = 4  # of an event, and of the start of a value
NEW, KNOWN, OLD, GONE = "NKOG"  # stored; known already; older than a full history; received before the deletion

# KEYS: the user's. ARGV: most events, time to live in seconds (0: none), then for each event: item, action, time, id,
# time at which it was received. Returns one letter for each event.
# Two events are put into the text. More would copy it as often, and hold Redis for a second: they go into a list.
EXTEND = r"""
local most, ttl = tonumber(ARGV[1]), tonumber(ARGV[2])
local offset, count, newest, records, deletion = 0, 0, '-1', '', nil
local value = redis.pcall('GET', KEYS[1])
if type(value) == 'string' then
  local d, o, c, n, first = string.match(value, '^h1 ?([%d.]*)\255(%d+)\255(%d+)\255([^\255]*)\255()')
  if o and tonumber(n) then offset, count, newest, records = tonumber(o), tonumber(c), n, string.sub(value, first) end
  deletion = d or string.match(value, '^d1\255([^\255]*)\255$')
end
local deleted = tonumber(deletion or '')

local function into_text(record, at, id)
  if string.find(records, id, 1, true) then return 'K' end
  if tonumber(at) >= tonumber(newest) then
    records, newest = records .. record, at
  else
    local position = 1
    for first, time in string.gmatch(records, '()[^\255]*\255[^\255]*\255([^\255]*)\255[^\255]*\255') do
      position = first
      if (tonumber(time) or 0) > tonumber(at) then break end
    end
    if position == 1 and count >= most then return 'O' end
    records = string.sub(records, 1, position - 1) .. record .. string.sub(records, position)
  end
  count = count + 1
  while count > most do
    records = string.sub(records, string.match(records, '^[^\255]*\255[^\255]*\255[^\255]*\255[^\255]*\255()'))
    count, offset = count - 1, offset + 1
  end
  return 'N'
end

local list, known = {}, {}
local function into_list(record, at, id)
  if known[id] then return 'K' end
  local low, high = 1, #list + 1
  while low < high do
    local middle = math.floor((low + high) / 2)
    if (tonumber(list[middle][2]) or 0) > tonumber(at) then high = middle else low = middle + 1 end
  end
  if low == 1 and #list >= most then return 'O' end
  table.insert(list, low, {record, at, id})
  known[id] = true
  while #list > most do
    known[table.remove(list, 1)[3]] = nil
    offset = offset + 1
  end
  return 'N'
end

local many = #ARGV > 2 + 5 * 2
if many then
  for record, at, id in string.gmatch(records, '([^\255]*\255[^\255]*\255([^\255]*)\255([^\255]*)\255)') do
    list[#list + 1] = {record, at, id}
    known[id] = true
  end
end
local add = many and into_list or into_text
local answers, changed = {}, false
for k = 3, #ARGV, 5 do
  local at, id = ARGV[k + 2], ARGV[k + 3]
  local answer = 'G'
  if not deleted or tonumber(ARGV[k + 4]) > deleted then
    answer = add(ARGV[k] .. '\255' .. ARGV[k + 1] .. '\255' .. at .. '\255' .. id .. '\255', at, id)
  end
  changed = changed or answer == 'N'
  answers[#answers + 1] = answer
end
if changed then
  if many then
    local texts = {}
    for k, entry in ipairs(list) do texts[k] = entry[1] end
    records, count, newest = table.concat(texts), #list, list[#list][2]
  end
  local head = deleted and 'h1 ' .. deletion or 'h1'
  head = head .. '\255' .. string.format('%d\255%d', offset, count) .. '\255' .. newest .. '\255'
  if ttl > 0 then redis.call('SET', KEYS[1], head .. records, 'EX', ttl)
  else redis.call('SET', KEYS[1], head .. records) end
end
return table.concat(answers)
"""


class Unreadable(ValueError):
    """The bytes are not a stored history."""


def arguments(event: Event, received: float) -> tuple[bytes, bytes, bytes, bytes, bytes]:
    """Return the arguments of `EXTEND` for one event."""
    key = b"\xfe" + event.key.encode()
    return (
        event.item_id.encode(),
        event.action.encode(),
        repr(event.timestamp).encode(),
        key,
        repr(received).encode(),
    )


def split(value: bytes) -> tuple[bytes, int, list[bytes]]:
    """Return (time of the deletion or nothing, offset, parts of the events). Raises Unreadable.

    The value of a deleted user has no events.
    """
    start, *parts = value.split(END)
    kind, _, deletion = start.partition(b" ")
    try:
        if kind == HISTORY and parts.pop() == b"" and len(parts) == PARTS - 1 + PARTS * int(parts[1]):
            return deletion, int(parts[0]), parts[PARTS - 1 :]
        if start == DELETED and parts.pop() == b"":
            return parts[0], 0, []
    except (ValueError, IndexError):
        pass
    raise Unreadable("not a stored history")


def unpack(value: bytes, most: int) -> History | None:
    """Return the newest events, at most `most`; `None` without events. Raises Unreadable."""
    _, offset, parts = split(value)
    cut = max(0, len(parts) // PARTS - most)
    parts = parts[PARTS * cut :]
    if not parts:
        return None
    try:
        return History.model_construct(
            item_ids=list(map(bytes.decode, parts[::PARTS])),
            actions=[action.decode() or None for action in parts[1::PARTS]],
            timestamps=list(map(float, parts[2::PARTS])),
            offset=offset + cut,
        )
    except ValueError as error:
        raise Unreadable(str(error)) from None


def tombstone(at: float) -> bytes:
    return DELETED + END + repr(at).encode() + END


def merge(value: bytes | None, events: Sequence[tuple[Event, float]], most: int) -> tuple[bytes | None, str]:
    """Add (event, time at which it was received) pairs to a value. Return the new value and a letter for each event."""
    try:
        deletion, offset, parts = split(value or b"")
        deleted = float(deletion or -1)
    except ValueError:
        deletion, deleted, offset, parts = b"", -1.0, 0, []
    records = [parts[k : k + PARTS] for k in range(0, len(parts), PARTS)]
    known = {record[3] for record in records}
    answers = ""
    for event, received in events:
        *record, _ = arguments(event, received)
        if received <= deleted:
            answers += GONE
        elif record[3] in known:
            answers += KNOWN
        else:
            position = bisect_right(records, event.timestamp, key=lambda other: float(other[2]))
            if position == 0 and len(records) >= most:
                answers += OLD
                continue
            records.insert(position, record)
            known.add(record[3])
            answers += NEW
            while len(records) > most:
                known.remove(records.pop(0)[3])
                offset += 1
    if NEW not in answers:
        return value, answers
    start = HISTORY + b" " + deletion if deletion else HISTORY
    head = [start, b"%d" % offset, b"%d" % len(records), records[-1][2]]
    return END.join([*head, *(part for record in records for part in record), b""]), answers
