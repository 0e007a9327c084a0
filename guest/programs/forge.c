/* The door between a guest program and its hypervisor is a page in the program's own address space
 * that does an `out`. Here it is opened in every wrong way: jumped into with return addresses that
 * are none, with flags that a program may not have, and the `out` done elsewhere. Each must be
 * SIGSEGV. On a Linux without such a page it is that too. */
#include "tap.h"

#define REGION 0x7f8000000000UL
/* Pages of the region to try: around its beginning, the page that SYSCALL enters (0x100), the vDSO's
 * (0x200, 0x210), the areas of processors (0x1000) and beyond. */
static const uint64_t pages[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 0xff, 0x100, 0x101, 0x200, 0x201, 0x203, 0x204, 0x20f, 0x210, 0x211,
	0x1000, 0x1001, 0x1002, 0x1003, 0x100000, 0x1000000, 0x1000005, 0x7ffffff};
enum { PAGES = sizeof pages / sizeof *pages };
/* The vDSO's image is there for programs to run, but not from its beginning: any end will do. */
static int expected(int sig, int page)
{
	return sig == SIGSEGV || (page >= 0x200 && page < 0x210 && (sig == SIGILL || sig == SIGTRAP || sig == SIGBUS || sig == SIGFPE));
}
static const uint64_t ports[] = {0x10, 0x11, 0x12, 0x13, 0x0f};

struct forgery {
	uint64_t target, rcx, r11, rax;
};

/* Where a forged return lands, if it works: nothing a program may do may work here. */
__asm__(".text\n.globl forged_return\nforged_return:\n cli\n hlt\n 1: jmp 1b\n"
	".globl plain_return\nplain_return:\n mov $231,%eax\n mov $77,%edi\n syscall\n hlt\n");
extern char forged_return[], plain_return[];

static void jump(void *arg)
{
	struct forgery *f = arg;
	alarm(3);
	__asm__ volatile("mov %0,%%rdi\n mov %1,%%rcx\n mov %2,%%r11\n mov %3,%%rax\n xor %%esi,%%esi\n xor %%edx,%%edx\n jmp *%%rdi" ::"r"(f->target), "r"(f->rcx),
			 "r"(f->r11), "r"(f->rax) : "rdi", "rcx", "r11", "rax", "rsi", "rdx", "memory");
	__builtin_unreachable();
}

static void returns_to_nowhere(void)
{
	const uint64_t targets[] = {
		0xffff800000000000, 0xffffffff81000000, 0xffffffffffffffff, 0x0000800000000000, 0x8000000000000000,
		0x7fffffffffff0000, 0x0000000000000000, 0x00007ffffffff000, 0x00007fffffffffff, 0x1234567812345678,
	};
	for (unsigned t = 0; t < sizeof targets / sizeof *targets; t++) {
		int bad = 0, last = 0;
		for (int page = 0; page < PAGES; page++) {
			struct forgery f = {REGION + pages[page] * PAGE, targets[t], 0x202, 39};
			int sig = died_of(in_child(jump, &f));
			if (!expected(sig, pages[page])) {
				bad++;
				last = pages[page] << 8 | sig;
			}
		}
		if (!ok(bad == 0, "returning to %#llx", (unsigned long long)targets[t]))
			say("# %d pages did not end with SIGSEGV, the last: page %#x signal %d\n", bad, last >> 8, last & 255);
	}
}

static void strange_flags(void)
{
	const struct { uint64_t flags; const char *name; } cases[] = {
		{0x3202, "IOPL 3"}, {0x1202, "IOPL 1"}, {0x4202, "NT"}, {0x20202, "VM"}, {0x10202, "RF"}, {0x8202, "bit 15"},
		{0x80202, "VIF"}, {0x100202, "VIP"}, {0x200202, "ID"}, {0, "nothing"}, {0x2, "interrupts off"}, {0xffffffff, "all"},
		{0xffffffffffffffff, "all 64"}, {0x40202, "AC"}, {0x602, "DF"},
	};
	/* Rights must not come of it: the code returned to tries `cli`. TF may trap before that. */
	for (unsigned c = 0; c < sizeof cases / sizeof *cases; c++) {
		int bad = 0, last = 0;
		for (int page = 0; page < PAGES; page++) {
			struct forgery f = {REGION + pages[page] * PAGE, (uint64_t)forged_return, cases[c].flags, 39};
			int sig = died_of(in_child(jump, &f));
			if (!expected(sig, pages[page]) && !(sig == SIGTRAP && cases[c].flags & 0x100)) {
				bad++;
				last = pages[page] << 8 | sig;
			}
		}
		if (!ok(bad == 0, "returning with %s in the flags", cases[c].name))
			say("# %d pages ended otherwise, the last: page %#x signal %d\n", bad, last >> 8, last & 255);
	}
}

static void into_the_middle(void)
{
	int bad = 0, last = 0;
	for (int page = 0; page < PAGES; page++)
		for (int at = 1; at < 24; at++) {
			struct forgery f = {REGION + pages[page] * PAGE + at, 0xffff800000000000, 0x202, 39};
			int sig = died_of(in_child(jump, &f));
			if (sig != SIGSEGV && sig != SIGILL && sig != SIGTRAP && sig != SIGBUS && sig != SIGFPE) {
				bad++;
				last = page << 16 | at << 8 | sig; /* page: its place in the list */
			}
		}
	if (!ok(bad == 0, "jumping into the middle"))
		say("# %d times, the last: page %d offset %d signal %d\n", bad, last >> 16, last >> 8 & 255, last & 255);
}

/* Executable memory with one I/O instruction, then the code of `forged_return`. */
static unsigned char *code;

static void elsewhere(void)
{
	static const struct { const char *name; unsigned char bytes[5], length, immediate_at; } forms[] = {
		{"out imm8, al", {0xe6, 0}, 2, 1}, {"out imm8, ax", {0x66, 0xe7, 0}, 3, 2}, {"out imm8, eax", {0xe7, 0}, 2, 1},
		{"out dx, al", {0xee}, 1, 0}, {"out dx, ax", {0x66, 0xef}, 2, 0}, {"out dx, eax", {0xef}, 1, 0},
		{"in al, imm8", {0xe4, 0}, 2, 1}, {"in eax, imm8", {0xe5, 0}, 2, 1}, {"in eax, dx", {0xed}, 1, 0},
		{"outsb", {0x6e}, 1, 0}, {"rep outsd", {0xf3, 0x6f}, 2, 0}, {"insd", {0x6d}, 1, 0},
	};
	for (unsigned form = 0; form < sizeof forms / sizeof *forms; form++) {
		int bad = 0, last = 0;
		for (unsigned p = 0; p < sizeof ports / sizeof *ports; p++)
			for (int good_return = 0; good_return < 2; good_return++) {
				unsigned char *at = code + 100;
				memset(code, 0xcc, PAGE);
				*at++ = 0xba; /* mov edx, port */
				uint32_t port = ports[p];
				memcpy(at, &port, 4);
				at += 4;
				memcpy(at, forms[form].bytes, forms[form].length);
				if (forms[form].immediate_at)
					at[forms[form].immediate_at] = ports[p];
				at += forms[form].length;
				memcpy(at, "\xfa\xf4\xeb\xfe", 4); /* cli; hlt; jmp $ */
				struct forgery f = {(uint64_t)code + 100, good_return ? (uint64_t)plain_return : 0xffff800000000000, 0x202, 39};
				int sig = died_of(in_child(jump, &f));
				if (sig != SIGSEGV) {
					bad++;
					last = port << 8 | sig;
				}
			}
		if (!ok(bad == 0, "%s elsewhere", forms[form].name))
			say("# %d times otherwise, the last: port %#x signal %d\n", bad, last >> 8, last & 255);
	}
}

/* The page cannot be changed, taken away, or written through the hypervisor's own hands. */
static void change_it(void *how)
{
	void *page = (void *)REGION;
	long size = 0x220 * PAGE;
	switch ((long)how) {
	case 0: munmap(page, size); break;
	case 1: mprotect(page, size, PROT_READ | PROT_WRITE | PROT_EXEC); break;
	case 2: mmap(page, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0); break;
	case 3: madvise(page, size, MADV_DONTNEED); break;
	case 4: mremap(page, size, 2 * size, MREMAP_MAYMOVE); break;
	case 5: munmap(NULL, REGION); break; /* all that is ours: we cannot go on, the VMM must */
	}
	/* Still able to call, and to fork. */
	if (syscall(SYS_getpid) <= 0)
		_exit(1);
	pid_t pid = fork();
	if (pid == 0)
		_exit(5);
	_exit(exited_with(wait_for(pid)) == 5 ? 0 : 2);
}

static void write_it(void *arg)
{
	*(volatile char *)arg = 0;
}

static void change(void)
{
	const char *names[] = {"unmapping", "mprotect over", "mapping over", "madvise over", "moving"};
	for (long how = 0; how < 5; how++)
		ok(exited_with(in_child(change_it, (void *)how)) == 0, "%s the region breaks nothing", names[how]);
	ok(died_of(in_child(change_it, (void *)5)) > 0, "unmapping everything ends the program, and only it");
	int bad = 0, readable = 0;
	int fd = open("/dev/zero", O_RDONLY);
	for (int page = 0; page < PAGES; page++) {
		char *at = (char *)REGION + pages[page] * PAGE;
		bad += died_of(in_child(write_it, at)) != SIGSEGV;
		readable += read(fd, at, 16) != -1 || errno != EFAULT;
	}
	close(fd);
	is(bad, 0, "no page of it can be written");
	is(readable, 0, "nor by a system call");
}

int main(void)
{
	deadline(900);
	code = mmap(NULL, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (code == MAP_FAILED)
		return 2;
	returns_to_nowhere();
	strange_flags();
	into_the_middle();
	elsewhere();
	change();
	return tap_end();
}
