/* System calls with random numbers and hostile arguments, in children that are allowed to die.
 * What is checked is that everything around them goes on.
 *   syscall_fuzz [SEED [CHILDREN]]
 * Only for a machine that may be broken: inside the VMM, or in the rig. */
#include "tap.h"
#include <sys/prctl.h>

static unsigned char *scratch;

/* Calls that would end or stop the test itself rather than try the VMM. */
static int spared(long nr)
{
	switch (nr) {
	case SYS_kill: case SYS_tkill: case SYS_tgkill: case SYS_rt_sigqueueinfo: case SYS_rt_tgsigqueueinfo:
	case SYS_pidfd_send_signal: case SYS_reboot: case SYS_kexec_load: case SYS_kexec_file_load: case SYS_vhangup:
	case SYS_ptrace: case SYS_process_vm_writev: case SYS_setpgid: case SYS_setsid:
	case SYS_mount: case SYS_umount2: case SYS_pivot_root: case SYS_chroot: case SYS_swapon: case SYS_init_module:
	case SYS_finit_module: case SYS_delete_module: case SYS_setpriority: case SYS_sched_setscheduler: case SYS_sched_setattr:
	case SYS_sched_setparam:
		return 1;
	}
	return 0;
}

static uint64_t argument(uint64_t *state)
{
	static const uint64_t edges[] = {
		0, 1, 2, 3, 7, 8, 16, 64, 100, 255, 4095, 4096, 4097, 65536, 1 << 20, 0x7fffffff, 0x80000000, 0xffffffff, 0x100000000,
		0x7fffffffffff, 0x7ffffffff000, 0x800000000000, 0x7f8000000000, 0x7f8000001000, 0x7fffffffffffffff, 0x8000000000000000,
		0xffff800000000000, 0xffffffff81000000, 0xffffffffffffffff, 0xfffffffffffffff0, 0xffffffffffffff9c, 0x1000, 0x400000,
	};
	uint64_t r = random_next(state), pick = r >> 56;
	if (pick < 110)
		return edges[r % (sizeof edges / sizeof *edges)];
	if (pick < 170)
		return (uint64_t)scratch + r % (8 * PAGE);
	if (pick < 190)
		return (uint64_t)scratch + 8 * PAGE - r % 32; /* near the end, behind which nothing is */
	if (pick < 220)
		return r % 300;
	if (pick < 230)
		return -(r % 300);
	return random_next(state);
}

static void child(uint64_t state, int calls)
{
	pid_t self = getpid();
	struct itimerval limit = {{0, 50000}, {0, 100000}};
	int null = open("/dev/null", O_RDWR);
	for (int i = 0; i < 3; i++)
		dup2(null, i);
	static const char *const texts[] = {"/", "/tmp", "/dev/null", "/proc/self/exe", "..", "a", "/dev/tty"};
	for (unsigned i = 0; i < 8 * PAGE; i += 8) {
		uint64_t r = random_next(&state);
		memcpy(scratch + i, &r, 8);
	}
	for (int i = 0; i < 64; i++)
		strcpy((char *)scratch + random_next(&state) % (8 * PAGE - 32), texts[random_next(&state) % 7]);
	for (int i = 0; i < calls; i++) {
		uint64_t r = random_next(&state), a[6];
		long nr = (r & 15) == 0 ? (long)random_next(&state) : (r & 15) == 1 ? (long)(r >> 8 & 0xffff) : (long)((r >> 8) % 470);
		for (int j = 0; j < 6; j++)
			a[j] = argument(&state);
		if (spared((int)nr))
			continue;
		setitimer(ITIMER_REAL, &limit, NULL);
		syscall(nr, a[0], a[1], a[2], a[3], a[4], a[5]);
		if (syscall(SYS_getpid) != self)
			_exit(0); /* it was a fork of some kind */
	}
	_exit(0);
}

int main(int argc, char **argv)
{
	uint64_t state = seed_from(argc > 1 ? argv[1] : NULL);
	int children = argc > 2 ? atoi(argv[2]) : 1500, ended = 0, stuck = 0;
	volatile uint64_t secret = 0x1234567890abcdef;
	deadline(1200);
	scratch = mmap(NULL, 9 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (scratch == MAP_FAILED)
		return 2;
	munmap(scratch + 8 * PAGE, PAGE);
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	sigset_t unblocked = block_news();
	for (int i = 0; i < children; i++) {
		int status;
		uint64_t seed = random_next(&state);
		pid_t pid = fork();
		if (pid == 0) {
			sigprocmask(SIG_SETMASK, &unblocked, NULL);
			setpgid(0, 0);
			child(seed, 60);
		}
		if (pid < 0) {
			say("Bail out! fork %d: errno %d\n", i, errno);
			return 1;
		}
		setpgid(pid, pid);
		long long since = now_ns();
		pid_t got;
		while ((got = waitpid(pid, &status, WNOHANG | WUNTRACED)) == 0 || (got == pid && WIFSTOPPED(status))) {
			if (now_ns() - since > 4000000000LL) {
				if (now_ns() - since > 14000000000LL) {
					stuck++;
					break;
				}
				kill(-pid, SIGKILL);
			}
			wait_for_news(500);
		}
		kill(-pid, SIGKILL);
		ended += got == pid;
		while (waitpid(-1, &status, WNOHANG) > 0)
			;
	}
	is(ended, children, "every child ended");
	is(stuck, 0, "none could not be killed");
	ok(secret == 0x1234567890abcdef, "the parent's memory is as it was");
	is(exited_with(in_child((void (*)(void *))(void *)_exit, (void *)9)), 9, "and forking works");
	return tap_end();
}
