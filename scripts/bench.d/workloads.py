"""What is timed. Each workload starts on a filesystem that was mounted just now, so everything is cold;
a warm one has run once before, untimed. What it needs is made by an earlier one of its group."""

import os
import random
import shutil
import subprocess
import time

COLD, WARM = "cold", "warm"


class Workload:
    """`work(place)` returns the seconds it took, or None: then the time of the whole call counts."""

    def __init__(self, name, work, start=COLD, group="files"):
        self.name, self.work, self.start, self.group = name, work, start, group

    def time(self, place):
        begun = time.monotonic()
        taken = self.work(place)
        return time.monotonic() - begun if taken is None else taken


class Sizes:
    """How much of everything."""

    def __init__(self, quick):
        self.mib = 64 if quick else 256
        self.random = 1000 if quick else 4000
        self.direct = 1000 if quick else 4000
        self.synced = 50 if quick else 200
        self.appends = 10_000 if quick else 50_000
        self.small = 1000 if quick else 5000
        self.passes = 10
        self.transactions = 50 if quick else 200
        self.quick = quick


class NotThere(Exception):
    """The filesystem has no such thing."""


def load(program, *arguments):
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode == 3:
        raise NotThere
    if done.returncode != 0:
        raise SystemExit(f"bench: {' '.join(map(str, arguments))}: {done.stderr.strip()}")
    return float(done.stdout)


def shell(*command, cwd=None, env=None):
    """The command's output goes where nobody reads it, but is made."""
    done = subprocess.run(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"bench: {' '.join(command)} in {cwd}: {done.stderr.strip()}")


def sqlite(place, mode, transactions):
    """One row and its index in each transaction, full sync."""
    path = os.path.join(place, f"{mode}.db")
    source = random.Random(1)
    lines = [f"pragma journal_mode={mode};", "pragma synchronous=full;",
             "create table if not exists t (k integer primary key, v text, w integer);",
             "create index if not exists i on t (w);"]
    lines += [f"insert into t (v, w) values ('{'v' * 200}', {source.randrange(1 << 30)});" for _ in range(transactions)]
    done = subprocess.run(["sqlite3", "-bail", path], input="\n".join(lines), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"bench: sqlite3 on {path}: {done.stderr.strip()}")


def build(place, tree):
    """Every C source of the crate `ring` of the tree, two compilers at a time; objects beside."""
    (ring,) = [name for name in os.listdir(os.path.join(place, tree)) if name.startswith("ring-")]
    shell("sh", "-c", "find crypto -name '*.c' | sort | xargs -P 2 -I% gcc -O1 -Iinclude -Ipregenerated -c % -o %.o",
          cwd=os.path.join(place, tree, ring))


GIT = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1", "GIT_AUTHOR_NAME": "bench",
       "GIT_AUTHOR_EMAIL": "bench@localhost", "GIT_COMMITTER_NAME": "bench", "GIT_COMMITTER_EMAIL": "bench@localhost"}


def git(place, *arguments):
    shell("git", "-c", "gc.auto=0", *arguments, cwd=os.path.join(place, "tree"), env=GIT)


def workloads(program, tar, sizes):
    """All of them, in the order in which they depend on each other. The last of a group leaves nothing behind."""
    def at(place, name):
        return os.path.join(place, name)

    def remove(place, *names):
        for name in names:
            path = at(place, name)
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)

    def l(what, name, *more):
        return lambda place: load(program, what, at(place, name), *more)

    def small(what, *more):
        def work(place):
            os.makedirs(at(place, "small"), exist_ok=True)
            return load(program, what, at(place, "small"), sizes.small, *more)
        return work

    def untar(place):
        os.mkdir(at(place, "tree"))
        shell("tar", "-xf", tar, "-C", at(place, "tree"))

    def tidy(work, *names):
        """What it made goes once the time was taken."""
        def both(place):
            begun = time.monotonic()
            taken = work(place)
            taken = time.monotonic() - begun if taken is None else taken
            remove(place, *names)
            return taken
        return both

    def git_add(place):
        shell("git", "init", "-q", cwd=at(place, "tree"), env=GIT)
        git(place, "add", "-A")

    def grep(place):
        shell("grep", "-rc", "unsafe", at(place, "tree"))

    big = "big"
    return [
        Workload("sequential write, then fsync", l("write", big, sizes.mib), group="one large file"),
        Workload("sequential read, cold", l("read", big), group="one large file"),
        Workload("sequential read, cached", l("read", big), WARM, "one large file"),
        Workload("random 4 KiB reads, cold", l("random-read", big, sizes.random, 1), group="one large file"),
        Workload("random 4 KiB reads, O_DIRECT", l("random-read", big, sizes.direct, 2, "direct"), group="one large file"),
        Workload("random 4 KiB overwrites, one fsync", l("random-write", big, sizes.random, 3), group="one large file"),
        Workload("random 4 KiB overwrites, fsync each", l("random-write", big, sizes.synced, 4, "sync"), group="one large file"),
        Workload("100-byte appends, one fsync", tidy(l("append", "log", sizes.appends, 100), "log", big), group="one large file"),
        Workload("create small files", small("create", 2000), group="small files"),
        Workload("stat, cold", small("stat"), group="small files"),
        Workload("stat, cached", small("stat", sizes.passes), WARM, "small files"),
        Workload("ls -lR, cold", lambda p: shell("ls", "-lR", at(p, "small")), group="small files"),
        Workload("ls -lR, cached", lambda p: shell("ls", "-lR", at(p, "small")), WARM, "small files"),
        Workload("read, cold", small("cat"), group="small files"),
        Workload("read, cached", small("cat", sizes.passes), WARM, "small files"),
        Workload("delete", small("delete"), group="small files"),
        Workload("untar", untar, group="source tree"),
        Workload("grep -r, cold", grep, group="source tree"),
        Workload("grep -r, cached", grep, WARM, "source tree"),
        Workload("git add", git_add, group="source tree"),
        Workload("git commit", lambda p: git(p, "commit", "-q", "-m", "all"), group="source tree"),
        Workload("git status, cold", lambda p: git(p, "status"), group="source tree"),
        Workload("git status, cached", lambda p: git(p, "status"), WARM, "source tree"),
        Workload("compile", lambda p: build(p, "tree"), group="source tree"),
        Workload("rm -r", lambda p: shell("rm", "-r", at(p, "tree")), group="source tree"),
        Workload("SQLite, WAL, full sync", tidy(lambda p: sqlite(p, "wal", sizes.transactions), "wal.db"), group="database"),
        Workload("SQLite, rollback journal, full sync",
                 tidy(lambda p: sqlite(p, "delete", sizes.transactions), "delete.db"), group="database"),
    ]


def source_tree(root, into, quick):
    """A tar of real sources: crates that this program is built from, in the versions of Cargo.lock."""
    wanted = ("ring", "rustls") if quick else ("ring", "rustls", "libc", "tokio", "regex-automata", "rustix", "clap_builder")
    with open(os.path.join(root, "Cargo.lock"), encoding="utf-8") as lock:
        packages = [part.split("\n") for part in lock.read().split("[[package]]\n")[1:]]
    field = lambda part, key: next((line.split('"')[1] for line in part if line.startswith(f"{key} = ")), None)
    registry = os.path.join(os.environ.get("CARGO_HOME", os.path.expanduser("~/.cargo")), "registry", "src")
    names = [f"{field(p, 'name')}-{field(p, 'version')}" for p in packages if field(p, "name") in wanted]
    registry = max((at.path for at in os.scandir(registry)), key=lambda at: len(set(names) & set(os.listdir(at))))
    names = sorted(name for name in names if os.path.isdir(os.path.join(registry, name)))
    tar = os.path.join(into, "tree.tar")
    shell("tar", "--sort=name", "-cf", tar, "-C", registry, *names)
    files = sum(len(entries) for name in names for _, _, entries in os.walk(os.path.join(registry, name)))
    return tar, names, files
