# SPDX-License-Identifier: Apache-2.0
"""`OpenSearchConnection`: where a cluster is and where the secrets to reach it are kept, never the secrets themselves.

The value is pickled into job graphs, shown in display data and printed in logs. So a password or a token is named by a
*reference*, `env:NAME`, `file:PATH` or `secret:NAME` (of Google Cloud's Secret Manager), that is looked up where the
connection is opened: on the launcher to plan, on each worker to read. Workers need the same variables, files or rights.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from transforms.errors import RequestError

#: Seconds for one request, the server's work included.
DEFAULT_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class OpenSearchConnection:
    """How to reach a cluster.

    Attributes:
      url: `http(s)://host:port[/prefix]`; several of one cluster are separated by commas. User and password are refused
        here.
      username: for basic authentication, with `password_from`.
      password_from: `env:NAME`, `file:PATH` or `secret:projects/.../secrets/.../versions/...`.
      bearer_token_from: the same, for JWT or OpenID tokens.
      ca_certs: file of the certificate authority; the system's are used without it.
      client_cert: PEM file of a client certificate.
      client_key: PEM file of its key; not needed when `client_cert` holds both.
      aws_region: sign requests for Amazon OpenSearch Service (SigV4) with the credentials that boto3 finds.
      aws_service: `es`, or `aoss` for Serverless.
      verify_certs: only turn off to try something out.
      timeout_s: seconds for one request.
      http_compress: gzip; costs the server more than it saves except over slow links.

    Raises:
      RequestError: from the constructor, for a URL or a combination that cannot work.
    """

    url: str
    username: str | None = None
    password_from: str | None = None
    bearer_token_from: str | None = None
    ca_certs: str | None = None
    client_cert: str | None = None
    client_key: str | None = None
    aws_region: str | None = None
    aws_service: str = "es"
    verify_certs: bool = True
    timeout_s: float = DEFAULT_TIMEOUT_S
    http_compress: bool = False

    def __post_init__(self) -> None:
        if not self.urls:
            raise RequestError("the OpenSearch URL is empty, expected http(s)://host:port")
        for url in self.urls:
            _check_url(url)
        for name in ("password_from", "bearer_token_from"):
            reference = getattr(self, name)
            if reference is not None and not reference.startswith(("env:", "file:", "secret:")):
                # The value is not shown: it may be the secret itself.
                raise RequestError(
                    f'{name} must be "env:NAME", "file:PATH" or "secret:NAME", which says where the secret is kept'
                )
        if (self.username is None) != (self.password_from is None):
            raise RequestError("basic authentication needs both a username and a password")
        if self.client_key and not self.client_cert:
            raise RequestError("a client key needs a client certificate")
        ways = [self.username, self.bearer_token_from, self.aws_region]
        if sum(way is not None for way in ways) > 1:
            raise RequestError("choose one of username and password, bearer token, or AWS region")
        if not 0 < self.timeout_s < math.inf:
            raise RequestError(f"timeout_s is {self.timeout_s}, expected a positive number of seconds")

    @classmethod
    def for_url(cls, url: str, **options: Any) -> OpenSearchConnection:
        """A connection to `url`; `options` are the other attributes."""
        return cls(url=url, **options)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ, **options: Any) -> OpenSearchConnection:
        """A connection from `OPENSEARCH_*` variables; `options` that are not None win over them.

        URL, USERNAME, PASSWORD, BEARER_TOKEN, CA_CERTS, CLIENT_CERT, CLIENT_KEY, AWS_REGION, AWS_SERVICE, VERIFY_CERTS
        (`false` to turn off), TIMEOUT_S. In place of PASSWORD or BEARER_TOKEN, PASSWORD_FILE names a file and
        PASSWORD_SECRET a secret of Google Cloud's Secret Manager. Of a secret only the name is kept.
        """

        def get(name: str) -> str | None:
            return environ.get(f"OPENSEARCH_{name}") or None

        def secret(name: str) -> str | None:
            path = get(f"{name}_FILE")
            if path:
                return f"file:{path}"
            managed = get(f"{name}_SECRET")
            if managed:
                return f"secret:{managed}"
            return f"env:OPENSEARCH_{name}" if get(name) else None

        found: dict[str, Any] = {
            "url": get("URL"),
            "username": get("USERNAME"),
            "password_from": secret("PASSWORD"),
            "bearer_token_from": secret("BEARER_TOKEN"),
            "ca_certs": get("CA_CERTS"),
            "client_cert": get("CLIENT_CERT"),
            "client_key": get("CLIENT_KEY"),
            "aws_region": get("AWS_REGION"),
            "aws_service": get("AWS_SERVICE") or "es",
            "verify_certs": (get("VERIFY_CERTS") or "true").lower() not in ("false", "0", "no"),
        }
        timeout = get("TIMEOUT_S")
        if timeout is not None:
            try:
                found["timeout_s"] = float(timeout)
            except ValueError:
                raise RequestError(f"OPENSEARCH_TIMEOUT_S is {timeout!r}, expected a number of seconds") from None
        found.update({name: value for name, value in options.items() if value is not None})
        if not found["url"]:
            raise RequestError("set OPENSEARCH_URL, for example to https://localhost:9200")
        return cls(**found)

    @property
    def urls(self) -> list[str]:
        return [url.strip().rstrip("/") for url in self.url.split(",") if url.strip()]

    def client_arguments(self) -> dict[str, Any]:
        """Arguments of `opensearchpy.OpenSearch`, secrets included: for the process that connects, never to be kept.

        Raises:
          RequestError: a variable or file that a reference names is missing here.
        """
        arguments: dict[str, Any] = {
            "hosts": [_host(url) for url in self.urls],
            "timeout": self.timeout_s,
            "http_compress": self.http_compress,
            "max_retries": 0,
        }
        if any(url.startswith("https:") for url in self.urls):
            arguments.update(verify_certs=self.verify_certs, ssl_show_warn=False, ca_certs=_existing(self.ca_certs))
            if self.client_cert:
                arguments.update(client_cert=_existing(self.client_cert), client_key=_existing(self.client_key))
            if not self.verify_certs:
                arguments["ssl_assert_hostname"] = False
        if self.username is not None and self.password_from is not None:
            arguments["http_auth"] = (self.username, _secret(self.password_from))
        elif self.bearer_token_from is not None:
            arguments["headers"] = {"authorization": f"Bearer {_secret(self.bearer_token_from)}"}
        elif self.aws_region is not None:
            arguments["http_auth"] = _aws_signer(self.aws_region, self.aws_service)
        return arguments


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  raises for a port that is not a number
    except ValueError:
        raise RequestError("the OpenSearch URL cannot be parsed, expected http(s)://host:port") from None
    if "@" in url:  # wherever it stands: without http:// there is no telling a password from a path
        host = f" for {parts.hostname}" if "@" in parts.netloc else ""
        raise RequestError(
            f"the OpenSearch URL{host} holds a user or a password, which would end up in job graphs and logs: set "
            "OPENSEARCH_USERNAME and OPENSEARCH_PASSWORD (or OPENSEARCH_PASSWORD_FILE) instead"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RequestError(f"the OpenSearch URL is {url!r}, expected http(s)://host:port")
    if parts.query or parts.fragment:
        raise RequestError("the OpenSearch URL has a query or a fragment, expected http(s)://host:port")


def _host(url: str) -> dict[str, Any]:
    parts = urlsplit(url)
    https = parts.scheme == "https"
    host = {
        "host": parts.hostname,
        "port": parts.port or (443 if https else 80),
        "use_ssl": https,
        "scheme": parts.scheme,
    }
    if parts.path.strip("/"):
        host["url_prefix"] = parts.path.strip("/")
    return host


def _secret(reference: str) -> str:
    kind, _, name = reference.partition(":")
    if kind == "env":
        value = os.environ.get(name)
        if not value:
            raise RequestError(f"the environment variable {name} is not set on this machine")
    elif kind == "secret":
        value = _managed_secret(name)
    else:
        try:
            with open(name, encoding="utf-8") as file:
                value = file.read()
        except OSError as error:
            raise RequestError(f"the file {name} with the OpenSearch secret cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise RequestError(f"the file {name} with the OpenSearch secret is not UTF-8 text") from None
    secret = value.rstrip("\r\n")  # as echo leaves it
    if any(ord(character) < 32 for character in secret):  # which HTTP would refuse, and show
        raise RequestError(f"the OpenSearch secret in {name} has a line break or another control character")
    return secret


def _managed_secret(name: str) -> str:
    from apache_beam.utils.secret import GcpSecret

    try:
        return str(GcpSecret(name).get_str())
    except RuntimeError as error:
        raise RequestError(f"the secret {name} cannot be read (it takes apache-beam[gcp]): {error}") from None


def _existing(path: str | None) -> str | None:
    """`path` if it can be read: TLS libraries report a missing file as an unknown error."""
    if path is not None:
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise RequestError(f"the certificate or key file {path} cannot be read: {error.strerror}") from None
    return path


def _aws_signer(region: str, service: str) -> Any:
    try:
        import boto3  # type: ignore[import-untyped]
    except ImportError:
        raise RequestError("signing for AWS needs boto3: pip install 'opensearch-knn-train[aws]'") from None
    from opensearchpy import Urllib3AWSV4SignerAuth

    credentials = boto3.Session().get_credentials()
    if credentials is None:
        raise RequestError("no AWS credentials were found on this machine")
    return Urllib3AWSV4SignerAuth(credentials, region, service)
