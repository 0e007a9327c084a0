/* Stream sockets inside the machine: names in the tree, abstract names, loopback addresses.
 * argv[1]: a folder where a socket can be made. */
#include "tap.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stddef.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>

static int outcome(long result) { return result == -1 ? errno : 0; }

static socklen_t unix_address(struct sockaddr_un *un, const char *name, int abstract)
{
	memset(un, 0, sizeof *un);
	un->sun_family = AF_UNIX;
	strcpy(un->sun_path + abstract, name);
	return offsetof(struct sockaddr_un, sun_path) + abstract + strlen(name) + !abstract;
}

static struct sockaddr_in loopback(int port)
{
	struct sockaddr_in in = {.sin_family = AF_INET, .sin_port = htons(port)};
	in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	return in;
}

/* A listener and a client: what is said arrives, both ways, across a fork. */
static void talk(const char *what, struct sockaddr *address, socklen_t length)
{
	int listener = socket(address->sa_family, SOCK_STREAM, 0);
	is(outcome(bind(listener, address, length)), 0, what);
	is(outcome(listen(listener, 3)), 0, "listens");
	struct sockaddr_storage name;
	socklen_t name_length = sizeof name;
	is(outcome(getsockname(listener, (void *)&name, &name_length)), 0, "has a name");
	pid_t child = fork();
	if (!child) {
		char text[32] = "";
		int client = socket(address->sa_family, SOCK_STREAM, 0);
		if (connect(client, (void *)&name, name_length) || write(client, "question", 8) != 8)
			_exit(1);
		_exit(read(client, text, sizeof text) != 6 || memcmp(text, "answer", 6) || read(client, text, 1) != 0 ? 2 : 0);
	}
	struct sockaddr_storage peer;
	socklen_t peer_length = sizeof peer;
	int server = accept(listener, (void *)&peer, &peer_length);
	ok(server >= 0 && peer.ss_family == address->sa_family, "a client comes");
	char text[32] = "";
	is(recv(server, text, 4, MSG_PEEK), 4, "MSG_PEEK");
	is(recv(server, text, sizeof text, 0), 8, "leaves it there");
	ok(!memcmp(text, "question", 8), "as it was sent");
	is(send(server, "answer", 6, MSG_NOSIGNAL), 6, "an answer");
	is(outcome(shutdown(server, SHUT_WR)), 0, "and no more");
	is(exited_with(wait_for(child)), 0, "arrives");
	is(recv(server, text, 1, 0), 0, "the client is gone");
	is(outcome(send(server, "x", 1, MSG_NOSIGNAL)), EPIPE, "and cannot be told anything");
	close(server);
	close(listener);
}

static void names(const char *folder)
{
	struct sockaddr_un un;
	char path[90];
	snprintf(path, sizeof path, "%s/sockets.%d", folder, getpid());
	socklen_t length = unix_address(&un, path, 0);
	talk("a name in the tree", (void *)&un, length);
	struct stat st;
	ok(!stat(path, &st) && S_ISSOCK(st.st_mode), "the name stays, a socket");
	int again = socket(AF_UNIX, SOCK_STREAM, 0);
	is(outcome(connect(again, (void *)&un, length)), ECONNREFUSED, "where nobody listens any more");
	is(outcome(bind(again, (void *)&un, length)), EADDRINUSE, "and nobody else can");
	is(outcome(open(path, O_RDWR)), ENXIO, "it cannot be opened");
	unlink(path);
	is(outcome(connect(again, (void *)&un, length)), ENOENT, "until it is gone");
	is(outcome(listen(again, 1)), EINVAL, "listening without a name");
	close(again);
	length = unix_address(&un, "vmm-test", 1);
	talk("an abstract name", (void *)&un, length);
	again = socket(AF_UNIX, SOCK_STREAM, 0);
	is(outcome(bind(again, (void *)&un, length)), 0, "which is free again");
	int other = socket(AF_UNIX, SOCK_STREAM, 0);
	is(outcome(bind(other, (void *)&un, length)), EADDRINUSE, "for one");
	is(outcome(bind(again, (void *)&un, length)), EINVAL, "that has one name only");
	is(outcome(connect(other, (void *)&un, length)), ECONNREFUSED, "and does not listen yet");
	close(again);
	close(other);
}

static void loopback_addresses(void)
{
	struct sockaddr_in in = loopback(0), far = loopback(80);
	talk("any port of 127.0.0.1", (void *)&in, sizeof in);
	struct sockaddr_in6 in6 = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
	int have6 = socket(AF_INET6, SOCK_STREAM, 0), works = !bind(have6, (void *)&in6, sizeof in6);
	close(have6);
	if (works)
		talk("any port of ::1", (void *)&in6, sizeof in6);
	far.sin_addr.s_addr = inet_addr("203.0.113.7");
	int s = socket(AF_INET, SOCK_STREAM, 0);
	is(outcome(bind(s, (void *)&far, sizeof far)), EADDRNOTAVAIL, "an address of somebody else");
	in = loopback(1);
	is(outcome(connect(s, (void *)&in, sizeof in)), ECONNREFUSED, "a port nobody listens on");
	close(s);
	s = socket(AF_INET, SOCK_STREAM, 0);
	struct sockaddr_in bound;
	socklen_t length = sizeof bound;
	is(outcome(listen(s, 1)), 0, "listening without a name takes a port");
	ok(!getsockname(s, (void *)&bound, &length) && bound.sin_port, "that can be asked for");
	int one = 1, value = 0;
	socklen_t size = sizeof value;
	is(outcome(setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one)), 0, "SO_REUSEADDR");
	ok(!getsockopt(s, SOL_SOCKET, SO_REUSEADDR, &value, &size) && value == 1, "is kept");
	is(outcome(setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one)), 0, "TCP_NODELAY");
	is(outcome(setsockopt(s, SOL_SOCKET, 9999, &one, sizeof one)), ENOPROTOOPT, "an option that does not exist");
	ok(!getsockopt(s, SOL_SOCKET, SO_ACCEPTCONN, &value, &size) && value == 1, "SO_ACCEPTCONN");
	ok(!getsockopt(s, SOL_SOCKET, SO_TYPE, &value, &size) && value == SOCK_STREAM, "SO_TYPE");
	close(s);
}

static void waiting(void)
{
	struct sockaddr_un un;
	socklen_t length = unix_address(&un, "vmm-test-wait", 1);
	int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
	bind(listener, (void *)&un, length);
	listen(listener, 8);
	is(outcome(accept(listener, NULL, NULL)), EAGAIN, "nobody there");
	struct pollfd p = {.fd = listener, .events = POLLIN};
	is(poll(&p, 1, 0), 0, "poll agrees");
	int epoll = epoll_create1(0);
	struct epoll_event event = {.events = EPOLLIN | EPOLLET};
	is(epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event), 0, "epoll takes it");
	pid_t child = fork();
	if (!child) {
		usleep(100000);
		int client = socket(AF_UNIX, SOCK_STREAM, 0);
		int failed = connect(client, (void *)&un, length);
		char c;
		_exit(failed || read(client, &c, 1) != 1);
	}
	is(epoll_wait(epoll, &event, 1, 5000), 1, "and wakes");
	int server = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	ok(server >= 0 && fcntl(server, F_GETFD) == FD_CLOEXEC && fcntl(server, F_GETFL) & O_NONBLOCK, "accept4 with flags");
	char c;
	is(outcome(recv(server, &c, 1, 0)), EAGAIN, "nothing said");
	struct ucred cred;
	socklen_t size = sizeof cred;
	ok(!getsockopt(server, SOL_SOCKET, SO_PEERCRED, &cred, &size) && cred.pid == child && cred.uid == geteuid(), "SO_PEERCRED");
	is(write(server, "x", 1), 1, "it is told to go");
	is(exited_with(wait_for(child)), 0, "and goes");
	int pair[2];
	is(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0, "a pair");
	is(outcome(recv(pair[0], &c, 1, MSG_DONTWAIT)), EAGAIN, "MSG_DONTWAIT");
	struct iovec pieces[2] = {{"two ", 4}, {"pieces", 6}};
	struct msghdr message = {.msg_iov = pieces, .msg_iovlen = 2};
	is(sendmsg(pair[0], &message, 0), 10, "sendmsg in pieces");
	int there = 0;
	ok(!ioctl(pair[1], FIONREAD, &there) && there == 10, "FIONREAD");
	char first[3], rest[20];
	pieces[0] = (struct iovec){first, 3}, pieces[1] = (struct iovec){rest, 20};
	is(recvmsg(pair[1], &message, 0), 10, "recvmsg in others");
	ok(!memcmp(first, "two", 3) && !memcmp(rest, " pieces", 7), "arrives");
	static char much[1 << 20];
	long sent = send(pair[0], much, sizeof much, MSG_DONTWAIT);
	ok(sent > 0 && sent < (long)sizeof much, "no more than fits is sent without waiting");
	close(epoll), close(server), close(listener), close(pair[0]), close(pair[1]);
}

static void nonsense(void)
{
	int s = socket(AF_UNIX, SOCK_STREAM, 0), pipes[2];
	char c = 0;
	is(outcome(socket(AF_UNIX, 77, 0)), EINVAL, "a type that does not exist");
	is(outcome(socket(AF_INET, SOCK_STREAM, IPPROTO_UDP)), EPROTONOSUPPORT, "UDP is not a stream");
	is(outcome(socket(12345, SOCK_STREAM, 0)), EAFNOSUPPORT, "a family that does not exist");
	is(outcome(socketpair(AF_INET, SOCK_STREAM, 0, pipes)), EOPNOTSUPP, "a pair of Internet sockets");
	is(outcome(send(s, &c, 1, 0)), ENOTCONN, "sending without a connection");
	is(outcome(recv(s, &c, 1, 0)), EINVAL, "receiving without one");
	int in = socket(AF_INET, SOCK_STREAM, 0);
	is(outcome(recv(in, &c, 1, 0)), ENOTCONN, "the same of an Internet socket");
	is(outcome(shutdown(in, SHUT_RD)), ENOTCONN, "shutting it down");
	close(in);
	is(outcome(getpeername(s, (void *)&c, &(socklen_t){1})), ENOTCONN, "asking who is there");
	is(outcome(accept(s, NULL, NULL)), EINVAL, "accepting without listening");
	is(outcome(bind(s, (void *)&c, 1)), EINVAL, "an address of one byte");
	is(outcome(bind(s, (void *)8, 16)), EFAULT, "an address nowhere");
	is(outcome(bind(s, (void *)&c, 4096)), EINVAL, "an address too long");
	is(outcome(bind(0, (void *)&c, 1)), ENOTSOCK, "what is no socket");
	is(outcome(bind(999, (void *)&c, 1)), EBADF, "what is nothing");
	close(s);
}

int main(int argc, char **argv)
{
	signal(SIGPIPE, SIG_IGN);
	names(argc > 1 ? argv[1] : "/tmp");
	loopback_addresses();
	waiting();
	nonsense();
	return tap_end();
}
