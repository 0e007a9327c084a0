/* Time: what the vDSO says against what the system calls say, and sleeping. */
#include "tap.h"
#include <elf.h>
#include <sched.h>
#include <sys/auxv.h>
#include <sys/resource.h>
#include <sys/times.h>

static long long ns(struct timespec t) { return t.tv_sec * 1000000000LL + t.tv_nsec; }

static long long by_syscall(clockid_t clock)
{
	struct timespec t = {0, 0};
	syscall(SYS_clock_gettime, clock, &t);
	return ns(t);
}

static long long by_library(clockid_t clock)
{
	struct timespec t = {0, 0};
	clock_gettime(clock, &t);
	return ns(t);
}

static void agree(clockid_t clock, const char *name)
{
	int back = 0, off = 0;
	long long last = 0;
	for (int i = 0; i < 20000; i++) {
		long long t = by_library(clock);
		back += t < last;
		last = t;
	}
	ok(back == 0, "%s never goes back (%d times)", name, back);
	/* The two may differ by a little; a millisecond is a mistake. */
	for (int i = 0; i < 300; i++) {
		long long a = by_syscall(clock), b = by_library(clock), c = by_syscall(clock);
		off += b < a - 1000000 || b > c + 1000000;
	}
	ok(off == 0, "%s is the system call's (%d times not)", name, off);
}

static void rate(void)
{
	/* The library's time lies between the system call's before and after, at both ends. */
	long long a0 = by_syscall(CLOCK_MONOTONIC), b = by_library(CLOCK_MONOTONIC), a1 = by_syscall(CLOCK_MONOTONIC);
	sleep_ms(300);
	long long c0 = by_syscall(CLOCK_MONOTONIC), d = by_library(CLOCK_MONOTONIC), c1 = by_syscall(CLOCK_MONOTONIC);
	ok(d - b >= c0 - a1 - 1000000 && d - b <= c1 - a0 + 1000000, "both run at the same rate");
	ok(c0 - a1 >= 299000000, "and a sleep lasts at least as long as asked");
}

static void wall_clock(void)
{
	struct timeval tv;
	long long before = by_syscall(CLOCK_REALTIME);
	is(gettimeofday(&tv, NULL), 0, "gettimeofday");
	long long t = tv.tv_sec * 1000000000LL + tv.tv_usec * 1000LL;
	ok(t > before - 2000000 && t < by_syscall(CLOCK_REALTIME) + 2000000, "is the wall clock");
	time_t s = time(NULL), stored = 0;
	ok(llabs(s - tv.tv_sec) <= 1, "time() too");
	ok(time(&stored) >= s && stored >= s, "also through its pointer");
	ok(s > 1577836800, "and it is after 2020");
	long long monotonic = by_library(CLOCK_MONOTONIC);
	ok(by_library(CLOCK_BOOTTIME) >= monotonic, "CLOCK_BOOTTIME is not behind CLOCK_MONOTONIC");
	ok(llabs(by_library(CLOCK_REALTIME_COARSE) - by_library(CLOCK_REALTIME)) < 100000000, "the coarse clock is near the fine one");
	struct timespec r;
	is(clock_getres(CLOCK_MONOTONIC, &r), 0, "clock_getres");
	ok(ns(r) > 0 && ns(r) <= 10000000, "is small");
	fails(clock_gettime(1234, &r), EINVAL, "no such clock");
	fails(syscall(SYS_clock_gettime, CLOCK_MONOTONIC, 0x10), EFAULT, "nowhere to store it");
}

static void processor(void)
{
	unsigned cpu = 12345, node = 12345;
	is(getcpu(&cpu, &node), 0, "getcpu");
	ok(cpu < 4096 && node < 1024, "gives a processor and a node");
	ok(sched_getcpu() >= 0, "sched_getcpu");
	long long before = by_library(CLOCK_PROCESS_CPUTIME_ID), t = now_ns();
	volatile unsigned long spin = 0;
	while (now_ns() - t < 100000000)
		for (int i = 0; i < 10000; i++)
			spin += i;
	ok(by_library(CLOCK_PROCESS_CPUTIME_ID) > before, "computing takes processor time");
	struct rusage u;
	is(getrusage(RUSAGE_SELF, &u), 0, "getrusage");
	ok(u.ru_utime.tv_sec * 1000000LL + u.ru_utime.tv_usec + u.ru_stime.tv_sec * 1000000LL + u.ru_stime.tv_usec > 0, "says so too");
	ok(times(NULL) != (clock_t)-1, "times");
}

static void sleeping(void)
{
	struct timespec t = {0, 1000000000};
	fails(nanosleep(&t, NULL), EINVAL, "a sleep of no proper time");
	t = (struct timespec){-1, 0};
	fails(nanosleep(&t, NULL), EINVAL, "or a negative one");
	clock_gettime(CLOCK_MONOTONIC, &t);
	long long until = ns(t) + 50000000;
	t = (struct timespec){until / 1000000000, until % 1000000000};
	is(clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL), 0, "sleeping until a time");
	ok(by_library(CLOCK_MONOTONIC) >= until, "until it is past");
	long long before = now_ns();
	is(clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL), 0, "until a time that is past");
	ok(now_ns() - before < 1000000000, "returns at once");
	is(alarm(50), 60, "alarm gives what was left of the last one");
	struct itimerval it = {{0, 0}, {3, 0}}, old;
	is(setitimer(ITIMER_REAL, &it, &old), 0, "setitimer is the same timer");
	ok(old.it_value.tv_sec >= 48 && old.it_value.tv_sec <= 50, "as alarm's");
	is(getitimer(ITIMER_REAL, &it), 0, "getitimer");
	ok(it.it_value.tv_sec <= 3 && it.it_value.tv_sec >= 1, "what is left");
	pid_t pid = fork();
	if (pid == 0) {
		getitimer(ITIMER_REAL, &it);
		_exit(it.it_value.tv_sec != 0 || it.it_value.tv_usec != 0);
	}
	is(exited_with(wait_for(pid)), 0, "a child has no timer");
	deadline(60);
	pid = fork();
	if (pid == 0) {
		long long a = by_library(CLOCK_MONOTONIC), b = by_syscall(CLOCK_MONOTONIC);
		_exit(a > before && llabs(a - b) < 100000000 ? 0 : 1);
	}
	is(exited_with(wait_for(pid)), 0, "but the same clock");
}

static void vdso(void)
{
	Elf64_Ehdr *elf = (Elf64_Ehdr *)getauxval(AT_SYSINFO_EHDR);
	if (!ok(elf != NULL, "there is a vDSO"))
		return;
	ok(!memcmp(elf->e_ident, ELFMAG, SELFMAG) && elf->e_type == ET_DYN, "which is an ELF");
	Elf64_Phdr *p = (Elf64_Phdr *)((char *)elf + elf->e_phoff);
	int load = 0, dynamic = 0;
	for (int i = 0; i < elf->e_phnum; i++) {
		load += p[i].p_type == PT_LOAD;
		dynamic += p[i].p_type == PT_DYNAMIC;
	}
	ok(load == 1 && dynamic == 1, "with one segment and a dynamic section");
}

int main(void)
{
	deadline(60);
	sleeping();
	vdso();
	agree(CLOCK_MONOTONIC, "CLOCK_MONOTONIC");
	agree(CLOCK_REALTIME, "CLOCK_REALTIME");
	rate();
	wall_clock();
	processor();
	return tap_end();
}
