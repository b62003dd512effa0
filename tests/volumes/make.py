#!/usr/bin/env python3
"""How the frozen volumes in this directory were made: real volumes of format 1, one fault each.

    make.py LETHEFS OUT      (root, /dev/fuse, Python with `cryptography` as scripts/test installs it)

What is tested are the archives. Once committed they are never made again: a program that reads only what it writes itself
today has no format. A new fault gets a new archive, made by adding it here and copying that archive alone.

The volumes are made by a real mount. What is in them, and so what a mount must show, is written down from what was put in,
never from what was read back. Keys and names come from `tests/reader/reader.py`. The key in each archive is a test key.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import hashlib
import hmac
import importlib.util
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

spec = importlib.util.spec_from_file_location("reader", Path(__file__).parent.parent / "reader" / "reader.py")
assert spec and spec.loader
reader = importlib.util.module_from_spec(spec)
sys.modules["reader"] = reader
spec.loader.exec_module(reader)

LETHEFS, OUT = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
HEADER, STORED = 512, 4124
LONG, LONG2 = "n" * 210 + "-long", "m" * 220 + "-long"
TARGET = "dir/" * 875


def data(size: int, salt: str) -> bytes:
    """Bytes without a block of zeros, the same for ever."""
    out = b""
    while len(out) < size:
        out += hashlib.sha256(f"{salt} {len(out)}".encode()).digest()
    return out[:size]


def close(fd: int) -> None:
    """Of a file in a mount that is dead."""
    with contextlib.suppress(OSError):
        os.close(fd)


class Made:
    """A volume under construction, and what a mount of it must show."""

    def __init__(self, where: Path) -> None:
        self.where = where
        self.backing, self.mnt, self.key = where / "backing", where / "mnt", where / "key"
        self.env = {"PATH": os.environ["PATH"], "HOME": str(where)}
        for name in ("trust", "run", "state"):
            (where / name).mkdir(exist_ok=True)
            self.env[f"LETHEFS_{'RUNTIME' if name == 'run' else name.upper()}_DIR"] = str(where / name)
        self.mnt.mkdir(exist_ok=True)
        self.shown: dict[str, dict[str, Any]] = {}
        self.unlisted: list[str] = []
        self.findings: list[str] = []
        self.refused: int | None = None

    def run(self, *args: str) -> str:
        done = subprocess.run([LETHEFS, *args], cwd=self.where, env=self.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def mount(self) -> None:
        self.pid = json.loads(self.run("mount", "backing", "mnt", "--trust", "--kms", f"file://{self.key}", "--json"))["pid"]

    def umount(self) -> None:
        self.run("umount", "mnt")

    def kill(self) -> None:
        """The daemon's end in the middle of work. Nothing is lost that it took from the kernel."""
        fd = os.open(self.mnt, os.O_RDONLY)
        assert ctypes.CDLL(None).syncfs(fd) == 0
        os.close(fd)
        os.kill(self.pid, signal.SIGKILL)
        subprocess.run(["umount", "-l", self.mnt], check=True)

    def copy(self, where: Path) -> Made:
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir()
        subprocess.run(["cp", "-a", self.backing, self.key, where], check=True)
        other = Made(where)
        other.shown = json.loads(json.dumps(self.shown))
        return other

    # What is put in, and written down.

    def file(self, path: str, contents: bytes) -> None:
        (self.mnt / path).write_bytes(contents)
        self.is_file(path, contents)

    def is_file(self, path: str, contents: bytes) -> None:
        self.shown[path] = {"type": "file", "size": len(contents), "sha256": hashlib.sha256(contents).hexdigest()}

    def directory(self, path: str) -> None:
        (self.mnt / path).mkdir()
        self.shown[path] = {"type": "directory"}

    def link(self, path: str, target: str) -> None:
        (self.mnt / path).symlink_to(target)
        self.shown[path] = {"type": "link", "target": target}

    def attribute(self, path: str, name: str, value: str) -> None:
        os.setxattr(self.mnt / path, name, value.encode())
        self.shown[path].setdefault("xattrs", {})[name] = value

    # Below it.

    def volume(self) -> Any:
        return reader.Volume(str(self.backing), self.kek(), 0, 1)

    def body(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.backing / "lethefs.volume").read_bytes().split(b"\n")[0])
        return found

    def kek(self) -> bytes:
        """docs/KMS.md, Key file; docs/FORMAT.md, section 3, the binding."""
        key, body = json.loads(self.key.read_bytes()), self.body()
        text = body["scopes"][0]["keks"][0]["slots"][0]["wrapped"].removeprefix("lethefs-file:v1:")
        wrapped = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        derive = HKDF(SHA256(), 32, bytes.fromhex(key["key_id"]), b"lethefs/1/file-kms")
        binding = b"lethefs/1/kek/" + bytes.fromhex(body["volume_id"]) + bytes(4) + (1).to_bytes(4, "little")
        return AESGCMSIV(derive.derive(base64.b64decode(key["key"]))).decrypt(wrapped[:12], wrapped[12:], binding)

    def find(self, plain: str) -> Path:
        """Where a plaintext path lies."""
        at, volume = self.backing, self.volume()
        for name in plain.split("/"):
            fd = os.open(at, os.O_RDONLY)
            at = at / volume.backing_name(volume.directory_header(fd), name.encode())[0]
            os.close(fd)
        return at

    def sidecar(self, plain: str) -> Path:
        entry = self.find(plain)
        return entry.with_name(entry.name.replace("lethefs.long.", "lethefs.name."))

    def put(self, plain: str, at: int, contents: bytes) -> None:
        with self.find(plain).open("r+b") as f:
            f.seek(at)
            f.write(contents)

    def flip(self, path: Path, at: int) -> None:
        contents = bytearray(path.read_bytes())
        contents[at] ^= 1
        path.write_bytes(contents)

    def relink(self, path: Path, target: str) -> None:
        path.unlink()
        path.symlink_to(target)

    # What a mount must show of it.

    def fails(self, *paths: str) -> None:
        for path in paths:
            self.shown[path] = {"type": self.shown[path]["type"], "error": "EIO"}

    def gone(self, *paths: str) -> None:
        for path in list(self.shown):
            if any(path == gone or path.startswith(gone + "/") for gone in paths):
                del self.shown[path]


def base(where: Path) -> Made:
    """Small, so that fifty of it are small; one of everything."""
    made = Made(where)
    made.run("init", "backing", "--kms", f"file://{made.key}", "--label", "frozen")
    made.mount()
    for size in (0, 1, 100, 4096, 4097, 12_293):
        made.file(f"size-{size}", data(size, f"size-{size}"))
    made.directory("dir")
    made.directory("dir/sub")
    made.directory("other")
    made.file("dir/one", data(500, "one"))
    made.file("dir/sub/two", data(300, "two"))
    made.file(f"dir/{LONG}", data(50, "long"))
    made.file(f"dir/{LONG2}", data(60, "long2"))
    made.directory(LONG)
    made.file(f"{LONG}/in", data(10, "in"))
    made.link("link", "dir/one")
    made.link("far", TARGET)
    os.mkfifo(made.mnt / "pipe", 0o640)
    made.shown["pipe"] = {"type": "fifo"}
    os.link(made.mnt / "size-100", made.mnt / "again")
    made.shown["again"] = dict(made.shown["size-100"])
    made.attribute("size-4096", "user.note", "of a file")
    made.attribute("dir", "user.note", "of a directory")
    with (made.mnt / "sparse").open("wb") as f:
        f.seek(300_000)
        f.write(data(100, "sparse"))
        f.truncate(1_000_000)
    made.is_file("sparse", bytes(300_000) + data(100, "sparse") + bytes(699_900))
    made.umount()
    return made


FAULTS: dict[str, Callable[[Made], None]] = {}


def fault(made: Callable[[Made], None]) -> Callable[[Made], None]:
    FAULTS[made.__name__.replace("_", "-")] = made
    return made


@fault
def sound(made: Made) -> None:
    """Nothing is wrong with it."""


@fault
def sound_sizes(made: Made) -> None:
    """Every size around the borders of blocks, and modes and owners."""
    made.mount()
    for size in (27, 28, 29, 3555, 3556, 3557, 4095, 8191, 8192, 8193, 12_288, 100_000):
        made.file(f"size-{size}", data(size, f"size-{size}"))
    made.file("mode", b"mode")
    os.chmod(made.mnt / "mode", 0o4751)
    os.chown(made.mnt / "mode", 1234, 5678)
    os.chmod(made.mnt / "mode", 0o4751)
    made.shown["mode"] |= {"mode": 0o4751, "uid": 1234, "gid": 5678}
    os.mknod(made.mnt / "null", 0o620 | stat.S_IFCHR, os.makedev(1, 3))
    made.shown["null"] = {"type": "char", "rdev": os.makedev(1, 3)}
    os.mknod(made.mnt / "socket", 0o600 | stat.S_IFSOCK)
    made.shown["socket"] = {"type": "socket"}
    made.umount()


def remake(made: Made, change: Callable[[bytearray], None], flags: int | None = None) -> None:
    """Another genuine header for a file, as a program of later might write it."""
    volume, path = made.volume(), made.find("size-4097")
    raw = bytearray(path.read_bytes())
    head = volume.static(bytes(raw[:128]), reader.REGULAR)
    change(raw)
    for at in (0, 128):
        raw[at + 68:at + 80] = data(12, f"nonce {at}")
        aad = b"lethefs/1/dek" + volume.id + bytes(raw[at:at + 68])
        raw[at + 80:at + 128] = AESGCMSIV(volume.wrapping).encrypt(bytes(raw[at + 68:at + 80]), head.dek, aad)
    if flags is not None:
        aad = b"lethefs/1/mutable" + volume.id + head.oid
        cipher = AESGCMSIV(head.key("header"))
        plain = bytearray(cipher.decrypt(bytes(raw[256:268]), bytes(raw[268:320]), aad))
        plain[24:28] = flags.to_bytes(4, "little")
        for at in (256, 320):
            raw[at:at + 64] = data(12, f"nonce {at}") + cipher.encrypt(data(12, f"nonce {at}"), bytes(plain), aad)
    path.write_bytes(raw)


@fault
def sound_reserved(made: Made) -> None:
    """Reserved bytes that are not 0: news that a reader of today may ignore."""
    def change(raw: bytearray) -> None:
        for at in (0, 128):
            raw[at + 20:at + 24] = b"news"
            raw[at + 48:at + 68] = data(20, "news")
        raw[384:512] = data(128, "news")
    remake(made, change)


@fault
def header_flags(made: Made) -> None:
    """A flag in the static header: news that a reader of today must not ignore."""
    def change(raw: bytearray) -> None:
        raw[11] = raw[128 + 11] = 1
    remake(made, change)
    made.fails("size-4097")
    made.findings = ["header"]


@fault
def mutable_header_flags(made: Made) -> None:
    """The same in the mutable one."""
    remake(made, lambda _: None, 5)
    made.fails("size-4097")
    made.findings = ["mutable-header"]


@fault
def volume_file_missing(made: Made) -> None:
    (made.backing / "lethefs.volume.bak").unlink()
    made.findings = ["volume-file"]


@fault
def volume_file_damaged(made: Made) -> None:
    made.flip(made.backing / "lethefs.volume", 100)
    made.findings = ["volume-file"]


def next_generation(made: Made) -> bytes:
    body = made.body() | {"generation": 2}
    line = json.dumps(body, separators=(",", ":")).encode()
    key = reader.hkdf(made.kek(), bytes.fromhex(body["volume_id"]), b"lethefs/1/kek/volume" + bytes(4) + (1).to_bytes(4, "little"))
    mac = hmac.digest(key, b"lethefs/1/volume-file" + line, "sha256").hex()
    auth = json.dumps({"auth": [{"scope": 0, "version": 1, "mac": mac}]}, separators=(",", ":")).encode()
    return line + b"\n" + auth + b"\n"


@fault
def volume_file_older(made: Made) -> None:
    """One copy is of the generation before."""
    (made.backing / "lethefs.volume.bak").write_bytes(next_generation(made))
    made.findings = ["volume-file"]


@fault
def volume_file_both(made: Made) -> None:
    for name in ("lethefs.volume", "lethefs.volume.bak"):
        made.flip(made.backing / name, 100)
    made.refused = 10


@fault
def volume_file_mac(made: Made) -> None:
    """Both copies say something that nobody with the key has said."""
    for name in ("lethefs.volume", "lethefs.volume.bak"):
        path = made.backing / name
        path.write_bytes(path.read_bytes().replace(b'"label":"frozen"', b'"label":"melted"'))
    made.refused = 10


@fault
def volume_file_extra(made: Made) -> None:
    """News of a later time, where there is room for it: nothing is wrong."""
    body = made.body() | {"generation": 2, "compat": ["from-later"]}
    for at in (body, body["scopes"][0], body["scopes"][0]["keks"][0], body["scopes"][0]["keks"][0]["slots"][0]):
        at["extra"] = {"from_later": {"a": [1, None, "x"]}}
    slot = json.loads(json.dumps(body["scopes"][0]["keks"][0]["slots"][0]))
    body["scopes"][0]["keks"][0]["slots"].append(slot | {"id": 2, "identity": {"provider": "from-later", "n": 5}})
    made.body = lambda: body  # type: ignore[method-assign]
    contents = next_generation(made)
    for name in ("lethefs.volume", "lethefs.volume.bak"):
        (made.backing / name).write_bytes(contents)


@fault
def volume_file_incompat(made: Made) -> None:
    """A feature that this program cannot know."""
    body = made.body() | {"generation": 2, "incompat": ["from-later"]}
    made.body = lambda: body  # type: ignore[method-assign]
    contents = next_generation(made)
    for name in ("lethefs.volume", "lethefs.volume.bak"):
        (made.backing / name).write_bytes(contents)
    made.refused = 10


@fault
def root_header(made: Made) -> None:
    (made.backing / "lethefs.dir").unlink()
    made.refused, made.findings = 10, ["root-header"]


@fault
def root_header_foreign(made: Made) -> None:
    made.relink(made.backing / "lethefs.dir", os.readlink(made.find("dir") / "lethefs.dir"))
    made.refused, made.findings = 10, ["root-header"]


@fault
def directory_header(made: Made) -> None:
    (made.find("dir") / "lethefs.dir").unlink()
    made.gone("dir")
    made.shown["dir"] = {"type": "directory", "error": "EIO"}
    made.findings = ["directory-header"]


@fault
def directory_header_foreign(made: Made) -> None:
    """Another directory's: genuine, so it opens, and then nothing in it does."""
    made.relink(made.find("dir") / "lethefs.dir", os.readlink(made.find("other") / "lethefs.dir"))
    made.gone("dir")
    made.shown["dir"] = {"type": "directory"}
    made.findings = ["attribute", "duplicate", "name", "sidecar"]


@fault
def header(made: Made) -> None:
    made.put("size-4097", 0, bytes(256))
    made.fails("size-4097")
    made.findings = ["header"]


@fault
def header_copy_static(made: Made) -> None:
    made.flip(made.find("size-4097"), 90)
    made.findings = ["header-copy"]


@fault
def header_copy_mutable(made: Made) -> None:
    made.flip(made.find("size-4097"), 256 + 64 + 20)
    made.findings = ["header-copy"]


@fault
def mutable_header(made: Made) -> None:
    made.put("size-4097", 256, bytes(128))
    made.fails("size-4097")
    made.findings = ["mutable-header"]


@fault
def object_type(made: Made) -> None:
    made.put("size-4097", 0, 2 * made.find("pipe").read_bytes())
    made.fails("size-4097")
    made.findings = ["object-type"]


@fault
def truncated(made: Made) -> None:
    """Below its seal, at the border of a block."""
    os.truncate(made.find("size-12293"), HEADER + 2 * STORED)
    made.fails("size-12293")
    made.findings = ["truncated"]


def floored(made: Made) -> bytes:
    """A file that a killed daemon left unsealed: floor 8,192, then a block that was never flushed."""
    made.mount()
    contents = data(12_288, "floored")
    fd = os.open(made.mnt / "floored", os.O_CREAT | os.O_RDWR, 0o644)
    os.pwrite(fd, contents[:8192], 0)
    os.fsync(fd)
    os.fsync(fd)
    os.pwrite(fd, contents[8192:], 8192)
    made.kill()
    close(fd)
    for n in range(2):
        (made.backing / f"lethefs.log.{n}").unlink(missing_ok=True)
    made.is_file("floored", contents)
    return contents


@fault
def unsealed(made: Made) -> None:
    """Left by a crash, and nothing wrong with it."""
    floored(made)


@fault
def truncated_floor(made: Made) -> None:
    floored(made)
    os.truncate(made.find("floored"), HEADER + STORED)
    made.fails("floored")
    made.findings = ["truncated"]


@fault
def unsealed_zero(made: Made) -> None:
    """A block above the floor never reached the medium: zeros, and no fault."""
    contents = floored(made)
    made.put("floored", HEADER + 2 * STORED, bytes(STORED))
    made.is_file("floored", contents[:8192] + bytes(4096))


@fault
def unsealed_torn(made: Made) -> None:
    """One sector of it did not."""
    contents = floored(made)
    made.put("floored", 17 * 512 + 1024, bytes(512))
    made.is_file("floored", contents[:8192] + bytes(4096))


@fault
def unsealed_short(made: Made) -> None:
    """Its end did not: the file ends with a sector."""
    contents = floored(made)
    os.truncate(made.find("floored"), 23 * 512)
    made.is_file("floored", contents[:8192] + bytes(23 * 512 - HEADER - 2 * STORED - 28))


@fault
def block_below_floor(made: Made) -> None:
    """A zeroed block below the floor is no hole, also once the file is sealed again."""
    floored(made)
    made.put("floored", HEADER, bytes(STORED))
    made.fails("floored")
    made.findings = ["block"]


@fault
def extended(made: Made) -> None:
    os.truncate(made.find("size-4097"), HEADER + 3 * STORED)
    made.fails("size-4097")
    made.findings = ["extended"]


@fault
def block_flipped(made: Made) -> None:
    made.flip(made.find("size-12293"), HEADER + STORED + 50)
    made.fails("size-12293")
    made.findings = ["block"]


@fault
def block_swapped(made: Made) -> None:
    raw = made.find("size-12293").read_bytes()
    a, b = raw[HEADER:HEADER + STORED], raw[HEADER + STORED:HEADER + 2 * STORED]
    made.put("size-12293", HEADER, b + a)
    made.fails("size-12293")
    made.findings = ["block"]


@fault
def block_zeroed(made: Made) -> None:
    made.put("size-12293", HEADER + STORED, bytes(STORED))
    made.fails("size-12293")
    made.findings = ["block"]


@fault
def block_foreign(made: Made) -> None:
    made.put("size-12293", HEADER, made.find("size-4096").read_bytes()[HEADER:])
    made.fails("size-12293")
    made.findings = ["block"]


@fault
def name_moved(made: Made) -> None:
    """To another directory, where its name does not decrypt."""
    entry = made.find("dir/one")
    entry.rename(made.find("other") / entry.name)
    made.gone("dir/one")
    made.findings = ["name"]


@fault
def name_forged(made: Made) -> None:
    made.find("size-1").rename(made.backing / reader.b64(data(30, "forged")))
    made.gone("size-1")
    made.findings = ["name"]


@fault
def sidecar(made: Made) -> None:
    made.sidecar(f"dir/{LONG}").unlink()
    made.unlisted = [f"dir/{LONG}"]
    made.findings = ["sidecar"]


@fault
def sidecar_foreign(made: Made) -> None:
    """Another entry's."""
    made.relink(made.sidecar(f"dir/{LONG}"), os.readlink(made.sidecar(f"dir/{LONG2}")))
    made.unlisted = [f"dir/{LONG}"]
    made.findings = ["sidecar"]


@fault
def sidecar_orphan(made: Made) -> None:
    made.find(f"dir/{LONG}").unlink()
    made.gone(f"dir/{LONG}")
    made.findings = ["sidecar-orphan"]


@fault
def planted_fifo(made: Made) -> None:
    path = made.find("size-1")
    path.unlink()
    os.mkfifo(path)
    made.shown["size-1"] = {"type": "none", "error": "EIO"}
    made.unlisted = ["size-1"]
    made.findings = ["planted"]


@fault
def planted_device(made: Made) -> None:
    path = made.find("size-1")
    path.unlink()
    os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    made.shown["size-1"] = {"type": "none", "error": "EIO"}
    made.unlisted = ["size-1"]
    made.findings = ["planted"]


@fault
def link(made: Made) -> None:
    path = made.find("link")
    target = os.readlink(path)
    made.relink(path, target[:-3] + ("A" if target[-3] != "A" else "B") + target[-2:])
    made.fails("link")
    made.findings = ["link"]


@fault
def link_planted(made: Made) -> None:
    made.relink(made.find("link"), "/etc/passwd")
    made.fails("link")
    made.findings = ["link"]


@fault
def link_tail(made: Made) -> None:
    next(path for path in (made.backing / "lethefs.overflow").iterdir() if path.name.endswith(".2")).unlink()
    made.fails("far")
    made.findings = ["link-tail"]


@fault
def link_tail_orphan(made: Made) -> None:
    made.find("far").unlink()
    made.gone("far")
    made.findings = ["link-tail-orphan"]


@fault
def attribute(made: Made) -> None:
    path = made.find("size-4096")
    name = next(name for name in os.listxattr(path) if name.startswith("user.lethefs."))
    value = bytearray(os.getxattr(path, name))
    value[-1] ^= 1
    os.setxattr(path, name, bytes(value))
    made.shown["size-4096"]["xattrs"] = {"user.note": None}
    made.findings = ["attribute"]


def crash(made: Made) -> None:
    """Changes of every kind, taken and in the log; then the end."""
    made.mount()
    contents = data(12_293, "size-12293")
    fds = {name: os.open(made.mnt / name, os.O_RDWR) for name in ("size-12293", "size-4097", "size-4096", "size-100")}
    os.pwrite(fds["size-12293"], data(4096, "new 1"), 4096)
    os.fdatasync(fds["size-12293"])
    os.pwrite(fds["size-4097"], data(4096, "new 2"), 0)
    os.fdatasync(fds["size-4097"])
    os.ftruncate(fds["size-4096"], 1000)
    os.pwrite(fds["size-100"], data(500, "new 3"), 90)
    made.file("made", data(6000, "made"))
    made.kill()
    for fd in fds.values():
        close(fd)
    made.is_file("size-12293", contents[:4096] + data(4096, "new 1") + contents[8192:])
    made.is_file("size-4097", data(4096, "new 2") + data(4097, "size-4097")[4096:])
    xattrs = made.shown["size-4096"]["xattrs"]
    made.is_file("size-4096", data(4096, "size-4096")[:1000])
    made.shown["size-4096"]["xattrs"] = xattrs
    made.is_file("size-100", data(100, "size-100")[:90] + data(500, "new 3"))
    made.shown["again"] = dict(made.shown["size-100"])


@fault
def unclean(made: Made) -> None:
    crash(made)
    made.findings = ["unclean"]


@fault
def log(made: Made) -> None:
    """A record in the middle, which was on the medium, is damaged: the others still count, and the loss is told."""
    before = made.find("size-12293").read_bytes()
    crash(made)
    made.is_file("size-12293", data(12_293, "size-12293"))
    path = made.backing / "lethefs.log.0"
    raw = path.read_bytes()
    records = [at for at in range(512, len(raw), 512) if raw[at:at + 8] == b"LETHEREC"]
    assert len(records) > 4
    # The first is the header that opened the file, the second its block, which is not in place yet.
    assert made.find("size-12293").read_bytes()[HEADER:] == before[HEADER:]
    made.flip(path, records[1] + 60)
    made.findings = ["log", "unclean"]


@fault
def duplicate(made: Made) -> None:
    """A file copied under another name: genuine, twice."""
    made.mount()
    (made.mnt / "copy").write_bytes(b"")
    made.umount()
    shutil.copyfile(made.find("size-4097"), made.find("copy"))
    made.is_file("copy", data(4097, "size-4097"))
    made.findings = ["duplicate"]


@fault
def leftover(made: Made) -> None:
    """A file and an empty directory under temporary names."""
    (made.backing / ("lethefs.tmp." + reader.b64(data(16, "t1")))).write_bytes(data(512, "leftover"))
    directory = made.backing / ("lethefs.tmp." + reader.b64(data(16, "t2")))
    directory.mkdir()
    (directory / "lethefs.dir").symlink_to(os.readlink(made.find("other") / "lethefs.dir"))
    shutil.rmtree(made.find("other"))
    made.gone("other")
    made.findings = ["leftover"]


@fault
def displaced(made: Made) -> None:
    """A directory under a temporary name, with something in it."""
    made.find("dir").rename(made.backing / ("lethefs.tmp." + reader.b64(data(16, "t3"))))
    made.gone("dir")
    made.findings = ["displaced"]


@fault
def foreign(made: Made) -> None:
    (made.backing / "lethefs.unknown").write_bytes(b"?")
    made.findings = ["foreign"]


@fault
def foreign_name(made: Made) -> None:
    """Not base64url: somebody put it there."""
    (made.backing / "not a name").write_bytes(b"?")
    made.findings = ["foreign"]


def newborn(made: Made) -> bytes:
    made.mount()
    made.file("newborn", data(5000, "newborn"))
    made.kill()
    for n in range(2):
        (made.backing / f"lethefs.log.{n}").unlink(missing_ok=True)
    return data(5000, "newborn")


@fault
def birth(made: Made) -> None:
    """After a power cut nothing of a new file is there but its making: empty."""
    newborn(made)
    os.truncate(made.find("newborn"), 0)
    made.is_file("newborn", b"")


@fault
def birth_blocks(made: Made) -> None:
    """Its blocks are there, its header is not."""
    newborn(made)
    made.put("newborn", 0, bytes(512))


@fault
def birth_missing(made: Made) -> None:
    """The same without the attribute: nothing has its key any more."""
    newborn(made)
    made.put("newborn", 0, bytes(512))
    os.removexattr(made.find("newborn"), "user.lethefs-birth")
    made.fails("newborn")
    made.findings = ["header"]


def main() -> None:
    OUT.mkdir(exist_ok=True)
    manifest: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="lethefs-make.") as temporary:
        where = Path(temporary)
        (where / "base").mkdir()
        whole = base(where / "base")
        for name, make in FAULTS.items():
            made = whole.copy(where / "made")
            make(made)
            subprocess.run(["tar", "--create", "--gzip", "--sparse", "--xattrs", "--xattrs-include=user.*", "--sort=name",
                            "--numeric-owner", "--file", OUT / f"{name}.tar.gz", "-C", made.where, "key", "backing"], check=True)
            about = " ".join((make.__doc__ or "").split())
            manifest[name] = {"about": about, "findings": made.findings, "refused": made.refused, "unlisted": made.unlisted,
                              "shows": {} if made.refused else made.shown}
            print(name, (OUT / f"{name}.tar.gz").stat().st_size)
    (OUT / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


main()
