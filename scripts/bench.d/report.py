"""Tables and pictures of what was measured."""

import math
import statistics


def median(values):
    return statistics.median(values)


def geometric_mean(values):
    return math.exp(statistics.fmean(math.log(value) for value in values))


class Results:
    """times[workload][contender]: seconds, one for each round; cpu and peak (bytes) beside."""

    def __init__(self, workloads, contenders):
        self.workloads, self.contenders = workloads, contenders
        self.times = {w.name: {c.name: [] for c in contenders} for w in workloads}
        self.cpu = {w.name: {c.name: [] for c in contenders} for w in workloads}
        self.peak = {w.name: {c.name: [] for c in contenders} for w in workloads}

    def add(self, workload, contender, seconds, usage):
        self.times[workload][contender].append(seconds)
        self.cpu[workload][contender].append(usage.cpu)
        self.peak[workload][contender].append(usage.peak)

    def speeds(self, workload, other, one="lethefs"):
        """How many times faster `one` was than `other`, within each round."""
        by = self.times[workload]
        return [b / a for a, b in zip(by[one], by[other])]

    def speed(self, workload, other, one="lethefs"):
        return median(self.speeds(workload, other, one))

    def all_speeds(self, other, one="lethefs"):
        """(speed, workload) for each that both can do."""
        names = [w.name for w in self.workloads if self.times[w.name][other] and self.times[w.name][one]]
        return [(self.speed(name, other, one), name) for name in names]

    def mean_speed(self, other, one="lethefs"):
        return geometric_mean([speed for speed, _ in self.all_speeds(other, one)])

    def has(self, contender):
        return any(c.name == contender for c in self.contenders)


def seconds(values):
    if not values:
        return "–"
    value = median(values)
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def ratio(values):
    if not values:
        return "–"
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def times_table(results):
    names = [c.name for c in results.contenders]
    others = [name for name in names if name != "lethefs"]
    lines = ["| seconds | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for w in results.workloads:
        by = results.times[w.name]
        lines.append(f"| {w.name} | " + " | ".join(seconds(by[n]) for n in names) + " |")
    lines += ["", "| lethefs is … times as fast as | " + " | ".join(others) + " |", "|---|" + "---|" * len(others)]
    for w in results.workloads:
        lines.append(f"| {w.name} | " + " | ".join(ratio(results.speeds(w.name, n)) for n in others) + " |")
    means = " | ".join(f"**{results.mean_speed(n):.2f}**" for n in others)
    lines.append(f"| **geometric mean** | {means} |")
    return "\n".join(lines)


def usage_table(results):
    names = [c.name for c in results.contenders if c.name != "ext4"]
    lines = ["| CPU seconds of the daemon, peak memory in MiB | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for w in results.workloads:
        used = [(results.cpu[w.name][n], results.peak[w.name][n]) for n in names]
        cells = [f"{median(cpu):.3f}, {median(peak) / (1 << 20):.0f}" if cpu else "–" for cpu, peak in used]
        lines.append(f"| {w.name} | " + " | ".join(cells) + " |")
    sums = [sum(median(results.cpu[w.name][n]) for w in results.workloads if results.cpu[w.name][n]) for n in names]
    peaks = [max(max(results.peak[w.name][n], default=0) for w in results.workloads) for n in names]
    lines.append("| **all; the largest** | " + " | ".join(f"**{s:.2f}, {p / (1 << 20):.0f}**" for s, p in zip(sums, peaks)) + " |")
    return "\n".join(lines)


def goals(results):
    """What is to be reached (the tracker's issue 6), and whether it was. (text, reached, figure)"""
    rows = []

    def goal(text, value, least):
        rows.append((text, value >= least, f"{value:.2f}", f"{least:g}"))

    def each(other, least):
        """Every workload that misses it, or the one that is nearest to that."""
        speeds = sorted(results.all_speeds(other))
        for value, name in [pair for pair in speeds if pair[0] < least] or [speeds[0]]:
            goal(f"{other}, {name}", value, least)

    if results.has("passthrough_ll"):
        goal("passthrough_ll, geometric mean", results.mean_speed("passthrough_ll"), 1.2)
        each("passthrough_ll", 0.7)
    if results.has("gocryptfs"):
        goal("gocryptfs, geometric mean", results.mean_speed("gocryptfs"), 4)
        each("gocryptfs", 1)
    if results.has("securefs"):
        each("securefs", 1)
    for names, least in ((("sequential read, cached", "read, cached", "stat, cached", "grep -r, cached"), 0.9),
                         (("sequential write, then fsync", "sequential read, cold"), 0.6), (("create small files",), 0.3)):
        for name in names:
            if name in results.times:
                goal(f"ext4, {name}", results.speed(name, "ext4"), least)
    lines = ["| goal: times as fast as | wanted | measured | |", "|---|---|---|---|"]
    lines += [f"| {text} | {least} | {value} | {'reached' if reached else '**missed**'} |" for text, reached, value, least in rows]
    return "\n".join(lines)


COLOURS = {"ext4": "#8a8a8a", "passthrough_ll": "#1f77b4", "lethefs": "#d62728", "gocryptfs": "#2ca02c", "securefs": "#9467bd"}


def svg(width, height, body):
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="sans-serif" font-size="12">\n<rect width="{width}" height="{height}" fill="#fff"/>\n'
            + "\n".join(body) + "\n</svg>\n")


def text(x, y, words, **style):
    words = words.replace("&", "&amp;").replace("<", "&lt;")
    more = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in style.items())
    return f'<text x="{x:.1f}" y="{y:.1f}"{more}>{words}</text>'


def picture(results, note):
    """One row for each workload, one dot for each contender: its speed against lethefs's, on a logarithmic axis. Lines go
    from the slowest to the fastest round."""
    left, right, row, top = 270, 20, 20, 66
    width = 900
    rows = [(w.name, {c.name: results.speeds(w.name, "lethefs", c.name) for c in results.contenders}) for w in results.workloads]
    means = {c.name: [geometric_mean([median(by[c.name]) for _, by in rows if by[c.name]])] for c in results.contenders}
    rows.append(("geometric mean", means))
    every = [value for _, by in rows for values in by.values() for value in values]
    low, high = math.floor(math.log2(min(every))), math.ceil(math.log2(max(every)))
    x = lambda value: left + (math.log2(value) - low) / (high - low) * (width - left - right)
    height = top + row * len(rows) + 20
    body = [text(10, 20, "Speed, lethefs = 1 (to the right: faster)", font_size=14), text(10, 38, note, fill="#666", font_size=10)]
    at = left
    for c in results.contenders:
        body.append(f'<circle cx="{at}" cy="54" r="4.5" fill="{COLOURS[c.name]}"/>')
        body.append(text(at + 9, 58, c.title))
        at += 30 + 8 * len(c.title)
    for power in range(low, high + 1):
        body.append(f'<line x1="{x(2 ** power):.1f}" y1="{top}" x2="{x(2 ** power):.1f}" y2="{height - 20}" '
                    f'stroke="{"#999" if power == 0 else "#e4e4e4"}"/>')
        label = f"{2 ** power}×" if power >= 0 else f"1/{2 ** -power}"
        body.append(text(x(2 ** power), height - 6, label, text_anchor="middle", fill="#666"))
    for n, (name, by) in enumerate(rows):
        y = top + row * (n + 0.5)
        body.append(text(left - 12, y + 4, name, text_anchor="end", **({"font_weight": "bold"} if n == len(rows) - 1 else {})))
        for c in results.contenders:
            values, colour = by[c.name], COLOURS[c.name]
            if not values:
                continue
            body.append(f'<line x1="{x(min(values)):.1f}" y1="{y:.1f}" x2="{x(max(values)):.1f}" y2="{y:.1f}" '
                        f'stroke="{colour}" stroke-opacity="0.4" stroke-width="3"/>')
            body.append(f'<circle cx="{x(median(values)):.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>')
    return svg(width, height, body)


def plot(title, x_title, y_title, series, note=""):
    """Both axes logarithmic. series: name -> [(x, y)]."""
    width, height, left, right, top, bottom = 440, 300, 62, 14, 52, 44
    points = [point for line in series.values() for point in line]
    decades = lambda values: (math.floor(math.log10(min(values))), max(math.ceil(math.log10(max(values))), math.floor(math.log10(min(values))) + 1))
    (x0, x1), (y0, y1) = decades([p[0] for p in points]), decades([p[1] for p in points])
    px = lambda v: left + (math.log10(v) - x0) / (x1 - x0) * (width - left - right)
    py = lambda v: height - bottom - (math.log10(v) - y0) / (y1 - y0) * (height - top - bottom)
    body = [text(10, 18, title, font_size=13), text(10, 33, note, font_size=10, fill="#666")]
    label = lambda power: f"{10 ** (power % 3)}{' kMGT'[power // 3].strip()}" if power >= 0 else f"{10.0 ** power:.{-power}f}"
    for power in range(x0, x1 + 1):
        body.append(f'<line x1="{px(10 ** power):.1f}" y1="{top}" x2="{px(10 ** power):.1f}" y2="{height - bottom}" stroke="#e4e4e4"/>')
        body.append(text(px(10 ** power), height - bottom + 14, label(power), text_anchor="middle", font_size=9, fill="#666"))
    for power in range(y0, y1 + 1):
        body.append(f'<line x1="{left}" y1="{py(10 ** power):.1f}" x2="{width - right}" y2="{py(10 ** power):.1f}" stroke="#e4e4e4"/>')
        body.append(text(left - 5, py(10 ** power) + 3, label(power), text_anchor="end", font_size=9, fill="#666"))
    body.append(text((left + width - right) / 2, height - 8, x_title, text_anchor="middle", font_size=11))
    body.append(text(10, 46, y_title, font_size=11))
    for n, (name, line) in enumerate(series.items()):
        colour = COLOURS.get(name, list(COLOURS.values())[n % len(COLOURS)])
        body.append('<polyline fill="none" stroke="%s" stroke-width="2" points="%s"/>' % (
            colour, " ".join(f"{px(a):.1f},{py(b):.1f}" for a, b in line)))
        body += [f'<circle cx="{px(a):.1f}" cy="{py(b):.1f}" r="3" fill="{colour}"/>' for a, b in line]
        body.append(text(width - right, top - 20 + 12 * n, name, text_anchor="end", font_size=10, fill=colour))
    return width, height, body


def plots(panels, columns=2):
    """Several plots in one picture."""
    width, height = panels[0][0], panels[0][1]
    body = []
    for n, (_, _, inner) in enumerate(panels):
        body.append(f'<g transform="translate({n % columns * width} {n // columns * height})">' + "\n".join(inner) + "</g>")
    return svg(width * columns, height * math.ceil(len(panels) / columns), body)
