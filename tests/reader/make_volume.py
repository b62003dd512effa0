#!/usr/bin/env python3
"""Independent writer of small lethefs volumes, from docs/FORMAT.md alone; shares no code with reader.py.

    make_volume.py BACKING --kek-hex HEX [--seed TEXT]

Makes the sample volume in the new directory BACKING and prints what reader.py list must print for it. With a seed, ids,
keys and nonces follow from it and the bytes are the same each time: for test vectors only.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import hmac
import json
import os
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

Random = Callable[[int], bytes]
SEALED, HOLES = 1, 2
KEK_2 = bytes(range(32))        # version 2, for headers wrapped under a KEK that the reader is not given


def seeded(seed: str) -> Random:
    state = [0]

    def draw(count: int) -> bytes:
        state[0] += 1
        return hashlib.shake_256(f"{seed}/{state[0]}".encode()).digest(count)
    return draw


def url64(data: bytes) -> str:
    return base64.b64encode(data, b"-_").decode().replace("=", "")


def std64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def derive(key: bytes, salt: bytes, info: bytes) -> bytes:
    return HKDF(hashes.SHA256(), 32, salt, info).derive(key)


def pattern(size: int, tag: int = 0) -> bytes:
    """Contents that differ in every block and have no block of zeros."""
    return hashlib.shake_256(b"pattern" + bytes([tag])).digest(size)


@dataclass
class Dir:
    path: str               # of the backing directory
    plain: bytes            # plaintext path, b"" for the root
    oid: bytes
    dek: bytes


@dataclass
class Volume:
    """A volume being written. `manifest` collects what a reader must list."""
    backing: str
    kek: bytes
    random: Random = os.urandom
    label: str = "sample"
    root_xattrs: dict[bytes, bytes] = field(default_factory=dict)
    manifest: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        os.mkdir(self.backing, 0o755)
        self.vid, root_id = self.random(16), self.random(16)
        self.root = self._directory(self.backing, b"", root_id, self.root_xattrs)
        self.write_volume_files(self.body())

    # Section 3

    def place(self, version: int) -> bytes:
        return struct.pack("<II", 0, version)

    def body(self) -> dict[str, Any]:
        keks = [self.kek_entry(1, self.kek, "active"), self.kek_entry(2, KEK_2, "deactivated")]
        return {"magic": "lethefs", "format": 1, "volume_id": self.vid.hex(), "label": self.label,
                "created": "2026-01-02T03:04:05Z", "generation": 1, "incompat": [], "compat": [],
                "root_id": self.root.oid.hex(), "scopes": [{"id": 0, "current": 1, "keks": keks, "extra": {}}], "extra": {"news": [1]}}

    def kek_entry(self, version: int, kek: bytes, state: str) -> dict[str, Any]:
        check = derive(self.random(32), self.vid, b"lethefs/1/kek/canary" + self.place(version))
        slot = {"id": 1, "created": "2026-01-02T03:04:05Z", "identity": {"kind": "sample"}, "wrapped": "sample",
                "canary": "sample", "canary_check": check.hex(), "extra": {}}
        commitment = derive(kek, self.vid, b"lethefs/1/kek/commit" + self.place(version))
        return {"version": version, "state": state, "created": "2026-01-02T03:04:05Z", "commitment": commitment.hex(),
                "slots": [slot], "extra": {"of": "a later program"}}

    def signed(self, line: bytes) -> bytes:
        key = derive(self.kek, self.vid, b"lethefs/1/kek/volume" + self.place(1))
        mac = hmac.new(key, b"lethefs/1/volume-file" + line, hashlib.sha256).hexdigest()
        auth = {"auth": [{"scope": 0, "version": 1, "mac": mac}]}
        return line + b"\n" + json.dumps(auth, separators=(",", ":")).encode() + b"\n"

    def write_volume_files(self, body: dict[str, Any]) -> None:
        data = self.signed(json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode())
        for name in ("lethefs.volume", "lethefs.volume.bak"):
            self._put(os.path.join(self.backing, name), data, 0o644)

    # Section 5

    def static(self, kind: int, oid: bytes, dek: bytes, rdev: int = 0, flags: int = 0, version: int = 1) -> bytes:
        kek = self.kek if version == 1 else KEK_2
        head = b"LETHEOBJ" + struct.pack("<HBBIII16sQ20s", 1, kind, flags, 0, version, 0, oid, rdev, bytes(20))
        nonce = self.random(12)
        wrapping = derive(kek, self.vid, b"lethefs/1/kek/wrap" + self.place(version))
        return head + nonce + AESGCMSIV(wrapping).encrypt(nonce, dek, b"lethefs/1/dek" + self.vid + head)

    # Section 6

    def _entry(self, parent: Dir, name: bytes) -> str:
        """The backing path for a name; makes the sidecar if there has to be one."""
        key = derive(parent.dek, parent.oid, b"lethefs/1/dek/name")
        c = AESGCMSIV(key).encrypt(bytes(12), name, b"lethefs/1/name" + parent.oid)
        if len(name) <= 175:
            return os.path.join(parent.path, url64(c))
        h = url64(hashlib.sha256(c).digest())
        os.symlink(url64(c), os.path.join(parent.path, "lethefs.name." + h))
        return os.path.join(parent.path, "lethefs.long." + h)

    def _put(self, path: str, data: bytes, mode: int) -> None:
        with open(path, "xb") as f:
            f.write(data)
        os.chmod(path, mode)

    def _listed(self, parent: Dir, name: bytes, kind: str, size: int, mode: int, **more: Any) -> None:
        path = parent.plain + b"/" + name if parent.plain else name
        self.manifest.append({"path_b64": std64(path), "type": kind, "size": size, "mode": mode} | more)

    def _directory(self, path: str, plain: bytes, oid: bytes, xattrs: dict[bytes, bytes]) -> Dir:
        made = Dir(path, plain, oid, self.random(32))
        os.symlink(url64(self.static(2, oid, made.dek)), os.path.join(path, "lethefs.dir"))
        self._xattrs(path, made.oid, made.dek, xattrs)
        os.chmod(path, 0o755)
        self.manifest.append({"path_b64": std64(plain), "type": "directory", "size": 0, "mode": 0o755, "rdev": 0,
                              "xattrs": self._listed_xattrs(xattrs)})
        return made

    def mkdir(self, parent: Dir, name: bytes, xattrs: dict[bytes, bytes] | None = None) -> Dir:
        path = self._entry(parent, name)
        os.mkdir(path)
        plain = parent.plain + b"/" + name if parent.plain else name
        return self._directory(path, plain, self.random(16), xattrs or {})

    # Section 7

    def mutable(self, oid: bytes, dek: bytes, counter: int, size: int, floor: int, flags: int) -> bytes:
        nonce = self.random(12)
        plain = struct.pack("<QQQIQ", counter, size, floor, flags, 0)
        key = derive(dek, oid, b"lethefs/1/dek/header")
        return nonce + AESGCMSIV(key).encrypt(nonce, plain, b"lethefs/1/mutable" + self.vid + oid)

    def file(self, parent: Dir, name: bytes, data: bytes, *, mode: int = 0o644, sealed: bool = True,
             floor: int | None = None, size: int | None = None, holes: bool = False, zero_blocks: tuple[int, ...] = (),
             tail: bytes = b"", old_a: bool = False, xattrs: dict[bytes, bytes] | None = None) -> str:
        """A regular file. `zero_blocks` are left as holes of the backing file; `tail` stands after the last block;
        `old_a` leaves static copy A under KEK version 2, as an interrupted rewrap does."""
        oid, dek = self.random(16), self.random(32)
        floor = len(data) if floor is None else floor
        size = len(data) if size is None else size
        flags = SEALED * sealed | HOLES * holes
        head = self.static(1, oid, dek, version=2 if old_a else 1) + self.static(1, oid, dek)
        head += self.mutable(oid, dek, 7, size, floor, flags) + self.mutable(oid, dek, 7, size, floor, flags)
        path = self._entry(parent, name)
        aead = AESGCMSIV(derive(dek, oid, b"lethefs/1/dek/content"))
        with open(path, "xb") as f:
            f.write(head + bytes(128))
            for i in range((len(data) + 4095) // 4096):
                plain = data[4096 * i:4096 * (i + 1)]
                nonce = self.random(12)
                stored = nonce + aead.encrypt(nonce, plain, b"lethefs/1/block" + self.vid + oid + struct.pack("<Q", i))
                f.truncate(512 + 4124 * i + len(stored))
                if i not in zero_blocks:
                    f.seek(512 + 4124 * i)
                    f.write(stored)
            f.seek(0, os.SEEK_END)
            f.write(tail)
        self._xattrs(path, oid, dek, xattrs or {})
        os.chmod(path, mode)
        self._listed(parent, name, "regular", len(data), mode, rdev=0, xattrs=self._listed_xattrs(xattrs or {}),
                     sha256=hashlib.sha256(data).hexdigest())
        return path

    def node(self, parent: Dir, name: bytes, kind: int, rdev: int = 0, xattrs: dict[bytes, bytes] | None = None) -> str:
        oid, dek = self.random(16), self.random(32)
        path = self._entry(parent, name)
        self._put(path, self.static(kind, oid, dek, rdev), 0o640)
        self._xattrs(path, oid, dek, xattrs or {})
        kinds = {4: "fifo", 5: "socket", 6: "char", 7: "block"}
        self._listed(parent, name, kinds[kind], 0, 0o640, rdev=rdev, xattrs=self._listed_xattrs(xattrs or {}))
        return path

    # Section 8

    def symlink(self, parent: Dir, name: bytes, target: bytes) -> str:
        oid, dek = self.random(16), self.random(32)
        nonce = self.random(12)
        key = derive(dek, oid, b"lethefs/1/dek/content")
        text = url64(self.static(3, oid, dek) + nonce +
                     AESGCMSIV(key).encrypt(nonce, target, b"lethefs/1/symlink" + self.vid + oid))
        if len(text) >= 1020:
            text += "."
            over = os.path.join(self.backing, "lethefs.overflow")
            os.makedirs(over, exist_ok=True)
            for k in range(1, (len(text) + 1019) // 1020):
                os.symlink(text[1020 * k:1020 * (k + 1)], os.path.join(over, f"{oid.hex()}.{k}"))
        path = self._entry(parent, name)
        os.symlink(text[:1020], path)
        self._listed(parent, name, "symlink", len(target), 0o777, target_b64=std64(target), rdev=0, xattrs={})
        return path

    # Section 9

    def _xattrs(self, path: str, oid: bytes, dek: bytes, xattrs: dict[bytes, bytes]) -> None:
        aead = AESGCMSIV(derive(dek, oid, b"lethefs/1/dek/xattr"))
        for x, value in xattrs.items():
            name = "user.lethefs." + url64(aead.encrypt(bytes(12), x, b"lethefs/1/xattr-name" + oid))
            nonce = self.random(12)
            os.setxattr(path, name, nonce + aead.encrypt(nonce, value, b"lethefs/1/xattr-value" + oid + x))

    def _listed_xattrs(self, xattrs: dict[bytes, bytes]) -> dict[str, str]:
        return {std64(x): std64(value) for x, value in xattrs.items()}

    def listing(self) -> list[dict[str, Any]]:
        return sorted(self.manifest, key=lambda r: base64.b64decode(r["path_b64"]))


def sample(backing: str, kek: bytes, random: Random = os.urandom) -> Volume:
    v = Volume(backing, kek, random, root_xattrs={b"user.on.root": b"yes"})
    for n in (0, 1, 3556, 4095, 4096, 4097, 5000, 8192, 100000):
        v.file(v.root, b"size-%d" % n, pattern(n))
    for n in (1, 174, 175, 176, 254, 255):
        v.file(v.root, b"n" * n, b"name of %d bytes" % n)
    v.file(v.root, b"\xff\xfe not UTF-8 \x80\n", b"odd name", mode=0o751)
    sub = v.mkdir(v.root, b"sub", {b"user.dir": b"attribute"})
    deep = v.mkdir(v.mkdir(sub, b"d" * 255), "tief \N{LATIN SMALL LETTER U WITH DIAERESIS}".encode())
    v.file(deep, b"size-1", pattern(1, 9), mode=0o600)
    v.mkdir(sub, b"empty")
    for n in (1, 607, 608, 609, 610, 1372, 1373, 1374, 4094, 4095):
        v.symlink(sub, b"link-%d" % n, (b"/" + pattern(4096, 3).hex().encode())[:n])
    v.symlink(sub, b"l" * 200, b"../\xff\xfe")
    v.node(sub, b"fifo", 4, xattrs={b"user.of.fifo": b"v"})
    v.node(sub, b"socket", 5)
    v.node(sub, b"char", 6, os.makedev(1, 3))
    v.node(sub, b"block", 7, os.makedev(0xABCDE, 0x12345))
    v.file(sub, b"xattrs", pattern(10), xattrs={
        b"user.empty": b"", b"user.mime_type": b"text/plain", b"user.big": pattern(1500), b"security.thing": b"\0\1",
        b"user." + b"x" * 160: b"165 bytes"})
    sparse = pattern(4096) + bytes(3 * 4096) + pattern(4096, 1) + bytes(2 * 4096 + 100)
    v.file(sub, b"sparse", sparse, holes=True, zero_blocks=(1, 2, 3, 5, 6, 7))
    v.file(sub, b"only-holes", bytes(50000), holes=True, zero_blocks=tuple(range(13)))
    v.file(sub, b"written-zeros", bytes(5000))
    v.file(sub, b"unsealed", pattern(10000, 4), sealed=False, floor=4096, size=4096)
    v.file(sub, b"unsealed-empty", b"", sealed=False)
    v.file(sub, b"unsealed-zero-block", pattern(4096, 5) + bytes(8192) + pattern(77, 6), sealed=False, floor=4096,
           size=4096, zero_blocks=(1, 2))
    v.file(sub, b"unsealed-tail", pattern(4096, 7), sealed=False, tail=b"torn" * 5)
    v.file(sub, b"half-rewrapped", pattern(6000, 8), old_a=True)
    return v


def main() -> int:
    parser = argparse.ArgumentParser(description="Write a sample lethefs volume.")
    parser.add_argument("backing")
    parser.add_argument("--kek-hex", required=True)
    parser.add_argument("--seed", help="draw ids, keys and nonces from this text; for test vectors only")
    args = parser.parse_args()
    kek = bytes.fromhex(args.kek_hex)
    if len(kek) != 32:
        parser.error("the KEK is not 64 hex digits")
    for record in sample(args.backing, kek, seeded(args.seed) if args.seed else os.urandom).listing():
        print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
