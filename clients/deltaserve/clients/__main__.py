"""``python -m deltaserve.clients``: the client's commands, without the server's dependencies."""

from deltaserve.clients.cli import main

main()
