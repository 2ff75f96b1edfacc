"""Damages files at random, as disks, editors and strangers do."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from embtables._util.files import unsealed

WORDS = [b"null", b"NaN", b"-1", b"1e999", b"18446744073709551616", b"true", b"[]", b"{}", b'""', b"\xff\xfe", b"\x00"]
VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 7, 1.5, 2**31, 2**60, 2**63, -(2**63), 10**30, float("inf"), float("nan")),
    *("", "x", "..", "../x", "/etc/passwd", "\0", "os:system", [], {}, [None], [1.5], [[]], {"x": {}}, "9" * 5000),
]


def bytes_damaged(whole: bytes, generator: random.Random) -> bytes:
    """A few bytes cut, changed, doubled, moved or put in."""
    data = bytearray(whole)
    for _ in range(generator.choice((1, 1, 1, 2, 8))):
        size = len(data)
        # Half of the damage hits the beginning, where headers are.
        start = generator.randrange(size + 1) if generator.random() < 0.5 else generator.randrange(min(size, 200) + 1)
        end = min(size, start + generator.choice((1, 2, 8, 100, size)))
        kind = generator.randrange(9)
        if kind == 0 and start < size:
            data[start] ^= 1 << generator.randrange(8)
        elif kind == 1 and start < size:
            data[start] = generator.randrange(256)
        elif kind == 2:
            del data[start:end]
        elif kind == 3:
            del data[start:]
        elif kind == 4:
            data[start:start] = data[start:end][:10_000]
        elif kind == 5:
            data[start:start] = generator.choice(WORDS)
        elif kind == 6:
            data[start:end] = bytes(end - start)
        elif kind == 7:
            digits = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
            if digits:
                data[generator.choice(digits)] = generator.randrange(48, 58)
        else:
            data[start:start] = generator.choice((b"[", b"{", b'{"a":', b"- ", b"&a [*a,")) * generator.choice(
                (1, 5000)
            )
    return bytes(data)


def values_damaged(content: Any, generator: random.Random) -> Any:
    """Plain data with a value replaced, left out, doubled or added somewhere."""
    content = copy.deepcopy(content)
    for _ in range(generator.choice((1, 1, 2))):
        place = content
        while isinstance(place, (dict, list)) and place:
            key = generator.choice(list(place)) if isinstance(place, dict) else generator.randrange(len(place))
            if generator.random() < 0.3 or not isinstance(place[key], (dict, list)) or not place[key]:
                change(place, key, generator)
                break
            place = place[key]
    return content


def change(place: Any, key: Any, generator: random.Random) -> None:
    """Does something to one entry of a mapping or list."""
    kind = generator.randrange(6)
    if kind == 0:
        del place[key]
    elif kind == 1:
        other = generator.choice(list(place)) if isinstance(place, dict) else generator.randrange(len(place))
        place[key] = copy.deepcopy(place[other])
    elif kind == 2 and isinstance(place, dict):
        place[f"{key}x"] = place.pop(key)
    elif kind == 3 and isinstance(place, list):
        place.append(copy.deepcopy(place[key]))
    elif kind == 4 and isinstance(place[key], int):
        place[key] = place[key] + generator.choice((-1, 1, 2**20))
    else:
        place[key] = copy.deepcopy(generator.choice(VALUES))


def forged(whole: bytes, suffix: str, generator: random.Random) -> bytes:
    """What a stranger makes of a file who knows its format: other values, and no checksum that would tell."""
    maker: Callable[[bytes, random.Random], bytes] = {
        ".json": _json,
        ".yaml": _yaml,
        ".npy": _npy,
        ".safetensors": _safetensors,
        ".pt": _checkpoint,
    }.get(suffix, bytes_damaged)
    return maker(whole, generator)


def _unsealed(content: Any) -> Any:
    return unsealed(content) if isinstance(content, dict) else content


def _json(whole: bytes, generator: random.Random) -> bytes:
    return json.dumps(values_damaged(_unsealed(json.loads(whole)), generator)).encode()


def _yaml(whole: bytes, generator: random.Random) -> bytes:
    return yaml.safe_dump(values_damaged(_unsealed(yaml.safe_load(whole)), generator)).encode()


def _npy(whole: bytes, generator: random.Random) -> bytes:
    size = struct.unpack("<H", whole[8:10])[0]
    shape = generator.choice(("(2**60,)", "(1152921504606846976,)", "(-1,)", "()", "(1, 2)", "(" * 3000, "(None,)"))
    kind = generator.choice(("'<f4'", "'|O'", "'<f8'", "'|u1'", "'V1000000000000'", "[('a', '<f4')]", "1"))
    header = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return whole[:8] + struct.pack("<H", len(header) % 2**16) + header + whole[10 + size :]


def _safetensors(whole: bytes, generator: random.Random) -> bytes:
    (size,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + size])
    metadata = header.get("__metadata__", {})
    if "embtables" in metadata and generator.random() < 0.8:
        described = json.loads(metadata["embtables"])
        described.pop("sha256", None)
        metadata["embtables"] = json.dumps(
            values_damaged(described, generator) if generator.random() < 0.7 else described
        )
    if generator.random() < 0.3:
        header = values_damaged(header, generator)
    body = bytearray(whole[8 + size :])
    if body and generator.random() < 0.5:
        for _ in range(4):
            body[generator.randrange(len(body))] = generator.randrange(256)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(body)


def described(whole: bytes, change: Callable[[Any], None]) -> bytes:
    """A table file of which a stranger changed the plan, without a checksum."""
    (size,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + size])
    plan = json.loads(header["__metadata__"]["embtables"])
    del plan["sha256"]
    change(plan)
    header["__metadata__"]["embtables"] = json.dumps(plan)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + whole[8 + size :]


def _checkpoint(whole: bytes, generator: random.Random) -> bytes:
    import io

    content = torch.load(io.BytesIO(whole), weights_only=True)
    key = generator.choice(("state", "state", "state", "identity", "version"))
    content[key] = values_damaged({"x": content[key]}, generator).get("x")
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def damage(path: Path, whole: bytes, seed: str) -> bool:
    """Writes a damaged form of ``whole`` to ``path``; returns whether it is forged, without a checksum to tell."""
    generator = random.Random(seed)
    is_forged = generator.random() < 0.5
    path.write_bytes(forged(whole, path.suffix, generator) if is_forged else bytes_damaged(whole, generator))
    return is_forged and path.suffix in (".json", ".yaml", ".npy", ".safetensors", ".pt")
