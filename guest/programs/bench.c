/* Workloads for the benchmark: each prints its own time in nanoseconds, so that the same program
 * can be compared natively and in a machine. Usage: bench WORKLOAD COUNT [MIB|FILE] */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096 };

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void say(const char *what, uint64_t ns, uint64_t count) {
    printf("%s %llu %llu\n", what, (unsigned long long)ns, (unsigned long long)count);
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

static volatile char *map(size_t pages) {
    void *at = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) die("mmap");
    /* One size of page everywhere, or the comparison is of something else. */
    madvise(at, pages * PAGE, MADV_NOHUGEPAGE);
    return at;
}

static void write_all(volatile char *at, size_t pages, size_t step) {
    for (size_t i = 0; i < pages; i += step) at[i * PAGE] = (char)i;
}

static int read_all(volatile char *at, size_t pages) {
    int sum = 0;
    for (size_t i = 0; i < pages; i++) sum += at[i * PAGE];
    return sum;
}

static void syscalls(uint64_t count) {
    uint64_t start = now();
    for (uint64_t i = 0; i < count; i++) syscall(SYS_getppid);
    say("syscall", now() - start, count);
}

static void clocks(uint64_t count) {
    uint64_t start = now();
    for (uint64_t i = 0; i < count; i++) now();
    say("clock_gettime", now() - start, count);
}

static void touch(size_t pages, int sequential) {
    volatile char *at = map(pages);
    uint64_t start = now();
    if (sequential) {
        write_all(at, pages, 1);
    } else {
        /* Every page once, in an order no window follows: a step prime to the number of pages. */
        size_t step = pages / 2 + 7;
        while (step % 2 == 0 || pages % step == 0) step++;
        for (size_t i = 0, p = 0; i < pages; i++, p = (p + step) % pages) at[p * PAGE] = 1;
    }
    say(sequential ? "first touch, in order" : "first touch, scattered", now() - start, pages);
}

static void reap(pid_t child) {
    int status;
    if (waitpid(child, &status, 0) != child || status != 0) die("child");
}

/* The child writes every page its parent has: one copy each. */
static void copy_on_write(size_t pages) {
    volatile char *at = map(pages);
    write_all(at, pages, 1);
    fflush(stdout);
    pid_t child = fork();
    if (child < 0) die("fork");
    if (child == 0) {
        uint64_t start = now();
        write_all(at, pages, 1);
        say("copy-on-write", now() - start, pages);
        fflush(stdout);
        _exit(0);
    }
    reap(child);
}

static void forks(uint64_t count, size_t pages) {
    volatile char *at = map(pages);
    write_all(at, pages, 1);
    uint64_t in_fork = 0, start = now();
    for (uint64_t i = 0; i < count; i++) {
        uint64_t before = now();
        pid_t child = fork();
        if (child < 0) die("fork");
        if (child == 0) _exit(0);
        in_fork += now() - before;
        reap(child);
    }
    say("fork, exit, wait", now() - start, count);
    say("fork alone", in_fork, count);
}

static int by_value(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* The median of the rounds stands for each of them. */
static void say_median(const char *what, uint64_t *rounds, uint64_t count, uint64_t units) {
    qsort(rounds, count, sizeof *rounds, by_value);
    say(what, rounds[count / 2] * count, units * count);
}

/* What a fork leaves to be paid later: the parent's pages after it, while the child lives. Each round has new memory:
 * nothing is left of the fork before. */
static void deferred(const char *what, size_t pages, int mode, uint64_t count) {
    enum { MOST = 101 };
    static uint64_t later[MOST], all[MOST];
    if (count == 0 || count > MOST) die("rounds");
    for (uint64_t round = 0; round < count; round++) {
        volatile char *at = map(pages);
        write_all(at, pages, 1);
        int gate[2];
        if (pipe(gate) != 0) die("pipe");
        uint64_t before = now();
        pid_t child = fork();
        if (child < 0) die("fork");
        if (child == 0) {
            char byte;
            close(gate[1]);
            if (read(gate[0], &byte, 1) != 0) _exit(1);
            _exit(0);
        }
        uint64_t start = now();
        if (mode == 0) read_all(at, pages);
        if (mode == 1) write_all(at, pages, 100);
        if (mode == 2) write_all(at, pages, 1);
        uint64_t end = now();
        later[round] = end - start;
        all[round] = end - before;
        close(gate[1]);
        close(gate[0]);
        reap(child);
        munmap((void *)at, pages * PAGE);
    }
    uint64_t units = mode == 1 ? (pages + 99) / 100 : pages;
    say_median(what, later, count, units);
    say_median("the same with the fork", all, count, units);
}

/* A file mapped and read in order; then mapped once more, when every page is in memory. */
static void mapped_file(const char *path, int sequential) {
    int fd = open(path, O_RDONLY);
    off_t size = fd < 0 ? -1 : lseek(fd, 0, SEEK_END);
    if (size < PAGE) die(path);
    size_t pages = (size_t)size / PAGE;
    for (int again = 0; again < 2; again++) {
        volatile char *at = mmap(NULL, pages * PAGE, PROT_READ, MAP_PRIVATE, fd, 0);
        if (at == MAP_FAILED) die("mmap");
        int sum = 0;
        uint64_t start = now();
        for (size_t i = 0, p = 0; i < pages; i++, p = (p + (sequential ? 1 : 997)) % pages) sum += at[p * PAGE];
        uint64_t took = now() - start;
        if (sum == 1) puts("");
        const char *order = sequential ? "in order" : "scattered";
        char what[64];
        snprintf(what, sizeof what, "%s of a file, %s", again ? "again, map" : "map", order);
        say(what, took, pages);
        munmap((void *)at, pages * PAGE);
    }
    close(fd);
}

/* All written, then all read: in a machine that has less memory than that, most of it comes from the page file. */
static void again(size_t pages, int sequential) {
    volatile char *at = map(pages);
    write_all(at, pages, 1);
    uint64_t start = now();
    int sum = 0;
    for (size_t i = 0, p = 0; i < pages; i++, p = (p + (sequential ? 1 : 997)) % pages) sum += at[p * PAGE];
    if (sum == 1) puts("");
    say(sequential ? "read again, in order" : "read again, scattered", now() - start, pages);
}

/* fork, execve of this program, and its end. */
static void execs(uint64_t count) {
    uint64_t start = now();
    for (uint64_t i = 0; i < count; i++) {
        pid_t child = fork();
        if (child < 0) die("fork");
        if (child == 0) {
            execl("/proc/self/exe", "bench", "none", "0", (char *)NULL);
            _exit(1);
        }
        reap(child);
    }
    say("fork, execve and exit", now() - start, count);
}

int main(int argc, char **argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: bench WORKLOAD COUNT [MIB|FILE]\n");
        return 2;
    }
    const char *what = argv[1];
    uint64_t count = strtoull(argv[2], NULL, 10);
    size_t pages = (argc > 3 ? strtoull(argv[3], NULL, 10) : 0) * 256;
    if (!strcmp(what, "none")) return 0;
    else if (!strcmp(what, "syscall")) syscalls(count);
    else if (!strcmp(what, "clock")) clocks(count);
    else if (!strcmp(what, "touch")) touch(pages, 1);
    else if (!strcmp(what, "scatter")) touch(pages, 0);
    else if (!strcmp(what, "cow")) copy_on_write(pages);
    else if (!strcmp(what, "fork")) forks(count, pages);
    else if (!strcmp(what, "exec")) execs(count);
    else if (!strcmp(what, "again")) again(pages, 1);
    else if (!strcmp(what, "again-scattered")) again(pages, 0);
    else if (!strcmp(what, "file") && argc > 3) mapped_file(argv[3], 1);
    else if (!strcmp(what, "file-scattered") && argc > 3) mapped_file(argv[3], 0);
    else if (!strcmp(what, "after-nothing")) deferred("then nothing", pages, 3, count);
    else if (!strcmp(what, "after-read")) deferred("then read all once", pages, 0, count);
    else if (!strcmp(what, "after-write-1")) deferred("then write 1 %", pages, 1, count);
    else if (!strcmp(what, "after-write-100")) deferred("then write 100 %", pages, 2, count);
    else {
        fprintf(stderr, "bench: no workload %s\n", what);
        return 2;
    }
    return 0;
}
