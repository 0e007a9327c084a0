/* Forks until there are no more processes: then EAGAIN, and afterwards all is as before.
 *   forkbomb MOST      at most MOST processes may be alive, ourselves included
 *   forkbomb --wild    every process forks for as long as it can; only that it ends is checked
 * With `--unprivileged` first, the limit is set by RLIMIT_NPROC: for trying it on Linux. */
#include "tap.h"
#include <sys/resource.h>

static void wild(void)
{
	int fd[2], refused = 0, forks = 0;
	pid_t top = getpid();
	if (pipe(fd))
		_exit(2);
	for (int i = 0; i < 12 && !refused; i++) { /* 2^12 processes at most, were there no limit */
		pid_t pid = fork();
		if (pid < 0)
			refused = errno;
		else
			forks += pid > 0;
	}
	if (getpid() != top) {
		while (waitpid(-1, NULL, 0) > 0)
			;
		_exit(refused == EAGAIN || refused == 0 ? 0 : 1);
	}
	close(fd[1]);
	char c;
	long n = read(fd[0], &c, 1); /* ends when the last of them has */
	is(n, 0, "all of them end");
	while (waitpid(-1, NULL, 0) > 0)
		;
	ok(forks > 0, "some forks worked");
	is(exited_with(in_child((void (*)(void *))(void *)_exit, (void *)9)), 9, "and forking works again");
}

int main(int argc, char **argv)
{
	volatile int at = 1, made = 0, most, ended = 0;
	deadline(120);
	if (argc > at && !strcmp(argv[at], "--unprivileged")) {
		struct rlimit limit = {40, 40};
		if (setuid(4242) || setrlimit(RLIMIT_NPROC, &limit))
			return 2;
		at++;
	}
	if (argc <= at)
		return 2;
	if (!strcmp(argv[at], "--wild")) {
		wild();
		return tap_end();
	}
	most = atoi(argv[at]);
	pid_t *pids = calloc(most + 10, sizeof *pids), pid = 0;
	for (int round = 0; round < 2; round++) {
		made = ended = 0;
		while (made < most + 5 && (pid = fork()) > 0)
			pids[made++] = pid;
		if (pid == 0)
			for (;;)
				pause();
		fails(pid, EAGAIN, "the fork too many");
		ok(made > 0 && made < most, "not more than allowed");
		pid = vfork();
		if (pid == 0)
			_exit(0);
		fails(pid, EAGAIN, "vfork too");
		for (int i = 0; i < made; i++)
			kill(pids[i], SIGKILL);
		for (int i = 0; i < made; i++)
			ended += died_of(wait_for(pids[i])) == SIGKILL;
		is(ended, made, "all of them end");
	}
	is(exited_with(in_child((void (*)(void *))(void *)_exit, (void *)9)), 9, "and forking works again");
	return tap_end();
}
