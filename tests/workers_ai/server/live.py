"""A server on a free port, in a thread, and requests to it byte by byte: nothing between the test and the socket."""

import contextlib
import http.client
import json
import socket
import threading
import time
from urllib.parse import urlsplit

import uvicorn

from refgemma.workers_ai.pages import GEMMA_2B
from refgemma.workers_ai.server.start import Connection, listen

ACCOUNT = "/client/v4/accounts/0123456789abcdef/ai"
RUN = f"{ACCOUNT}/run/{GEMMA_2B}"
PATIENCE = 60  # seconds until a test gives up waiting for what must come; no test expects anything of the clock


@contextlib.contextmanager
def serving(app, *, buffer=None):
    """Address of a running server; `buffer` is the bytes that a socket takes beyond what its reader has read."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", http=Connection, loop="asyncio"))
    listener = listen("127.0.0.1", 0)
    if buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)  # connections have it from there
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def wait_for(condition):
    """Until something is so; a test that waits in vain fails here."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


class Reply:
    """A response that was read to its end."""

    def __init__(self, response):
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def code(self):
        """Of the first error."""
        return self.json["errors"][0]["code"]

    @property
    def message(self):
        return self.json["errors"][0]["message"]

    @property
    def result(self):
        assert (self.status, self.json["success"], self.json["errors"]) == (200, True, []), self.body
        return self.json["result"]


def ask(address, path, body=None, *, method=None, headers=(), timeout=PATIENCE):
    """Send a request: no body, bytes as they are, or anything else as JSON."""
    with sent(address, path, body, method=method, headers=headers, timeout=timeout) as response:
        return Reply(response)


@contextlib.contextmanager
def sent(address, path, body=None, *, method=None, headers=(), timeout=PATIENCE, buffer=None):
    """A response that is yet to be read."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=timeout)
    if buffer is not None:
        connection.connect()
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    try:
        connection.request(method or ("GET" if data is None else "POST"), path, data, dict(headers))
        yield connection.getresponse()
    finally:
        connection.close()


def form(file_name, content, *, boundary="a-boundary"):
    """Body and headers of an upload, as curl -F writes it."""
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file_name"\r\n\r\n{file_name}\r\n'
    head += f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{file_name}"\r\n'
    head += "Content-Type: application/octet-stream\r\n\r\n"
    body = head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
    return body, {"content-type": f"multipart/form-data; boundary={boundary}"}


def events(body):
    """Data of each server-sent event, JSON but for the last."""
    assert body.endswith(b"\n\n")
    lines = body.decode().removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [line if line == "[DONE]" else json.loads(line) for line in (line[6:] for line in lines)]
