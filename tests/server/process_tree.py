"""A process tree that does all it can to escape: forks, sessions of its own, deaf to SIGTERM.

Run as `python process_tree.py PIDFILE [deaf] [end CODE]`: writes the ids of its processes to
PIDFILE, one per line, once all are there.
"""

import os
import signal
import sys
import time
from pathlib import Path


def linger(deaf: bool) -> None:
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)  # the guard ends it; were that broken, it would end all the same


def main() -> None:
    pidfile, *options = sys.argv[1:]
    deaf = "deaf" in options
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:  # its parent ends: an orphan in a session of its own
            os.write(write, f"{os.getpid()}\n".encode())
            linger(deaf)
        os._exit(0)
    if os.fork() == 0:
        os.write(write, f"{os.getpid()}\n".encode())
        linger(deaf)
    lines = f"{os.getpid()}\n{os.environ['TMPDIR']}\n".encode()
    numbers = b""
    while numbers.count(b"\n") < 2:
        numbers += os.read(read, 100)
    temporary = Path(pidfile + ".new")
    temporary.write_bytes(lines + numbers)
    temporary.rename(pidfile)
    if "end" in options:
        sys.exit(int(options[-1]))
    linger(deaf)


main()
