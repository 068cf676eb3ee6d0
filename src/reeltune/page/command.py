"""The flags of `reeltune serve`; the server, and what draws, is imported once these are sound.  (no torch)"""

from __future__ import annotations

import secrets
import socket
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from reeltune.core.errors import UserError
from reeltune.core.options import Options, a_path, whole_number

PORT = 8765
LOOPBACK = "127.0.0.1"


def serve(argv: Sequence[str]) -> int:
    """Serves the page until Ctrl-C. Returns the exit code. Raises UserError."""
    parser = Options(
        "reeltune serve",
        description="A page to look at data and runs, on this machine alone (127.0.0.1). Prints its address, with the "
        "token that it asks for. It reads files and changes none, without --edit or --run.",
    )
    parser.add_argument("folder", type=a_path, nargs="?", default=Path(), help="what lies below it is shown [.]")
    parser.add_argument("--port", type=whole_number, default=PORT, metavar="N", help=f"0 takes a free one [{PORT}]")
    parser.add_argument("--open", action="store_true", help="open the browser, too")
    parser.add_argument("--edit", action="store_true", help="captions may be edited, into new lists, and recipes saved")
    parser.add_argument("--run", action="store_true", help="runs may be started, stopped and resumed")
    options = parser.read(argv)
    if not options.folder.is_dir():
        raise UserError("serve", f"{str(options.folder)!r} is no folder; give one with runs or data lists below it")
    if not 0 <= options.port < 65536:
        raise UserError("serve", f"port is {options.port}, and ports are 0 to 65535; give another")
    try:
        import uvicorn

        from reeltune.page.app import make_app
    except ModuleNotFoundError as missing:
        raise UserError("serve", f"{missing.name} is not installed; pip install 'reeltune[page]'") from missing

    token = secrets.token_urlsafe(32)
    with listening(options.port) as listener:
        address = f"http://{LOOPBACK}:{listener.getsockname()[1]}/?token={token}"
        app = make_app(options.folder, token, edit=options.edit, run=options.run)
        settings = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=1, server_header=False
        )
        sys.stdout.write(f"{address}\n")
        sys.stdout.flush()
        if options.open:
            webbrowser.open(address)
        uvicorn.Server(settings).run(sockets=[listener])
    return 0


def listening(port: int) -> socket.socket:
    """A socket of loopback alone. Raises UserError."""
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise UserError(
            "serve", f"port {port} of {LOOPBACK} cannot be had ({error.strerror}); give another --port, or 0"
        ) from None
    return listener
