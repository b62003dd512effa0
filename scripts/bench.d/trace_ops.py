"""How many requests the kernel sends for an operation, and how many system calls on the backing directory come of them.
The daemon is watched with strace; times are nothing that this tells."""

import os
import re
import signal
import subprocess

EACH = 20

# enum fuse_opcode, include/uapi/linux/fuse.h
OPCODES = {1: "LOOKUP", 2: "FORGET", 3: "GETATTR", 4: "SETATTR", 5: "READLINK", 6: "SYMLINK", 8: "MKNOD", 9: "MKDIR",
           10: "UNLINK", 11: "RMDIR", 12: "RENAME", 13: "LINK", 14: "OPEN", 15: "READ", 16: "WRITE", 17: "STATFS",
           18: "RELEASE", 20: "FSYNC", 21: "SETXATTR", 22: "GETXATTR", 23: "LISTXATTR", 24: "REMOVEXATTR", 25: "FLUSH",
           26: "INIT", 27: "OPENDIR", 28: "READDIR", 29: "RELEASEDIR", 30: "FSYNCDIR", 34: "ACCESS", 35: "CREATE",
           36: "INTERRUPT", 39: "IOCTL", 42: "BATCH_FORGET", 43: "FALLOCATE", 44: "READDIRPLUS", 45: "RENAME2", 46: "LSEEK",
           47: "COPY_FILE_RANGE", 50: "SYNCFS", 51: "TMPFILE", 52: "STATX"}

# Not calls on files, or the way to and from the kernel's FUSE.
OTHER = {"futex", "epoll_pwait", "epoll_wait", "nanosleep", "clock_nanosleep", "clock_gettime", "sched_yield", "mmap", "munmap",
         "madvise", "mprotect", "brk", "tgkill", "rt_sigreturn", "getpid", "gettid", "poll", "ppoll", "recvfrom", "getrandom",
         "rt_sigprocmask", "rt_sigaction", "clone", "clone3", "rseq", "set_robust_list", "sigaltstack", "sched_getaffinity",
         "exit", "pipe2", "restart_syscall", "wait4", "sched_setaffinity", "prctl", "statx_", "process_vm_readv"}


def create(at, n):
    os.close(os.open(f"{at}/made{n}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))


def write_new(at, n):
    fd = os.open(f"{at}/written{n}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    os.write(fd, b"x" * 2000)
    os.close(fd)


def overwrite(at, n):
    fd = os.open(f"{at}/old{n}", os.O_WRONLY)
    os.pwrite(fd, b"y" * 2000, 0)
    os.close(fd)


def rewrite(at, n):
    fd = os.open(f"{at}/old{n}", os.O_WRONLY | os.O_TRUNC)
    os.write(fd, b"y" * 2000)
    os.close(fd)


def append(at, n):
    fd = os.open(f"{at}/old{n}", os.O_WRONLY | os.O_APPEND)
    os.write(fd, b"z" * 100)
    os.close(fd)


def read(at, n):
    fd = os.open(f"{at}/old{n}", os.O_RDONLY)
    os.read(fd, 65536)
    os.close(fd)


def fsync_new(at, n):
    fd = os.open(f"{at}/synced{n}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    os.write(fd, b"x" * 2000)
    os.fsync(fd)
    os.close(fd)


def list_(at, n):
    for entry in os.scandir(f"{at}/full{n}"):
        entry.stat(follow_symlinks=False)


def missing(at, n):
    try:
        os.stat(f"{at}/missing{n}")
    except FileNotFoundError:
        pass


# Name; what is done; how it starts (cold: nothing cached; warm: it was done or looked up before); and the least that the FUSE
# protocol and an encrypting filesystem with one backing file for each file need for it, as (requests, backing calls).
OPERATIONS = [
    ("create, empty", create, "warm", ("LOOKUP CREATE", "open, write of the header")),
    ("create, write 2,000 bytes", write_new, "warm", ("LOOKUP CREATE WRITE", "open, one write")),
    ("the same, fsync", fsync_new, "warm", ("LOOKUP CREATE WRITE FSYNC", "open, one write, fsync")),
    ("stat, first", lambda at, n: os.stat(f"{at}/old{n}"), "cold", ("LOOKUP", "stat")),
    ("stat, again", lambda at, n: os.stat(f"{at}/old{n}"), "warm", ("none", "none")),
    ("stat of what is not there", missing, "cold", ("LOOKUP", "stat")),
    ("read 2,000 bytes, first", read, "cold", ("LOOKUP READ", "stat, open, read")),
    ("read 2,000 bytes, again", read, "warm", ("none", "none")),
    ("overwrite 2,000 bytes", overwrite, "warm", ("WRITE", "write to the log, write in place")),
    ("append 100 bytes", append, "warm", ("WRITE", "write")),
    ("rewrite by O_TRUNC", rewrite, "warm", ("SETATTR WRITE", "write to the log, truncate, write")),
    ("chmod", lambda at, n: os.chmod(f"{at}/old{n}", 0o600), "warm", ("SETATTR", "chmod, stat")),
    ("mkdir", lambda at, n: os.mkdir(f"{at}/directory{n}"), "warm", ("LOOKUP MKDIR", "mkdir, header, stat")),
    ("list a directory of 50 with attributes, first", list_, "cold", ("LOOKUP 2 READDIRPLUS", "stat, open, header, getdents, 50 stats")),
    ("the same, again", list_, "warm", ("none", "none")),
    ("rename", lambda at, n: os.rename(f"{at}/old{n}", f"{at}/renamed{n}"), "warm", ("LOOKUP RENAME", "rename")),
    ("delete", lambda at, n: os.unlink(f"{at}/renamed{n}"), "warm", ("UNLINK FORGET", "unlink")),
    ("rmdir", lambda at, n: os.rmdir(f"{at}/directory{n}"), "warm", ("RMDIR FORGET", "unlink of the header, rmdir")),
]


def prepare(at):
    os.makedirs(at)
    for n in range(EACH):
        with open(f"{at}/old{n}", "wb") as file:
            file.write(b"a" * 2000)
        os.mkdir(f"{at}/full{n}")
        for m in range(50):
            with open(f"{at}/full{n}/file{m}", "wb") as file:
                file.write(b"b" * 100)


class Watch:
    """strace on a daemon and its children, from enter to exit."""

    def __init__(self, pid, path):
        self.pid, self.path = pid, path

    def __enter__(self):
        from contenders import family
        awaited = {str(pid) for pid in family(self.pid)}
        pids = [word for pid in awaited for word in ("-p", pid)]
        self.strace = subprocess.Popen(["strace", "-f", "-y", "-xx", "-s", "16", "-o", self.path, *pids],
                                       stderr=subprocess.PIPE, text=True)
        while awaited:
            line = self.strace.stderr.readline()
            if not line:
                raise SystemExit("bench: strace cannot attach")
            attached = re.search(r"Process (\d+) attached", line)
            awaited.discard(attached and attached[1])
        return self

    def __exit__(self, *_):
        self.strace.send_signal(signal.SIGINT)
        self.strace.communicate()


CALL = re.compile(r"^(\d+) +(?:<\.\.\. (\w+) resumed>|(\w+)\()(.*)$")


def count(path):
    """Requests by name, and backing calls by name, in what strace wrote."""
    requests, calls, begun = {}, {}, {}
    with open(path, encoding="ascii", errors="replace") as lines:
        for line in lines:
            found = CALL.match(line)
            if not found:
                continue
            pid, resumed, name, rest = found.groups()
            name = resumed or name
            if not resumed and rest.endswith("<unfinished ...>"):
                begun[pid] = rest
                continue
            rest = begun.pop(pid, "") + rest if resumed else rest
            result = re.search(r"= (-?\d+)[^=]*$", rest)
            if name in OTHER or not result:
                continue
            first = rest.split(",")[0]
            # -y writes descriptors as 3</dev/fuse>, its paths under -xx in hexadecimal.
            where = re.sub(r"\\x(..)", lambda m: chr(int(m[1], 16)), first)
            if "/dev/fuse" in where:
                if name in ("read", "readv", "splice") and int(result[1]) > 0:
                    bytes_ = re.findall(r"\\x(..)", rest.split('"')[1]) if name == "read" and rest.count('"') > 1 else []
                    opcode = int("".join(reversed(bytes_[4:8])), 16) if len(bytes_) >= 8 else 0
                    requests[OPCODES.get(opcode, "?")] = requests.get(OPCODES.get(opcode, "?"), 0) + 1
                continue
            if re.search(r"<(pipe|socket|anon_inode)", where) or name.startswith("clock_"):
                continue
            calls[name] = calls.get(name, 0) + 1
    # The mark at the end.
    requests.pop("STATFS", None)
    calls.pop("fstatfs", None)
    return requests, calls


def each(counted):
    """Per operation, dearest first, rounded: 20 operations share a FORGET."""
    parts = []
    for name, n in sorted(counted.items(), key=lambda item: (-item[1], item[0])):
        rate = n / EACH
        if rate > 0.1:
            parts.append(name if abs(rate - 1) < 0.05 else f"{rate:.3g} {name}")
    return ", ".join(parts) or "none"


def watch_all(contender):
    rows = {}
    log = os.path.join(contender.at, "strace.out")
    contender.mount()
    at = os.path.join(contender.place, "top")
    prepare(at)
    contender.unmount()
    for name, operation, start, _ in OPERATIONS:
        contender.mount()
        if start == "warm":
            list_once(at)
        else:
            os.listdir(at)  # the directory's own keys; its entries come with it where there is readdirplus
            contender.unmount()
            contender.mount()
            os.stat(at)
        if name.endswith("again"):
            for n in range(EACH):
                operation(at, n)
        with Watch(contender.daemon.pid, log):
            for n in range(EACH):
                operation(at, n)
            os.statvfs(contender.place)
        rows[name] = count(log)
        contender.unmount()
    return rows


def list_once(at):
    """Looks everything up and reads it, so that the names, attributes and keys are there."""
    for n in range(EACH):
        for name in (f"old{n}", f"renamed{n}"):
            try:
                with open(f"{at}/{name}", "rb") as file:
                    file.read()
            except FileNotFoundError:
                pass
    for path in (f"{at}/directory{n}" for n in range(EACH)):
        try:
            os.listdir(path)
        except FileNotFoundError:
            pass


def measure(there):
    rows = {contender.name: watch_all(contender) for contender in there}
    lines = ["| operation | requests | ideal | backing calls | ideal |", "|---|---|---|---|---|"]
    for name, _, _, (ideal_requests, ideal_calls) in OPERATIONS:
        requests, calls = rows["lethefs"][name]
        lines.append(f"| {name} | {each(requests)} | {ideal_requests} | {each(calls)} | {ideal_calls} |")
    others = [c.name for c in there if c.name != "lethefs"]
    if others:
        names = ["lethefs", *others]
        lines += ["", "| requests; backing calls | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
        total = lambda counted: f"{sum(counted.values()) / EACH:.3g}"
        for name, *_ in OPERATIONS:
            lines.append(f"| {name} | " + " | ".join("; ".join(map(total, rows[n][name])) for n in names) + " |")
    return "\n".join(lines)
