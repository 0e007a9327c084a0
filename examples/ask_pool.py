#!/usr/bin/env python3
"""Runs one copy of a pool's template without starting anything: its standard input is this program's, and so are its
output and its status.

    vmm run --name warm --ready-freeze --root / -- python3 server.py &
    vmm pool warm &
    echo request | examples/ask_pool.py warm-pool

What is said on the pool's socket is in docs/control.md, "Copies of a pool, in any language".
"""
import array
import json
import os
import socket
import sys


class Pool:
    """A conversation with a pool. Its copies end with it."""

    def __init__(self, name, **lot):
        folder = os.environ.get("XDG_RUNTIME_DIR")
        folder = f"{folder}/vmm" if folder else f"/tmp/vmm-{os.geteuid()}"
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(f"{folder}/{name}/clones")
        self.lines = self.socket.makefile("rb")
        self.say({"op": "serve", **lot})
        self.room = self.hear()["room"]

    def say(self, what, descriptors=()):
        line = json.dumps(what).encode() + b"\n"
        with_it = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        sent = self.socket.sendmsg([line], with_it if descriptors else [])
        if sent < len(line):
            self.socket.sendall(line[sent:])

    def hear(self):
        line = self.lines.readline()
        if not line:
            raise EOFError("the pool has ended")
        return json.loads(line)

    def run(self, number=1, stdin=0, stdout=1, stderr=2, **one):
        """Runs a copy to its end: its status."""
        given = ["given"] * 3
        self.say({"op": "start", "number": number, "stdio": given, **one}, [stdin, stdout, stderr])
        while True:
            match self.hear():
                case {"runs": _}:
                    pass
                case {"ended": {"status": status}}:
                    return status
                case {"failed": {"why": why}} | {"error": why}:
                    raise RuntimeError(why)


if __name__ == "__main__":
    sys.exit(Pool(sys.argv[1]).run())
