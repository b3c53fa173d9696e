# SPDX-License-Identifier: Apache-2.0
"""Connections: what they accept, where secrets go and do not go, and TLS and users against a secured server."""

from __future__ import annotations

import pickle
import socket
import ssl
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import cloudpickle
import numpy as np
import pytest

from tests.opensearch.support import Proxy, assert_no_contexts, fill, read, same_rows, vectors
from transforms.errors import RequestError, TrainingError
from transforms.opensearch import OpenSearchConnection, OpenSearchVectors, ReadFromOpenSearch, throttle
from transforms.opensearch.session import ServerError, Session

SECRET = "s3cret-Passw0rd"
MATRIX = vectors(120, 8)


def refused(**options):
    with pytest.raises(RequestError) as found:
        OpenSearchConnection(**{"url": "https://host:9200", **options})
    assert SECRET not in str(found.value)
    return str(found.value)


def test_secrets_are_not_accepted_by_value():
    message = refused(url=f"https://me:{SECRET}@search.example.com:9200")
    assert "OPENSEARCH_PASSWORD" in message
    assert "search.example.com" in message
    refused(url=f"https://{SECRET}@search.example.com")
    assert 'must be "env:NAME", "file:PATH" or "secret:NAME"' in refused(username="me", password_from=SECRET)
    assert "bearer_token_from must be" in refused(bearer_token_from=SECRET)


@pytest.mark.parametrize(
    "url", ["host:9200", "ftp://host", "https://", "https://host:port", "https://h/?q=1", "https://h,x"]
)
def test_urls_that_cannot_work(url):
    assert "http(s)://host:port" in refused(url=url)


def test_combinations_that_cannot_work():
    assert "both a username and a password" in refused(username="me")
    assert "both a username and a password" in refused(password_from="env:P")
    assert "choose one" in refused(username="me", password_from="env:P", aws_region="eu-west-1")
    assert "client certificate" in refused(client_key="k.pem")
    assert "timeout_s is 0" in refused(timeout_s=0)


def test_the_environment_gives_references_only(monkeypatch, tmp_path):
    environ = {
        "OPENSEARCH_URL": "https://a:9200/prefix/, https://b:9200",
        "OPENSEARCH_USERNAME": "me",
        "OPENSEARCH_PASSWORD": SECRET,
        "OPENSEARCH_CA_CERTS": "ca.pem",
        "OPENSEARCH_VERIFY_CERTS": "false",
        "OPENSEARCH_TIMEOUT_S": "7.5",
    }
    connection = OpenSearchConnection.from_env(environ, http_compress=True)
    assert connection == OpenSearchConnection(
        url="https://a:9200/prefix/, https://b:9200",
        username="me",
        password_from="env:OPENSEARCH_PASSWORD",
        ca_certs="ca.pem",
        verify_certs=False,
        timeout_s=7.5,
        http_compress=True,
    )
    assert connection.urls == ["https://a:9200/prefix", "https://b:9200"]
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OPENSEARCH_CA_CERTS", "")
    with pytest.raises(RequestError, match=r"ca\.pem cannot be read"):
        connection.client_arguments()
    # The file wins, and its last line's end is not part of the password.
    (tmp_path / "password").write_text(SECRET + "!\n")
    monkeypatch.setenv("OPENSEARCH_PASSWORD_FILE", str(tmp_path / "password"))
    arguments = OpenSearchConnection.from_env().client_arguments()
    assert arguments["http_auth"] == ("me", SECRET + "!")
    assert [host.get("url_prefix") for host in arguments["hosts"]] == ["prefix", None]


def test_the_end_of_a_line_is_not_part_of_a_secret(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKEN", SECRET + "\n")
    connection = OpenSearchConnection("http://h", bearer_token_from="env:TOKEN")
    assert connection.client_arguments()["headers"] == {"authorization": f"Bearer {SECRET}"}
    monkeypatch.setenv("TOKEN", SECRET + "\nmore")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    latin = OpenSearchConnection("http://h", bearer_token_from=f"file:{tmp_path}/latin")
    for broken, message in ((connection, "in TOKEN has a line break"), (latin, "latin .* is not UTF-8")):
        with pytest.raises(RequestError, match=message) as caught:
            broken.client_arguments()
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize("url", [f"https://me:{SECRET}@h:9200", f"me:{SECRET}@h:9200", f"http://a,b:{SECRET}@h"])
def test_a_password_in_the_url_is_refused_and_not_shown(url):
    with pytest.raises(RequestError, match="holds a user or a password") as caught:
        OpenSearchConnection(url)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_a_timeout_is_a_number_of_seconds(seconds):
    with pytest.raises(RequestError, match=r"timeout_s is .*, expected a positive number of seconds"):
        OpenSearchConnection.from_env({"OPENSEARCH_URL": "http://h", "OPENSEARCH_TIMEOUT_S": seconds})


def test_missing_environment_is_named(monkeypatch):
    with pytest.raises(RequestError, match="set OPENSEARCH_URL"):
        OpenSearchConnection.from_env({})
    with pytest.raises(RequestError, match=r"OPENSEARCH_TIMEOUT_S is 'soon'"):
        OpenSearchConnection.from_env({"OPENSEARCH_URL": "http://h", "OPENSEARCH_TIMEOUT_S": "soon"})
    monkeypatch.delenv("NOT_HERE", raising=False)
    connection = OpenSearchConnection("http://h", username="me", password_from="env:NOT_HERE")
    with pytest.raises(RequestError, match="variable NOT_HERE is not set on this machine"):
        Session(connection)
    connection = OpenSearchConnection("http://h", bearer_token_from="file:/no/such/file")
    with pytest.raises(RequestError, match=r"/no/such/file .* cannot be read"):
        Session(connection)


def test_secret_manager_is_asked_where_the_connection_is_opened(monkeypatch):
    name = "projects/p/secrets/opensearch/versions/latest"
    environ = {"OPENSEARCH_URL": "http://h", "OPENSEARCH_USERNAME": "me", "OPENSEARCH_PASSWORD_SECRET": name}
    connection = OpenSearchConnection.from_env(environ)
    assert connection.password_from == f"secret:{name}"
    monkeypatch.setitem(sys.modules, "google.cloud.secretmanager", None)
    with pytest.raises(RequestError, match=rf"{name} cannot be read \(it takes apache-beam\[gcp\]\): "):
        connection.client_arguments()

    class Client:
        """Stands in for Google's client: there is no Secret Manager without Google's cloud."""

        def access_secret_version(self, request):
            assert request == {"name": name}
            return SimpleNamespace(payload=SimpleNamespace(data=f"{SECRET}\n".encode()))

    cloud = sys.modules.get("google.cloud") or types.ModuleType("google.cloud")
    stub = SimpleNamespace(SecretManagerServiceClient=Client)
    monkeypatch.setitem(sys.modules, "google.cloud", cloud)
    monkeypatch.setattr(cloud, "secretmanager", stub, raising=False)
    monkeypatch.setitem(sys.modules, "google.cloud.secretmanager", stub)
    assert connection.client_arguments()["http_auth"] == ("me", SECRET)
    assert SECRET not in str(pickle.dumps(connection))


def test_secrets_are_not_in_repr_pickles_or_display_data(monkeypatch):
    monkeypatch.setenv("OPENSEARCH_URL", "https://host:9200")
    monkeypatch.setenv("OPENSEARCH_USERNAME", "me")
    monkeypatch.setenv("OPENSEARCH_PASSWORD", SECRET)
    connection = OpenSearchConnection.from_env()
    assert connection.client_arguments()["http_auth"] == ("me", SECRET)
    transform = ReadFromOpenSearch(connection, "index", "vec", 8, query={"match_all": {}})
    source = transform.source()
    shown = [repr(connection), repr(source), str(transform.display_data()), repr(transform)]
    assert not any(SECRET in text for text in shown)
    assert not any(
        SECRET.encode() in pickler.dumps(value) for pickler in (pickle, cloudpickle) for value in (source, transform)
    )
    assert transform.display_data()["url"] == "https://host:9200"


class Headers:
    """A server that remembers the headers of requests."""

    def __enter__(self):
        self.seen = seen = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                seen.append({name.lower(): value for name, value in self.headers.items()})
                self.send_response(200)
                self.send_header("content-length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


def test_bearer_tokens_are_sent(monkeypatch):
    """No JWT realm on the test server: what is sent is all that is checked."""
    monkeypatch.setenv("TOKEN", SECRET)
    with Headers() as server, Session(OpenSearchConnection(server.url, bearer_token_from="env:TOKEN")) as session:
        assert session.json("GET", "/") == {}
    assert server.seen[0]["authorization"] == f"Bearer {SECRET}"


def test_aws_requests_are_signed(monkeypatch):
    pytest.importorskip("boto3")
    for name, value in (("ACCESS_KEY_ID", "AKIDEXAMPLE"), ("SECRET_ACCESS_KEY", SECRET), ("SESSION_TOKEN", "token")):
        monkeypatch.setenv(f"AWS_{name}", value)
    with Headers() as server:
        connection = OpenSearchConnection(server.url, aws_region="eu-west-1", aws_service="aoss")
        with Session(connection) as session:
            session.json("GET", "/_mapping/field/a.b", {"x": "a b,c"})
    (headers,) = server.seen
    assert headers["authorization"].startswith("AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/")
    assert "/eu-west-1/aoss/aws4_request" in headers["authorization"]
    assert headers["x-amz-security-token"] == "token"
    assert SECRET not in str(headers)


# Against the security plugin


@pytest.fixture(scope="module")
def secure(opensearch_secure):
    fill(opensearch_secure, "guarded", MATRIX, shards=2)
    return opensearch_secure


@pytest.fixture
def connect(secure, monkeypatch):
    def make(user="trainer", password=None, **options):
        monkeypatch.setenv("SECURE_PASSWORD", password or secure.users.get(user, "x"))
        who = {"username": user, "password_from": "env:SECURE_PASSWORD"} if user else {}
        return OpenSearchConnection(**{"url": secure.url, "ca_certs": secure.ca, **who, **options})

    return make


def guarded(connection, index="guarded"):
    return OpenSearchVectors(connection, index, "vec", 8, search_size=20)


def test_a_password_opens(secure, connect):
    source = guarded(connect())
    assert source.summary().reader == "script"
    assert same_rows(read(source)[1], MATRIX)
    assert_no_contexts(secure)


def test_a_client_certificate_opens(secure, connect):
    mapping = {"users": ["trainer"]}
    path = "/_plugins/_security/api/rolesmapping/trainer"
    secure.admin_client().transport.perform_request("PUT", path, body=mapping)
    connection = connect(None, client_cert=secure.client_cert, client_key=secure.client_key)
    assert same_rows(read(guarded(connection))[1], MATRIX)
    assert_no_contexts(secure)


def test_a_user_without_points_in_time_reads_the_same(secure, connect):
    expected, _ = read(guarded(connect()))
    found, rows = read(guarded(connect("reader_nopit")))
    assert np.array_equal(found, expected)
    assert same_rows(rows, MATRIX)
    assert_no_contexts(secure)


def test_a_user_who_may_not_see_the_search_queue_is_not_troubled(secure, connect, monkeypatch):
    monkeypatch.setattr(throttle, "LOOK_EVERY_S", 0.0)
    source = guarded(connect())
    assert same_rows(read(source)[1], MATRIX)
    nodes = source.slices()[0].nodes
    path = f"/_nodes/{nodes[0]}/stats/thread_pool"
    with Session(connect()) as session:
        with pytest.raises(ServerError, match=r"403 .*cluster:monitor/nodes/stats"):
            session.json("GET", path)
        pace = throttle.Throttle(1).pace(nodes)
        pace.wait(session)
        asked = session.stats.requests
        pace.wait(session)
        assert session.stats.requests == asked
    assert_no_contexts(secure)


def problem(connection, index="guarded"):
    with pytest.raises((RequestError, TrainingError)) as found:
        guarded(connection, index).slices()
    assert SECRET not in str(found.value)
    assert "\n" not in str(found.value)
    assert found.value.__suppress_context__ or found.value.__context__ is None
    return found.type, str(found.value)


def test_wrong_password(secure, connect):
    kind, message = problem(connect(password=SECRET))
    assert kind is RequestError
    assert "does not accept the credentials (401)" in message


def test_missing_permissions_are_named(connect):
    kind, message = problem(connect("nobody_user"))
    assert kind is RequestError
    assert "the user lacks the permission indices:admin/mappings/fields/get" in message


def test_an_alias_needs_the_permission_that_shows_its_filter(secure, connect):
    """Without it, a filtered alias would be read as if it had no filter."""
    secure.client().indices.put_alias(index="guarded", name="guarded-alias")
    assert same_rows(read(guarded(connect(), "guarded-alias"))[1], MATRIX)
    kind, message = problem(connect("reader_nopit"), "guarded-alias")
    assert kind is RequestError
    assert "lacks the permission indices:admin/shards/search_shards" in message


def test_unknown_authority(secure, connect):
    for ca_certs in (secure.other_ca, None):
        kind, message = problem(connect(ca_certs=ca_certs))
        assert kind is RequestError
        assert "is not signed by a known authority: give its CA file (ca_certs, OPENSEARCH_CA_CERTS)" in message


def test_another_host_name(secure, connect, monkeypatch):
    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest: resolve("localhost" if host == "other.test" else host, *rest)
    )
    url = secure.url.replace("localhost", "other.test")
    kind, message = problem(connect(url=url))
    assert kind is RequestError
    assert message == f"the certificate of {url} is for another host name"


def test_without_verification_it_opens(connect):
    assert same_rows(read(guarded(connect(ca_certs=None, verify_certs=False)))[1], MATRIX)


def test_http_where_https_is_spoken(secure, connect):
    kind, message = problem(connect(url=secure.url.replace("https", "http"), ca_certs=None))
    assert kind is TrainingError
    assert "is it https:// ?" in message


def test_https_where_http_is_spoken(opensearch_3, connect):
    kind, message = problem(connect(url=opensearch_3.url.replace("http", "https")))
    assert kind is RequestError
    assert "does not speak TLS" in message


def test_an_expired_certificate(secure, connect):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(secure.expired_node_cert, secure.expired_node_key)
    with Headers() as server:
        server._server.socket = context.wrap_socket(server._server.socket, server_side=True)
        port = server.url.rsplit(":", 1)[1]
        kind, message = problem(connect(url=f"https://localhost:{port}"))
    assert kind is RequestError
    assert message == f"the certificate of https://localhost:{port} has expired"


def test_certificate_files_that_are_not_there(connect):
    _, message = problem(connect(ca_certs="/no/ca.pem"))
    assert message == "the certificate or key file /no/ca.pem cannot be read: No such file or directory"


def test_compressed_pages(opensearch):
    fill(opensearch, "compressed", MATRIX)
    connection = OpenSearchConnection(opensearch.url, http_compress=True)
    assert same_rows(read(guarded(connection, "compressed"))[1], MATRIX)


def test_a_prefix_and_a_second_host(opensearch):
    """Behind a path, as behind a gateway."""
    fill(opensearch, "behind", MATRIX)

    class Gateway(Proxy):
        def _forward(self, handler, body):
            assert handler.path.startswith("/os/")
            handler.path = handler.path[3:]
            return super()._forward(handler, body)

    with Gateway(opensearch.url) as proxy:
        assert same_rows(read(guarded(OpenSearchConnection(f"{proxy.url}/os/"), "behind"))[1], MATRIX)
