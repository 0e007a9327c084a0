/* Waiting for children: who is reaped when, groups and sessions, stopped and continued ones. */
#include "tap.h"
#include <sys/resource.h>

static volatile int chld_count, chld_code, chld_status, chld_pid;

static void on_child(int sig, siginfo_t *info, void *context)
{
	(void)sig;
	(void)context;
	chld_count++;
	chld_code = info->si_code;
	chld_status = info->si_status;
	chld_pid = info->si_pid;
}

static pid_t child_exits(int code)
{
	pid_t pid = fork();
	if (pid == 0)
		_exit(code);
	return pid;
}

static pid_t child_pauses(int group)
{
	pid_t pid = fork();
	if (pid == 0) {
		for (;;)
			pause();
	}
	if (group >= 0)
		setpgid(pid, group);
	return pid;
}

static void statuses(void)
{
	int status = 0;
	struct rusage usage;
	fails(waitpid(-1, &status, 0), ECHILD, "no child to wait for");
	pid_t a = child_exits(3), b = child_exits(259);
	is(waitpid(b, &status, 0), b, "waitpid for one");
	is(WEXITSTATUS(status), 3, "of whose status 8 bits count");
	is(waitpid(-1, &status, 0), a, "then any");
	is(WEXITSTATUS(status), 3, "with its status");
	fails(waitpid(a, &status, 0), ECHILD, "a child is reaped once");
	fails(waitpid(1, &status, WNOHANG), ECHILD, "somebody else's child");
	a = child_pauses(-1);
	is(waitpid(a, &status, WNOHANG), 0, "WNOHANG on a running one");
	is(kill(a, SIGTERM), 0, "end it");
	is(wait4(a, &status, 0, &usage), a, "wait4");
	ok(WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM, "says of which signal it died");
	ok(usage.ru_utime.tv_sec < 10, "and what it used");
	a = child_exits(1);
	sleep_ms(50);
	is(kill(a, 0), 0, "a zombie still has its pid");
	is(waitpid(a, NULL, 0), a, "a status may be dropped");
	fails(kill(a, 0), ESRCH, "afterwards the pid is free");
	fails(waitpid(-1, &status, 0x100000), EINVAL, "unknown options");
	pid_t many[20];
	int sum = 0, n = 0;
	for (int i = 0; i < 20; i++)
		many[i] = child_exits(i);
	while (waitpid(-1, &status, 0) > 0) {
		sum += WEXITSTATUS(status);
		n++;
	}
	ok(n == 20 && sum == 190 && many[0] > 0, "twenty children, each once");
}

static void by_id(void)
{
	siginfo_t info;
	pid_t a = child_exits(17);
	is(waitid(P_PID, a, &info, WEXITED | WNOWAIT), 0, "waitid without reaping");
	ok(info.si_pid == a && info.si_code == CLD_EXITED && info.si_status == 17 && info.si_signo == SIGCHLD, "tells pid, code and status");
	is(waitid(P_ALL, 0, &info, WEXITED), 0, "then with");
	ok(info.si_pid == a, "the same");
	fails(waitid(P_PID, a, &info, WEXITED), ECHILD, "once");
	a = child_pauses(-1);
	memset(&info, 1, sizeof info);
	is(waitid(P_PID, a, &info, WEXITED | WNOHANG), 0, "waitid WNOHANG on a running one");
	is(info.si_pid, 0, "leaves si_pid zero");
	kill(a, SIGKILL);
	is(waitid(P_PID, a, &info, WEXITED), 0, "a killed one");
	ok(info.si_code == CLD_KILLED && info.si_status == SIGKILL, "CLD_KILLED");
	fails(waitid(P_ALL, 0, &info, 0), EINVAL, "waiting for nothing");
	fails(waitid(99, 0, &info, WEXITED), EINVAL, "of an unknown kind");
}

static void stopping(void)
{
	int status;
	siginfo_t info;
	struct sigaction act = {.sa_sigaction = on_child, .sa_flags = SA_SIGINFO | SA_RESTART};
	sigaction(SIGCHLD, &act, NULL);
	chld_count = 0;
	pid_t a = child_pauses(0); /* a group of its own: SIGTSTP does not stop one that is orphaned */
	kill(a, SIGSTOP);
	is(waitpid(a, &status, WUNTRACED), a, "WUNTRACED sees a stop");
	ok(WIFSTOPPED(status) && WSTOPSIG(status) == SIGSTOP, "and its signal");
	sleep_ms(20);
	ok(chld_count == 1 && chld_code == CLD_STOPPED && chld_pid == a, "SIGCHLD came");
	is(waitpid(a, &status, WUNTRACED | WNOHANG), 0, "a stop is reported once");
	kill(a, SIGCONT);
	is(waitpid(a, &status, WCONTINUED), a, "WCONTINUED sees it go on");
	ok(WIFCONTINUED(status), "says so");
	kill(a, SIGTSTP);
	is(waitid(P_PID, a, &info, WSTOPPED), 0, "waitid sees a stop");
	ok(info.si_code == CLD_STOPPED && info.si_status == SIGTSTP, "CLD_STOPPED");
	is(waitpid(a, &status, WNOHANG), 0, "which plain waitpid does not");
	kill(a, SIGTERM);
	sleep_ms(50);
	is(waitpid(a, &status, WNOHANG), 0, "a stopped one does not die of SIGTERM");
	kill(a, SIGCONT);
	is(waitpid(a, &status, 0), a, "until it goes on");
	is(died_of(status), SIGTERM, "then it does");
	a = child_pauses(-1);
	kill(a, SIGSTOP);
	waitpid(a, &status, WUNTRACED);
	kill(a, SIGKILL);
	is(waitpid(a, &status, 0), a, "SIGKILL ends a stopped one");
	act.sa_flags |= SA_NOCLDSTOP;
	sigaction(SIGCHLD, &act, NULL);
	chld_count = 0;
	a = child_pauses(-1);
	kill(a, SIGSTOP);
	waitpid(a, &status, WUNTRACED);
	sleep_ms(20);
	is(chld_count, 0, "SA_NOCLDSTOP: no SIGCHLD for a stop");
	kill(a, SIGKILL);
	waitpid(a, &status, 0);
	sleep_ms(20);
	is(chld_count, 1, "but for the end");
	act.sa_flags = SA_SIGINFO | SA_NOCLDWAIT;
	sigaction(SIGCHLD, &act, NULL);
	a = child_exits(5);
	fails(waitpid(a, &status, 0), ECHILD, "SA_NOCLDWAIT: children are not waited for");
	signal(SIGCHLD, SIG_IGN);
	a = child_exits(5);
	fails(waitpid(-1, &status, 0), ECHILD, "nor when SIGCHLD is ignored");
	signal(SIGCHLD, SIG_DFL);
}

static void groups(void)
{
	int status;
	pid_t a = child_pauses(0), b = child_pauses(a), c = child_exits(1);
	is(getpgid(a), a, "a group of its own");
	is(getpgid(b), a, "which another joins");
	is(getpgid(c) == getpgrp() || getpgid(c) == -1, 1, "the third is in ours");
	is(waitpid(0, &status, 0), c, "waitpid(0) waits for our group");
	is(waitpid(-a, &status, WNOHANG), 0, "nobody there has ended");
	is(kill(-a, SIGTERM), 0, "a signal to the group");
	int got = waitpid(-a, &status, 0);
	is(got == a || got == b, 1, "ends one");
	siginfo_t info;
	is(waitid(P_PGID, a, &info, WEXITED), 0, "and the other");
	fails(waitpid(-a, &status, 0), ECHILD, "then the group is empty");
	fails(kill(-a, 0), ESRCH, "and gone");
	fails(setpgid(0, 0x3ffff0), EPERM, "joining a group that is not there");
	fails(setpgid(-1, 0), EINVAL, "a negative pid");
	fails(getpgid(0x3ffff0), ESRCH, "the group of nobody");
	int fd[2];
	if (pipe(fd))
		return;
	a = fork();
	if (a == 0) {
		pid_t s = setsid();
		int bad = s != getpid() || getsid(0) != s || getpgrp() != s || setsid() != -1 || errno != EPERM;
		bad |= open("/dev/tty", O_RDWR) >= 0;
		_exit(bad);
	}
	is(exited_with(wait_for(a)), 0, "setsid makes a session, once, without a terminal");
	a = fork();
	if (a == 0) {
		setpgid(0, 0);
		if (fork() == 0)
			for (;;)
				pause();
		if (fork() == 0)
			for (;;)
				pause();
		if (write(fd[1], "r", 1) != 1)
			_exit(1);
		close(fd[1]);
		for (;;)
			pause();
	}
	close(fd[1]);
	char byte;
	is(read(fd[0], &byte, 1), 1, "a family in one group");
	killpg(a, SIGKILL);
	is(died_of(wait_for(a)), SIGKILL, "is killed");
	is(read(fd[0], &byte, 1), 0, "grandchildren too");
	close(fd[0]);
}

static void orphans(void)
{
	int fd[2];
	pid_t got = 0, self = getpid();
	if (pipe(fd))
		return;
	pid_t a = fork();
	if (a == 0) {
		pid_t middle = getpid();
		if (fork() == 0) {
			while (getppid() == middle)
				sleep_ms(5);
			got = getppid();
			_exit(write(fd[1], &got, sizeof got) != sizeof got);
		}
		_exit(0);
	}
	is(exited_with(wait_for(a)), 0, "a parent that does not wait");
	is(read(fd[0], &got, sizeof got), sizeof got, "its child gets another parent");
	ok(got > 0 && got != a && (got != self || self == 1), "which is not us");
	while (waitpid(-1, NULL, 0) > 0)
		;
}

int main(void)
{
	deadline(60);
	statuses();
	by_id();
	stopping();
	groups();
	orphans();
	return tap_end();
}
