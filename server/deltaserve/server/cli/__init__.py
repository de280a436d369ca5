"""The command `deltaserve`: the server, what needs none, and the client's commands."""

import typer

from deltaserve.clients.cli import app as clients_app
from deltaserve.clients.cli_keys import keys_app
from deltaserve.server.cli.keys import create as create_key
from deltaserve.server.cli.offline import compress, inspect, plan, tune
from deltaserve.server.cli.serve import serve

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve every fine-tune of a base model from one copy of that base, in one mixed batch.",
)
for command in (serve, plan, inspect, tune, compress):
    app.command()(command)
keys_app.command("create")(create_key)  # in place of the clients', which knows no files
app.add_typer(clients_app)


def main() -> None:
    """Entry point."""
    app()
