"""What is measured: each filesystem on a loop ext4 of its own, mounted and unmounted at will."""

import os
import re
import resource
import signal
import subprocess
import time

PASSWORD = "bench"


def run(*command, **more):
    done = subprocess.run(command, capture_output=True, text=True, **more)
    if done.returncode != 0:
        raise SystemExit(f"bench: {' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def umount(*command, **more):
    """What was closed just now may keep a mount busy for a moment: RELEASE waits for nobody."""
    until = time.monotonic() + 10
    while True:
        done = subprocess.run(command, capture_output=True, text=True, check=False, **more)
        if done.returncode == 0:
            return
        if not re.search("busy|in use", done.stderr) or time.monotonic() > until:
            raise SystemExit(f"bench: {done.stderr.strip()}")
        time.sleep(0.01)


def is_mounted(place):
    """By the device's change: asking the filesystem itself would begin to use it."""
    with open("/proc/self/mountinfo", encoding="utf-8") as mounts:
        return any(line.split()[4] == place for line in mounts)


class Usage:
    """What a daemon used: CPU seconds, and the peak of its resident memory in bytes."""

    def __init__(self, cpu=0.0, peak=0):
        self.cpu, self.peak = cpu, peak


class Contender:
    """Plain ext4, and the base of the others. A loop device of its own for each, so that a cold start is one
    of this filesystem alone and nobody else's caches are dropped."""

    name = "ext4"
    title = "ext4"

    def __init__(self, at, gigabytes):
        self.at = os.path.join(at, self.name)
        self.image = os.path.join(self.at, "disk.img")
        self.disk = os.path.join(self.at, "disk")
        self.place = os.path.join(self.disk, "files")
        self.daemon = None
        self.started = Usage()
        os.makedirs(self.disk)
        with open(self.image, "wb") as image:
            os.posix_fallocate(image.fileno(), 0, gigabytes << 30)
        # Nothing that ext4 would go on doing in the background. Many small inodes fit.
        run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", "-i", "8192", self.image)
        self.loop = run("losetup", "--find", "--show", "--direct-io=on", self.image).strip()
        self.attach()
        os.mkdir(os.path.join(self.disk, "files"))
        self.create()
        self.detach()

    def create(self):
        """Once, on the empty disk."""

    def command(self):
        """Starts the daemon in the foreground; None: there is none."""
        return None

    def environment(self):
        return None

    def prepare(self):
        """In the daemon's process, before it begins."""

    def attach(self):
        run("mount", self.loop, self.disk)

    def detach(self):
        umount("umount", self.disk)

    def mount(self):
        """Nothing of it is in any cache then."""
        self.attach()
        command = self.command()
        if command is None:
            return
        os.makedirs(self.place, exist_ok=True)
        log = open(os.path.join(self.at, "daemon.log"), "ab")
        self.daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                       env=self.environment(), preexec_fn=self.prepare)
        log.close()
        until = time.monotonic() + 20
        while not is_mounted(self.place):
            if self.daemon.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"bench: {self.name} did not mount; see {self.at}/daemon.log")
            time.sleep(0.002)
        os.statvfs(self.place)  # waits for the first answer

    def begin(self):
        """What the daemon has used so far does not count."""
        if self.daemon:
            self.started = Usage(sum(cpu_seconds(pid) for pid in family(self.daemon.pid)))

    def unmount(self):
        """Writes everything out, what the daemon put off included; returns what it used since begin()."""
        usage = Usage()
        if self.daemon:
            usage.peak = sum(peak_memory(pid) for pid in family(self.daemon.pid))
            self.stop()
            usage.cpu = reap(self.daemon) - self.started.cpu
            self.daemon = None
        self.detach()
        return usage

    def stop(self):
        umount("umount", self.place)

    def abandon(self):
        """Whatever state it is in."""
        if self.daemon:
            subprocess.run(["umount", "-l", self.place], capture_output=True, check=False)
            self.daemon.send_signal(signal.SIGTERM)
            self.daemon.wait()
        subprocess.run(["umount", "-l", self.disk], capture_output=True, check=False)
        subprocess.run(["losetup", "--detach", self.loop], capture_output=True, check=False)


class OnTop(Contender):
    """One that has a daemon and a mountpoint of its own."""

    def __init__(self, at, gigabytes):
        super().__init__(at, gigabytes)
        self.place = os.path.join(self.at, "mnt")


class Passthrough(OnTop):
    name = "passthrough_ll"
    title = "passthrough_ll"
    program = None

    def prepare(self):
        # It has a descriptor for each inode.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    def command(self):
        source = os.path.join(self.disk, "files")
        return [self.program, "-f", "-o", f"writeback,cache=always,source={source}", self.place]


class Lethefs(OnTop):
    name = "lethefs"
    title = "lethefs"
    program = None
    options = []

    def environment(self):
        env = {"PATH": os.environ["PATH"], "HOME": self.at}
        env.update({f"LETHEFS_{name}_DIR": os.path.join(self.at, name.lower()) for name in ("TRUST", "RUNTIME", "STATE")})
        return env

    def create(self):
        for name in ("trust", "runtime", "state"):
            os.mkdir(os.path.join(self.at, name), 0o700)
        run(self.program, "init", os.path.join(self.disk, "files"), "--kms", f"file://{self.at}/key", env=self.environment())

    def command(self):
        return [self.program, "mount", "-f", *self.options, os.path.join(self.disk, "files"), self.place]

    def stop(self):
        umount(self.program, "umount", self.place, env=self.environment())


class Gocryptfs(OnTop):
    name = "gocryptfs"
    title = "gocryptfs"

    def password(self):
        path = os.path.join(self.at, "password")
        with open(path, "w", encoding="ascii") as file:
            file.write(PASSWORD)
        return path

    def create(self):
        # How dear the password is to guess is nothing that a mount's speed depends on.
        run("gocryptfs", "-init", "-q", "-scryptn", "10", "-passfile", self.password(), os.path.join(self.disk, "files"))

    def command(self):
        return ["gocryptfs", "-fg", "-q", "-passfile", self.password(), os.path.join(self.disk, "files"), self.place]


class Securefs(OnTop):
    name = "securefs"
    title = "securefs"

    def create(self):
        run("securefs", "create", "--pass", PASSWORD, "--pbkdf", "pkcs5-pbkdf2-hmac-sha256", "-r", "1000",
            os.path.join(self.disk, "files"))

    def command(self):
        return ["securefs", "mount", "--pass", PASSWORD, os.path.join(self.disk, "files"), self.place]


ALL = (Contender, Passthrough, Lethefs, Gocryptfs, Securefs)


def family(pid):
    """A process and those below it."""
    found = [pid]
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as children:
            for child in children.read().split():
                found += family(int(child))
    return found


def cpu_seconds(pid):
    """To the nanosecond, as the scheduler counts it; a process's own clock does so for all its threads."""
    return time.clock_gettime(~pid << 3 | 2)


def peak_memory(pid):
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return 0


def reap(daemon):
    """Waits for the end; CPU seconds of all its life, its children's included."""
    _, status, used = os.wait4(daemon.pid, 0)
    daemon.returncode = os.waitstatus_to_exitcode(status)
    if daemon.returncode != 0:
        raise SystemExit(f"bench: {daemon.args[0]} ended with {daemon.returncode}")
    return used.ru_utime + used.ru_stime
