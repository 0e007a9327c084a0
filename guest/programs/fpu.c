/* FPU and vector state: every component the processor has is filled, something happens, and all of it is looked at again:
   fpu [ROUNDS]   calls, waits, threads that take turns, signals, frames that handlers change, forks
   fpu held       through `freeze` of /dev/vmm: says "NUMBER same" in each guest it is made again in, and waits */
#include "tap.h"
#include <cpuid.h>
#include <pthread.h>
#include <ucontext.h>

enum { LEGACY = 512, HEADER = 64, MOST = 4096, MXCSR = 24, MXCSR_MASK = 28, ST = 32, XMM = 160, SW = 464 };
/* x87, SSE, AVX, AVX-512: no protection keys, with which a program could lock itself out. */
enum { COMPONENTS = 0xe7, AVX = 4 };

struct area {
	unsigned char byte[MOST];
} __attribute__((aligned(64)));

static uint64_t components; /* 0: no XSAVE, and FXSAVE has all there is */
static unsigned offset[8], size[8];

static void look_at_processor(void)
{
	unsigned a, b, c, d;
	__cpuid(1, a, b, c, d);
	if (!(c & 1 << 27))
		return;
	__asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
	components = a & COMPONENTS;
	for (int n = 2; n < 8; n++)
		if (components & 1 << n)
			__cpuid_count(0xd, n, size[n], offset[n], c, d);
}

/* Loads `in`, makes a call, and stores what is there then; or counts `spin` down instead, without a call. */
static long through(const struct area *in, struct area *out, long spin, long nr, long a, long b, long c, long d)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = spin;
	register const struct area *from __asm__("r12") = in;
	register struct area *to __asm__("r13") = out;
	register long whole __asm__("r14") = components;
	register long number __asm__("r15") = nr;
	long result;
	__asm__ volatile("test %[whole], %[whole]\n jz 1f\n"
			 "mov %k[whole], %%eax\n mov %%rdx, %%r9\n xor %%edx, %%edx\n xrstor64 (%[from])\n mov %%r9, %%rdx\n jmp 2f\n"
			 "1: fxrstor64 (%[from])\n"
			 "2: test %[spin], %[spin]\n jz 4f\n"
			 "3: dec %[spin]\n jnz 3b\n xor %%eax, %%eax\n jmp 5f\n"
			 "4: mov %[number], %%rax\n syscall\n"
			 "5: mov %%rax, %%r9\n test %[whole], %[whole]\n jz 6f\n"
			 "mov %k[whole], %%eax\n xor %%edx, %%edx\n xsave64 (%[to])\n jmp 7f\n"
			 "6: fxsave64 (%[to])\n"
			 "7: mov %%r9, %%rax\n fninit\n cld"
			 : "=&a"(result), [spin] "+r"(r8), "+d"(c)
			 : [from] "r"(from), [to] "r"(to), [whole] "r"(whole), [number] "r"(number), "D"(a), "S"(b), "r"(r10)
			 : "rcx", "r9", "r11", "memory", "cc", "st", "st(1)", "st(2)", "st(3)", "st(4)", "st(5)", "st(6)", "st(7)", "xmm0", "xmm1", "xmm2",
			   "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
	__asm__ volatile("ldmxcsr %0" ::"m"((unsigned){0x1f80}));
	return result;
}

static void put32(struct area *s, int at, uint32_t value) { memcpy(s->byte + at, &value, 4); }

static void fill(struct area *s, uint64_t seed)
{
	memset(s, 0, sizeof *s);
	for (int at = XMM; at < XMM + 256; at += 8)
		*(uint64_t *)(s->byte + at) = random_next(&seed);
	for (int n = 0; n < 8; n++) {
		/* Numbers, not NaNs: eight bytes of fraction, and an exponent. */
		*(uint64_t *)(s->byte + ST + 16 * n) = random_next(&seed) | 1ull << 63;
		*(uint16_t *)(s->byte + ST + 16 * n + 8) = 0x3f00 + (random_next(&seed) & 0xff);
	}
	/* Exceptions masked, any rounding; all registers in use. */
	*(uint16_t *)s->byte = 0x033f | (random_next(&seed) & 3) << 10 | 0x40;
	s->byte[4] = 0xff;
	put32(s, MXCSR, 0x1f80 | (random_next(&seed) & 3) << 13 | (random_next(&seed) & 0x803f));
	for (int n = 2; n < 8; n++)
		for (unsigned at = 0; at + 8 <= size[n]; at += 8)
			*(uint64_t *)(s->byte + offset[n] + at) = random_next(&seed);
	*(uint64_t *)(s->byte + LEGACY) = components;
}

/* Where two states differ, -1 if nowhere. The last x87 instruction's addresses are kept by some processors only. */
static int difference(const struct area *s, const struct area *t)
{
	for (int at = 0; at < XMM + 256; at++) {
		int address = at >= 6 && at < 24, unused = at >= ST && at < XMM && at % 16 >= 10;
		int mask = at >= MXCSR_MASK && at < ST;
		if (!address && !unused && !mask && s->byte[at] != t->byte[at])
			return at;
	}
	for (int n = 2; n < 8; n++)
		for (unsigned at = offset[n]; at < offset[n] + size[n]; at++)
			if (s->byte[at] != t->byte[at])
				return at;
	return -1;
}

static int kept(const struct area *s, long spin, long nr, long a, long b, long c, long d, const char *what)
{
	struct area now;
	memset(&now, 0, sizeof now);
	through(s, &now, spin, nr, a, b, c, d);
	int at = difference(s, &now);
	if (at >= 0)
		say("# %s: byte %d is %#x and was %#x\n", what, at, now.byte[at], s->byte[at]);
	return at < 0;
}

static const struct timespec moment = {0, 300000};

/* So many rounds of what takes a thread off its processor, with a state of its own each time. */
static long rounds(int count, uint64_t seed)
{
	struct area s;
	long wrong = 0;
	for (int n = 0; n < count; n++) {
		fill(&s, random_next(&seed));
		wrong += !kept(&s, 0, SYS_getppid, 0, 0, 0, 0, "a call");
		wrong += !kept(&s, 0, SYS_sched_yield, 0, 0, 0, 0, "a turn given away");
		wrong += !kept(&s, 0, SYS_nanosleep, (long)&moment, 0, 0, 0, "a sleep");
		wrong += !kept(&s, 200000, 0, 0, 0, 0, 0, "work");
	}
	return wrong;
}

static int how_often;
static void *takes_turns(void *seed) { return (void *)rounds(how_often, (uintptr_t)seed); }

static void threads(void)
{
	pthread_t thread[6];
	long wrong = 0;
	for (uintptr_t n = 0; n < 6; n++)
		if (pthread_create(&thread[n], NULL, takes_turns, (void *)(n + 1)))
			wrong++;
	for (int n = 0; n < 6; n++) {
		void *result;
		wrong += pthread_join(thread[n], &result) ? 1 : (long)result;
	}
	is(wrong, 0, "six threads each find their own state");
}

static void other_process(void *seed) { _exit(rounds(how_often, (uintptr_t)seed) != 0); }

static void processes(void)
{
	pid_t child[4];
	int wrong = 0;
	for (uintptr_t n = 0; n < 4; n++)
		if ((child[n] = fork()) == 0)
			other_process((void *)(n + 100));
	for (int n = 0; n < 4; n++)
		wrong += child[n] < 0 || wait_for(child[n]) != 0;
	is(wrong, 0, "four processes each find their own state");
	struct area s, now;
	fill(&s, 77);
	pid_t pid = through(&s, &now, 0, SYS_fork, 0, 0, 0, 0);
	if (pid == 0)
		_exit(difference(&s, &now) >= 0);
	is(difference(&s, &now), -1, "a fork leaves the parent's state");
	is(wait_for(pid), 0, "a fork's child has its parent's state");
}

/* Two processes that wake each other: who waits has left its state. */
static void ping_pong(void)
{
	int there[2], back[2], wrong = 0;
	char byte = 0;
	if (pipe(there) || pipe(back)) {
		ok(0, "pipes");
		return;
	}
	pid_t pid = fork();
	struct area s;
	for (int n = 0; n < how_often; n++) {
		fill(&s, n * 2 + (pid == 0));
		int *in = pid ? back : there, *out = pid ? there : back;
		if (pid)
			wrong += write(out[1], &byte, 1) != 1;
		wrong += !kept(&s, 0, SYS_read, in[0], (long)&byte, 1, 0, "a read that waits");
		if (!pid)
			wrong += write(out[1], &byte, 1) != 1;
	}
	if (!pid)
		_exit(wrong != 0);
	is(wrong, 0, "a process that waits finds its state");
	is(wait_for(pid), 0, "and so does the one that wakes it");
}

static struct area handlers, fresh;
static void (*change)(unsigned char *, uint64_t *);
static uint64_t change_seed;

static void handler(int signal, siginfo_t *info, void *context)
{
	(void)signal, (void)info;
	struct area now;
	unsigned char *frame = (void *)((ucontext_t *)context)->uc_mcontext.fpregs;
	__asm__ volatile("fxsave64 %0" : "=m"(fresh));
	if (change)
		change(frame, &change_seed);
	through(&handlers, &now, 0, SYS_getppid, 0, 0, 0, 0);
}

static void other_xmm(unsigned char *frame, uint64_t *seed)
{
	for (int at = XMM; at < XMM + 256; at++)
		frame[at] = random_next(seed);
	frame[MXCSR + 1] ^= 0x60; /* the rounding */
}

/* Headers, sizes, control words and everything else: a byte here or there is anything. */
static void hostile(unsigned char *frame, uint64_t *seed)
{
	for (int n = random_next(seed) % 4; n >= 0; n--) {
		static const int begin[] = {0, MXCSR, SW, LEGACY, LEGACY + 8, LEGACY + 16}, length[] = {576, 8, 48, 8, 8, 48};
		int part = random_next(seed) % 6;
		frame[begin[part] + random_next(seed) % length[part]] = random_next(seed);
	}
}

static void struck(void *seed)
{
	struct area s, now;
	change = hostile;
	change_seed = (uintptr_t)seed;
	fill(&s, 5);
	through(&s, &now, 0, SYS_kill, getpid(), SIGUSR1, 0, 0);
	syscall(SYS_exit_group, 0);
}

static void signals(void)
{
	struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO};
	sigaction(SIGUSR1, &action, NULL);
	struct area s, now;
	int wrong = 0;
	fill(&handlers, 99);
	for (int n = 0; n < how_often; n++) {
		fill(&s, n);
		wrong += !kept(&s, 0, SYS_kill, getpid(), SIGUSR1, 0, 0, "a handler");
		uint32_t mxcsr;
		memcpy(&mxcsr, fresh.byte + MXCSR, 4);
		wrong += mxcsr != 0x1f80 || *(uint16_t *)fresh.byte != 0x37f;
	}
	is(wrong, 0, "a handler begins anew, and leaves the state as it was");
	change = other_xmm;
	for (int n = 0; n < how_often; n++) {
		fill(&s, n);
		change_seed = n;
		through(&s, &now, 0, SYS_kill, getpid(), SIGUSR1, 0, 0);
		uint64_t seed = n;
		other_xmm(s.byte, &seed);
		wrong += difference(&s, &now) >= 0;
	}
	is(wrong, 0, "what a handler puts into its frame is what there is");
	fill(&s, 6);
	for (uintptr_t n = 1; n <= (uintptr_t)how_often * 4; n++) {
		int status = in_child(struck, (void *)n);
		wrong += exited_with(status) != 0 && died_of(status) != SIGSEGV;
		wrong += !kept(&s, 0, SYS_sched_yield, 0, 0, 0, 0, "another's frame");
	}
	is(wrong, 0, "a bad frame is a program's own trouble");
	change = NULL;
}

static int held(void)
{
	struct area s, t, now;
	int vmm = open("/dev/vmm", O_RDWR);
	fill(&s, 1);
	fill(&t, 2);
	if (through(&s, &now, 0, SYS_write, vmm, (long)"freeze\n", 7, 0) != 7)
		return 3;
	char said[512] = "";
	unsigned long number = 0;
	if (read(vmm, said, sizeof said - 1) <= 0)
		return 4;
	sscanf(said, "clone %lu", &number);
	say("%lu %s\n", number, difference(&s, &now) < 0 ? "same" : "other");
	for (char byte; !number;) {
		if (read(0, &byte, 1) <= 0)
			return 0;
	}
	for (;;) {
		kept(&t, 1000000, 0, 0, 0, 0, 0, "work");
		sleep_ms(20);
	}
}

int main(int argc, char **argv)
{
	look_at_processor();
	if (argc > 1 && !strcmp(argv[1], "held"))
		return held();
	deadline(100);
	how_often = argc > 1 ? atoi(argv[1]) : 20;
	is(rounds(how_often, 1), 0, "a state is kept");
	threads();
	processes();
	ping_pong();
	signals();
	return tap_end();
}
