/* Signals as a program sees them: handlers, masks, alternate stacks, nesting, restarted and
 * interrupted calls, what the hardware's faults say, and a frame that is not one. */
#include "trapped.h"
#include <fenv.h>
#include <poll.h>
#include <sys/ucontext.h>

static volatile sig_atomic_t count, budget, nested_max, depth, order[8], order_n;
static volatile pid_t got_pid;
static volatile int got_status;

static void on(int sig, void (*handler)(int, siginfo_t *, void *), int flags, int blocked)
{
	struct sigaction act;
	memset(&act, 0, sizeof act);
	act.sa_sigaction = handler;
	act.sa_flags = flags | SA_SIGINFO;
	sigemptyset(&act.sa_mask);
	if (blocked)
		sigaddset(&act.sa_mask, blocked);
	if (sigaction(sig, &act, NULL))
		say("# sigaction(%d): errno %d\n", sig, errno);
}

static void counting(int sig, siginfo_t *info, void *context)
{
	(void)context;
	count++;
	got_signal = sig;
	got_code = info->si_code;
	got_pid = info->si_pid;
	got_status = info->si_status;
}

static void block(int how, int sig)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, sig);
	sigprocmask(how, &set, NULL);
}

static void basics(void)
{
	on(SIGUSR1, counting, 0, 0);
	is(kill(getpid(), SIGUSR1), 0, "kill of oneself");
	is(count, 1, "the handler has run when kill returns");
	is(got_code, SI_USER, "si_code says a process sent it");
	is(got_pid, getpid(), "si_pid says which");
	raise(SIGUSR1);
	is(count, 2, "raise works too");
	is(got_code, SI_TKILL, "si_code says so");

	block(SIG_BLOCK, SIGUSR1);
	raise(SIGUSR1);
	raise(SIGUSR1);
	is(count, 2, "a blocked signal waits");
	sigset_t pending;
	sigpending(&pending);
	is(sigismember(&pending, SIGUSR1), 1, "and is pending");
	block(SIG_UNBLOCK, SIGUSR1);
	is(count, 3, "two of a kind arrive once");

	signal(SIGUSR1, SIG_IGN);
	block(SIG_BLOCK, SIGUSR1);
	raise(SIGUSR1);
	block(SIG_UNBLOCK, SIGUSR1);
	is(count, 3, "an ignored signal is gone");

	on(SIGUSR1, counting, SA_RESETHAND, 0);
	raise(SIGUSR1);
	struct sigaction act;
	sigaction(SIGUSR1, NULL, &act);
	ok(act.sa_handler == SIG_DFL, "SA_RESETHAND resets");
	fails(sigaction(SIGKILL, &act, NULL), EINVAL, "SIGKILL cannot be caught");
	fails(kill(getpid(), 999), EINVAL, "no such signal");
	fails(kill(0x3fffff, 0), ESRCH, "no such process");
	is(kill(getpid(), 0), 0, "signal 0 only asks");
}

static void queued(int sig, siginfo_t *info, void *context)
{
	(void)context;
	(void)sig;
	if (order_n < 8)
		order[order_n++] = info->si_value.sival_int;
}

static void real_time(void)
{
	on(SIGRTMIN, queued, 0, 0);
	block(SIG_BLOCK, SIGRTMIN);
	for (int i = 1; i <= 3; i++)
		sigqueue(getpid(), SIGRTMIN, (union sigval){.sival_int = i * 11});
	block(SIG_UNBLOCK, SIGRTMIN);
	ok(order_n == 3 && order[0] == 11 && order[1] == 22 && order[2] == 33, "real-time signals queue, in order, with values");
}

static void nesting(int sig, siginfo_t *info, void *context)
{
	(void)info;
	(void)context;
	depth++;
	if (depth > nested_max)
		nested_max = depth;
	if (sig == SIGUSR1)
		raise(SIGUSR2);
	else if (budget-- > 0)
		raise(SIGUSR1);
	depth--;
}

static void nested(void)
{
	on(SIGUSR1, nesting, 0, 0);
	on(SIGUSR2, nesting, 0, 0);
	nested_max = 0;
	budget = 1;
	raise(SIGUSR1);
	is(nested_max, 2, "a different signal nests, the same one is blocked in its own handler");
	on(SIGUSR1, nesting, SA_NODEFER, 0);
	on(SIGUSR2, nesting, SA_NODEFER, 0);
	nested_max = 0;
	budget = 1;
	raise(SIGUSR1);
	is(nested_max, 4, "SA_NODEFER lets the same one nest");
	on(SIGUSR1, nesting, 0, SIGUSR2);
	on(SIGUSR2, nesting, 0, SIGUSR1);
	nested_max = 0;
	budget = 1;
	raise(SIGUSR1);
	is(nested_max, 1, "sa_mask holds the other one back");
}

static char alternate[64 * 1024] __attribute__((aligned(16)));
static volatile int on_alternate, ss_flags;

static void where_am_i(int sig, siginfo_t *info, void *context)
{
	char here;
	stack_t now;
	(void)sig;
	(void)info;
	(void)context;
	on_alternate = &here >= alternate && &here < alternate + sizeof alternate;
	sigaltstack(NULL, &now);
	ss_flags = now.ss_flags;
}

#pragma GCC diagnostic ignored "-Winfinite-recursion"
__attribute__((noinline)) static int eat_stack(int n)
{
	volatile char big[16384];
	big[0] = n;
	return eat_stack(n + 1) + big[0];
}

static void alternate_stack(void)
{
	stack_t st = {.ss_sp = alternate, .ss_size = sizeof alternate}, old;
	is(sigaltstack(&st, NULL), 0, "sigaltstack");
	on(SIGUSR1, where_am_i, SA_ONSTACK, 0);
	raise(SIGUSR1);
	is(on_alternate, 1, "SA_ONSTACK runs the handler there");
	is(ss_flags, SS_ONSTACK, "and sigaltstack says so inside");
	on(SIGUSR1, where_am_i, 0, 0);
	raise(SIGUSR1);
	is(on_alternate, 0, "without it, not");
	on(SIGSEGV, jumping, SA_ONSTACK, 0);
	if (!sigsetjmp(escape, 1))
		eat_stack(0);
	is(got_signal, SIGSEGV, "a stack overflow can be caught on the other stack");
	st.ss_size = 100;
	fails(sigaltstack(&st, NULL), ENOMEM, "a tiny one is refused");
	st.ss_flags = SS_DISABLE;
	is(sigaltstack(&st, &old), 0, "disabled again");
	ok(old.ss_sp == alternate, "the old one comes back");
}

#define FAULT(sig, code, addr, name, ...) do { \
	got_signal = 0; \
	on(sig, jumping, 0, 0); \
	if (!sigsetjmp(escape, 1)) { __VA_ARGS__; } \
	ok(got_signal == sig && got_code == (code) && (long)got_addr == (long)(addr), "%s%s", name, \
	   got_signal == sig && got_code == (code) && (long)got_addr == (long)(addr) ? "" : " (see below)"); \
	if (!(got_signal == sig && got_code == (code) && (long)got_addr == (long)(addr))) \
		say("# signal %d code %d addr %p, want %d %d %#lx\n", got_signal, got_code, got_addr, sig, code, (long)(addr)); \
} while (0)

static void faults(void)
{
	char *page = mmap(NULL, 2 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	volatile int zero = 0, sink;
	munmap(page + PAGE, PAGE);
	FAULT(SIGSEGV, SEGV_MAPERR, 0x123, "reading where nothing is", sink = *(volatile char *)0x123);
	FAULT(SIGSEGV, SEGV_MAPERR, 0, "writing to NULL", *(volatile char *)(long)zero = 1);
	FAULT(SIGSEGV, SEGV_ACCERR, page + 17, "writing to a read-only page", ((volatile char *)page)[17] = 1);
	FAULT(SIGSEGV, SEGV_MAPERR, page + PAGE + 5, "reading an unmapped page", sink = ((volatile char *)page)[PAGE + 5]);
	FAULT(SIGSEGV, SEGV_MAPERR, page + PAGE, "a read that crosses into one", sink = *(volatile int *)(page + PAGE - 2));
	FAULT(SIGSEGV, SEGV_ACCERR, page, "running data", ((void (*)(void))page)());
	FAULT(SIGSEGV, SEGV_MAPERR, page + PAGE, "running where nothing is", ((void (*)(void))(page + PAGE))());
	FAULT(SIGSEGV, SI_KERNEL, 0, "a non-canonical address", sink = *(volatile char *)0x8000000000000000);
	(void)sink;
	munmap(page, PAGE);
}

extern char signals_div[], signals_ud2[], signals_int3[];

static void more_faults(void)
{
	FAULT(SIGFPE, FPE_INTDIV, signals_div, "dividing by zero", __asm__ volatile("xor %%ecx,%%ecx\nsignals_div: divl %%ecx" ::: "eax", "ecx", "edx"));
	FAULT(SIGILL, ILL_ILLOPN, signals_ud2, "ud2", __asm__ volatile("signals_ud2: ud2"));
	FAULT(SIGTRAP, SI_KERNEL, 0, "int3", __asm__ volatile("int3"));
	FAULT(SIGSEGV, SI_KERNEL, 0, "hlt", __asm__ volatile("hlt"));
	if (emulated_cpu())
		skip("a floating-point division by zero, unmasked", "the emulated processor does not trap it");
	else
		FAULT(SIGFPE, FPE_FLTDIV, got_addr, "a floating-point division by zero, unmasked",
		      feenableexcept(FE_DIVBYZERO); volatile double d = 0; d = 1 / d);
	feclearexcept(FE_ALL_EXCEPT);
	fedisableexcept(FE_ALL_EXCEPT);
}

static void skipping(int sig, siginfo_t *info, void *context)
{
	ucontext_t *uc = context;
	(void)sig;
	(void)info;
	uc->uc_mcontext.gregs[REG_RIP] += 2;
	uc->uc_mcontext.gregs[REG_RAX] = 0x1122334455667788;
}

static void registers_survive(void)
{
	long rax, bad = 0;
	on(SIGILL, skipping, 0, 0);
	__asm__ volatile("ud2" : "=a"(rax) : : "memory");
	is(rax, 0x1122334455667788, "a handler changes registers and where it goes on");
	on(SIGUSR1, counting, 0, 0);
	double a = 1.5, b = 0;
	__asm__ volatile("mov $0x1111,%%rbx\n mov $0x2222,%%r12\n mov $0x3333,%%r13\n movsd %2,%%xmm9\n mov %3,%%rdi\n mov %4,%%rsi\n"
			 "mov $62,%%eax\n syscall\n"
			 "xor $0x1111,%%rbx\n xor $0x2222,%%r12\n xor $0x3333,%%r13\n or %%r12,%%rbx\n or %%r13,%%rbx\n mov %%rbx,%0\n movsd %%xmm9,%1"
			 : "=r"(bad), "=m"(b) : "m"(a), "g"((long)getpid()), "g"((long)SIGUSR1)
			 : "rax", "rbx", "rcx", "r11", "r12", "r13", "rdi", "rsi", "xmm9", "memory");
	is(bad, 0, "registers are as before after a handler");
	ok(b == 1.5, "vector registers too");
}

static void garbage_frame(void *unused)
{
	(void)unused;
	signal(SIGSEGV, SIG_DFL); /* what a handler would be given depends on how much was restored */
	__asm__ volatile("mov %0,%%rsp\n mov $15,%%eax\n syscall\n" ::"r"(0x1000L) : "memory");
}

static void garbage_contents(void *fill)
{
	static unsigned char frame[8192] __attribute__((aligned(64)));
	signal(SIGSEGV, SIG_DFL);
	memset(frame, (int)(long)fill, sizeof frame);
	__asm__ volatile("lea 4096(%0),%%rsp\n mov $15,%%eax\n syscall\n hlt\n" ::"r"(frame) : "memory");
}

static void sigreturns(void)
{
	is(died_of(in_child(garbage_frame, NULL)), SIGSEGV, "sigreturn without a frame");
	is(died_of(in_child(garbage_contents, (void *)0xff)), SIGSEGV, "sigreturn with a frame of ones");
	is(died_of(in_child(garbage_contents, (void *)0x41)), SIGSEGV, "sigreturn with a frame of letters");
	ok(died_of(in_child(garbage_contents, (void *)0)) > 0, "sigreturn with a frame of zeros does not live");
}

static void tick(int ms, int repeat)
{
	struct itimerval t = {{0, repeat ? ms * 1000 : 0}, {0, ms * 1000}};
	setitimer(ITIMER_REAL, &t, NULL);
}

static void interrupted(void)
{
	int fd[2];
	char c;
	if (pipe(fd))
		return;
	on(SIGALRM, counting, 0, 0);
	tick(30, 0);
	fails(read(fd[0], &c, 1), EINTR, "without SA_RESTART a read is interrupted");
	tick(30, 0);
	struct timespec second = {5, 0}, left = {0, 0};
	fails(nanosleep(&second, &left), EINTR, "and so is a sleep");
	ok(left.tv_sec == 4 && left.tv_nsec > 0, "which says what is left");
	tick(30, 0);
	struct pollfd p = {.fd = fd[0], .events = POLLIN};
	fails(poll(&p, 1, 5000), EINTR, "and a poll");
	on(SIGALRM, counting, SA_RESTART, 0);
	tick(30, 0);
	fails(poll(&p, 1, 5000), EINTR, "which is never restarted");
	tick(30, 0);
	fails(pause(), EINTR, "nor is pause");
	int before = count;
	pid_t pid = fork();
	if (pid == 0) {
		sleep_ms(150);
		_exit(write(fd[1], "x", 1) != 1);
	}
	tick(30, 1);
	is(read(fd[0], &c, 1), 1, "with SA_RESTART a read goes on");
	ok(count > before, "though the handler ran");
	is(exited_with(wait_for(pid)), 0, "wait goes on too");
	tick(0, 0);
	sigset_t all, none;
	sigfillset(&all);
	sigemptyset(&none);
	sigprocmask(SIG_BLOCK, &all, NULL);
	raise(SIGUSR1);
	on(SIGUSR1, counting, 0, 0);
	before = count;
	fails(sigsuspend(&none), EINTR, "sigsuspend lets a waiting signal in");
	is(count, before + 1, "whose handler ran");
	sigprocmask(SIG_SETMASK, &none, NULL);
	close(fd[0]);
	on(SIGPIPE, counting, 0, 0);
	before = count;
	fails(write(fd[1], "x", 1), EPIPE, "writing to a pipe without a reader");
	is(count - before, 1, "sends SIGPIPE");
	close(fd[1]);
}

static void dies_of_pipe(void *unused)
{
	int fd[2];
	(void)unused;
	signal(SIGPIPE, SIG_DFL);
	if (pipe(fd) == 0) {
		close(fd[0]);
		if (write(fd[1], "x", 1) < 0)
			_exit(3);
	}
}

static void raises(void *sig)
{
	signal((int)(long)sig, SIG_DFL);
	raise((int)(long)sig);
}

static void defaults(void)
{
	is(died_of(in_child(dies_of_pipe, NULL)), SIGPIPE, "SIGPIPE ends a program by default");
	for (long sig = 1; sig < 32; sig++) {
		if (sig == SIGSTOP || sig == SIGTSTP || sig == SIGTTIN || sig == SIGTTOU)
			continue;
		int ignored = sig == SIGCHLD || sig == SIGCONT || sig == SIGURG || sig == SIGWINCH;
		int died = died_of(in_child(raises, (void *)sig));
		if (died != (ignored ? 0 : sig))
			ok(0, "the default of signal %ld: died of %d", sig, died);
	}
	ok(1, "each signal's default");
	on(SIGCHLD, counting, SA_RESTART, 0);
	int before = count;
	pid_t pid = fork();
	if (pid == 0)
		_exit(9);
	wait_for(pid);
	is(count - before, 1, "SIGCHLD comes");
	ok(got_pid == pid && got_code == CLD_EXITED && got_status == 9, "with pid, code and status");
	on(SIGUSR1, counting, 0, 0);
	pid = fork();
	if (pid == 0) {
		before = count;
		raise(SIGUSR1);
		_exit(count - before);
	}
	is(exited_with(wait_for(pid)), 1, "handlers survive a fork");
	block(SIG_BLOCK, SIGUSR2);
	raise(SIGUSR2);
	pid = fork();
	if (pid == 0) {
		sigset_t set;
		sigpending(&set);
		_exit(sigismember(&set, SIGUSR2));
	}
	is(exited_with(wait_for(pid)), 0, "pending signals do not");
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	siginfo_t info;
	is(sigwaitinfo(&set, &info), SIGUSR2, "sigwaitinfo takes a pending one");
	struct timespec soon = {0, 30000000};
	fails(sigtimedwait(&set, &info, &soon), EAGAIN, "sigtimedwait runs out of time");
	fails(syscall(SYS_rt_sigaction, SIGUSR1, 1L, NULL, 8), EFAULT, "sigaction from a bad address");
	fails(syscall(SYS_rt_sigaction, SIGUSR1, NULL, NULL, 4), EINVAL, "sigaction with a wrong set size");
}

int main(void)
{
	deadline(60);
	basics();
	real_time();
	nested();
	alternate_stack();
	faults();
	more_faults();
	registers_survive();
	sigreturns();
	interrupted();
	defaults();
	return tap_end();
}
