"""Reads TensorFlow's checkpoints without TensorFlow: a table of names in NAME.index, the numbers in NAME.data-*-of-*.

The table is LevelDB's: blocks of entries, each of which repeats a part of the key before it; a block of blocks; and a
footer that says where that one is. An entry's value is a protobuf message with dtype, shape and place.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from supy._checks import require

MAGIC = 0xDB4775248B80FB57
DTYPES = {1: np.float32, 2: np.float64, 3: np.int32, 9: np.int64, 14: np.uint16, 19: np.float16}
BFLOAT16 = 14


def read_checkpoint(prefix: Path) -> dict[str, torch.Tensor]:
    """All variables of the checkpoint ``prefix``, mapped into memory rather than read.

    Raises:
        ValueError: a file is missing, cut off, compressed or damaged (the index has checksums, which are checked; those of
            the numbers are not), or a variable is sliced or not of numbers.
    """
    op = "GAUAlpha"
    index = prefix.with_name(prefix.name + ".index")
    try:
        entries = dict(_table(index.read_bytes()))
        header = _message(entries.pop(b""))
        shards = header.get(1, 0)
        require(header.get(2, 0) == 0, op, f"{index} is big-endian, expected little-endian")
        return {
            key.decode(): _variable(op, key.decode(), _message(value), prefix, shards)
            for key, value in entries.items()
        }
    except FileNotFoundError as error:
        raise ValueError(f"supy.{op}: {error.filename} does not exist, expected a part of a checkpoint") from None
    except (IndexError, KeyError, TypeError, struct.error, UnicodeDecodeError, _Damage, OSError) as error:
        raise ValueError(f"supy.{op}: {index} is no TensorFlow checkpoint of version 2 ({error})") from None


class _Damage(Exception):
    pass


def _variable(op: str, name: str, entry: dict, prefix: Path, shards: int) -> torch.Tensor:
    kind, shard, offset, size = (entry.get(field, 0) for field in (1, 3, 4, 5))
    require(kind in DTYPES and 7 not in entry, op, f"variable {name} has dtype {kind}, expected numbers in one piece")
    dimensions = _message(entry.get(2, b""), repeated=2).get(2, [])
    shape = [_message(dimension).get(1, 0) for dimension in dimensions]
    dtype = np.dtype(DTYPES[kind])
    path = prefix.with_name(f"{prefix.name}.data-{shard:05}-of-{shards:05}")
    count = 1
    for length in shape:
        count *= length
    whole = size == count * dtype.itemsize and offset + size <= path.stat().st_size
    require(whole, op, f"variable {name} has shape {shape} and {size} bytes, expected all of them in {path}")
    if count == 0:
        return torch.from_numpy(np.empty(shape, dtype))
    # Copied on write, so that torch may have it.
    array = torch.from_numpy(np.memmap(path, dtype, "c", offset, tuple(shape)))
    return array.view(torch.bfloat16) if kind == BFLOAT16 else array


def _table(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    footer = content[-48:]
    if len(footer) < 48 or struct.unpack("<Q", footer[-8:])[0] != MAGIC:
        raise _Damage("its last bytes are not a table's")
    _, _, at = _handle(footer, 0)  # of a block that only says how the table was made
    place, size, _ = _handle(footer, at)
    for _, handle in _entries(_block(content, place, size)):
        place, size, _ = _handle(handle, 0)
        yield from _entries(_block(content, place, size))


def _block(content: bytes, place: int, size: int) -> bytes:
    kind, checksum = struct.unpack_from("<BI", content, place + size)
    if kind != 0:
        raise _Damage("its table is compressed")
    value = _crc32c(content[place : place + size + 1])
    if checksum != ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF:
        raise _Damage("its checksum is wrong")
    return content[place : place + size]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    restarts = struct.unpack_from("<I", block, len(block) - 4)[0]
    at, end, key = 0, len(block) - 4 - 4 * restarts, b""
    while at < end:
        shared, at = _varint(block, at)
        own, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at : at + own]
        yield key, block[at + own : at + own + length]
        at += own + length


def _handle(data: bytes, at: int) -> tuple[int, int, int]:
    place, at = _varint(data, at)
    size, at = _varint(data, at)
    return place, size, at


def _message(data: bytes, repeated: int = -1) -> dict:
    """The fields of a protobuf message by number: integers, or bytes; a list of them for the field ``repeated``."""
    fields: dict = {}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
        elif wire == 2:
            length, at = _varint(data, at)
            value, at = data[at : at + length], at + length
        elif wire == 5:
            value, at = data[at : at + 4], at + 4
        else:
            raise _Damage(f"a message has a field of wire type {wire}")
        if number == repeated:
            fields.setdefault(number, []).append(value)
        else:
            fields[number] = value
    return fields


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128 or shift > 63:
            return value, at


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC = _crc_table()


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF
