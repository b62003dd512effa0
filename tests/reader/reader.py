#!/usr/bin/env python3
"""Independent reader of lethefs volumes, written from docs/FORMAT.md alone ("section N" below is a section of it).

    reader.py BACKING --kek-hex-file FILE [--scope 0 --version 1] list | cat PATH | verify

list    one JSON line for each object, the root (path_b64 "") included, sorted by plaintext path; an object that must
        not be believed has "error" and no "sha256" or "xattrs". Base64 here is the standard one, padded.
cat     the contents of a regular file; of a damaged one what stands before the damage, then status 1
verify  a JSON summary {objects, files, bytes, errors, warnings}. Errors are what no crash and no rewrap leaves behind;
        warnings are leftovers. Damage to one of two copies is an error too, though list and cat still read the other.

The status is 1 if anything was in error. Needs Python 3.11 and `cryptography` with an OpenSSL of 3.2 or later inside;
some versions (44, for one) cannot open an AES-GCM-SIV ciphertext of nothing, so that is tried before anything else.
"""

from __future__ import annotations

import argparse
import base64
import errno
import hashlib
import hmac
import json
import os
import re
import stat
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

TYPES = {1: "regular", 2: "directory", 3: "symlink", 4: "fifo", 5: "socket", 6: "char", 7: "block"}
REGULAR, DIRECTORY, SYMLINK = {1}, {2}, {3}
NODES, DEVICES = {4, 5, 6, 7}, {6, 7}
HEADER, PLAIN, OVERHEAD = 512, 4096, 28
STORED = PLAIN + OVERHEAD
SEALED, HOLES = 1, 2
RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)", re.ASCII)
STATES = ("pre-active", "active", "suspended", "deactivated", "compromised", "destroyed")
NOFOLLOW = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Trouble(Exception):
    """What a mounted volume answers with EIO, or refuses to mount for."""


class NotHeld(Trouble):
    """Wrapped under a KEK version that was not given: no damage, but not readable here."""


def le(value: int, size: int) -> bytes:
    return value.to_bytes(size, "little")


def num(raw: bytes) -> int:
    return int.from_bytes(raw, "little")


def b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def unb64(text: str) -> bytes:
    """RFC 4648 section 5 without padding. One text for each value: stray bits at the end are refused."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", text) or len(text) % 4 == 1:
        raise Trouble("not base64url")
    raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if b64(raw) != text:
        raise Trouble("not canonical base64url")
    return raw


def hkdf(key: bytes, salt: bytes, info: bytes) -> bytes:
    """Section 2."""
    return HKDF(algorithm=SHA256(), length=32, salt=salt, info=info).derive(key)


def unseal(key: bytes, nonce: bytes, sealed: bytes, aad: bytes, what: str) -> bytes:
    """AES-256-GCM-SIV, section 2."""
    try:
        return AESGCMSIV(key).decrypt(nonce, sealed, aad)
    except (InvalidTag, ValueError):
        raise Trouble(f"{what} does not authenticate") from None


@dataclass
class Static:
    """The static header once its DEK has opened, section 5."""
    type: int
    oid: bytes
    rdev: int
    dek: bytes

    def key(self, purpose: str) -> bytes:
        return hkdf(self.dek, self.oid, b"lethefs/1/dek/" + purpose.encode())


@dataclass
class Mutable:
    """The mutable header, section 7."""
    counter: int
    size: int
    floor: int
    flags: int


def attribute(fd: int, name: str) -> bytes:
    try:
        return os.getxattr(fd, name)
    except OSError:
        return b""


def torn(start: int, stored: bytes) -> bool:
    """Section 7: all that lies in one sector of the backing file is zero, or a short block ends with a sector."""
    if len(stored) < STORED and (start + len(stored)) % 512 == 0:
        return True
    edges = [0, *range(512 - start % 512, len(stored), 512), len(stored)]
    return any(not any(stored[a:b]) for a, b in zip(edges, edges[1:]) if b > a)


class Volume:
    def __init__(self, backing: str, kek: bytes, scope: int, version: int) -> None:
        self.kek, self.scope, self.version = kek, scope, version
        self.errors: list[str] = []     # damage that does not belong to one listed object, or that a copy made good
        self.warnings: list[str] = []
        self.inodes: dict[bytes, tuple[int, int]] = {}
        self.pieces: set[str] = set()
        self.root = os.open(backing, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        body = self.read_volume_file()
        self.versions = {kek["version"] for kek in body["scopes"][0]["keks"]}
        self.id, self.root_id = bytes.fromhex(body["volume_id"]), bytes.fromhex(body["root_id"])
        self.wrapping = hkdf(kek, self.id, b"lethefs/1/kek/wrap" + le(scope, 4) + le(version, 4))

    # Section 3

    def read_volume_file(self) -> dict[str, Any]:
        """Section 3: the authentic copy of the higher generation."""
        good: list[dict[str, Any]] = []
        reasons: list[str] = []
        for name in ("lethefs.volume", "lethefs.volume.bak"):
            try:
                good.append(self.check_volume_file(name))
            except FileNotFoundError:
                self.warnings.append(f"{name}: missing")
            except (Trouble, OSError) as e:
                reasons.append(f"{name}: {e}")
        if not good:
            raise Trouble("; ".join(reasons) or "no volume file")
        self.errors += reasons
        if len(good) == 2 and good[0] != good[1]:
            if good[0]["volume_id"] != good[1]["volume_id"] or good[0]["generation"] == good[1]["generation"]:
                raise Trouble("the two volume files are authentic and contradict each other")
            self.warnings.append("lethefs.volume and lethefs.volume.bak are of different generations")
        return max(good, key=lambda b: b["generation"])

    def check_volume_file(self, name: str) -> dict[str, Any]:
        """Section 3: one copy. The body gives the salt for its own check and is believed only after the MAC."""
        fd = os.open(name, NOFOLLOW, dir_fd=self.root)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise Trouble("not a regular file")
            raw = read_at(fd, 0, (1 << 20) + 1)
        finally:
            os.close(fd)
        lines = raw.split(b"\n")
        if len(raw) > 1 << 20 or len(lines) != 3 or lines[2]:
            raise Trouble("not two lines of at most 1 MiB")
        body, auth = parse_json(lines[0]), parse_json(lines[1])
        if body.get("magic") != "lethefs":
            raise Trouble("no lethefs volume")
        if body.get("format") != 1:
            raise Trouble(f"format {body.get('format')!r} is not known to this reader")
        kek = self.check_body(body)
        place = le(self.scope, 4) + le(self.version, 4)
        vid = bytes.fromhex(body["volume_id"])
        if hkdf(self.kek, vid, b"lethefs/1/kek/commit" + place).hex() != kek["commitment"]:
            raise Trouble("the KEK is not the one the volume commits to")
        key = hkdf(self.kek, vid, b"lethefs/1/kek/volume" + place)
        mac = hmac.digest(key, b"lethefs/1/volume-file" + lines[0], "sha256")
        fields(auth, {"auth": list})
        found = False
        for entry in auth["auth"]:
            fields(entry, {"scope": int, "version": int, "mac": 64})
            if (entry["scope"], entry["version"]) == (self.scope, self.version):
                if not hmac.compare_digest(entry["mac"], mac.hex()):
                    raise Trouble("the MAC does not match")
                found = True
        if not found:
            raise Trouble(f"no MAC of KEK version {self.version}")
        if body["incompat"]:
            raise Trouble(f"needs features unknown to this reader: {body['incompat']}")
        return body

    def check_body(self, body: dict[str, Any]) -> dict[str, Any]:
        """Section 3, the table: every field, no other. Returns the entry of our KEK version."""
        fields(body, {"magic": str, "format": int, "volume_id": 32, "label": str, "created": "time", "generation": int,
                      "incompat": list, "compat": list, "root_id": 32, "scopes": list, "extra": dict})
        label = body["label"]
        if len(label.encode("utf-8", "replace")) > 64 or any(unicodedata.category(c) in ("Cc", "Cs") for c in label):
            raise Trouble("bad label")
        if not all(isinstance(s, str) for s in body["incompat"] + body["compat"]):
            raise Trouble("incompat and compat are lists of strings")
        ours = []
        for scope in body["scopes"]:
            fields(scope, {"id": int, "current": int, "keks": list, "extra": dict})
            for kek in scope["keks"]:
                fields(kek, {"version": int, "state": str, "created": "time", "commitment": 64, "slots": list,
                             "extra": dict})
                if kek["version"] < 1 or kek["state"] not in STATES:
                    raise Trouble("bad KEK entry")
                for slot in kek["slots"]:
                    fields(slot, {"id": int, "created": "time", "identity": dict, "wrapped": str, "canary": str,
                                  "canary_check": 64, "extra": dict})
                if (scope["id"], kek["version"]) == (self.scope, self.version):
                    ours.append(kek)
            versions = [kek["version"] for kek in scope["keks"]]
            if len(set(versions)) != len(versions) or scope["current"] not in versions:
                raise Trouble("KEK versions contradict each other")
        if [scope["id"] for scope in body["scopes"]] != [0]:
            raise Trouble("format 1 has one scope, 0")
        if not ours:
            raise NotHeld(f"the volume has no KEK of scope {self.scope} version {self.version}")
        found: dict[str, Any] = ours[0]
        return found

    # Section 5

    def static(self, raw: bytes, types: set[int]) -> Static:
        """Section 5: one static header, believed once its DEK opens, for an object of one of these types."""
        if len(raw) != 128 or raw[:8] != b"LETHEOBJ":
            raise Trouble("no static header")
        if num(raw[8:10]) != 1:
            raise Trouble(f"object of format {num(raw[8:10])}")
        scope, version = num(raw[12:16]), num(raw[16:20])
        if scope != self.scope or version not in self.versions:
            raise Trouble(f"wrapped under scope {scope} KEK version {version}, which the volume does not have")
        if version != self.version:
            raise NotHeld(f"wrapped under KEK version {version}, which was not given")
        dek = unseal(self.wrapping, raw[68:80], raw[80:], b"lethefs/1/dek" + self.id + raw[:68], "static header")
        kind, rdev = raw[10], num(raw[40:48])
        if raw[11] or (rdev and kind not in DEVICES):      # reserved bytes: section 14
            raise Trouble("static header has flags set, or a number that its type has not")
        if kind not in types:
            raise Trouble(f"the header says {TYPES.get(kind, kind)}, the backing entry does not")
        return Static(kind, raw[24:40], rdev, dek)

    def directory_header(self, fd: int) -> Static:
        """Section 5, directory header."""
        try:
            head = self.static(unb64(os.readlink("lethefs.dir", dir_fd=fd)), DIRECTORY)
        except OSError as e:
            raise Trouble(f"lethefs.dir: {e.strerror}") from None
        if os.path.samestat(os.fstat(fd), os.fstat(self.root)) and head.oid != self.root_id:
            raise Trouble("the root directory is not the object that the volume file names")
        return head

    # Section 6

    def backing_name(self, directory: Static, name: bytes) -> tuple[str, bytes]:
        """Section 6: the backing name for a plaintext name, and c."""
        c = AESGCMSIV(directory.key("name")).encrypt(bytes(12), name, b"lethefs/1/name" + directory.oid)
        return (b64(c) if len(b64(c)) <= 255 else "lethefs.long." + b64(hashlib.sha256(c).digest())), c

    def plain_name(self, fd: int, directory: Static, entry: str) -> bytes:
        """Section 6: the plaintext name of a backing entry, which must be what this name is encrypted to."""
        text = entry
        if entry.startswith("lethefs.long."):
            try:
                text = os.readlink("lethefs.name." + entry.removeprefix("lethefs.long."), dir_fd=fd)
            except OSError as e:
                raise Trouble(f"sidecar: {e.strerror}") from None
        name = unseal(directory.key("name"), bytes(12), unb64(text), b"lethefs/1/name" + directory.oid, "name")
        if name in (b"", b".", b"..") or b"/" in name or b"\0" in name or len(name) > 255:
            raise Trouble("the name decrypts to something that is no name")
        if self.backing_name(directory, name)[0] != entry:
            raise Trouble("the name is stored under a backing name that is not its own")
        return name

    # Section 7

    def open_regular(self, fd: int) -> tuple[Static, Mutable, int]:
        """Section 7: both headers and the size, with the rules that need no block."""
        length, raw = os.fstat(fd).st_size, read_at(fd, 0, HEADER)
        if not any(raw) and len(birth := attribute(fd, "user.lethefs-birth")) == 256:
            head = self.static(birth[:128], REGULAR)
            size = PLAIN * (max(0, length - HEADER) // STORED) + max(0, max(0, length - HEADER) % STORED - OVERHEAD)
            return head, self.mutable(head, bytes(256) + birth[128:]), size
        if length < HEADER or len(raw) != HEADER:
            raise Trouble(f"backing file of {length} bytes is damaged")
        heads: list[Static] = []
        failed: list[Trouble] = []
        for at in (0, 128):
            try:
                heads.append(self.static(raw[at:at + 128], REGULAR))
            except Trouble as e:
                failed.append(e)
        if not heads:
            raise failed[0]
        for why in failed:
            (self.warnings if isinstance(why, NotHeld) else self.errors).append(f"a copy of a static header: {why}")
        if heads[0] != heads[-1]:
            self.errors.append("the copies of a static header are of different objects")
        mutable = self.mutable(heads[0], raw)
        size = PLAIN * ((length - HEADER) // STORED) + max(0, (length - HEADER) % STORED - OVERHEAD)
        if size < mutable.floor:
            raise Trouble(f"cut off: {size} bytes, at least {mutable.floor} were flushed")
        if mutable.flags & SEALED and not size == mutable.size == mutable.floor:
            raise Trouble(f"cut off or extended: {size} bytes, sealed with {mutable.size}")
        if length == HEADER and mutable.size:
            raise Trouble(f"empty, but the header says {mutable.size} bytes")
        return heads[0], mutable, size

    def mutable(self, head: Static, raw: bytes) -> Mutable:
        """Section 7: the copy of the higher counter that opens."""
        opened: list[Mutable] = []
        for at in (256, 320):
            try:
                plain = unseal(head.key("header"), raw[at:at + 12], raw[at + 12:at + 64],
                               b"lethefs/1/mutable" + self.id + head.oid, "a copy of a mutable header")
            except Trouble as e:
                self.errors.append(str(e))
                continue
            flags = num(plain[24:28])
            if flags & ~(SEALED | HOLES):
                raise Trouble("mutable header has unknown flags set")
            opened.append(Mutable(num(plain[:8]), num(plain[8:16]), num(plain[16:24]), flags))
        if not opened:
            raise Trouble("no mutable header opens")
        if opened[0] != opened[-1]:
            if opened[0].counter == opened[1].counter:
                raise Trouble("two mutable headers of one counter differ")
            self.errors.append("the copies of a mutable header differ")
        return max(opened, key=lambda m: m.counter)

    def blocks(self, fd: int, head: Static, mutable: Mutable, size: int) -> Iterator[bytes]:
        """Section 7: what a reader believes, block by block."""
        key, aad = head.key("content"), b"lethefs/1/block" + self.id + head.oid
        for i in range(-(-size // PLAIN)):
            want = min(PLAIN, size - PLAIN * i)
            stored = read_at(fd, HEADER + STORED * i, want + OVERHEAD)
            if len(stored) != want + OVERHEAD:
                raise Trouble(f"block {i}: changed while being read")
            if stored.count(0) == len(stored):
                if PLAIN * i < mutable.floor and not mutable.flags & HOLES:
                    raise Trouble(f"block {i}: zeros, but it was written")
                yield bytes(want)
                continue
            try:
                yield unseal(key, stored[:12], stored[12:], aad + le(i, 8), f"block {i}")
            except Trouble:
                if mutable.flags & SEALED or PLAIN * i < mutable.floor or not torn(HEADER + STORED * i, stored):
                    raise
                yield bytes(want)

    # Section 8

    def symlink(self, fd: int, entry: str) -> tuple[Static, bytes]:
        """Section 8. The object id that leads to the further pieces is believed only after the header has opened."""
        text = os.readlink(entry, dir_fd=fd)
        if len(text) > 1020:
            raise Trouble("symlink of more than 1,020 characters")
        if len(text) < 1020:
            raw = unb64(text)
            head = self.static(raw[:128], SYMLINK)
        else:
            head = self.static(unb64(text[:172])[:128], SYMLINK)
            raw = unb64(self.overflow(head.oid, text))
        aad = b"lethefs/1/symlink" + self.id + head.oid
        target = unseal(head.key("content"), raw[128:140], raw[140:], aad, "target")
        if not 1 <= len(target) <= 4095 or b"\0" in target:
            raise Trouble("the target decrypts to something that is no target")
        return head, target

    def overflow(self, oid: bytes, first: str) -> str:
        """Section 8: t, put together from its pieces; 4,095 bytes make six of them."""
        text = first
        try:
            fd = os.open("lethefs.overflow", NOFOLLOW | os.O_DIRECTORY, dir_fd=self.root)
        except OSError as e:
            raise Trouble(f"lethefs.overflow: {e.strerror}") from None
        try:
            for k in range(1, 6):
                self.pieces.add(f"{oid.hex()}.{k}")
                piece = os.readlink(f"{oid.hex()}.{k}", dir_fd=fd)
                text += piece
                if piece.endswith("."):
                    return text[:-1]
                if len(piece) != 1020:
                    break
        except OSError as e:
            raise Trouble(f"piece {k} of the symlink: {e.strerror}") from None
        finally:
            os.close(fd)
        raise Trouble("the pieces of the symlink have no end")

    # Section 9

    def xattrs(self, fd: int, head: Static) -> dict[bytes, bytes]:
        """Section 9. Attributes outside `user.lethefs.` are not the volume's."""
        found: dict[bytes, bytes] = {}
        try:
            names = os.listxattr(fd)
        except OSError as e:
            if e.errno == errno.ENOTSUP:
                return found
            raise
        key = head.key("xattr")
        for full in names:
            if full.startswith("user.lethefs."):
                c, raw = unb64(full.removeprefix("user.lethefs.")), os.getxattr(fd, full)
                x = unseal(key, bytes(12), c, b"lethefs/1/xattr-name" + head.oid, "attribute name")
                found[x] = unseal(key, raw[:12], raw[12:], b"lethefs/1/xattr-value" + head.oid + x, f"attribute {x!r}")
        return found

    # The tree, section 1

    def object(self, fd: int, entry: str, path: bytes) -> tuple[dict[str, Any], Static | None]:
        """Section 1: the plaintext object behind a backing entry, read and checked to its end."""
        st = os.stat(entry, dir_fd=fd, follow_symlinks=False)
        mode = stat.S_IMODE(st.st_mode)
        record: dict[str, Any] = {"path_b64": text64(path), "type": "unknown", "size": 0, "mode": mode}
        head = None
        own = -1
        try:
            if stat.S_ISLNK(st.st_mode):
                record["type"] = "symlink"
                head, target = self.symlink(fd, entry)
                record |= {"size": len(target), "target_b64": text64(target), "rdev": 0, "xattrs": {}}
            elif stat.S_ISDIR(st.st_mode) or stat.S_ISREG(st.st_mode):
                own = os.open(entry, NOFOLLOW, dir_fd=fd)
                st = os.fstat(own)
                if stat.S_ISDIR(st.st_mode):
                    record["type"] = "directory"
                    head = self.directory_header(own)
                    record |= {"rdev": 0, "xattrs": json_xattrs(self.xattrs(own, head))}
                elif st.st_size == 128:
                    node = self.static(read_at(own, 0, 128), NODES)
                    record["type"] = TYPES[node.type]
                    head = node
                    record |= {"rdev": node.rdev, "xattrs": json_xattrs(self.xattrs(own, node))}
                else:
                    record |= {"type": "regular", "size": 1}    # what section 1 shows of a damaged one
                    head, mutable, size = self.open_regular(own)
                    record["size"] = size
                    digest = hashlib.sha256()
                    for block in self.blocks(own, head, mutable, size):
                        digest.update(block)
                    record |= {"rdev": 0, "xattrs": json_xattrs(self.xattrs(own, head)), "sha256": digest.hexdigest()}
            else:
                raise Trouble("a backing entry of this type is not believed")
            inode = (st.st_dev, st.st_ino)
            if self.inodes.setdefault(head.oid, inode) != inode:
                self.warnings.append("its object id is also that of another backing entry")
        except (Trouble, OSError) as e:
            record = {k: v for k, v in record.items() if k in ("path_b64", "type", "size", "mode")} | {"error": str(e)}
        finally:
            if own >= 0:
                os.close(own)
        return record, head

    def walk(self, parent: int, entry: str, path: bytes) -> Iterator[dict[str, Any]]:
        """Section 1: this object and everything below it."""
        start = len(self.errors), len(self.warnings)
        record, head = self.object(parent, entry, path)
        for notes, at in zip((self.errors, self.warnings), start):
            notes[at:] = [f"{path!r}: {note}" for note in notes[at:]]
        yield record
        if record["type"] != "directory" or head is None:
            return
        fd = os.open(entry, NOFOLLOW | os.O_DIRECTORY, dir_fd=parent)
        try:
            names = set(os.listdir(fd))
            for child in sorted(names, key=os.fsencode):
                if self.is_ours(child, names, root=not path):
                    continue
                try:
                    name = self.plain_name(fd, head, child)
                except Trouble as e:
                    self.errors.append(f"{path!r}: backing entry {child!r} is not shown: {e}")
                    continue
                yield from self.walk(fd, child, path + b"/" + name if path else name)
        finally:
            os.close(fd)

    def is_ours(self, name: str, names: set[str], root: bool) -> bool:
        """Section 1: names that are no entries."""
        if name.startswith("lethefs.tmp."):
            self.warnings.append(f"leftover {name}")
            return True
        if name.startswith("lethefs.name."):
            if "lethefs.long." + name.removeprefix("lethefs.name.") not in names:
                self.warnings.append(f"sidecar without its entry: {name}")
            return True
        if root and name in ("lethefs.log.0", "lethefs.log.1"):
            self.warnings.append(f"{name}: mounted, or not unmounted cleanly: the last changes may be only in the log")
            return True
        at_root = ("lethefs.volume", "lethefs.volume.bak", "lethefs.overflow", "lethefs.erase", "lethefs.quarantine")
        return name == "lethefs.dir" or root and name in at_root

    def records(self) -> list[dict[str, Any]]:
        found = sorted(self.walk(self.root, ".", b""), key=lambda r: base64.b64decode(r["path_b64"]))
        try:
            fd = os.open("lethefs.overflow", NOFOLLOW | os.O_DIRECTORY, dir_fd=self.root)
            self.warnings += [f"lethefs.overflow/{n}: belongs to no symlink" for n in set(os.listdir(fd)) - self.pieces]
            os.close(fd)
        except FileNotFoundError:
            pass
        except OSError as e:
            self.errors.append(f"lethefs.overflow: {e.strerror}")
        return found

    def cat(self, path: bytes) -> Iterator[bytes]:
        """Sections 6 and 7: straight to one file, by encrypting the names on the way to it."""
        fd = os.dup(self.root)
        *parents, last = [part for part in path.split(b"/") if part] or [b"."]
        for part in parents:
            fd = os.open(self.backing_name(self.directory_header(fd), part)[0], NOFOLLOW | os.O_DIRECTORY, dir_fd=fd)
        entry = self.backing_name(self.directory_header(fd), last)[0]
        if not stat.S_ISREG(os.stat(entry, dir_fd=fd, follow_symlinks=False).st_mode):
            raise Trouble("not a regular file")
        own = os.open(entry, NOFOLLOW, dir_fd=fd)
        yield from self.blocks(own, *self.open_regular(own))


def read_at(fd: int, offset: int, count: int) -> bytes:
    got = b""
    while len(got) < count and (more := os.pread(fd, count - len(got), offset + len(got))):
        got += more
    return got


def text64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def json_xattrs(found: dict[bytes, bytes]) -> dict[str, str]:
    return {text64(name): text64(value) for name, value in sorted(found.items())}


def parse_json(raw: bytes) -> dict[str, Any]:
    """One JSON object. A key that stands twice is refused: it would mean two things to two readers."""
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in items}) != len(items):
            raise Trouble("a JSON key stands twice")
        return dict(items)
    try:
        value = json.loads(raw.decode(), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as e:
        raise Trouble(f"bad JSON: {e}") from None
    if not isinstance(value, dict):
        raise Trouble("bad JSON: not an object")
    return value


def fields(value: Any, table: dict[str, Any]) -> None:
    """Section 3: exactly these fields. A type, or a number for so many hex digits, or "time" for RFC 3339 in UTC."""
    if not isinstance(value, dict) or set(value) != set(table):
        raise Trouble(f"fields are not exactly {', '.join(table)}")
    for key, kind in table.items():
        item = value[key]
        if kind is int:
            good = type(item) is int and 0 <= item < 1 << 64
        elif isinstance(kind, int):
            good = isinstance(item, str) and re.fullmatch(f"[0-9a-f]{{{kind}}}", item) is not None
        elif kind == "time":
            good = isinstance(item, str) and RFC3339.fullmatch(item) is not None
        else:
            good = isinstance(item, kind)
        if not good:
            raise Trouble(f"field {key} is not well-formed")


def self_test() -> bool:
    """RFC 8452, appendix C.2, the first vector, and the way back."""
    aead, nonce = AESGCMSIV(b"\1" + bytes(31)), b"\3" + bytes(11)
    tag = bytes.fromhex("07f5f4169bbf55a8400cd47ea6fd400f")
    try:
        return aead.encrypt(nonce, b"", None) == tag and aead.decrypt(nonce, tag, None) == b""
    except (InvalidTag, ValueError):
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description="Independent reader of lethefs volumes.")
    parser.add_argument("backing")
    parser.add_argument("--kek-hex-file", required=True)
    parser.add_argument("--scope", type=int, default=0)
    parser.add_argument("--version", type=int, default=1)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    commands.add_parser("cat").add_argument("path")
    commands.add_parser("verify")
    args = parser.parse_args()
    if not self_test():
        parser.error("this version of cryptography is not correct for empty plaintexts; take a newer one")
    with open(args.kek_hex_file, encoding="ascii") as f:
        kek = bytes.fromhex(f.read().strip())
    if len(kek) != 32:
        parser.error("the KEK is not 64 hex digits")
    try:
        volume = Volume(args.backing, kek, args.scope, args.version)
        if args.command == "cat":
            for block in volume.cat(os.fsencode(args.path)):
                sys.stdout.buffer.write(block)
            return 0
        records = volume.records()
    except (Trouble, OSError) as e:
        sys.stdout.flush()
        if args.command == "verify":
            print(json.dumps({"objects": 0, "files": 0, "bytes": 0, "errors": [str(e)], "warnings": []}))
        print(f"reader.py: {e}", file=sys.stderr)
        return 1
    bad = [f"{base64.b64decode(r['path_b64'])!r}: {r['error']}" for r in records if "error" in r]
    if args.command == "list":
        for record in records:
            print(json.dumps(record))
        for note in volume.errors + volume.warnings:
            print(f"reader.py: {note}", file=sys.stderr)
        return 1 if bad else 0
    files = [r for r in records if "sha256" in r]
    print(json.dumps({"objects": len(records), "files": len(files), "bytes": sum(r["size"] for r in files),
                      "errors": bad + volume.errors, "warnings": volume.warnings}))
    return 1 if bad or volume.errors else 0


if __name__ == "__main__":
    sys.exit(main())
