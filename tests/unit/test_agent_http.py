"""The agent's pages: HTTP with limits, metrics that a parser takes in both formats."""

import asyncio
import os
import socket
from http import HTTPStatus

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from sidestep.node import httpd
from sidestep.node.metrics import Metrics

ENGINE = (
    "# HELP istio_tcp_connections_opened_total Opened\n# TYPE istio_tcp_connections_opened_total counter\n"
    'istio_tcp_connections_opened_total{reporter="source"} 3\n'
)


async def page(request: httpd.Request) -> httpd.Response:
    if request.path == "/fail":
        raise RuntimeError("boom")
    if request.path == "/none":
        return httpd.refuse(HTTPStatus.NOT_FOUND)
    query = "".join(f" {name}={value}" for name, value in sorted(request.query.items()))
    return httpd.Response(f"{request.path} {request.headers.get('host', '')}{query}".encode())


def asked(*requests: bytes) -> list[bytes]:
    async def run() -> list[bytes]:
        listener = httpd.bind("127.0.0.1", 0)
        port = listener.getsockname()[1]
        answers = []
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            server = group.create_task(httpd.serve(listener, page))
            for request in requests:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(request)
                answers.append(await reader.read())
                writer.close()
            server.cancel()
        return answers

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("request_", "status", "body"),
    [
        (b"GET /a?b=c HTTP/1.1\r\nHost: x\r\n\r\n", b"200", b"/a x b=c"),
        (b"GET /a?b=%5Bfd00%3A%3A1%5D%3A80&c=&b2 HTTP/1.1\r\nHost: x\r\n\r\n", b"200", b"/a x b=[fd00::1]:80 b2= c="),
        (b"GET /a?b=1&b=2 HTTP/1.1\r\nHost: x\r\n\r\n", b"200", b"/a x b=2"),
        (b"GET /a?" + b"&".join([b"b=1"] * 20) + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"400", b"Bad Request\n"),
        (b"HEAD /a HTTP/1.1\r\nHost: x\r\n\r\n", b"200", b""),
        (b"GET /none HTTP/1.1\r\n\r\n", b"404", b"Not Found\n"),
        (b"GET /fail HTTP/1.1\r\n\r\n", b"500", b"Internal Server Error\n"),
        (b"POST /a HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", b"405", b"Method Not Allowed\n"),
        (b"nonsense\r\n\r\n", b"400", b"Bad Request\n"),
        (b"GET /a HTTP/1.1\r\nno colon\r\n\r\n", b"400", b"Bad Request\n"),
        (b"GET /a HTTP/1.1\r\nx: " + b"y" * 9000 + b"\r\n\r\n", b"431", b"Request Header Fields Too Large\n"),
    ],
)
def test_answers(request_: bytes, status: bytes, body: bytes) -> None:
    [answer] = asked(request_)
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert head.split(b" ")[1] == status and rest == body


def test_a_silent_client_is_let_go_and_no_fd_stays() -> None:
    before = len(os.listdir("/proc/self/fd"))
    assert asked(b"GET /", b"GET /a HTTP/1.1\r\n\r\n")[0] == b""
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_taken_port_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError):
        httpd.bind("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize("openmetrics", [False, True])
@pytest.mark.parametrize(
    "engine",
    [
        ENGINE,
        ENGINE.replace("# HELP istio_tcp_connections_opened_total", "# HELP istio_tcp_connections_opened").replace(
            "# TYPE istio_tcp_connections_opened_total", "# TYPE istio_tcp_connections_opened"
        )
        + "# EOF\n",
        "",
    ],
)
def test_the_page_parses(engine: str, openmetrics: bool) -> None:
    metrics = Metrics()
    metrics.add("istio_xds_message_total", url='a"b\\c\nd')
    metrics.add("istio_xds_message_total", 2, url='a"b\\c\nd')
    text = metrics.render(engine, openmetrics)
    assert text.endswith("# EOF\n") and text.count("# EOF") == 1
    families = {f.name: f for f in (parse_openmetrics if openmetrics else parse_text)(text)}
    assert families["istio_build"].samples[0].labels["component"] == "ztunnel"
    message = families["istio_xds_message"]
    assert message.type == "counter" and message.samples[0].value == 3
    assert message.samples[0].labels == {"url": 'a"b\\c\nd'}
    assert families["process_open_fds"].samples[0].value > 2
    if engine:
        opened = families["istio_tcp_connections_opened"]
        assert opened.type == "counter" and opened.samples[0].value == 3
