"""An FTP server for tests of remote storage: python ftp_server.py DIRECTORY [IDLE_TIMEOUT_S].

Says its port on standard output and ends when its standard input closes.
"""

import logging
import sys
import threading

from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.servers import ThreadedFTPServer

USER, PASSWORD = "introvert", "open-sesame"


class Handler(FTPHandler):
    authorizer = DummyAuthorizer()
    banner = "ready"
    auth_failed_timeout = 0


def main() -> None:
    logging.disable(logging.CRITICAL)
    Handler.authorizer.add_user(USER, PASSWORD, sys.argv[1], perm="elradfmwMT")
    Handler.timeout = float(sys.argv[2]) if len(sys.argv) > 2 else 300
    server = ThreadedFTPServer(("127.0.0.1", 0), Handler)
    server.max_cons = server.max_cons_per_ip = 0
    print(server.address[1], flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()
    server.close_all()


if __name__ == "__main__":
    main()
