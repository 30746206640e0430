"""A server of shards that stalls and fails, for tests."""

from __future__ import annotations

import functools
import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path


class Store:
    """A server of a directory. `trouble`: what it does by turns, for each file whose name ends like this, instead of
    answering: "503", "stall" in the middle, "cut" the connection there."""

    def __init__(self, directory: Path, trouble: list[str], ending: str = ".tar"):
        self.asked: list[str] = []
        self.healthy = False  # True: the trouble is over
        left: dict[str, Iterator[str]] = {}
        store = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *arguments) -> None:
                pass

            def do_GET(self) -> None:
                store.asked.append(self.path)
                turns = left.setdefault(self.path, iter(trouble))
                what = next(turns, None) if self.path.endswith(ending) and not store.healthy else None
                if what is None:
                    return super().do_GET()
                if what == "503":
                    return self.send_error(503)
                data = Path(self.translate_path(self.path)).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                if what == "stall":
                    time.sleep(20)

        self._server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Handler, directory=str(directory))
        )
        self._server.daemon_threads, self._server.block_on_close = True, False
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
