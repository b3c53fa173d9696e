# SPDX-License-Identifier: Apache-2.0
"""A server with the security plugin: TLS, certificates of every sort a client may meet, and users of little power."""

from __future__ import annotations

import base64
import json
import shutil
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensearchpy import OpenSearch

from tests.opensearch_home import Missing, assemble
from tests.opensearch_server import OpenSearchServer

MODEL_INDEX = ".opensearch-knn-models"

METADATA = ["indices:admin/get", "indices:admin/mappings/get", "indices:monitor/settings/get"]
ROLES: dict[str, dict[str, Any]] = {
    # All that training in the cluster, and outside it, may need.
    "trainer": {
        "cluster_permissions": [
            "cluster:admin/knn_*",
            "cluster:monitor/main",
            "indices:data/read/scroll*",
            "indices:data/write/bulk",
        ],
        "index_permissions": [
            # `read` covers opening a point in time.
            {"index_patterns": ["*"], "allowed_actions": ["read", "indices:admin/shards/search_shards", *METADATA]},
            {
                "index_patterns": ["knn-train-*"],
                "allowed_actions": [
                    "indices:admin/create",
                    "indices:admin/delete",
                    "indices:admin/mapping/put",
                    "indices:admin/refresh*",
                    "indices:data/write/*",
                ],
            },
        ],
    },
    # Just enough to read: neither points in time nor where the shards are.
    "reader_nopit": {
        "cluster_permissions": ["cluster:monitor/main", "indices:data/read/scroll*"],
        "index_permissions": [
            {
                "index_patterns": ["*"],
                "allowed_actions": [
                    "get",
                    "search",
                    "indices:admin/mappings/fields/get*",
                    "indices:data/read/field_caps*",
                    *METADATA,
                ],
            }
        ],
    },
    "nobody_user": {"cluster_permissions": []},
}


class SecureOpenSearchServer(OpenSearchServer):
    """`users` maps names to passwords; each user but `admin` has the role of its own name in ROLES."""

    scheme = "https"

    def __init__(self, version: str = "2.19.1", **options: Any) -> None:
        # The plugin's own configuration has the user admin; the rest are made once the node is up.
        self.users = {"admin": "admin", **dict.fromkeys(ROLES, "Tr41n-0utside.the-cluster")}
        self._has_users = False
        super().__init__(version, **options)

    @property
    def certificates(self) -> Path:
        return self.run_dir / "config" / "certificates"

    @property
    def ca(self) -> str:
        return self._pem("ca.crt")

    @property
    def other_ca(self) -> str:
        """An authority that signed nothing here."""
        return self._pem("other-ca.crt")

    @property
    def admin_cert(self) -> str:
        return self._pem("admin.crt")

    @property
    def admin_key(self) -> str:
        return self._pem("admin.key")

    @property
    def client_cert(self) -> str:
        """Proves that the client is the user `trainer`."""
        return self._pem("trainer.crt")

    @property
    def client_key(self) -> str:
        return self._pem("trainer.key")

    @property
    def expired_client_cert(self) -> str:
        return self._pem("expired-trainer.crt")

    @property
    def expired_client_key(self) -> str:
        return self._pem("expired-trainer.key")

    @property
    def expired_node_cert(self) -> str:
        """For `localhost`, like the node's own, but past its date. The node does not use it."""
        return self._pem("expired-node.crt")

    @property
    def expired_node_key(self) -> str:
        return self._pem("expired-node.key")

    def client(self, user: str | None = "admin", **options: Any) -> OpenSearch:
        """As `user`; with `user=None` add `client_cert` and `client_key`, or be no one."""
        who = {"http_auth": (user, self.users[user])} if user else {}
        return super().client(**{"ca_certs": self.ca, **who, **options})

    def admin_client(self, **options: Any) -> OpenSearch:
        """With the admin certificate, which alone may write to system indices."""
        return self.client(user=None, client_cert=self.admin_cert, client_key=self.admin_key, **options)

    def start(self) -> None:
        super().start()
        if not self._has_users:
            self._create_users()
            self._has_users = True

    def settings(self) -> dict[str, Any]:
        own: dict[str, Any] = {
            "allow_default_init_securityindex": True,
            "authcz.admin_dn": ["CN=admin"],
            "nodes_dn": ["CN=node"],
            "ssl.http.clientauth_mode": "OPTIONAL",
            "ssl.http.enabled": True,
            "ssl.transport.enforce_hostname_verification": False,
            "system_indices.enabled": True,
            "system_indices.indices": [MODEL_INDEX],
            "system_indices.permission.enabled": True,
        }
        for layer in ("http", "transport"):
            own[f"ssl.{layer}.pemcert_filepath"] = "certificates/node.crt"
            own[f"ssl.{layer}.pemkey_filepath"] = "certificates/node.key"
            own[f"ssl.{layer}.pemtrustedcas_filepath"] = "certificates/ca.crt"
        return {**{f"plugins.security.{name}": value for name, value in own.items()}, **super().settings()}

    def _assembled(self) -> Path:
        return assemble(self.version, security=True)

    def _configure(self) -> None:
        folder = self.certificates
        folder.mkdir()
        authority = Authority(folder, "ca")
        Authority(folder, "other-ca")
        for name in ("node", "admin", "trainer"):
            authority.issue(name, name)
        for name in ("node", "trainer"):
            authority.issue(f"expired-{name}", name, expired=True)
        config = self.run_dir / "config" / "opensearch-security" / "config.yml"
        config.write_text(json.dumps(_authentication()))

    def _health_headers(self) -> dict[str, str]:
        token = base64.b64encode(f"admin:{self.users['admin']}".encode()).decode()
        return {"Authorization": f"Basic {token}"}

    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.ca)

    def _pem(self, name: str) -> str:
        return str(self.certificates / name)

    def _create_users(self) -> None:
        transport = self.admin_client().transport
        for name, role in ROLES.items():
            transport.perform_request("PUT", f"/_plugins/_security/api/roles/{name}", body=role)
            user = {"password": self.users[name], "opendistro_security_roles": [name]}
            transport.perform_request("PUT", f"/_plugins/_security/api/internalusers/{name}", body=user)


def _authentication() -> dict[str, Any]:
    """A password, or a client certificate whose common name is the user."""

    def domain(order: int, authenticator: dict[str, Any], backend: str) -> dict[str, Any]:
        return {
            "http_enabled": True,
            "order": order,
            "http_authenticator": authenticator,
            "authentication_backend": {"type": backend},
        }

    by_password = domain(1, {"type": "basic", "challenge": True}, "intern")
    by_name = {"type": "clientcert", "challenge": False, "config": {"username_attribute": "cn"}}
    return {
        "_meta": {"type": "config", "config_version": 2},
        "config": {"dynamic": {"authc": {"password": by_password, "certificate": domain(0, by_name, "noop")}}},
    }


# `openssl ca` is the one command of every OpenSSL version that takes an end date in the past.
AUTHORITY = """\
[ca]
default_ca = here
[here]
database = {name}.index
new_certs_dir = .
rand_serial = yes
unique_subject = no
default_md = sha256
policy = anything
x509_extensions = issued
certificate = {name}.crt
private_key = {name}.key
[anything]
commonName = supplied
[issued]
basicConstraints = CA:FALSE
subjectAltName = DNS:localhost, IP:127.0.0.1
extendedKeyUsage = serverAuth, clientAuth
[req]
distinguished_name = subject
x509_extensions = authority
[subject]
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
"""


@dataclass(frozen=True)
class Authority:
    """A certificate authority in `folder`: `<name>.crt` and `<name>.key`."""

    folder: Path
    name: str

    def __post_init__(self) -> None:
        (self.folder / f"{self.name}.cnf").write_text(AUTHORITY.format(name=self.name))
        (self.folder / f"{self.name}.index").touch()
        self._request(self.name, self.name, f"{self.name}.crt", "-x509", "-days", "30")

    def issue(self, file: str, common_name: str, expired: bool = False) -> None:
        """Writes `<file>.crt` and `<file>.key`."""
        self._request(file, common_name, f"{file}.csr")
        until = "20200201000000Z" if expired else "20491231000000Z"
        period = ("-startdate", "20200101000000Z", "-enddate", until)
        self._openssl("ca", "-batch", "-notext", *period, "-in", f"{file}.csr", "-out", f"{file}.crt")

    def _request(self, file: str, common_name: str, out: str, *options: str) -> None:
        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{file}.key")
        self._openssl("req", *options, *key, "-subj", f"/CN={common_name}", "-out", out)

    def _openssl(self, command: str, *options: str) -> None:
        if shutil.which("openssl") is None:
            raise Missing("openssl is not on PATH")
        line = ["openssl", command, "-config", f"{self.name}.cnf", *options]
        done = subprocess.run(line, check=False, cwd=self.folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(line)} failed:\n{done.stderr}")
