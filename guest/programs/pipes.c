/* Pipes, and waiting on several things at once. */
#include "tap.h"
#include <poll.h>
#include <sys/select.h>
#include <sys/uio.h>

static int fd[2];
static char big[300000];

static void fresh(int flags)
{
	if (pipe2(fd, flags))
		_exit(90);
}
static void done(void)
{
	close(fd[0]);
	close(fd[1]);
}

static void simple(void)
{
	char text[100];
	fresh(0);
	is(write(fd[1], "hello", 5), 5, "write to a pipe");
	is(read(fd[0], text, 2), 2, "a short read takes what it asks for");
	is(read(fd[0], text + 2, 98), 3, "a long one what is there");
	ok(!memcmp(text, "hello", 5), "in order");
	fails(lseek(fd[0], 0, SEEK_SET), ESPIPE, "a pipe cannot seek");
	fails(pread(fd[0], text, 1, 0), ESPIPE, "nor be read at an offset");
	fails(read(fd[1], text, 1), EBADF, "the writing end cannot be read");
	fails(write(fd[0], text, 1), EBADF, "the reading end cannot be written");
	is(write(fd[1], text, 0), 0, "writing nothing");
	struct iovec out[3] = {{"ab", 2}, {"", 0}, {"cde", 3}}, in[2] = {{text, 1}, {text + 1, 99}};
	is(writev(fd[1], out, 3), 5, "writev");
	is(readv(fd[0], in, 2), 5, "readv");
	ok(!memcmp(text, "abcde", 5), "the same bytes");
	struct stat st;
	is(fstat(fd[0], &st), 0, "fstat of a pipe");
	ok(S_ISFIFO(st.st_mode), "says FIFO");
	close(fd[1]);
	is(read(fd[0], text, 10), 0, "no writer: end of file");
	close(fd[0]);
	fails(pipe2(fd, 0x1), EINVAL, "pipe2 with strange flags");
	fails(syscall(SYS_pipe2, 0x1000, 0), EFAULT, "pipe2 to nowhere");
}

static void not_blocking(void)
{
	char c;
	long total = 0, n;
	fresh(O_NONBLOCK);
	fails(read(fd[0], &c, 1), EAGAIN, "an empty pipe, not blocking");
	while ((n = write(fd[1], big, 4096)) > 0)
		total += n;
	is(n == -1 && errno == EAGAIN, 1, "a full one too");
	is(total, 65536, "which takes 64 KiB");
	is(fcntl(fd[1], F_GETPIPE_SZ), 65536, "as F_GETPIPE_SZ says");
	struct pollfd p[2] = {{fd[0], POLLIN, 0}, {fd[1], POLLOUT, 0}};
	is(poll(p, 2, 0), 1, "poll: full is readable, not writable");
	is(p[0].revents, POLLIN, "POLLIN at the reading end");
	is(read(fd[0], big, 4096), 4096, "read a page of it");
	is(write(fd[1], big, 4096), 4096, "and a page fits again");
	is(fcntl(fd[0], F_GETFL) & (O_NONBLOCK | O_ACCMODE), O_NONBLOCK | O_RDONLY, "F_GETFL");
	is(fcntl(fd[0], F_SETFL, 0), 0, "F_SETFL");
	is(fcntl(fd[0], F_GETFL) & O_NONBLOCK, 0, "takes it away");
	done();
}

static void blocking(void)
{
	char c;
	fresh(0);
	pid_t pid = fork();
	if (pid == 0) {
		sleep_ms(80);
		_exit(write(fd[1], "!", 1) != 1);
	}
	long long before = now_ns();
	is(read(fd[0], &c, 1), 1, "a reader waits for a writer");
	ok(now_ns() - before > 50000000, "really");
	wait_for(pid);
	for (unsigned i = 0; i < sizeof big; i++)
		big[i] = (char)(i * 7 + i / 251);
	pid = fork();
	if (pid == 0) {
		close(fd[0]);
		_exit(write(fd[1], big, sizeof big) != sizeof big);
	}
	close(fd[1]);
	static char copy[sizeof big];
	unsigned long got = 0;
	long n;
	sleep_ms(20);
	while ((n = read(fd[0], copy + got, got + 10000 < sizeof copy ? 10000 : sizeof copy - got)) > 0)
		got += n;
	is(got, sizeof big, "a writer of more than fits waits for the reader");
	ok(!memcmp(big, copy, sizeof big), "and every byte arrives");
	is(exited_with(wait_for(pid)), 0, "its one write wrote all");
	close(fd[0]);
	/* The end of file must come even when the reader is already waiting. */
	fresh(0);
	pid = fork();
	if (pid == 0) {
		close(fd[0]);
		sleep_ms(50);
		_exit(0);
	}
	close(fd[1]);
	is(read(fd[0], &c, 1), 0, "a waiting reader gets the end of file when the last writer exits");
	wait_for(pid);
	close(fd[0]);
}

static void atomic_writes(void)
{
	enum { WRITERS = 6, RECORDS = 40, SIZE = 1000 };
	char record[SIZE];
	int bad = 0, seen[WRITERS] = {0};
	fresh(0);
	for (int w = 0; w < WRITERS; w++)
		if (fork() == 0) {
			memset(record, 'A' + w, SIZE);
			for (int i = 0; i < RECORDS; i++)
				if (write(fd[1], record, SIZE) != SIZE)
					_exit(1);
			_exit(0);
		}
	close(fd[1]);
	for (int i = 0; i < WRITERS * RECORDS; i++) {
		int got = 0;
		while (got < SIZE) {
			int n = read(fd[0], record + got, SIZE - got);
			if (n <= 0)
				break;
			got += n;
		}
		for (int j = 1; j < SIZE; j++)
			bad += record[j] != record[0];
		if (record[0] >= 'A' && record[0] < 'A' + WRITERS)
			seen[record[0] - 'A']++;
	}
	is(bad, 0, "writes up to PIPE_BUF are not mixed");
	int complete = 1;
	for (int w = 0; w < WRITERS; w++)
		complete &= seen[w] == RECORDS && wait_for(-1) == 0;
	ok(complete, "and all of them came");
	is(read(fd[0], record, 1), 0, "then the end");
	close(fd[0]);
}

/* A reader looks at a pipe just when a record comes: it gets all of it, or waits. */
static void whole_records(void)
{
	enum { ROUNDS = 1500 };
	long record[3] = {-1, -1, -1}, cut = 0;
	int back[2];
	fresh(0);
	if (pipe(back))
		return;
	pid_t pid = fork();
	if (pid == 0) {
		for (int i = 0; i < ROUNDS; i++)
			if (write(fd[1], record, sizeof record) != sizeof record || read(back[0], record, sizeof record) != sizeof record)
				_exit(1);
		_exit(0);
	}
	close(fd[1]);
	close(back[0]);
	for (int i = 0; i < ROUNDS; i++) {
		cut += read(fd[0], record, sizeof record) != sizeof record;
		cut += write(back[1], record, sizeof record) != sizeof record;
	}
	is(cut, 0, "a record comes as a whole to who waits for it");
	is(exited_with(wait_for(pid)), 0, "in both directions");
	close(fd[0]);
	close(back[1]);
}

static void polling(void)
{
	fresh(0);
	struct pollfd p[4] = {{fd[0], POLLIN, 0}, {fd[1], POLLOUT, 0}, {-1, POLLIN, 99}, {777, POLLIN, 0}};
	is(poll(p, 4, 0), 2, "poll counts what is ready");
	is(p[0].revents, 0, "an empty pipe is not readable");
	is(p[1].revents, POLLOUT, "it is writable");
	is(p[2].revents, 0, "a negative descriptor is skipped");
	is(p[3].revents, POLLNVAL, "one that is not open: POLLNVAL");
	long long before = now_ns();
	is(poll(p, 1, 60), 0, "poll waits");
	ok(now_ns() - before >= 60000000, "as long as it was told");
	pid_t pid = fork();
	if (pid == 0) {
		sleep_ms(50);
		_exit(write(fd[1], "x", 1) != 1);
	}
	is(poll(p, 1, 5000), 1, "or until something comes");
	is(p[0].revents, POLLIN, "which is said");
	wait_for(pid);
	close(fd[1]);
	is(poll(p, 1, 0), 1, "data and no writer");
	is(p[0].revents, POLLIN | POLLHUP, "POLLIN and POLLHUP");
	done();
	fresh(0);
	close(fd[0]);
	p[0] = (struct pollfd){fd[1], POLLOUT, 0};
	is(poll(p, 1, 0), 1, "no reader");
	is(p[0].revents & POLLERR, POLLERR, "POLLERR");
	close(fd[1]);
	before = now_ns();
	is(poll(NULL, 0, 30), 0, "poll on nothing is a sleep");
	ok(now_ns() - before >= 30000000, "of that length");
	fails(syscall(SYS_poll, 0x1000, 1, 0), EFAULT, "poll of a bad address");
}

static void selecting(void)
{
	fd_set r, w;
	struct timeval t = {0, 40000};
	fresh(0);
	FD_ZERO(&r);
	FD_SET(fd[0], &r);
	is(select(fd[0] + 1, &r, NULL, NULL, &t), 0, "select runs out of time");
	is(FD_ISSET(fd[0], &r), 0, "with the set cleared");
	FD_SET(fd[0], &r);
	FD_ZERO(&w);
	FD_SET(fd[1], &w);
	t = (struct timeval){5, 0};
	is(select(fd[1] + 1, &r, &w, NULL, &t), 1, "the writing end is ready");
	ok(FD_ISSET(fd[1], &w) && !FD_ISSET(fd[0], &r), "that one only");
	if (write(fd[1], "x", 1) != 1)
		return;
	FD_SET(fd[0], &r);
	is(select(fd[0] + 1, &r, NULL, NULL, NULL), 1, "and the reading end when there is something");
	FD_ZERO(&r);
	FD_SET(40, &r);
	fails(select(41, &r, NULL, NULL, &t), EBADF, "a descriptor that is not open");
	fails(select(-1, NULL, NULL, NULL, &t), EINVAL, "a negative count");
	struct timespec soon = {0, 20000000};
	sigset_t none;
	sigemptyset(&none);
	is(pselect(0, NULL, NULL, NULL, &soon, &none), 0, "pselect as a sleep");
	struct pollfd p = {fd[0], POLLIN, 0};
	is(ppoll(&p, 1, &soon, &none), 1, "ppoll");
	done();
}

int main(void)
{
	deadline(60);
	signal(SIGPIPE, SIG_IGN);
	simple();
	not_blocking();
	blocking();
	atomic_writes();
	whole_records();
	polling();
	selecting();
	return tap_end();
}
