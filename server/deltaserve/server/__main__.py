"""``python -m deltaserve.server``: the same as the command `deltaserve`."""

from deltaserve.server.cli import main

main()
