/* POSIX timers (timer_create(2)) and signals that are read from a descriptor (signalfd(2)). */
#include "tap.h"
#include <poll.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>

static volatile sig_atomic_t handled, told_value, told_code;

static void handler(int signo, siginfo_t *info, void *context)
{
	(void)signo;
	(void)context;
	handled++;
	told_value = info->si_value.sival_int;
	told_code = info->si_code;
}

static struct itimerspec in_ms(long first, long interval)
{
	struct itimerspec spec = {
		.it_value = { first / 1000, first % 1000 * 1000000 },
		.it_interval = { interval / 1000, interval % 1000 * 1000000 },
	};
	return spec;
}

static void block(int signo)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, signo);
	sigprocmask(SIG_BLOCK, &set, NULL);
}

static void signals_of_timers(void)
{
	struct sigaction action = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO };
	sigaction(SIGRTMIN, &action, NULL);
	struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN };
	event.sigev_value.sival_int = 42;
	timer_t timer, other;
	is(timer_create(CLOCK_MONOTONIC, &event, &timer), 0, "a timer");
	is(timer_create(CLOCK_REALTIME, NULL, &other), 0, "one more");
	ok(timer != other, "they differ");
	struct itimerspec spec = in_ms(20, 0), left;
	is(timer_settime(timer, 0, &spec, NULL), 0, "is set");
	is(timer_gettime(timer, &left), 0, "what is left");
	ok(left.it_value.tv_sec == 0 && left.it_value.tv_nsec > 0 && left.it_value.tv_nsec <= 20000000, "is not more than was set");
	while (!handled)
		pause();
	is(handled, 1, "it expires once");
	is(told_value, 42, "with its value");
	is(told_code, SI_TIMER, "as a timer's signal");
	is(timer_gettime(timer, &left), 0, "what is left then");
	ok(left.it_value.tv_sec == 0 && left.it_value.tv_nsec == 0, "is nothing");

	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	spec = in_ms(0, 0);
	spec.it_value = now;
	handled = 0;
	is(timer_settime(timer, TIMER_ABSTIME, &spec, NULL), 0, "a time that has passed");
	for (int i = 0; i < 1000 && !handled; i++)
		usleep(1000);
	is(handled, 1, "expires at once");
	is(timer_delete(other), 0, "one is deleted");
	errno = 0;
	is(timer_delete(other), -1, "only once");
	is(errno, EINVAL, "then it is no timer");
	is(timer_delete(timer), 0, "the other too");
}

static void overruns(void)
{
	block(SIGRTMIN + 1);
	struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 1 };
	timer_t timer;
	timer_create(CLOCK_MONOTONIC, &event, &timer);
	struct itimerspec spec = in_ms(5, 5);
	timer_settime(timer, 0, &spec, NULL);
	usleep(100000);
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 1);
	siginfo_t info;
	struct timespec none = { 0, 0 };
	is(sigtimedwait(&set, &info, &none), SIGRTMIN + 1, "one signal is queued");
	ok(info.si_overrun >= 10, "which stands for many expiries");
	is(timer_getoverrun(timer), info.si_overrun, "as many as timer_getoverrun says");
	is(timer_delete(timer), 0, "the timer is deleted");
}

/* The signal of a timer that is no more stays queued or goes (as of Linux 6.13): the next timer's is another one. */
static void deleted_with_its_signal(void)
{
	block(SIGRTMIN + 3);
	struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 3 };
	timer_t timer;
	timer_create(CLOCK_MONOTONIC, &event, &timer);
	struct itimerspec spec = in_ms(1, 0);
	timer_settime(timer, 0, &spec, NULL);
	sigset_t pending;
	do {
		usleep(1000);
		sigpending(&pending);
	} while (!sigismember(&pending, SIGRTMIN + 3));
	is(timer_delete(timer), 0, "a timer is deleted with its signal queued");
	event.sigev_signo = SIGRTMIN;
	handled = 0;
	timer_create(CLOCK_MONOTONIC, &event, &timer);
	timer_settime(timer, 0, &spec, NULL);
	for (int i = 0; i < 5000 && !handled; i++)
		usleep(1000);
	is(handled, 1, "the next one is heard of all the same");
	timer_delete(timer);
}

static volatile int in_thread;

static void notified(union sigval value)
{
	__atomic_store_n(&in_thread, value.sival_int, __ATOMIC_SEQ_CST);
}

static void threads_of_timers(void)
{
	struct sigevent event = { .sigev_notify = SIGEV_THREAD, .sigev_notify_function = notified };
	event.sigev_value.sival_int = 7;
	timer_t timer;
	is(timer_create(CLOCK_MONOTONIC, &event, &timer), 0, "a timer that starts a thread");
	struct itimerspec spec = in_ms(10, 0);
	timer_settime(timer, 0, &spec, NULL);
	for (int i = 0; i < 5000 && !__atomic_load_n(&in_thread, __ATOMIC_SEQ_CST); i++)
		usleep(1000);
	is(in_thread, 7, "has started it");
	timer_delete(timer);
	struct sigevent nobody = { .sigev_notify = SIGEV_NONE };
	timer_create(CLOCK_MONOTONIC, &nobody, &timer);
	spec = in_ms(5, 0);
	timer_settime(timer, 0, &spec, NULL);
	usleep(20000);
	struct itimerspec left;
	timer_gettime(timer, &left);
	is(left.it_value.tv_nsec, 0, "a timer that tells nobody has run out");
	timer_delete(timer);
	struct sigevent cpu = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN };
	handled = 0;
	is(timer_create(CLOCK_PROCESS_CPUTIME_ID, &cpu, &timer), 0, "a timer of the time a process runs");
	spec = in_ms(20, 0);
	timer_settime(timer, 0, &spec, NULL);
	usleep(50000);
	is(handled, 0, "does not run while it sleeps");
	while (!handled)
		;
	is(handled, 1, "and does when it runs");
	timer_delete(timer);
}

static void bad_timers(void)
{
	timer_t timer;
	struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = 65 };
	errno = 0;
	is(syscall(SYS_timer_create, CLOCK_MONOTONIC, &event, &timer), -1, "signal 65");
	is(errno, EINVAL, "is none");
	event.sigev_signo = SIGUSR1;
	event.sigev_notify = 77;
	is(syscall(SYS_timer_create, CLOCK_MONOTONIC, &event, &timer), -1, "notification 77");
	is(errno, EINVAL, "is none");
	is(syscall(SYS_timer_create, 12345, NULL, &timer), -1, "clock 12345");
	is(errno, EINVAL, "is none");
	is(syscall(SYS_timer_create, CLOCK_MONOTONIC, NULL, NULL), -1, "no place for the number");
	is(errno, EFAULT, "is EFAULT");
	int id;
	is(syscall(SYS_timer_create, CLOCK_MONOTONIC, NULL, &id), 0, "a timer of the kernel's");
	struct itimerspec spec = in_ms(0, 0);
	spec.it_value.tv_nsec = 1000000000;
	is(syscall(SYS_timer_settime, id, 0, &spec, NULL), -1, "a second of nanoseconds");
	is(errno, EINVAL, "is too many");
	pid_t child = fork();
	if (child == 0)
		_exit(syscall(SYS_timer_delete, id) == -1 && errno == EINVAL ? 0 : 1);
	int status;
	waitpid(child, &status, 0);
	is(status, 0, "a child has none of its parent's timers");
	is(syscall(SYS_timer_delete, id), 0, "it is there still");
}

static void reading_signals(void)
{
	block(SIGUSR1);
	block(SIGRTMIN + 2);
	block(SIGCHLD);
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGRTMIN + 2);
	int fd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
	ok(fd >= 0, "signalfd");
	struct signalfd_siginfo info[4];
	errno = 0;
	is(read(fd, info, sizeof info), -1, "nothing to read");
	is(errno, EAGAIN, "is EAGAIN");
	is(read(fd, info, 100), -1, "too little room");
	is(errno, EINVAL, "is EINVAL");
	struct pollfd poll_fd = { .fd = fd, .events = POLLIN };
	is(poll(&poll_fd, 1, 0), 0, "it is not ready");
	union sigval value = { .sival_int = 1234 };
	kill(getpid(), SIGUSR1);
	sigqueue(getpid(), SIGRTMIN + 2, value);
	sigqueue(getpid(), SIGRTMIN + 2, value);
	is(poll(&poll_fd, 1, 1000), 1, "then it is");
	is(read(fd, info, sizeof info), 3 * sizeof info[0], "three signals are read");
	is(info[0].ssi_signo, SIGUSR1, "the standard one first");
	is(info[0].ssi_pid, getpid(), "with its sender");
	is(info[1].ssi_signo, SIGRTMIN + 2, "then the others");
	is(info[2].ssi_int, 1234, "with their value");
	is(info[2].ssi_code, SI_QUEUE, "and how they were sent");

	sigaddset(&set, SIGCHLD);
	is(signalfd(fd, &set, 0), fd, "the set is changed");
	int epoll = epoll_create1(0);
	struct epoll_event event = { .events = EPOLLIN | EPOLLET };
	is(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event), 0, "an epoll looks at it");
	for (int round = 0; round < 2; round++) {
		pid_t child = fork();
		if (child == 0)
			_exit(5);
		is(epoll_wait(epoll, &event, 1, 5000), 1, "a child ends");
		is(read(fd, info, sizeof info), sizeof info[0], "one signal is read");
		ok(info[0].ssi_signo == SIGCHLD && info[0].ssi_pid == (uint32_t)child && info[0].ssi_status == 5, "which tells of it");
		waitpid(child, NULL, 0);
	}
	fcntl(fd, F_SETFL, 0);
	pid_t child = fork();
	if (child == 0) {
		usleep(20000);
		kill(getppid(), SIGUSR1);
		struct pollfd own = { .fd = fd, .events = POLLIN };
		_exit(poll(&own, 1, 0));
	}
	is(read(fd, info, sizeof info[0]), sizeof info[0], "a read waits");
	is(info[0].ssi_signo, SIGUSR1, "for a signal");
	int status;
	waitpid(child, &status, 0);
	is(status, 0, "a child with the same descriptor does not see it");
	errno = 0;
	is(signalfd(0, &set, 0), -1, "what is no signalfd");
	is(errno, EINVAL, "cannot be changed");
	is(syscall(SYS_signalfd4, -1, &set, 4, 0), -1, "a set of four bytes");
	is(errno, EINVAL, "is none");
	close(fd);
	close(epoll);
}

int main(void)
{
	deadline(60);
	signals_of_timers();
	overruns();
	deleted_with_its_signal();
	threads_of_timers();
	bad_timers();
	reading_signals();
	return tap_end();
}
