"""What costs how much as work grows: lethefs alone."""

import os
import time

import report
from contenders import family, peak_memory
from workloads import load


def timed(work):
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def memory(contender):
    return sum(peak_memory(pid) for pid in family(contender.daemon.pid))


def fresh(contender, make):
    contender.mount()
    at = os.path.join(contender.place, "growth")
    os.makedirs(at, exist_ok=True)
    taken = make(at)
    contender.unmount()
    return taken


def files(contender, program, counts):
    """Volumes of so many files: mounting, the first look at one, one that is cached, memory when all were seen."""
    rows, there = [], 0
    for count in counts:
        def make(at):
            top = os.path.join(at, f"files{count}")
            os.mkdir(top)
            return load(program, "create", top, count, 0) / count
        create = fresh(contender, make)
        there += count
        top = os.path.join(contender.place, "growth", f"files{count}")
        mount = timed(contender.mount)
        idle = memory(contender)
        looks = min(count, 2000)
        cold = load(program, "lookup", top, looks, count, 1)
        few = memory(contender)
        every = load(program, "stat", top, count) / count
        cached = load(program, "lookup", top, 20_000, count, 2)
        rows.append({"files": there, "mount": mount, "create": create, "cold": cold, "each": every, "cached": cached, "idle": idle, "few": few,
                     "all": memory(contender), "unmount": timed(contender.unmount)})
    return rows


def sizes(contender, program, shifts):
    """A file with one written block at its end, everything before it a hole."""
    rows = []
    for size in [0] + [1 << shift for shift in shifts]:
        def make(at):
            path = os.path.join(at, f"size{size}")
            def write():
                fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
                if size:
                    os.pwrite(fd, b"x" * min(size, 4096), max(size - 4096, 0))
                os.fsync(fd)
                os.close(fd)
            return timed(write)
        make_ = fresh(contender, make)
        path = os.path.join(contender.place, "growth", f"size{size}")
        contender.mount()
        look = timed(lambda: os.stat(path))
        def read(at):
            def work():
                fd = os.open(path, os.O_RDONLY)
                os.pread(fd, 4096, at)
                os.close(fd)
            return work
        first = timed(read(max(size - 4096, 0)))
        middle = timed(read(size // 8192 * 4096))
        contender.unmount()
        rows.append({"size": max(size, 1), "create": make_, "stat": look, "last": first, "middle": middle})
    return rows


def directories(contender, program, counts):
    """One flat directory of so many entries."""
    rows = []
    for count in counts:
        def make(at):
            top = os.path.join(at, f"flat{count}")
            os.mkdir(top)
            return load(program, "flat", top, count) / count
        create = fresh(contender, make)
        top = os.path.join(contender.place, "growth", f"flat{count}")
        contender.mount()
        cold = load(program, "list", top) / count
        cached = load(program, "list", top) / count
        peak = memory(contender)
        contender.unmount()
        contender.mount()
        one = timed(lambda: os.stat(os.path.join(top, f"file{count // 2:07d}.txt")))
        contender.unmount()
        rows.append({"entries": count, "create": create, "list": cold, "again": cached, "one": one, "memory": peak})
    return rows


def clients(contender, program, numbers, total):
    """So many processes share the same work."""
    rows = []
    for n in numbers:
        rows.append({"clients": n, "each": fresh(contender, lambda at: load(program, "clients", n, at, total)) / (total // n * n)})
    return rows


def churn(contender, program, operations, parts=10):
    """Resident memory over operations that leave nothing behind: five to a round."""
    contender.mount()
    at = os.path.join(contender.place, "churn")
    os.mkdir(at)
    rows = []
    for part in range(1, parts + 1):
        load(program, "clients", 2, at, operations // 5 // parts)
        rows.append((operations // parts * part, sum(resident(pid) for pid in family(contender.daemon.pid))))
    contender.unmount()
    return rows


def resident(pid):
    with open(f"/proc/{pid}/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def table(rows, columns):
    lines = ["| " + " | ".join(title for _, title, _ in columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(show(row[key]) for key, _, show in columns) + " |" for row in rows]
    return "\n".join(lines)


def micro(value):
    return f"{value * 1e6:.3g}" if value < 1e-3 else f"{value * 1e6:,.0f}"


def mib(value):
    return f"{value / (1 << 20):.1f}"


def number(value):
    return f"{value:,}"


def measure(contender, program, operations, quick):
    counts = [10, 1000, 10_000] if quick else [10, 1000, 10_000, 100_000, 1_000_000]
    flat = [10, 1000, 10_000] if quick else [10, 100, 1000, 10_000, 100_000]
    total = 3200 if quick else 64_000
    by_files = files(contender, program, counts)
    by_size = sizes(contender, program, (12, 20, 30, 36))
    by_entries = directories(contender, program, flat)
    by_clients = clients(contender, program, (1, 2, 4, 8, 16, 32, 64), total)
    parts = [
        table(by_files, [("files", "files in the volume", number), ("mount", "mount, µs", micro), ("create", "create, µs", micro),
                         ("cold", "stat of a random one, cold, µs", micro), ("each", "stat of all, cold, µs each", micro),
                         ("cached", "stat, cached, µs", micro), ("idle", "memory after the mount, MiB", mib),
                         ("all", "when all were seen, MiB", mib), ("unmount", "unmount, µs", micro)]),
        table(by_size, [("size", "size in bytes (1: empty)", number), ("create", "create, write the last block, fsync, µs", micro), ("stat", "stat, µs", micro),
                        ("last", "open, read the last block, µs", micro), ("middle", "open, read in the middle, µs", micro)]),
        table(by_entries, [("entries", "entries of one directory", number), ("create", "create, µs each", micro), ("list", "list with attributes, cold, µs each", micro),
                           ("again", "cached, µs each", micro), ("one", "stat of one, cold, µs", micro), ("memory", "memory, MiB", mib)]),
        table(by_clients, [("clients", "clients", number), ("each", "create, write, stat, read, delete: µs each", micro)]),
    ]
    us = 1e6
    panels = [
        report.plot("Files in the volume", "files", "µs", {
            "mount": [(r["files"], r["mount"] * us) for r in by_files],
            "stat, cold": [(r["files"], r["cold"] * us) for r in by_files],
            "stat, cached": [(r["files"], r["cached"] * us) for r in by_files]}),
        report.plot("Memory of the daemon", "files that were looked at", "MiB (peak)", {
            "after looking at all": [(r["files"], r["all"] / (1 << 20)) for r in by_files]}),
        report.plot("Size of a file (sparse)", "bytes", "µs", {
            "write the last block, fsync": [(r["size"], r["create"] * us) for r in by_size],
            "stat, cold": [(r["size"], r["stat"] * us) for r in by_size],
            "read the last block, cold": [(r["size"], r["last"] * us) for r in by_size]}),
        report.plot("Entries of one directory", "entries", "µs for each entry", {
            "create": [(r["entries"], r["create"] * us) for r in by_entries],
            "list, cold": [(r["entries"], r["list"] * us) for r in by_entries],
            "list, cached": [(r["entries"], r["again"] * us) for r in by_entries]}),
        report.plot("Clients at once", "clients", "µs for each round of create, write, stat, read, delete", {
            "all together": [(r["clients"], r["each"] * us) for r in by_clients]}),
    ]
    if operations:
        over = churn(contender, program, operations)
        parts.append("| operations | memory, MiB |\n|---|---|\n" + "\n".join(f"| {n:,} | {mib(m)} |" for n, m in over))
        panels.append(report.plot("Memory over operations", "operations", "MiB (resident)", {"churn": [(n, m / (1 << 20)) for n, m in over]}))
    return "\n\n".join(parts), report.plots(panels)
