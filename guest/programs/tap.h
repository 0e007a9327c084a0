/* What the guest test programs share: results as TAP lines, and a child to do something dangerous.
 * Results go out with one write each, so that a fork never duplicates buffered output. */
#ifndef TAP_H
#define TAP_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL

static int tap_count, tap_failed;

__attribute__((format(printf, 1, 2), unused)) static void say(const char *format, ...)
{
	char line[512];
	va_list args;
	va_start(args, format);
	int n = vsnprintf(line, sizeof line, format, args);
	va_end(args);
	if (n > (int)sizeof line - 1)
		n = sizeof line - 1;
	if (write(1, line, n) != n)
		_exit(99);
}

__attribute__((format(printf, 2, 3))) static int ok(int good, const char *format, ...)
{
	char name[400];
	va_list args;
	va_start(args, format);
	vsnprintf(name, sizeof name, format, args);
	va_end(args);
	tap_count++;
	tap_failed += !good;
	say("%sok %d - %s\n", good ? "" : "not ", tap_count, name);
	return good;
}

/* The two values are printed only when they differ: a run that passes prints the same everywhere. */
__attribute__((unused)) static int is(long got, long want, const char *name)
{
	if (got == want)
		return ok(1, "%s", name);
	return ok(0, "%s: got %ld (%#lx), want %ld (%#lx), errno %d", name, got, got, want, want, errno);
}

/* A call that must fail with this errno. */
__attribute__((unused)) static int fails(long result, int want, const char *name)
{
	int e = errno;
	if (result == -1 && e == want)
		return ok(1, "%s", name);
	return ok(0, "%s: result %ld, errno %d, want errno %d", name, result, result == -1 ? e : 0, want);
}

/* What cannot be tried here; the harness counts these. */
__attribute__((unused)) static void skip(const char *name, const char *why)
{
	say("ok %d - %s # SKIP %s\n", ++tap_count, name, why);
}

/* QEMU's emulated processor leaves out some faults that real ones have. */
__attribute__((unused)) static int emulated_cpu(void) { return getenv("VMM_TEST_EMULATED_CPU") != NULL; }

__attribute__((unused)) static int tap_end(void)
{
	say("1..%d\n", tap_count);
	return tap_failed ? 1 : 0;
}

/* Ends the whole program if it hangs. */
__attribute__((unused)) static void deadline(unsigned seconds) { alarm(seconds); }

__attribute__((unused)) static long long now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

__attribute__((unused)) static void sleep_ms(long ms)
{
	struct timespec t = {ms / 1000, ms % 1000 * 1000000};
	while (nanosleep(&t, &t) && errno == EINTR)
		;
}

/* So that `wait_for_news` hears of children that end or stop. Gives back what was blocked before: the children's own. */
__attribute__((unused)) static sigset_t block_news(void)
{
	sigset_t news, before;
	sigemptyset(&news);
	sigaddset(&news, SIGCHLD);
	sigprocmask(SIG_BLOCK, &news, &before);
	return before;
}

/* Until a child has ended or stopped since the last time, or so many milliseconds are over. */
__attribute__((unused)) static void wait_for_news(long ms)
{
	struct timespec t = {ms / 1000, ms % 1000 * 1000000};
	sigset_t news;
	sigemptyset(&news);
	sigaddset(&news, SIGCHLD);
	sigtimedwait(&news, NULL, &t);
}

__attribute__((unused)) static int wait_for(pid_t pid)
{
	int status;
	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			return -1;
	return status;
}

/* Runs the body in a child; gives its wait status. */
__attribute__((unused)) static int in_child(void (*body)(void *), void *arg)
{
	pid_t pid = fork();
	if (pid == 0) {
		body(arg);
		_exit(0);
	}
	return pid < 0 ? -1 : wait_for(pid);
}

__attribute__((unused)) static int died_of(int status) { return status != -1 && WIFSIGNALED(status) ? WTERMSIG(status) : 0; }
__attribute__((unused)) static int exited_with(int status) { return status != -1 && WIFEXITED(status) ? WEXITSTATUS(status) : -1; }

/* A small generator, so that a seed says everything. */
__attribute__((unused)) static uint64_t random_next(uint64_t *state)
{
	uint64_t z = *state += 0x9e3779b97f4a7c15;
	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
	z = (z ^ z >> 27) * 0x94d049bb133111eb;
	return z ^ z >> 31;
}

/* The seed: argv[1], or a new one; printed to stderr, which is not compared with anything. */
__attribute__((unused)) static uint64_t seed_from(const char *arg)
{
	uint64_t seed;
	if (arg)
		seed = strtoull(arg, NULL, 0);
	else if (syscall(SYS_getrandom, &seed, sizeof seed, 0) != sizeof seed)
		seed = now_ns();
	dprintf(2, "seed %#llx\n", (unsigned long long)seed);
	return seed;
}
#endif
