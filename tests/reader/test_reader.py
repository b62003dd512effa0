#!/usr/bin/env python3
"""Tests of reader.py against volumes of make_volume.py: python3 test_reader.py

LETHEFS_READER_SEED and LETHEFS_READER_FLIPS set the seed and the number of the random flips; TMPDIR has to be on a
filesystem with user extended attributes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Callable
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV

import make_volume
import reader

HERE = os.path.dirname(os.path.abspath(__file__))
KEK = bytes(range(100, 132))
SEED = int(os.environ.get("LETHEFS_READER_SEED", random.SystemRandom().randrange(1 << 32)))
FLIPS = int(os.environ.get("LETHEFS_READER_FLIPS", "600"))
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
Records = dict[bytes, dict[str, Any]]


def run(backing: str, *command: str | bytes, kek: bytes = KEK) -> subprocess.CompletedProcess[bytes]:
    with tempfile.NamedTemporaryFile("w") as f:
        f.write(kek.hex() + "\n")
        f.flush()
        program = [sys.executable, os.path.join(HERE, "reader.py"), backing, "--kek-hex-file", f.name]
        return subprocess.run([*program, *command], capture_output=True, check=False)


def read(backing: str) -> tuple[Records, list[str], list[str]]:
    """In this process: the records by path, all errors, all warnings. A refused volume has no records."""
    volume = None
    try:
        volume = reader.Volume(backing, KEK, 0, 1)
        records = {base64.b64decode(r["path_b64"]): r for r in volume.records()}
        return records, [r["error"] for r in records.values() if "error" in r] + volume.errors, volume.warnings
    except (reader.Trouble, OSError) as e:
        return {}, [str(e)], []
    finally:
        if volume is not None:
            os.close(volume.root)


def patch(path: str, offset: int, data: bytes) -> None:
    with open(path, "r+b") as f:
        f.seek(offset)
        f.write(data)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def slurp(path: str) -> bytes:
    with open(path, "rb") as f:
        return f.read()


class Case(unittest.TestCase):
    def setUp(self) -> None:
        self.tmp = tempfile.mkdtemp(prefix="lethefs-reader-")
        self.addCleanup(shutil.rmtree, self.tmp)
        self.backing = os.path.join(self.tmp, "volume")

    def volume(self) -> make_volume.Volume:
        self.v = make_volume.Volume(self.backing, KEK, make_volume.seeded("test"))
        return self.v

    def expect_error(self, text: str, path: bytes | None = b"f") -> None:
        """The object at this path, or with None something that belongs to no object, is in error for this reason."""
        records, errors, _ = read(self.backing)
        if path is not None:
            self.assertIn(text, records[path].get("error", "no error"))
            self.assertNotIn("sha256", records[path])
        self.assertTrue(any(text in e for e in errors), errors)

    def expect_fine(self, data: bytes, error: str | None = None) -> None:
        """The file f has these contents; with `error` there is also something for verify to tell."""
        records, errors, _ = read(self.backing)
        self.assertEqual(records[b"f"].get("sha256"), sha256(data), errors)
        if error is None:
            self.assertEqual(errors, [])
        else:
            self.assertTrue(any(error in e for e in errors), errors)


class Sample(Case):
    def test_rfc8452_empty_plaintext(self) -> None:
        aead, nonce = AESGCMSIV(bytes([1]) + bytes(31)), bytes([3]) + bytes(11)
        tag = bytes.fromhex("07f5f4169bbf55a8400cd47ea6fd400f")
        self.assertEqual(aead.encrypt(nonce, b"", b""), tag)
        self.assertEqual(aead.decrypt(nonce, tag, b""), b"")

    def test_list_cat_verify(self) -> None:
        v = make_volume.sample(self.backing, KEK)
        listed = run(self.backing, "list")
        self.assertEqual(listed.returncode, 0, listed.stderr)
        records = [json.loads(line) for line in listed.stdout.splitlines()]
        self.assertEqual(records, v.listing())
        files = [r for r in records if r["type"] == "regular"]
        summary = run(self.backing, "verify")
        self.assertEqual(summary.returncode, 0, summary.stdout)
        got = json.loads(summary.stdout)
        self.assertEqual((got["objects"], got["files"], got["bytes"], got["errors"]),
                         (len(records), len(files), sum(r["size"] for r in files), []))
        self.assertEqual(len(got["warnings"]), 1)      # the interrupted rewrap
        for record in files:
            out = run(self.backing, "cat", base64.b64decode(record["path_b64"]))
            self.assertEqual((out.returncode, sha256(out.stdout)), (0, record["sha256"]), record)
        for path in ("sub", "nothing", "sub/link-1", "", "sub/../size-1"):
            out = run(self.backing, "cat", path)
            self.assertEqual((out.returncode, out.stdout), (1, b""), path)

    def test_seeded_is_reproducible(self) -> None:
        def tree(name: str) -> list[Any]:
            top = os.path.join(self.tmp, name)
            make_volume.sample(top, KEK, make_volume.seeded("s"))
            found = []
            for base, dirs, files in os.walk(top):
                for entry in dirs + files:
                    path = os.path.join(base, entry)
                    what = os.readlink(path) if os.path.islink(path) else slurp(path) if os.path.isfile(path) else b""
                    found.append((os.path.relpath(path, top), what))
            return sorted(found)
        self.assertEqual(tree("a"), tree("b"))

    def test_wrong_kek(self) -> None:
        make_volume.sample(self.backing, KEK)
        out = run(self.backing, "verify", kek=bytes(32))
        self.assertEqual(out.returncode, 1)
        self.assertIn("commits to", json.loads(out.stdout)["errors"][0])
        self.assertEqual(run(self.backing, "list", kek=bytes(32)).stdout, b"")

    def test_random_flips(self) -> None:
        """One byte at a random place of the backing directory: contents are identical or in error, never wrong."""
        print(f"\nrandom flips: LETHEFS_READER_SEED={SEED}, {FLIPS} times", file=sys.stderr)
        rng = random.Random(SEED)
        v = make_volume.sample(self.backing, KEK)
        want = {base64.b64decode(r["path_b64"]): r for r in v.listing()}
        everything = [os.path.join(base, e) for base, dirs, files in os.walk(self.backing) for e in dirs + files]
        outcome = {"error": 0, "ignored": 0}
        for _ in range(FLIPS):
            path = rng.choice(everything)
            what, undo, ignored = self.flip(rng, path)
            if undo is None:
                continue
            with self.subTest(seed=SEED, flip=what):
                records, errors, _ = read(self.backing)
                for name, record in records.items():
                    self.assertIn(name, want)
                    if "error" not in record:
                        self.assertEqual(record, want[name])
                if not ignored:
                    self.assertNotEqual(errors, [], "not noticed")
                outcome["error" if errors else "ignored"] += 1
            undo()
        records, errors, _ = read(self.backing)
        self.assertEqual((records, errors), (want, []))
        print(f"random flips: {outcome}", file=sys.stderr)

    def flip(self, rng: random.Random, path: str) -> tuple[str, Callable[[], None] | None, bool]:
        """Damage one thing. Returns what was done, how to undo it, and whether the format ignores that place."""
        st = os.lstat(path)
        base, entry = os.path.split(path)
        names = [] if stat.S_ISLNK(st.st_mode) else [n for n in os.listxattr(path) if n.startswith("user.lethefs.")]
        choice = rng.choice(["body", "body", "body", "name", *(["xattr name", "xattr value"] if names else [])])
        what = f"{choice} of {os.path.relpath(path, self.backing)}"
        if choice == "name":
            at = rng.randrange(len(entry))
            new = os.path.join(base, entry[:at] + rng.choice([c for c in ALPHABET if c != entry[at]]) + entry[at + 1:])
            if os.path.lexists(new):
                return what, None, False
            os.rename(path, new)
            return what + f" at {at}", lambda: os.rename(new, path), False
        if choice.startswith("xattr"):
            name = rng.choice(names)
            value = os.getxattr(path, name)
            at = rng.randrange(len(value))
            if choice == "xattr value":
                os.setxattr(path, name, value[:at] + bytes([value[at] ^ rng.randrange(1, 256)]) + value[at + 1:])
                return what, lambda: os.setxattr(path, name, value), False
            at = rng.randrange(len("user.lethefs."), len(name))
            other = name[:at] + rng.choice([c for c in ALPHABET if c != name[at]]) + name[at + 1:]
            os.removexattr(path, name)
            os.setxattr(path, other, value)

            def put_back() -> None:
                os.removexattr(path, other)
                os.setxattr(path, name, value)
            return what, put_back, False
        if stat.S_ISLNK(st.st_mode):
            old = os.readlink(path)
            at = rng.randrange(len(old))
            new_char = rng.choice([c for c in map(chr, range(1, 128)) if c != old[at]])
            os.unlink(path)
            os.symlink(old[:at] + new_char + old[at + 1:], path)

            def relink() -> None:
                os.unlink(path)
                os.symlink(old, path)
            return what + f" at {at}", relink, False
        if stat.S_ISREG(st.st_mode):
            data = slurp(path)
            at = rng.randrange(min(len(data), rng.choice([512, len(data)])))
            patch(path, at, bytes([data[at] ^ rng.randrange(1, 256)]))
            ignored = False
            if not entry.startswith("lethefs.volume") and len(data) >= 512:
                torn = data.endswith(b"torn" * 5) and at >= len(data) - 20
                now = slurp(path)
                unheld = at < 128 and now[16] == 2 or 128 <= at < 256 and now[144] == 2
                # A block of "unsealed-zero-block": what a crash left above the floor reads as zeros, with or without the flip.
                block = data[512 + (at - 512) // 4124 * 4124:][:4124] if at >= 512 else b""
                crashed = len(data) == 512 + 3 * 4124 + 28 + 77 and bool(block) and not any(block)
                ignored = 384 <= at < 512 or torn or unheld or crashed
            return what + f" at {at}", lambda: patch(path, at, data[at:at + 1]), ignored
        return what, None, False


class VolumeFile(Case):
    def rewrite(self, change: Callable[[dict[str, Any]], Any], sign: bool = True) -> None:
        body = self.v.body()
        change(body)
        if sign:
            for name in ("lethefs.volume", "lethefs.volume.bak"):
                os.unlink(os.path.join(self.backing, name))
            self.v.write_volume_files(body)

    def test_signed_but_refused(self) -> None:
        self.volume()

        def kek(body: dict[str, Any]) -> dict[str, Any]:
            found: dict[str, Any] = body["scopes"][0]["keks"][0]
            return found
        for text, change in (
                ("features", lambda b: b["incompat"].append("tails")),
                ("format 2", lambda b: b.update(format=2)),
                ("format '1'", lambda b: b.update(format="1")),
                ("no lethefs", lambda b: b.update(magic="other")),
                ("fields", lambda b: b.update(news=1)),
                ("fields", lambda b: b.pop("compat")),
                ("fields", lambda b: kek(b).update(news=1)),
                ("fields", lambda b: kek(b)["slots"][0].update(news=1)),
                ("label", lambda b: b.update(label="a" * 65)),
                ("label", lambda b: b.update(label="a\nb")),
                ("one scope", lambda b: b["scopes"].append(dict(b["scopes"][0], id=1))),
                ("contradict", lambda b: b["scopes"][0].update(current=3)),
                ("contradict", lambda b: b["scopes"][0]["keks"].append(dict(kek(b), state="active"))),
                ("generation", lambda b: b.update(generation=True)),
                ("created", lambda b: b.update(created="yesterday")),
                ("KEK entry", lambda b: kek(b).update(state="fine")),
                ("commits to", lambda b: kek(b).update(commitment="00" * 32)),
                ("no KEK", lambda b: (kek(b).update(version=3), b["scopes"][0].update(current=3)))):
            with self.subTest(text):
                self.rewrite(change)
                self.expect_error(text, None)
        self.rewrite(lambda b: b["compat"].append("anything"))
        self.assertEqual(read(self.backing)[1], [])

    def test_bytes(self) -> None:
        self.volume()
        path, bak = (os.path.join(self.backing, n) for n in ("lethefs.volume", "lethefs.volume.bak"))
        good = slurp(path)
        body, auth = good.splitlines()
        for text, data in (
                ("MAC", good.replace(b"sample", b"Sample", 1)), ("two lines", good + b"\n"), ("two lines", good[:-1]),
                ("two lines", b""), ("bad JSON", b"{\n" + auth + b"\n"), ("no MAC", body + b'\n{"auth":[]}\n'),
                ("twice", self.v.signed(body[:-1] + b',"label":"x"}')), ("bad JSON", b"[" * 99999 + b"\n1\n"),
                ("1 MiB", self.v.signed(body + b" " * (1 << 20)))):
            with self.subTest(text):
                for name in (path, bak):
                    with open(name, "wb") as f:
                        f.write(data)
                self.expect_error(text, None)
                with open(bak, "wb") as f:
                    f.write(good)
                records, errors, _ = read(self.backing)
                self.assertEqual(list(records), [b""])
                self.assertEqual(len(errors), 1)

    def test_two_copies(self) -> None:
        self.volume()
        path = os.path.join(self.backing, "lethefs.volume")
        body = self.v.body()
        good = self.v.signed(json.dumps(body | {"generation": 2}).encode())
        with open(path, "wb") as f:
            f.write(good)
        _, errors, warnings = read(self.backing)
        self.assertEqual((errors, len(warnings)), ([], 1))
        with open(path, "wb") as f:
            f.write(self.v.signed(json.dumps(body | {"label": "other"}).encode()))
        self.expect_error("contradict", None)
        os.unlink(path)
        self.assertEqual(read(self.backing)[1], [])
        os.mkfifo(path)
        self.assertEqual(len(read(self.backing)[1]), 1)
        os.unlink(os.path.join(self.backing, "lethefs.volume.bak"))
        self.expect_error("not a regular file", None)

    def test_root_id(self) -> None:
        v = self.volume()
        other = v.mkdir(v.root, b"other")
        os.unlink(os.path.join(self.backing, "lethefs.dir"))
        shutil.copy(os.path.join(other.path, "lethefs.dir"), self.backing, follow_symlinks=False)
        self.expect_error("not the object", b"")


class Files(Case):
    data = make_volume.pattern(10000)

    def file(self, **more: Any) -> str:
        self.path = self.volume().file(self.v.root, b"f", self.data, **more)
        return self.path

    def again(self) -> None:
        shutil.rmtree(self.backing)

    def test_floor_and_sealed(self) -> None:
        self.file()
        for length in (0, 1, 127, 129, 511, 512, 540, 4636, 8760, 8761, 10000, 10595, 10597, 20000):
            os.truncate(self.path, length)
            self.expect_error("damaged" if length < 512 else "cut off")
            self.again()
            self.file()
        os.truncate(self.path, 128)
        self.expect_error("the backing entry does not")
        self.again()
        self.file(sealed=False, floor=8192, size=8192)
        os.truncate(self.path, 8760)                    # at floor: believed
        self.expect_fine(self.data[:8192])
        os.truncate(self.path, 8760 + 28)               # no byte of plaintext in the tail
        self.expect_fine(self.data[:8192])
        os.truncate(self.path, 8760 + 29)
        self.expect_fine(self.data[:8192] + b"\0")
        os.truncate(self.path, 8759)
        self.expect_error("cut off")
        self.again()
        self.file(sealed=False, floor=0, size=10000)
        os.truncate(self.path, 512)
        self.expect_error("empty, but")
        self.again()
        self.file(size=9999)
        self.expect_error("sealed with")
        self.again()
        self.file(floor=8192)
        self.expect_error("sealed with")

    def test_blocks(self) -> None:
        cases: tuple[tuple[str, Callable[[bytes], bytes]], ...] = (
                ("block 1 does", lambda d: d[:4636] + d[512:4636] + d[8760:]),             # block 0 in place of 1
                ("block 0 does", lambda d: d[:512] + d[4636:8760] + d[512:4636] + d[8760:]),   # exchanged
                ("block 0: zeros", lambda d: d[:512] + bytes(4124) + d[4636:]),
                ("block 2: zeros", lambda d: d[:8760] + bytes(len(d) - 8760)),
                ("block 2 does", lambda d: d[:8760] + d[4636:8760][:len(d) - 8760]))
        for text, change in cases:
            with self.subTest(text):
                self.file()
                patch(self.path, 0, change(slurp(self.path)))
                self.expect_error(text)
                out = run(self.backing, "cat", "f")
                self.assertEqual(out.returncode, 1)
                self.assertTrue(self.data.startswith(out.stdout))
                self.again()

    def test_zeros(self) -> None:
        self.file(sealed=False, floor=4097, size=4097)
        patch(self.path, 8760, bytes(4124)[:10596 - 8760])      # wholly above floor
        self.expect_fine(self.data[:8192] + bytes(1808))
        patch(self.path, 4636, bytes(4124))                     # floor lies in it
        self.expect_error("block 1: zeros")
        self.again()
        self.file(holes=True)
        patch(self.path, 4636, bytes(4124))
        self.expect_fine(self.data[:4096] + bytes(4096) + self.data[8192:])

    def test_blocks_of_another_file(self) -> None:
        self.file()
        other = self.v.file(self.v.root, b"g", make_volume.pattern(10000, 1))
        patch(self.path, 512, slurp(other)[512:4636])
        self.expect_error("block 0 does")

    def test_static_copies(self) -> None:
        junk = b"\xA5"
        self.file()
        patch(self.path, 100, junk)
        self.expect_fine(self.data, "a copy of a static header")
        patch(self.path, 228, junk)
        self.expect_error("static header does not")
        self.again()
        self.file()
        other = self.v.file(self.v.root, b"g", b"other")
        patch(self.path, 128, slurp(other)[:128])
        self.expect_fine(self.data, "different objects")
        patch(self.path, 0, slurp(other)[:128])
        self.expect_error("no mutable header")

    def test_static_fields(self) -> None:
        oid, dek = bytes(16), bytes(32)
        self.file()
        v = self.v
        for text, raw in (("flags", v.static(1, oid, dek, flags=1)), ("flags", v.static(1, oid, dek, rdev=5)),
                          ("says fifo", v.static(4, oid, dek)), ("says 9", v.static(9, oid, dek)),
                          ("version 2, which was not given", v.static(1, oid, dek, version=2)),
                          ("does not have", v.static(1, oid, dek, version=3)), ("no static", bytes(128)),
                          ("format 2", v.static(1, oid, dek).replace(b"LETHEOBJ\1", b"LETHEOBJ\2"))):
            with self.subTest(text):
                patch(self.path, 0, raw + raw)
                self.expect_error(text)

    def test_mutable_copies(self) -> None:
        self.file(sealed=False, floor=4096, size=4096)
        raw = slurp(self.path)
        head = reader.Volume(self.backing, KEK, 0, 1).static(raw[:128], {1})

        def make(counter: int, floor: int, flags: int) -> bytes:
            return self.v.mutable(head.oid, head.dek, counter, 10000, floor, flags)
        for error, a, b in (("differ", make(8, 10000, 1), make(7, 0, 0)), ("differ", make(7, 0, 0), make(8, 10000, 1)),
                            ("copy of a mutable", make(7, 0, 0), bytes(64)),
                            ("copy of a mutable", bytes(64), make(7, 0, 0))):
            patch(self.path, 256, a + b)
            self.expect_fine(self.data, error)
        for error, a, b in (("one counter", make(8, 0, 0), make(8, 1, 0)), ("flags", make(8, 0, 4), make(8, 0, 4)),
                            ("no mutable", bytes(64), bytes(64)), ("cut off", make(8, 10001, 0), make(7, 0, 0)),
                            ("cut off", make(7, 0, 0), make(8, 10001, 0))):
            patch(self.path, 256, a + b)
            self.expect_error(error)

    def test_reserved_is_ignored(self) -> None:
        self.file()
        patch(self.path, 384, b"x" * 128)
        self.expect_fine(self.data)


class Tree(Case):
    def test_planted(self) -> None:
        v = self.volume()
        for make in (os.mkfifo, lambda p: os.mknod(p, stat.S_IFSOCK | 0o600),
                     lambda p: os.mknod(p, stat.S_IFCHR, os.makedev(1, 5))):
            path = v.file(v.root, b"f", b"contents")
            os.unlink(path)
            try:
                make(path)
            except PermissionError:
                continue
            self.expect_error("not believed")
            os.unlink(path)

    def test_kind_exchanged(self) -> None:
        v = self.volume()
        link, path, node = v.symlink(v.root, b"l", b"t"), v.file(v.root, b"f", b"12"), v.node(v.root, b"n", 6, 259)
        target = os.readlink(link)
        os.unlink(link)
        os.symlink(make_volume.url64(slurp(path)[:128] + reader.unb64(target)[128:]), link)
        self.expect_error("says regular", b"l")
        patch(node, 0, reader.unb64(target)[:128])
        self.expect_error("says symlink", b"n")
        patch(node, 0, v.static(6, bytes(16), bytes(32), 259))
        patch(node, 40, b"\1")
        self.expect_error("static header does not", b"n")
        patch(node, 0, v.static(4, bytes(16), bytes(32), 259))
        self.expect_error("a number that its type has not", b"n")
        os.unlink(node)
        os.mkdir(node)
        self.expect_error("lethefs.dir", b"n")
        os.symlink(os.readlink(os.path.join(self.backing, "lethefs.dir")) + "A", os.path.join(node, "lethefs.dir"))
        self.expect_error("no static header", b"n")

    def test_names(self) -> None:
        v = self.volume()
        sub = v.mkdir(v.root, b"sub")
        path = v.file(v.root, b"f", b"contents")
        key = make_volume.derive(v.root.dek, v.root.oid, b"lethefs/1/dek/name")

        def entry(name: bytes) -> bytes:
            return AESGCMSIV(key).encrypt(bytes(12), name, b"lethefs/1/name" + v.root.oid)

        def long(c: bytes, h: bytes) -> str:
            os.symlink(make_volume.url64(c), os.path.join(self.backing, "lethefs.name." + make_volume.url64(h)))
            return "lethefs.long." + make_volume.url64(h)

        def digest(c: bytes) -> bytes:
            return hashlib.sha256(c).digest()
        whole = make_volume.url64(entry(b"12"))                  # 18 bytes, 24 characters
        ragged = make_volume.url64(entry(b"123"))                # 19 bytes, 26 characters: 4 bits over
        ragged = ragged[:-1] + ALPHABET[ALPHABET.index(ragged[-1]) + 1]
        bad = [make_volume.url64(entry(name)) for name in (b"", b".", b"..", b"a/b", b"a\0")]
        bad += [whole[:-1], whole + "=", ragged, "hello", "lethefs.unknown", "Grüße", "lethefs.long." + "c" * 43,
                long(entry(b"short"), digest(entry(b"short"))), long(entry(b"l" * 255), bytes(32)),
                long(entry(b"l" * 256), digest(entry(b"l" * 256)))]
        for name in bad:
            os.mkdir(os.path.join(self.backing, name))
        os.rename(path, os.path.join(sub.path, os.path.basename(path)))
        with open(os.path.join(sub.path, "lethefs.volume"), "w"):
            pass
        records, errors, warnings = read(self.backing)
        self.assertEqual(sorted(records), [b"", b"sub"])
        self.assertEqual((len(errors), warnings), (len(bad) + 2, []))

    def test_leftovers(self) -> None:
        v = self.volume()
        path = v.file(v.root, b"l" * 200, b"")
        os.unlink(path)
        os.mkdir(os.path.join(self.backing, "lethefs.tmp.AAAAAAAAAAAAAAAAAAAAAA"))
        os.mkdir(os.path.join(self.backing, "lethefs.overflow"))
        os.symlink("x", os.path.join(self.backing, "lethefs.overflow", "00" * 16 + ".1"))
        with open(os.path.join(self.backing, "lethefs.erase"), "w") as f:
            f.write("anything")
        records, errors, warnings = read(self.backing)
        self.assertEqual((list(records), errors, len(warnings)), ([b""], [], 3))
        shutil.rmtree(os.path.join(self.backing, "lethefs.overflow"))
        os.symlink(self.tmp, os.path.join(self.backing, "lethefs.overflow"))
        records, errors, _ = read(self.backing)
        self.assertEqual((list(records), len(errors)), ([b""], 1))

    def test_copied_object(self) -> None:
        v = self.volume()
        f, g = v.file(v.root, b"f", b"contents"), v.file(v.root, b"g", b"other")
        os.unlink(g)
        os.link(f, g)
        self.assertEqual(read(self.backing)[1:], ([], []))
        os.unlink(g)
        shutil.copy(f, g)
        self.assertEqual(len(read(self.backing)[2]), 1)

    def test_symlink_pieces(self) -> None:
        v = self.volume()
        path = v.symlink(v.root, b"l", b"t" * 4095)
        over = os.path.join(self.backing, "lethefs.overflow")
        pieces = sorted(os.path.join(over, n) for n in os.listdir(over))
        self.assertEqual(len(pieces), 5)
        texts = [os.readlink(p) for p in pieces]

        def replace(at: str, text: str) -> None:
            os.unlink(at)
            os.symlink(text, at)
        for error, k, text in (("target does not", 0, texts[1]), ("no end", 2, texts[2][:-1]),
                               ("target does not", 0, "A" * 1019 + "."), ("not base64url", 0, "A" * 1000 + ".A."),
                               ("target does not", 4, "."), ("no end", 4, texts[4][:-1]), ("no end", 4, "A" * 1020)):
            replace(pieces[k], text)
            self.expect_error(error, b"l")
            replace(pieces[k], texts[k])
        self.assertEqual(read(self.backing)[1], [])
        os.rename(pieces[3], pieces[3] + "0")
        self.expect_error("piece 4", b"l")
        replace(path, os.readlink(path)[:1000])
        self.expect_error("target does not", b"l")

    def test_targets_that_are_none(self) -> None:
        v = self.volume()
        for target in (b"", b"a\0b", b"t" * 4096):
            path = v.symlink(v.root, b"l", target)
            self.expect_error("no target", b"l")
            os.unlink(path)

    def test_xattrs(self) -> None:
        v = self.volume()
        f = v.file(v.root, b"f", b"contents", xattrs={b"user.a": b"one", b"user.b": b"two"})
        g = v.file(v.root, b"g", b"contents", xattrs={b"user.a": b"three"})
        os.setxattr(f, "user.planted", b"is not the volume's")
        self.expect_fine(b"contents")
        a, b = (n for n in os.listxattr(f) if n.startswith("user.lethefs."))
        old = os.getxattr(f, a)
        os.setxattr(f, a, os.getxattr(f, b))
        self.expect_error("attribute b'user")
        os.setxattr(f, a, b"short")
        self.expect_error("attribute b'user")
        os.setxattr(f, a, old)
        foreign = [n for n in os.listxattr(g)][0]
        os.setxattr(f, foreign, os.getxattr(g, foreign))
        self.expect_error("attribute name")


if __name__ == "__main__":
    unittest.main()
