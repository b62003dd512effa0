/* The work that Python would be too slow to time. Prints the seconds that it took.
 *
 *   load write FILE MIB                1 MiB at a time into a new file, one fsync at the end
 *   load read FILE                     all of it, 1 MiB at a time
 *   load random-read FILE COUNT SEED [direct]
 *   load random-write FILE COUNT SEED [sync]     4 KiB; sync: fsync after each, else one at the end
 *   load append FILE COUNT BYTES       one write(2) with O_APPEND for each, one fsync at the end
 *   load create DIR COUNT BYTES        small files, 100 to a directory
 *   load stat DIR COUNT [PASSES]       each of them
 *   load cat DIR COUNT [PASSES]        open, read, close of each
 *   load delete DIR COUNT              and their directories
 *   load lookup DIR COUNT OF SEED      stat of COUNT random ones of OF: seconds for each
 *   load flat DIR COUNT                empty files, all in one directory
 *   load list DIR                      every entry of one directory, with its attributes
 *   load clients N DIR COUNT           N processes share COUNT rounds of create, write, stat, read, delete
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MIB (1 << 20)
#define BLOCK 4096
#define PER_DIRECTORY 100
/* The exit code where the filesystem has no O_DIRECT. */
#define NOT_THERE 3

static uint64_t state;

/* splitmix64 */
static uint64_t number(void) {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void die(const char *what) {
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

#define MUST(call) ((call) == -1 ? (die(#call), -1) : 0)

static int must_open(const char *path, int flags) {
    int fd = open(path, flags, 0644);
    if (fd == -1 && errno == EINVAL && flags & O_DIRECT) exit(NOT_THERE);
    if (fd == -1) die(path);
    return fd;
}

static void all(ssize_t done, size_t wanted, const char *what) {
    if (done != (ssize_t)wanted) {
        if (done >= 0) errno = EIO;
        die(what);
    }
}

static unsigned char *buffer(size_t bytes) {
    unsigned char *at = aligned_alloc(BLOCK, bytes);
    if (!at) die("memory");
    /* Nothing that a disk could compress. */
    for (size_t i = 0; i < bytes / 8; i++) ((uint64_t *)at)[i] = number();
    return at;
}

static const char *directory(const char *top, long n) {
    static char path[4096];
    snprintf(path, sizeof path, "%s/directory%05ld", top, n / PER_DIRECTORY);
    return path;
}

static const char *file(const char *top, long n) {
    static char path[4096];
    snprintf(path, sizeof path, "%s/directory%05ld/file%07ld.txt", top, n / PER_DIRECTORY, n);
    return path;
}

static void make_file(const char *path, const unsigned char *data, size_t bytes) {
    int fd = must_open(path, O_CREAT | O_EXCL | O_WRONLY);
    if (bytes) all(write(fd, data, bytes), bytes, "write");
    MUST(close(fd));
}

static void read_file(const char *path, unsigned char *data) {
    int fd = must_open(path, O_RDONLY);
    ssize_t n;
    while ((n = read(fd, data, 64 << 10)) > 0) continue;
    if (n == -1) die("read");
    MUST(close(fd));
}

static void client(const char *top, long me, long count, unsigned char *data) {
    char path[4096];
    struct stat st;
    for (long n = 0; n < count; n++) {
        snprintf(path, sizeof path, "%s/client%02ld-%07ld", top, me, n);
        make_file(path, data, 2000);
        MUST(stat(path, &st));
        read_file(path, data);
        MUST(unlink(path));
    }
}

int main(int argc, char **argv) {
    if (argc < 3) return 2;
    const char *what = argv[1], *path = argv[2];
    long count = argc > 3 ? atol(argv[3]) : 0;
    double begun, taken;
    struct stat st;
    state = 1;
    unsigned char *data = buffer(MIB);
    if (!strcmp(what, "write")) {
        begun = now();
        int fd = must_open(path, O_CREAT | O_TRUNC | O_WRONLY);
        for (long n = 0; n < count; n++) all(write(fd, data, MIB), MIB, "write");
        MUST(fsync(fd));
        MUST(close(fd));
    } else if (!strcmp(what, "read")) {
        begun = now();
        int fd = must_open(path, O_RDONLY);
        ssize_t n;
        while ((n = read(fd, data, MIB)) > 0) continue;
        if (n == -1) die("read");
        MUST(close(fd));
    } else if (!strcmp(what, "random-read") || !strcmp(what, "random-write")) {
        int writes = what[7] == 'w', each = argc > 5;
        state = atol(argv[4]);
        int fd = must_open(path, writes ? O_RDWR : each ? O_RDONLY | O_DIRECT : O_RDONLY);
        MUST(fstat(fd, &st));
        begun = now();
        for (long n = 0; n < count; n++) {
            off_t at = number() % (st.st_size / BLOCK) * BLOCK;
            all(writes ? pwrite(fd, data, BLOCK, at) : pread(fd, data, BLOCK, at), BLOCK, what);
            if (writes && each) MUST(fsync(fd));
        }
        if (writes && !each) MUST(fsync(fd));
        MUST(close(fd));
    } else if (!strcmp(what, "append")) {
        size_t bytes = atol(argv[4]);
        begun = now();
        int fd = must_open(path, O_CREAT | O_APPEND | O_WRONLY);
        for (long n = 0; n < count; n++) all(write(fd, data, bytes), bytes, "write");
        MUST(fsync(fd));
        MUST(close(fd));
    } else if (!strcmp(what, "create")) {
        begun = now();
        for (long n = 0; n < count; n++) {
            if (n % PER_DIRECTORY == 0) MUST(mkdir(directory(path, n), 0755));
            make_file(file(path, n), data, atol(argv[4]));
        }
    } else if (!strcmp(what, "stat") || !strcmp(what, "cat")) {
        long passes = argc > 4 ? atol(argv[4]) : 1;
        begun = now();
        for (; passes > 0; passes--)
            for (long n = 0; n < count; n++) {
                if (what[0] == 's') MUST(stat(file(path, n), &st));
                else read_file(file(path, n), data);
            }
    } else if (!strcmp(what, "delete")) {
        begun = now();
        for (long n = 0; n < count; n++) {
            MUST(unlink(file(path, n)));
            if ((n + 1) % PER_DIRECTORY == 0 || n + 1 == count) MUST(rmdir(directory(path, n)));
        }
    } else if (!strcmp(what, "lookup")) {
        long of = atol(argv[4]);
        state = atol(argv[5]);
        begun = now();
        for (long n = 0; n < count; n++) MUST(stat(file(path, number() % of), &st));
        printf("%.9f\n", (now() - begun) / count);
        return 0;
    } else if (!strcmp(what, "flat")) {
        char name[4096];
        begun = now();
        for (long n = 0; n < count; n++) {
            snprintf(name, sizeof name, "%s/file%07ld.txt", path, n);
            make_file(name, data, 0);
        }
    } else if (!strcmp(what, "list")) {
        begun = now();
        DIR *dir = opendir(path);
        if (!dir) die(path);
        struct dirent *entry;
        while ((entry = readdir(dir))) MUST(fstatat(dirfd(dir), entry->d_name, &st, AT_SYMLINK_NOFOLLOW));
        closedir(dir);
    } else if (!strcmp(what, "clients")) {
        long total = atol(argv[4]);
        const char *top = argv[3];
        count = atol(argv[2]);
        begun = now();
        for (long n = 0; n < count; n++) {
            pid_t pid = fork();
            MUST(pid);
            if (pid == 0) {
                client(top, n, total / count, data);
                _exit(0);
            }
        }
        for (long n = 0; n < count; n++) {
            int status;
            MUST(wait(&status));
            if (status != 0) {
                errno = EIO;
                die("a client");
            }
        }
    } else {
        return 2;
    }
    taken = now() - begun;
    printf("%.9f\n", taken);
    return 0;
}
