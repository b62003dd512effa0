"""The measurements of scripts/bench-log."""

import os
import platform
import random
import statistics
import subprocess
import sys
import time

PROGRAM, AT, ROUNDS, MIB = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
BLOCK = 4096
VARIANTS = ("log", "no log", "ext4")


def run(*command, **more):
    return subprocess.run(command, check=True, capture_output=True, text=True, **more).stdout


def path(*parts):
    return os.path.join(AT, *parts)


ENV = {"PATH": os.environ["PATH"], "HOME": AT}
ENV.update({f"LETHEFS_{name}_DIR": path(name.lower()) for name in ("TRUST", "RUNTIME", "STATE")})


def lethefs(*arguments):
    return run(PROGRAM, *arguments, env=ENV)


def set_up():
    """A loop ext4; on it one volume for each variant of lethefs, mounted, and a plain directory."""
    with open(path("disk.img"), "wb") as image:
        image.truncate(4 << 30)
    run("mkfs.ext4", "-q", path("disk.img"))
    os.mkdir(path("disk"))
    # The journal's own commits, every five seconds otherwise, would be counted as somebody's.
    run("mount", "-o", "loop,commit=1000", path("disk.img"), path("disk"))
    for name in ("trust", "runtime", "state"):
        os.mkdir(path(name), 0o700)
    places = {"ext4": path("disk", "plain")}
    os.mkdir(places["ext4"])
    for variant, options in (("log", []), ("no log", ["-o", "unsafe_no_log"])):
        name = variant.replace(" ", "-")
        volume = path("disk", name)
        lethefs("init", volume, "--kms", "file://" + path("key-" + name))
        places[variant] = path("mnt-" + name)
        os.mkdir(places[variant])
        lethefs("mount", volume, places[variant], *options)
    return places


def device_flushes():
    device = os.stat(path("disk")).st_dev
    link = os.readlink(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    with open(f"/sys/block/{os.path.basename(link)}/stat", encoding="ascii") as stat:
        return int(stat.read().split()[15])


def settle():
    """Nobody's work is left over for the next one."""
    run("sync", "-f", path("disk"))
    for place in PLACES.values():
        run("sync", "-f", place)
    run("sync", "-f", path("disk"))


def timed(work):
    settle()
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def data_file(place):
    """A file of MIB MiB, sealed where that means something: it was flushed and left alone."""
    name = os.path.join(place, "data")
    with open(name, "wb") as file:
        for _ in range(MIB):
            file.write(os.urandom(1 << 20))
        os.fsync(file.fileno())
    return name


def overwrites(place, seed, unit, count, sync):
    """Without sync the pages are written out in the end, as the kernel would some seconds later, and that counts."""
    fd = os.open(os.path.join(place, "data"), os.O_RDWR)
    source, buffer = random.Random(seed), os.urandom(unit)
    for n in range(count):
        block = source.randrange(MIB * (1 << 20) // unit) if unit == BLOCK else n % (MIB * (1 << 20) // unit)
        os.pwrite(fd, buffer, block * unit)
        if sync:
            os.fsync(fd)
    if not sync:
        os.fsync(fd)
    os.close(fd)


def sqlite(place, mode, transactions):
    """One row and its index in each transaction, full sync, into a table that is there already."""
    source = random.Random(1)
    lines = [f"pragma journal_mode={mode};", "pragma synchronous=full;",
             "create table if not exists t (k integer primary key, v text, w integer);",
             "create index if not exists i on t (w);"]
    lines += [f"insert into t (v, w) values ('{'v' * 200}', {source.randrange(1 << 30)});" for _ in range(transactions)]
    run("sqlite3", "-bail", os.path.join(place, f"{mode}.db"), input="\n".join(lines))


WORK = {
    "random 4 KiB overwrites, not synced": lambda p, n: overwrites(p, n, BLOCK, 8000, False),
    "sequential 1 MiB overwrites, not synced": lambda p, n: overwrites(p, n, 1 << 20, 2 * MIB, False),
    "4 KiB overwrites, fsync after each": lambda p, n: overwrites(p, n, BLOCK, 300, True),
    "SQLite, WAL": lambda p, n: sqlite(p, "wal", 200),
    "SQLite, rollback journal": lambda p, n: sqlite(p, "delete", 100),
}


def spread(values):
    return f"{statistics.median(values):5.2f} ({min(values):.2f} to {max(values):.2f})"


def measure():
    times = {name: {variant: [] for variant in VARIANTS} for name in WORK}
    for place in PLACES.values():
        data_file(place)
        sqlite(place, "wal", 2000)
        sqlite(place, "delete", 50)
    for n in range(ROUNDS + 1):
        for name, work in WORK.items():
            # In turns, so that what the machine does otherwise meets all of them.
            order = VARIANTS[n % 3:] + VARIANTS[:n % 3]
            for variant in order:
                taken = timed(lambda: work(PLACES[variant], n))
                if n > 0:  # the first is for the caches
                    times[name][variant].append(taken)
    print(f"\nmedian of {ROUNDS} rounds; ratios within a round, median (least to greatest)\n")
    print("| | ext4, s | no log, s | log, s | log / no log | log / ext4 |\n|---|---|---|---|---|---|")
    for name, by in times.items():
        medians = [f"{statistics.median(by[variant]):.3f}" for variant in ("ext4", "no log", "log")]
        ratios = [spread([a / b for a, b in zip(by["log"], by[other])]) for other in ("no log", "ext4")]
        print("| " + " | ".join([name, *medians, *ratios]) + " |")


def write(fd, unit, at):
    os.pwrite(fd, os.urandom(unit), at)


def flush_counts():
    """Flushes that the device was asked for while one thing was done, many times over: for each of them."""
    def kept(place):
        return os.open(os.path.join(place, "data"), os.O_RDWR)

    def each_new(place, n, sync):
        fd = os.open(os.path.join(place, f"new{n}"), os.O_CREAT | os.O_RDWR, 0o644)
        write(fd, 8192, 0)
        if sync:
            sync(fd)
        os.close(fd)

    def each_append(place, n, sync):
        fd = os.open(os.path.join(place, "append"), os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
        os.write(fd, os.urandom(5000))
        if sync:
            sync(fd)
        os.close(fd)

    def each_overwrite(place, n, sync):
        fd = kept(place)
        write(fd, BLOCK, n * 7919 % (MIB << 8) * BLOCK)
        if sync:
            sync(fd)
        os.close(fd)

    def each_rewrite(place, n, sync):
        with open(os.path.join(place, "rewritten"), "wb") as file:
            file.write(os.urandom(6000))
            file.flush()
            if sync:
                sync(file.fileno())

    def each_mkdir(place, n, sync):
        os.mkdir(os.path.join(place, f"dir{n}"))

    def each_replace(place, n, sync):
        with open(os.path.join(place, "replacing"), "wb") as file:
            file.write(os.urandom(6000))
            file.flush()
            if sync:
                sync(file.fileno())
        os.rename(os.path.join(place, "replacing"), os.path.join(place, "replaced"))

    kinds = (("new file", each_new), ("append", each_append), ("overwrite", each_overwrite),
             ("rewrite by O_TRUNC", each_rewrite), ("mkdir", each_mkdir), ("rename over", each_replace))
    print("\ndevice flushes for each of 50\n\n| | | ext4 | no log | log |\n|---|---|---|---|---|")
    for name, each in kinds:
        for how, sync in (("alone", None), ("fdatasync", os.fdatasync), ("fsync", os.fsync)):
            if sync and each is each_mkdir:
                continue
            row = []
            for variant in ("ext4", "no log", "log"):
                place = os.path.join(PLACES[variant], f"{name.replace(' ', '-')}-{how}")
                os.mkdir(place)
                data_file_small(place, each)
                settle()
                before = device_flushes()
                for n in range(50):
                    each(place, n, sync)
                row.append(f"{(device_flushes() - before) / 50:.2f}")
            print(f"| {name} | {how} | " + " | ".join(row) + " |")


def data_file_small(place, each):
    """What is there before the first one."""
    with open(os.path.join(place, "data"), "wb") as file:
        file.write(os.urandom(MIB << 20 if each.__name__ == "each_overwrite" else BLOCK))
    for name in ("rewritten", "replaced"):
        with open(os.path.join(place, name), "wb") as file:
            file.write(os.urandom(5000))


PLACES = set_up()
print(f"{platform.release()}, {os.cpu_count()} processors, {time.strftime('%Y-%m-%d')}, "
      f"{run(PROGRAM, '--version').strip()}, SQLite {run('sqlite3', '--version').split()[0]}, a file of {MIB} MiB")
flush_counts()
measure()
for variant in ("log", "no log"):
    lethefs("umount", PLACES[variant])
