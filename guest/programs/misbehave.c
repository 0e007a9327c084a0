/* Programs that do what they must not. `misbehave NAME` does one thing and should die of it;
 * `misbehave` alone does each in a child and checks the signal and what the handler is told. */
#include "tap.h"

static volatile int zero;
static char *nowhere = (char *)0x10;

static void wild_jump(void) { ((void (*)(void))0x123456789000)(); }
static void jump_null(void) { ((void (*)(void))(long)zero)(); }
static void jump_kernel(void) { __asm__ volatile("mov $0xffffffff81000000,%rax\n jmp *%rax"); }
static void jump_noncanonical(void) { __asm__ volatile("mov $0x0123456789abcdef,%rax\n jmp *%rax"); }
static void call_stack(void)
{
	volatile unsigned char code[16] = {0xc3};
	((void (*)(void))code)();
}
#pragma GCC diagnostic ignored "-Winfinite-recursion"
__attribute__((noinline)) static int deeper(int n)
{
	volatile char frame[4000];
	frame[zero] = (char)n;
	return deeper(n + 1) + frame[zero];
}
static void stack_overflow(void) { deeper(0); }
static void no_stack(void) { __asm__ volatile("xor %esp,%esp\n push %rax"); }
static void bad_stack(void) { __asm__ volatile("mov $0x4141414141414141,%rsp\n push %rax"); }
static void divide(void) { __asm__ volatile("xor %%ecx,%%ecx\n mov $1,%%eax\n cltd\n idiv %%ecx" ::: "eax", "ecx", "edx"); }
static void divide_overflow(void) { __asm__ volatile("mov $0x80000000,%%eax\n cltd\n mov $-1,%%ecx\n idiv %%ecx" ::: "eax", "ecx", "edx"); }
static void ud2(void) { __asm__ volatile("ud2"); }
static void bad_opcode(void) { __asm__ volatile(".byte 0x06"); }
static void bad_lock(void) { __asm__ volatile(".byte 0xf0, 0x90"); }
static void hlt(void) { __asm__ volatile("hlt"); }
static void cli(void) { __asm__ volatile("cli"); }
static void sti(void) { __asm__ volatile("sti"); }
static void in_al(void) { __asm__ volatile("inb $0x60,%%al" ::: "eax"); }
static void in_dx(void) { __asm__ volatile("inl %%dx,%%eax" ::"d"(0xcf8) : "eax"); }
static void out_al(void) { __asm__ volatile("outb %%al,$0x80" ::: "eax"); }
static void out_dx(void) { __asm__ volatile("outl %%eax,%%dx" ::"d"(0xcf8), "a"(0)); }
static void outs(void) { __asm__ volatile("outsb" ::"d"(0x3f8), "S"(&zero)); }
static void wrmsr(void) { __asm__ volatile("wrmsr" ::"c"(0xc0000082), "a"(0), "d"(0)); }
static void rdmsr(void) { __asm__ volatile("rdmsr" ::"c"(0xc0000080) : "eax", "edx"); }
static void mov_cr0(void) { __asm__ volatile("mov %%cr0,%%rax" ::: "rax"); }
static void mov_cr3(void) { __asm__ volatile("mov %%rax,%%cr3" ::"a"(0L)); }
static void mov_cr4(void) { __asm__ volatile("mov %%rax,%%cr4" ::"a"(0L)); }
static void mov_dr7(void) { __asm__ volatile("mov %%rax,%%dr7" ::"a"(0L)); }
static void lgdt(void) { __asm__ volatile("lgdt %0" ::"m"(*nowhere)); }
static void lidt(void)
{
	static char table[10];
	__asm__ volatile("lidt %0" ::"m"(table));
}
static void ltr(void) { __asm__ volatile("ltr %%ax" ::"a"(0x40)); }
static void invlpg(void) { __asm__ volatile("invlpg (%0)" ::"r"(&zero)); }
static void wbinvd(void) { __asm__ volatile("wbinvd"); }
static void swapgs(void) { __asm__ volatile("swapgs"); }
static void sysret(void) { __asm__ volatile("sysretq"); }
static void iret_kernel(void)
{
	/* To ring 0 through IRET: a null or a kernel code segment must not work. */
	__asm__ volatile("mov %%rsp,%%rax\n push $0\n push %%rax\n push $0x3002\n push $0x08\n lea 1f(%%rip),%%rax\n push %%rax\n iretq\n1: hlt" ::: "rax", "memory");
}
static void far_jump(void)
{
	static struct { uint32_t offset; uint16_t selector; } __attribute__((packed)) target = {0x1000, 0x08};
	__asm__ volatile("ljmp *%0" ::"m"(target));
}
static void load_ds(void) { __asm__ volatile("mov %%ax,%%ss" ::"a"(0x0)); }
static void load_fs(void) { __asm__ volatile("mov %%ax,%%fs" ::"a"(0xfff8)); }
static void int_13(void) { __asm__ volatile("int $0x0d"); }
static void int_ff(void) { __asm__ volatile("int $0xff"); }
static void int3(void) { __asm__ volatile("int3"); }
static void icebp(void) { __asm__ volatile(".byte 0xf1"); }
static void trap_flag(void) { __asm__ volatile("pushf\n orl $0x100,(%%rsp)\n popf\n nop\n nop" ::: "memory", "cc"); }
static void vmcall(void) { __asm__ volatile(".byte 0x0f,0x01,0xd9"); } /* VMMCALL: not for programs */
static void clts(void) { __asm__ volatile("clts"); }
static void read_noncanonical(void) { __asm__ volatile("mov (%0),%%al" ::"r"(0x8000000000000000) : "eax"); }
static void write_noncanonical(void) { __asm__ volatile("movb $1,(%0)" ::"r"(0x0000800000000000)); }
static void read_kernel(void) { __asm__ volatile("mov (%0),%%al" ::"r"(0xffff800000000000) : "eax"); }
static void write_kernel(void) { __asm__ volatile("movb $1,(%0)" ::"r"(0xffffffff81000000)); }
static void read_last(void) { __asm__ volatile("mov (%0),%%rax" ::"r"(0xffffffffffffffff) : "rax"); }
static void write_text(void) { *(volatile char *)(long)write_text = 0; }
static void write_constant(void)
{
	static const char constant[] = "constant";
	*(volatile char *)(constant + zero) = 0;
}
static void misaligned_sse(void) { __asm__ volatile("movaps 1(%0),%%xmm0" ::"r"((long)&zero & ~15) : "xmm0"); }
static void alignment_check(void)
{
	static char data[16] __attribute__((aligned(8)));
	__asm__ volatile("pushf\n orl $0x40000,(%%rsp)\n popf\n mov 1(%0),%%eax\n pushf\n andl $~0x40000,(%%rsp)\n popf" ::"r"(data) : "eax", "cc", "memory");
}
static void abort_(void) { abort(); }

/* May end in more than one way, by processor and kernel: only that it ends, or goes on, is checked. */
static void int_80(void) { __asm__ volatile("int $0x80" ::"a"(20) : "memory"); }
static void sysenter(void) { __asm__ volatile("mov %%rsp,%%rbp\n sysenter" ::"a"(20) : "memory", "rcx", "rdx"); }

enum { ANY = -1, NO_CODE = 0x7fff };
static const struct {
	const char *name;
	void (*act)(void);
	int signal, code;
	long address; /* -1: not looked at */
} acts[] = {
	{"wild_jump", wild_jump, SIGSEGV, SEGV_MAPERR, 0x123456789000},
	{"jump_null", jump_null, SIGSEGV, SEGV_MAPERR, 0},
	{"jump_kernel", jump_kernel, SIGSEGV, NO_CODE, -1},
	{"jump_noncanonical", jump_noncanonical, SIGSEGV, SI_KERNEL, 0},
	{"call_stack", call_stack, SIGSEGV, SEGV_ACCERR, -1},
	{"stack_overflow", stack_overflow, SIGSEGV, NO_CODE, -1},
	{"no_stack", no_stack, SIGSEGV, NO_CODE, -1},
	{"bad_stack", bad_stack, SIGBUS, NO_CODE, -1},
	{"divide", divide, SIGFPE, FPE_INTDIV, -1},
	{"divide_overflow", divide_overflow, SIGFPE, FPE_INTDIV, -1},
	{"ud2", ud2, SIGILL, ILL_ILLOPN, -1},
	{"bad_opcode", bad_opcode, SIGILL, ILL_ILLOPN, -1},
	{"bad_lock", bad_lock, SIGILL, ILL_ILLOPN, -1},
	{"hlt", hlt, SIGSEGV, SI_KERNEL, 0},
	{"cli", cli, SIGSEGV, SI_KERNEL, 0},
	{"sti", sti, SIGSEGV, SI_KERNEL, 0},
	{"in_al", in_al, SIGSEGV, SI_KERNEL, 0},
	{"in_dx", in_dx, SIGSEGV, SI_KERNEL, 0},
	{"out_al", out_al, SIGSEGV, SI_KERNEL, 0},
	{"out_dx", out_dx, SIGSEGV, SI_KERNEL, 0},
	{"outs", outs, SIGSEGV, SI_KERNEL, 0},
	{"wrmsr", wrmsr, SIGSEGV, SI_KERNEL, 0},
	{"rdmsr", rdmsr, SIGSEGV, SI_KERNEL, 0},
	{"mov_cr0", mov_cr0, SIGSEGV, SI_KERNEL, 0},
	{"mov_cr3", mov_cr3, SIGSEGV, SI_KERNEL, 0},
	{"mov_cr4", mov_cr4, SIGSEGV, SI_KERNEL, 0},
	{"mov_dr7", mov_dr7, SIGSEGV, SI_KERNEL, 0},
	{"lgdt", lgdt, SIGSEGV, NO_CODE, -1},
	{"lidt", lidt, SIGSEGV, SI_KERNEL, 0},
	{"ltr", ltr, SIGSEGV, SI_KERNEL, 0},
	{"invlpg", invlpg, SIGSEGV, SI_KERNEL, 0},
	{"wbinvd", wbinvd, SIGSEGV, SI_KERNEL, 0},
	{"swapgs", swapgs, SIGSEGV, SI_KERNEL, 0},
	{"sysret", sysret, SIGSEGV, SI_KERNEL, 0},
	{"clts", clts, SIGSEGV, SI_KERNEL, 0},
	{"iret_kernel", iret_kernel, SIGSEGV, SI_KERNEL, 0},
	{"far_jump", far_jump, SIGSEGV, SI_KERNEL, 0},
	{"load_ss", load_ds, SIGSEGV, SI_KERNEL, 0},
	{"load_fs", load_fs, SIGSEGV, SI_KERNEL, 0},
	{"int_13", int_13, SIGSEGV, SI_KERNEL, 0},
	{"int_ff", int_ff, SIGSEGV, SI_KERNEL, 0},
	{"int3", int3, SIGTRAP, SI_KERNEL, 0},
	{"icebp", icebp, SIGTRAP, NO_CODE, -1},
	{"trap_flag", trap_flag, SIGTRAP, TRAP_TRACE, -1},
	{"read_noncanonical", read_noncanonical, SIGSEGV, SI_KERNEL, 0},
	{"write_noncanonical", write_noncanonical, SIGSEGV, SI_KERNEL, 0},
	{"read_kernel", read_kernel, SIGSEGV, NO_CODE, -1},
	{"write_kernel", write_kernel, SIGSEGV, NO_CODE, -1},
	{"read_last", read_last, SIGSEGV, NO_CODE, -1},
	{"write_text", write_text, SIGSEGV, SEGV_ACCERR, -1},
	{"write_constant", write_constant, SIGSEGV, SEGV_ACCERR, -1},
	{"misaligned_sse", misaligned_sse, SIGSEGV, SI_KERNEL, 0},
	{"alignment_check", alignment_check, SIGBUS, BUS_ADRALN, -1},
	{"abort", abort_, SIGABRT, NO_CODE, -1},
	{"vmcall", vmcall, ANY, NO_CODE, -1},
	{"int_80", int_80, ANY, NO_CODE, -1},
	{"sysenter", sysenter, ANY, NO_CODE, -1},
};
enum { ACTS = sizeof acts / sizeof *acts };

static int report_to;

static void report(int sig, siginfo_t *info, void *context)
{
	long what[3] = {sig, info->si_code, (long)info->si_addr};
	(void)context;
	_exit(write(report_to, what, sizeof what) == sizeof what ? 0 : 1);
}

/* In a child with a handler: what is it told? */
static void told(int i)
{
	static char stack[32768];
	int fd[2];
	long what[3] = {0, 0, 0};
	if (pipe(fd))
		return;
	pid_t pid = fork();
	if (pid == 0) {
		stack_t st = {.ss_sp = stack, .ss_size = sizeof stack};
		struct sigaction act = {.sa_sigaction = report, .sa_flags = SA_SIGINFO | SA_ONSTACK};
		int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT};
		sigaltstack(&st, NULL);
		for (int s = 0; s < 6; s++)
			sigaction(signals[s], &act, NULL);
		report_to = fd[1];
		acts[i].act();
		_exit(0);
	}
	close(fd[1]);
	long n = read(fd[0], what, sizeof what);
	wait_for(pid);
	close(fd[0]);
	int good = n == sizeof what && what[0] == acts[i].signal &&
		   (acts[i].code == NO_CODE || what[1] == acts[i].code) && (acts[i].address == -1 || what[2] == acts[i].address);
	ok(good, "%s: what a handler is told", acts[i].name);
	if (!good)
		say("# %s: signal %ld code %ld address %#lx\n", acts[i].name, what[0], what[1], what[2]);
}

/* What QEMU's emulated processor gets wrong, tried on a Linux there. */
static int not_emulated(const char *name)
{
	return !strcmp(name, "bad_stack") || !strcmp(name, "iret_kernel") || !strcmp(name, "icebp") || !strcmp(name, "alignment_check");
}

static void perform(void *i) { acts[(long)i].act(); }

int main(int argc, char **argv)
{
	deadline(120);
	if (argc > 1 && !strcmp(argv[1], "--list")) {
		for (int i = 0; i < ACTS; i++)
			say("%s %d\n", acts[i].name, acts[i].signal);
		return 0;
	}
	for (int i = 0; argc > 1 && i < ACTS; i++)
		if (!strcmp(argv[1], acts[i].name)) {
			acts[i].act();
			return 0;
		}
	if (argc > 1)
		return 2;
	for (long i = 0; i < ACTS; i++) {
		if (emulated_cpu() && not_emulated(acts[i].name)) {
			skip(acts[i].name, "the emulated processor does something else");
			continue;
		}
		int status = in_child(perform, (void *)i);
		if (acts[i].signal == ANY) {
			int sig = died_of(status);
			ok(exited_with(status) == 0 || sig == SIGSEGV || sig == SIGILL || sig == SIGBUS || sig == SIGTRAP, "%s harms nobody", acts[i].name);
			continue;
		}
		ok(died_of(status) == acts[i].signal, "%s ends with its signal%s", acts[i].name, died_of(status) == acts[i].signal ? "" : " (see below)");
		if (died_of(status) != acts[i].signal)
			say("# %s: status %#x, want signal %d\n", acts[i].name, status, acts[i].signal);
		told(i);
	}
	return tap_end();
}
