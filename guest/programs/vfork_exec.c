/* vfork and posix_spawn: the child runs in the parent's memory, and the parent waits, until exec
 * or exit. That is how a failure in the child reaches the parent. */
#include "tap.h"
#include <spawn.h>

extern char **environ;
static volatile int shared_word;
static volatile long long child_done_at;

static int as_child(int argc, char **argv)
{
	if (!strcmp(argv[1], "exit"))
		return atoi(argv[2]);
	if (!strcmp(argv[1], "mask")) { /* is SIGUSR1 blocked, and who leads the group? */
		sigset_t set;
		sigprocmask(SIG_BLOCK, NULL, &set);
		return sigismember(&set, SIGUSR1) * 2 + (getpgrp() == getpid());
	}
	if (!strcmp(argv[1], "env")) {
		const char *v = getenv("SPAWN_TEST");
		return v && argc > 2 && !strcmp(v, argv[2]) ? 11 : 12;
	}
	if (!strcmp(argv[1], "write"))
		return write(7, "through 7", 9) == 9 ? 0 : 1;
	return 99;
}

int main(int argc, char **argv)
{
	if (argc > 1)
		return as_child(argc, argv);
	deadline(60);
	int status;

	pid_t pid = vfork();
	if (pid == 0) {
		struct timespec t = {0, 100000000};
		nanosleep(&t, NULL);
		shared_word = 4711;
		child_done_at = now_ns();
		_exit(23);
	}
	long long seen = now_ns();
	is(shared_word, 4711, "the parent sees what the vfork child wrote");
	ok(seen >= child_done_at && child_done_at > 0, "the parent went on only when the child was done");
	is(exited_with(wait_for(pid)), 23, "its status comes back");

	volatile int why = 0;
	pid = vfork();
	if (pid == 0) {
		execl("/nonexistent/program", "program", (char *)NULL);
		why = errno;
		_exit(127);
	}
	is(why, ENOENT, "a failed exec's errno reaches the parent through memory");
	is(exited_with(wait_for(pid)), 127, "and the child's status too");

	pid = vfork();
	if (pid == 0) {
		shared_word = 1;
		execl(argv[0], argv[0], "exit", "42", (char *)NULL);
		shared_word = 2;
		_exit(1);
	}
	is(shared_word, 1, "after exec the memory is the parent's alone");
	is(exited_with(wait_for(pid)), 42, "vfork and exec run a program");

	pid = vfork();
	if (pid == 0)
		raise(SIGKILL);
	is(died_of(wait_for(pid)), SIGKILL, "a vfork child that is killed wakes the parent");

	char *bad[] = {"none", NULL}, *go[] = {argv[0], "exit", "7", NULL};
	is(posix_spawn(&pid, "/nonexistent/none", NULL, NULL, bad, environ), ENOENT, "posix_spawn of nothing says ENOENT");
	is(waitpid(-1, &status, WNOHANG), -1, "and leaves no child behind");
	is(posix_spawn(&pid, "/", NULL, NULL, bad, environ), EACCES, "posix_spawn of a folder says EACCES");
	is(posix_spawn(&pid, argv[0], NULL, NULL, go, environ), 0, "posix_spawn of a program works");
	is(exited_with(wait_for(pid)), 7, "with its status");
	is(posix_spawnp(&pid, "no-such-program-anywhere", NULL, NULL, bad, environ), ENOENT, "posix_spawnp searches PATH");

	posix_spawnattr_t attr;
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	posix_spawnattr_init(&attr);
	posix_spawnattr_setflags(&attr, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETPGROUP);
	posix_spawnattr_setsigmask(&attr, &set);
	char *mask[] = {argv[0], "mask", NULL};
	is(posix_spawn(&pid, argv[0], NULL, &attr, mask, environ), 0, "posix_spawn with a mask and a group");
	is(exited_with(wait_for(pid)), 3, "both reach the program");

	int fd[2];
	char text[16] = "";
	posix_spawn_file_actions_t actions;
	if (pipe(fd))
		return 2;
	posix_spawn_file_actions_init(&actions);
	posix_spawn_file_actions_adddup2(&actions, fd[1], 7);
	posix_spawn_file_actions_addclose(&actions, fd[0]);
	char *writer[] = {argv[0], "write", NULL};
	is(posix_spawn(&pid, argv[0], &actions, NULL, writer, environ), 0, "posix_spawn with file actions");
	is(exited_with(wait_for(pid)), 0, "the program wrote");
	is(read(fd[0], text, sizeof text), 9, "through the duplicated descriptor");
	ok(!strcmp(text, "through 7"), "the right bytes");
	posix_spawn_file_actions_addopen(&actions, 8, "/nonexistent/file", O_RDONLY, 0);
	is(posix_spawn(&pid, argv[0], &actions, NULL, writer, environ), ENOENT, "a file action that fails is reported");

	char *env[] = {"SPAWN_TEST=a value", NULL}, *getter[] = {argv[0], "env", "a value", NULL};
	is(posix_spawn(&pid, argv[0], NULL, NULL, getter, env), 0, "posix_spawn with an environment");
	is(exited_with(wait_for(pid)), 11, "which the program sees");

	status = system("exit 5");
	ok(exited_with(status) == 5 || exited_with(status) == 127, "system() runs a shell, or says that there is none");
	return tap_end();
}
