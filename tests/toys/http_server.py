"""A web server on this machine that answers as badly as a test wants it to."""

import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Site:
    """Serves contents by path; the first answers to a path may be scripted.

    Attributes:
        contents: path -> bytes.
        script: path -> answers still to come, functions of the request; then it is served whole.
        asked: (path, headers) of every request.
        tags: path -> ETag; without one, the server knows no ranges.
    """

    def __init__(self):
        self.contents, self.script, self.tags = {}, {}, {}
        self.asked = []
        self.over = threading.Event()

    def url(self, path, scheme="http"):
        return f"{scheme}://127.0.0.1:{self.port}{path}"

    def count(self, path):
        return sum(asked == path for asked, _ in self.asked)

    def put(self, path, content, *script, tag=""):
        self.contents[path], self.script[path], self.tags[path] = content, list(script), tag
        return self.url(path)


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        site, path = self.server.site, self.path.partition("?")[0]
        site.asked.append((self.path, dict(self.headers)))
        if path not in site.contents:
            return status(404)(self)
        return (site.script[path].pop(0) if site.script[path] else whole)(self)

    @property
    def content(self):
        return self.server.site.contents[self.path.partition("?")[0]]

    @property
    def tag(self):
        return self.server.site.tags[self.path.partition("?")[0]]

    def begin(self, code, length, **headers):
        self.close_connection = True
        self.send_response(code)
        if length is not None:
            self.send_header("Content-Length", str(length))
        if self.tag:
            self.send_header("ETag", self.tag)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def log_message(self, *_):
        pass


def whole(request, upto=None):
    """Serve it all, or from the byte that a request wants to go on from."""
    content, start = request.content, 0
    wanted = request.headers.get("Range", "")
    if request.tag and wanted and request.headers.get("If-Range") == request.tag:
        start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        request.begin(206, len(content) - start, Content_Range=span)
    else:
        request.begin(200, len(content))
    request.wfile.write(content[start:upto])


def cut(at):
    """Serve up to a byte and hang up."""
    return lambda request: whole(request, at)


def stall(at):
    """Serve up to a byte, then nothing more; the connection stays open."""

    def answer(request):
        whole(request, at)
        request.wfile.flush()
        request.server.site.over.wait(20)

    return answer


def status(code, content=b"", **headers):
    def answer(request):
        request.send_response(code)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    return answer


def lie(length):
    """State another length than the content has."""

    def answer(request):
        request.begin(200, length)
        request.wfile.write(request.content)

    return answer


def without_length(request):
    """State no length; the end of the connection is the end of the content."""
    request.begin(200, None)
    request.wfile.write(request.content)


def replaced(content, tag):
    """Put another content there, then serve it."""

    def answer(request):
        path = request.path.partition("?")[0]
        request.server.site.contents[path], request.server.site.tags[path] = content, tag
        whole(request)

    return answer


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass


@contextlib.contextmanager
def serving():
    """Run a server for the block; its thread and port are gone afterwards."""
    site = Site()
    with QuietServer(("127.0.0.1", 0), Request) as server:
        server.site, site.port = site, server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield site
        finally:
            site.over.set()
            server.shutdown()
            thread.join()
