"""Attack 21: JupyterLab without the token, with a wrong one, and from another origin."""

import base64
import http.client
import json
import re
import secrets
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest

import browser
from cfiddle_cluster import userhost
from live import LiveCluster, docker, wait_until

EVIL = "http://evil.example"
OTHER = "test_user1"
FILE = "test_slurm.sh"
"""Lies in the home directory of whom JupyterLab belongs to, and is not hidden."""
PRIVATE = [
    "/api/contents",
    "/api/kernels",
    "/api/sessions",
    "/api/terminals",
    "/api/kernelspecs",
    f"/files/{FILE}",
    "/api/me",
]


class Visitor:
    """Somebody who speaks HTTP to JupyterLab, with what they have: a token, cookies, or nothing."""

    def __init__(self, cluster: LiveCluster) -> None:
        self.address = urlsplit(userhost.address(cluster.config)).netloc
        self.cookies: dict[str, str] = {}

    def ask(self, method: str, path: str, body: str = "", **headers: str) -> tuple[int, str, str]:
        """Return status, headers as text, and body."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.cookies:
            given["Cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        connection = http.client.HTTPConnection(self.address, timeout=20)
        try:
            connection.request(method, path, body, given)
            answer = connection.getresponse()
            for name, value in answer.getheaders():
                if name.lower() == "set-cookie" and (match := re.match(r"([^=]+)=([^;]*)", value)):
                    self.cookies[match[1]] = match[2].strip('"')
            text = "" if answer.status == 101 else answer.read().decode(errors="replace")
            return answer.status, str(answer.headers).lower(), text
        finally:
            connection.close()

    def upgrade(self, path: str, **headers: str) -> int:
        """Return the status of the answer to a WebSocket's first request."""
        key = base64.b64encode(secrets.token_bytes(16)).decode()
        wanted = {
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec_WebSocket_Key": key,
            "Sec_WebSocket_Version": "13",
        }
        return self.ask("GET", path, **wanted, **headers)[0]


@pytest.fixture
def visitor(cluster: LiveCluster) -> Visitor:
    return Visitor(cluster)


@pytest.fixture
def owner(cluster: LiveCluster) -> Visitor:
    """Give somebody who has logged in, as a browser does, and now has cookies."""
    owner = Visitor(cluster)
    assert owner.ask("GET", f"/lab?token={cluster.state.secret('jupyter-token')}")[0] == 200
    assert any(name.startswith("username-") for name in owner.cookies)
    assert owner.ask("GET", "/api/contents")[0] == 200
    return owner


@pytest.fixture
def terminal(cluster: LiveCluster, owner: Visitor) -> Iterator[str]:
    authorization = {"Authorization": f"token {cluster.state.secret('jupyter-token')}"}
    status, _, text = Visitor(cluster).ask("POST", "/api/terminals", **authorization)
    assert status == 200
    name = json.loads(text)["name"]
    yield name
    Visitor(cluster).ask("DELETE", f"/api/terminals/{name}", **authorization)


@pytest.mark.parametrize("path", PRIVATE)
@pytest.mark.parametrize("how", ["no token", "an empty token", "a wrong token", "a wrong header", "a made-up cookie"])
def test_without_the_token_nothing_is_told(visitor: Visitor, path: str, how: str) -> None:
    query, headers = {
        "no token": ("", {}),
        "an empty token": ("?token=", {}),
        "a wrong token": (f"?token={'0' * 64}", {}),
        "a wrong header": ("", {"Authorization": f"token {'0' * 64}"}),
        "a made-up cookie": ("", {}),
    }[how]
    if how == "a made-up cookie":
        name = f"username-{visitor.address.replace(':', '-').replace('.', '-')}"
        visitor.cookies = {name: "2|1:0|10:1700000000|8:username|4:eyJ9|00"}
    status, _, text = visitor.ask("GET", path + query, **headers)
    assert status in (302, 401, 403), text[:300]
    assert FILE not in text.replace(path, "").replace(f"%2Ffiles%2F{FILE}", "")


@pytest.mark.parametrize("path", ["/api/terminals", "/api/kernels", "/api/sessions"])
def test_without_the_token_nothing_is_started(visitor: Visitor, path: str) -> None:
    assert visitor.ask("POST", path, "{}")[0] == 403
    assert visitor.ask("POST", f"{path}?token=wrong", "{}")[0] == 403


def test_socket_of_a_terminal_needs_the_token(visitor: Visitor, cluster: LiveCluster, terminal: str) -> None:
    path = f"/terminals/websocket/{terminal}"
    assert visitor.upgrade(path) == 403
    assert visitor.upgrade(f"{path}?token=wrong") == 403
    assert visitor.upgrade(path, Authorization=f"token {cluster.state.secret('jupyter-token')}") == 101, (
        "else this proves nothing"
    )


def test_page_of_another_origin_can_use_no_cookie(owner: Visitor, terminal: str) -> None:
    same = f"http://{owner.address}"
    path = f"/terminals/websocket/{terminal}"
    assert owner.upgrade(path, Origin=same) == 101, "else this proves nothing"
    assert owner.upgrade(path, Origin=EVIL) == 403
    assert owner.upgrade(path, Origin="null") == 403
    # Reading: the answer carries no permission for the other origin. Writing: a form has no XSRF token.
    _, headers, _ = owner.ask("GET", "/api/contents", Origin=EVIL)
    assert "access-control-allow-origin" not in headers
    for origin in (EVIL, same):
        assert owner.ask("POST", "/api/terminals", "", Origin=origin)[0] in (403, 404)
    assert "frame-ancestors 'self'" in owner.ask("GET", "/lab")[1]


PAGE = """<!doctype html><title>evil</title><script>
const target = %s;
async function take(path, options) {
  try {
    const answer = await fetch(target + path, {credentials: "include", ...options});
    return answer.type == "opaque" ? "nothing" : await answer.text();
  } catch (error) {
    return "nothing";
  }
}
async function attack() {
  return {
    read: await take("/api/contents", {}),
    start: await take("/api/terminals", {method: "POST", mode: "no-cors", body: "{}"}),
    socket: await new Promise(done => {
      const socket = new WebSocket(target.replace("http", "ws") + "/terminals/websocket/%s");
      socket.onopen = () => done("open");
      socket.onclose = () => done("nothing");
    }),
  };
}
</script>"""


def test_browser_that_is_logged_in_gives_another_page_nothing(cluster: LiveCluster, terminal: str) -> None:
    target = userhost.address(cluster.config)
    body = (PAGE % (json.dumps(target), terminal)).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Say nothing."""

    # The same host on another port is another origin, but the same site: cookies do travel.
    with ThreadingHTTPServer((str(urlsplit(target).hostname), 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with browser.page() as page:
                page.goto(f"{target}/lab?token={cluster.state.secret('jupyter-token')}")
                before = _terminals(cluster)
                page.goto(f"http://{urlsplit(target).hostname}:{server.server_address[1]}/")
                assert page.evaluate("attack()") == {"read": "nothing", "start": "nothing", "socket": "nothing"}
                assert _terminals(cluster) == before
        finally:
            server.shutdown()


def _terminals(cluster: LiveCluster) -> list[str]:
    token = cluster.state.secret("jupyter-token")
    text = Visitor(cluster).ask("GET", "/api/terminals", Authorization=f"token {token}")[2]
    return sorted(terminal["name"] for terminal in json.loads(text))


def test_what_a_kernel_says_goes_over_no_network(cluster: LiveCluster) -> None:
    authorization = {"Authorization": f"token {cluster.state.secret('jupyter-token')}"}
    _, _, text = Visitor(cluster).ask("POST", "/api/kernels", "{}", **authorization)
    kernel = json.loads(text)["id"]
    try:
        sockets = f"find /run/jupyter -type s -path '*{kernel}*'"
        wait_until(
            lambda: len(cluster.in_service("userhost", sockets).ok().split()) >= 5,
            timeout_s=30,
            what="its sockets are files",
        )
        table = cluster.user("cat /proc/net/tcp /proc/net/tcp6", OTHER).ok()
        listening = re.findall(r":([0-9A-F]{4}) [0-9A-F]+:0000 0A \S+ \S+ \S+ +1000 ", table)
        # One more is the kernel's pipe for what its children print, which only takes (ipykernel/iostream.py).
        assert len({int(port, 16) for port in listening} - {8888}) <= 1
    finally:
        Visitor(cluster).ask("DELETE", f"/api/kernels/{kernel}", **authorization)


def test_token_is_not_in_the_log(cluster: LiveCluster, owner: Visitor) -> None:
    log = docker("logs", cluster.container("userhost"))
    assert cluster.state.secret("jupyter-token") not in log.output
