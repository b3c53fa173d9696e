# SPDX-License-Identifier: Apache-2.0
"""Publishing under the security plugin: the roles of PUBLISHING.md are enough, and nothing in them is too much."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pipelines import models
from tests.opensearch_security import SecureOpenSearchServer
from tests.publish_cases import CASES
from transforms.errors import RequestError, TrainingError
from transforms.model_files import ModelFiles
from transforms.opensearch import OpenSearchConnection, Session, model_index, publishing, temporary_index
from transforms.opensearch.publishing import PublishResult, publish
from transforms.opensearch.routes import AUTO, DELEGATE, REPLAY, SWAP

PAGE = (Path(publishing.__file__).parent / "PUBLISHING.md").read_text()
ROLES: dict[str, dict[str, Any]] = {
    name: json.loads(text) for name, text in re.findall(r"```json (\w+)\n(.*?)```", PAGE, re.DOTALL)
}
PASSWORD = "Publ1sh-from.outside"
USERS = {"publisher": ["publisher"], "swapper": ["publisher", "swapper"], "pruner": ["publisher", "pruner"]}


@pytest.fixture(scope="module")
def secure(opensearch_secure: SecureOpenSearchServer) -> SecureOpenSearchServer:
    transport = opensearch_secure.admin_client().transport
    for name, role in ROLES.items():
        put_role(opensearch_secure, name, role)
    for user, roles in USERS.items():
        body = {"password": PASSWORD, "opendistro_security_roles": roles}
        transport.perform_request("PUT", f"/_plugins/_security/api/internalusers/{user}", body=body)
    return opensearch_secure


def put_role(server: SecureOpenSearchServer, name: str, role: Mapping[str, Any]) -> None:
    server.admin_client().transport.perform_request("PUT", f"/_plugins/_security/api/roles/{name}", body=role)


@pytest.fixture
def admin(secure: SecureOpenSearchServer) -> Iterator[Session]:
    """With the admin certificate. Each test must leave no temporary index."""
    options = {"ca_certs": secure.ca, "client_cert": secure.admin_cert, "client_key": secure.admin_key}
    with Session(OpenSearchConnection(secure.url, **options)) as session:
        yield session
        left = [index.name for index in temporary_index.find(session)]
        for index in temporary_index.find(session):
            index.delete(session)
        for model in model_index.list_models(session):
            model_index.delete_model(session, model["model_id"])
        assert left == []


def published(session: Session, name: str, route: str, with_sample: bool = True) -> PublishResult:
    case = CASES[name]
    request = case.request("2.19.1")
    return publish(session, case.model(request), request, case.vectors if with_sample else None, route)


@pytest.fixture
def as_user(secure: SecureOpenSearchServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Session]]:
    monkeypatch.setenv("PUBLISHER_PASSWORD", PASSWORD)
    options = {"ca_certs": secure.ca, "password_from": "env:PUBLISHER_PASSWORD"}
    sessions = {user: Session(OpenSearchConnection(secure.url, username=user, **options), attempts=1) for user in USERS}
    yield sessions
    for session in sessions.values():
        session.close()


@pytest.mark.parametrize(
    ("name", "route", "taken"),
    [("IVF-Flat", AUTO, REPLAY), ("HNSW-PQ", REPLAY, REPLAY), ("IVF-PQ", AUTO, DELEGATE), ("byte", AUTO, REPLAY)],
)
def test_an_ordinary_user_replays_and_delegates(
    admin: Session, as_user: dict[str, Session], name: str, route: str, taken: str
) -> None:
    result = published(as_user["publisher"], name, route)
    assert (result.route, result.warnings) == (taken, ())
    assert result.registration is not None


def test_an_ordinary_user_is_told_why_it_cannot_swap(admin: Session, as_user: dict[str, Session]) -> None:
    with pytest.raises(RequestError, match=r"^route swap is not possible: this user may not write to .* system index"):
        published(as_user["publisher"], "IVF-PQ", SWAP)
    with pytest.raises(RequestError, match=r"cannot be replayed: .*may not write to .*, and there is no sample"):
        published(as_user["publisher"], "IVF-PQ", AUTO, with_sample=False)
    assert model_index.list_models(admin) == []


def test_the_second_role_and_the_admin_certificate_swap(admin: Session, as_user: dict[str, Session]) -> None:
    for session in (as_user["swapper"], admin):
        result = published(session, "IVF-PQ", AUTO)
        assert (result.route, result.exact, result.warnings) == (SWAP, True, ())


def permissions() -> list[tuple[str, str]]:
    """(role, permission) of all that the page's roles hold."""
    found = []
    for name, role in ROLES.items():
        for permission in role.get("cluster_permissions", []):
            found.append((name, permission))
        for part in role["index_permissions"]:
            found += [(name, permission) for permission in part["allowed_actions"]]
    return found


def without(role: Mapping[str, Any], permission: str) -> dict[str, Any]:
    def rest(actions: list[str]) -> list[str]:
        return [action for action in actions if action != permission]

    parts = [{**part, "allowed_actions": rest(part["allowed_actions"])} for part in role["index_permissions"]]
    return {"cluster_permissions": rest(role.get("cluster_permissions", [])), "index_permissions": parts}


# Only missed when something is taken back: the first always, the others when the plugin reads the model fast.
DELETE = "cluster:admin/knn_delete_model_action"
STEPS_OF_DELETE = ["cluster:admin/knn_update_model_graveyard_action", "cluster:admin/knn_update_model_metadata_action"]


PUBLISHING = [each for each in permissions() if each[0] != "pruner" and each[1] not in [DELETE, *STEPS_OF_DELETE]]


@pytest.mark.parametrize(("role", "permission"), PUBLISHING)
def test_no_permission_is_superfluous(
    secure: SecureOpenSearchServer, admin: Session, as_user: dict[str, Session], role: str, permission: str
) -> None:
    put_role(secure, role, without(ROLES[role], permission))
    try:
        user, name, route = ("swapper", "IVF-PQ", SWAP) if role == "swapper" else ("publisher", "IVF-Flat", REPLAY)
        try:
            told = " ".join(published(as_user[user], name, route).warnings)
        except (RequestError, TrainingError) as error:
            told = str(error)
        assert told
    finally:
        put_role(secure, role, ROLES[role])
        for index in temporary_index.find(admin):  # what may not be deleted stays
            publishing.cleanup(admin, index)


def test_who_may_not_see_registrations_does_not_swap(
    secure: SecureOpenSearchServer, admin: Session, as_user: dict[str, Session]
) -> None:
    put_role(secure, "publisher", without(ROLES["publisher"], "cluster:monitor/state"))
    try:
        with pytest.raises(RequestError, match=r"^route swap is not possible: .* permission cluster:monitor/state"):
            published(as_user["swapper"], "IVF-PQ", SWAP)
        assert model_index.list_models(admin) == []
        result = published(as_user["swapper"], "IVF-PQ", AUTO)
        assert result.route == DELEGATE
        assert "may not see registrations" in result.explanation
    finally:
        put_role(secure, "publisher", ROLES["publisher"])


def run_as(user: str, secure: SecureOpenSearchServer, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    given = {"URL": secure.url, "USERNAME": user, "PASSWORD": PASSWORD, "CA_CERTS": secure.ca}
    for name, value in given.items():
        monkeypatch.setenv(f"OPENSEARCH_{name}", value)
    models.run([*words, "--opensearch_url", secure.url])


def pruned(secure: SecureOpenSearchServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    run_as("pruner", secure, monkeypatch, "prune", "*", "--keep", "1", "--delete")
    return json.loads(capsys.readouterr().out)


def test_the_third_role_lists_and_prunes(
    secure: SecureOpenSearchServer,
    admin: Session,
    as_user: dict[str, Session],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    old, new = (published(as_user["pruner"], "IVF-Flat", REPLAY).model_id for _ in range(2))
    run_as("pruner", secure, monkeypatch, "list")
    assert {model["model_id"] for model in json.loads(capsys.readouterr().out)} == {old, new}
    results = {each["model_id"]: each["result"] for each in pruned(secure, monkeypatch, capsys)}
    assert results == {old: "deleted", new: "kept"}


@pytest.mark.parametrize(("role", "permission"), [each for each in permissions() if each[0] == "pruner"])
def test_nothing_is_pruned_without_seeing_who_uses_it(
    secure: SecureOpenSearchServer,
    admin: Session,
    as_user: dict[str, Session],
    role: str,
    permission: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for _ in range(2):
        published(as_user["pruner"], "IVF-Flat", REPLAY)
    put_role(secure, role, without(ROLES[role], permission))
    try:
        with pytest.raises(RequestError, match=f"lacks the permission {permission}$"):
            pruned(secure, monkeypatch, capsys)
        assert len(model_index.list_models(admin)) == 2
        if "template" in permission:
            run_as("pruner", secure, monkeypatch, "prune", "*", "--keep", "1")
            printed = capsys.readouterr()
            assert "warning: templates are not looked at: " in printed.err
            assert permission in printed.err
            assert [each["result"] for each in json.loads(printed.out)] == ["kept", "to delete"]
    finally:
        put_role(secure, role, ROLES[role])


@pytest.mark.parametrize("may_delete", [True, False])
def test_what_fails_is_taken_back_where_that_is_permitted(
    secure: SecureOpenSearchServer,
    admin: Session,
    as_user: dict[str, Session],
    may_delete: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any) -> None:
        raise TrainingError("of no use")

    monkeypatch.setattr(publishing._Publication, "_proven", fail)
    publisher = ROLES["publisher"]
    put_role(secure, "publisher", publisher if may_delete else without(publisher, DELETE))
    try:
        with pytest.raises(TrainingError, match="of no use"):
            published(as_user["publisher"], "IVF-Flat", REPLAY)
    finally:
        put_role(secure, "publisher", publisher)
    left = temporary_index.find(admin)
    assert [model["model_id"] for model in model_index.list_models(admin)] == [index.model_id for index in left]
    assert len(left) == (0 if may_delete else 1)
    for index in left:
        assert f"lacks the permission {DELETE}" in caplog.text
        assert "run the same command again, or knn-models cleanup" in caplog.text
        publishing.cleanup(admin, index)


@pytest.fixture
def copies(admin: Session) -> Callable[[int], Iterator[str]]:
    """Makes models one at a time, each under an id of its own, of one that the cluster trained."""
    original = published(admin, "IVF-Flat", REPLAY).model_id
    documents = f"/{model_index.MODEL_INDEX}/_doc"
    document = admin.json("GET", f"{documents}/{original}")["_source"]

    def make(count: int) -> Iterator[str]:
        for number in range(count):
            copy = f"{original}-{number}"
            admin.json("PUT", f"{documents}/{copy}", {"refresh": "true"}, {**document, "model_id": copy})
            yield copy

    return make


def delete_all(session: Session, model_ids: Iterator[str]) -> None:
    for model_id in model_ids:
        assert model_index.delete_model(session, model_id)


def test_who_publishes_may_always_delete(copies: Callable[[int], Iterator[str]], as_user: dict[str, Session]) -> None:
    delete_all(as_user["publisher"], copies(100))


@pytest.mark.parametrize("step", STEPS_OF_DELETE)
def test_deleting_needs_its_steps_now_and_then(
    secure: SecureOpenSearchServer, copies: Callable[[int], Iterator[str]], as_user: dict[str, Session], step: str
) -> None:
    put_role(secure, "publisher", without(ROLES["publisher"], step))
    try:
        with pytest.raises(RequestError, match=f"lacks the permission {step}"):
            delete_all(as_user["publisher"], copies(1000))
    finally:
        put_role(secure, "publisher", ROLES["publisher"])


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"OPENSEARCH_PASSWORD": "wrong"}, "does not accept the credentials (401)"),
        ({"OPENSEARCH_CA_CERTS": "other_ca"}, "is not signed by a known authority"),
        (
            {"OPENSEARCH_CLIENT_CERT": "expired_client_cert", "OPENSEARCH_CLIENT_KEY": "expired_client_key"},
            "refuses the client certificate",
        ),
    ],
)
def test_who_is_not_let_in_gets_one_line(
    secure: SecureOpenSearchServer,
    tmp_path: Path,
    environment: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = CASES["IVF-Flat"].model(CASES["IVF-Flat"].request("2.19.1"), "m1")
    files = ModelFiles(str(tmp_path))
    files.claim("m1", model.json())
    files.write(model)
    given = {"OPENSEARCH_USERNAME": "publisher", "OPENSEARCH_PASSWORD": PASSWORD, "OPENSEARCH_CA_CERTS": secure.ca}
    for name, value in {**given, **environment}.items():
        monkeypatch.setenv(name, getattr(secure, value, value))
    monkeypatch.setattr("sys.argv", ["knn-models", "publish", "m1", "--model_dir", str(tmp_path)])
    monkeypatch.setenv("OPENSEARCH_URL", secure.url)
    with pytest.raises(SystemExit) as caught:
        models.main()
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
    assert PASSWORD not in printed.err
