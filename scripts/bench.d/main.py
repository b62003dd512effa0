"""The measurements of scripts/bench: see there."""

import argparse
import os
import platform
import sys
import time

import contenders
import growth
import report
import trace_ops
import workloads
from contenders import run


def arguments():
    parser = argparse.ArgumentParser(prog="bench", description="Measures lethefs beside other filesystems, in turns.")
    parser.add_argument("--quick", action="store_true", help="small, and two rounds")
    parser.add_argument("--rounds", type=int, help="how often (5; --quick: 2)")
    parser.add_argument("--only", metavar="TEXT", help="workloads whose group or name contains it (all of their group are run)")
    parser.add_argument("--with", dest="names", metavar="A,B", help="only these filesystems, with lethefs and ext4")
    parser.add_argument("--against", metavar="PROGRAM", help="another build of lethefs, measured beside")
    parser.add_argument("--growth", action="store_true", help="instead: what costs how much as work grows, lethefs alone")
    parser.add_argument("--churn", type=int, default=0, metavar="N", help="with --growth: memory over N more operations")
    parser.add_argument("--trace", action="store_true", help="instead: requests and system calls for each operation")
    parser.add_argument("--out", metavar="DIR", help="where tables (.md) and pictures (.svg) are put")
    for name in ("--program", "--passthrough", "--load", "--at", "--root"):
        parser.add_argument(name, required=True, help=argparse.SUPPRESS)
    return parser.parse_args()


def chosen(args):
    kinds = list(contenders.ALL)
    if args.names:
        keep = {"ext4", "lethefs", *args.names.split(",")}
        unknown = keep - {kind.name for kind in kinds}
        if unknown:
            raise SystemExit(f"bench: no such filesystem: {', '.join(unknown)}")
        kinds = [kind for kind in kinds if kind.name in keep]
    if args.against:
        before = type("Before", (contenders.Lethefs,), {"name": "before", "title": "lethefs before", "program": args.against})
        report.COLOURS["before"] = "#ff9896"
        kinds.append(before)
    return kinds


def machine(sizes, names, files):
    return (f"{platform.release()}, {os.cpu_count()} processors, {time.strftime('%-d %B %Y')}; a file of {sizes.mib} MiB, "
            f"{sizes.small} small files of 2,000 bytes, a source tree of {files} files ({', '.join(names)})")


def versions(args, kinds):
    known = {"lethefs": lambda: run(args.program, "--version").split()[1],
             "gocryptfs": lambda: run("gocryptfs", "--version").split(";")[0].split()[1],
             "securefs": lambda: run("dpkg-query", "-W", "-f", "${Version}", "securefs"),
             "passthrough_ll": lambda: run("dpkg-query", "-W", "-f", "${Version}", "libfuse3-dev")}
    return ", ".join(f"{kind.name} {known[kind.name]()}" for kind in kinds if kind.name in known)


def turns(kinds, n):
    """Everybody is first, and last, equally often."""
    n %= len(kinds)
    return kinds[n:] + kinds[:n]


def one(workload, contender):
    contender.mount()
    if workload.start == workloads.WARM:
        workload.work(contender.place)
    contender.begin()
    try:
        seconds = workload.time(contender.place)
    except workloads.NotThere:
        seconds = None
    return seconds, contender.unmount()


def measure(args, sizes, there, todo):
    rounds = args.rounds or (2 if sizes.quick else 5)
    results = report.Results(todo, there)
    for n in range(rounds):
        for m, workload in enumerate(todo):
            if sys.stderr.isatty():
                print(f"\rround {n + 1} of {rounds}: {workload.name:40}", end="", file=sys.stderr)
            for contender in turns(there, n + m):
                seconds, usage = one(workload, contender)
                if seconds is not None:
                    results.add(workload.name, contender.name, seconds, usage)
    if sys.stderr.isatty():
        print("\r" + " " * 70 + "\r", end="", file=sys.stderr)
    return rounds, results


def compare(args, there):
    sizes = workloads.Sizes(args.quick)
    tar, names, files = workloads.source_tree(args.root, args.at, args.quick)
    todo = workloads.workloads(args.load, tar, sizes)
    if args.only:
        groups = {w.group for w in todo if args.only in w.name or args.only in w.group}
        todo = [w for w in todo if w.group in groups]
        if not todo:
            raise SystemExit(f"bench: no workload is called {args.only}")
    rounds, results = measure(args, sizes, there, todo)
    about = f"Linux {machine(sizes, names, files)}; {versions(args, there)}; medians of {rounds} rounds."
    parts = [about, report.goals(results), report.times_table(results), report.usage_table(results)]
    emit(args, "bench", "\n\n".join(parts), report.picture(results, f"{rounds} rounds, {time.strftime('%-d %B %Y')}, Linux {platform.release()}"))


def emit(args, name, words, *pictures):
    print(words)
    if args.out:
        os.makedirs(args.out, exist_ok=True)
        for ending, content in (("md", words + "\n"), *(("svg", picture) for picture in pictures)):
            with open(os.path.join(args.out, f"{name}.{ending}"), "w", encoding="utf-8") as file:
                file.write(content)


def main():
    args = arguments()
    contenders.Lethefs.program, contenders.Passthrough.program = args.program, args.passthrough
    there = []
    try:
        if args.growth:
            kinds, size = [contenders.Lethefs], 12
        elif args.trace:
            kinds, size = chosen(args)[1:], 1
        else:
            kinds, size = chosen(args), 1 if args.quick else 2
        for kind in kinds:
            there.append(kind(args.at, size))
        if args.growth:
            emit(args, "growth", *growth.measure(there[0], args.load, args.churn, args.quick))
        elif args.trace:
            emit(args, "trace", trace_ops.measure(there))
        else:
            compare(args, there)
    finally:
        for contender in there:
            contender.abandon()


main()
