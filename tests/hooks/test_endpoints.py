"""Who may read what over HTTP, by SGLang's own keys: --api-key is a client's, --admin-api-key the operator's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sglang.srt.entrypoints import http_server
from sglang.srt.utils.auth import AuthLevel, add_api_key_middleware

from keepkv_sglang.hooks import endpoints
from keepkv_sglang.settings.config import KeepKVConfig

INFO = ("/server_info", "/get_server_info")
CLIENT, OPERATOR = "client's", "operator's"


@pytest.fixture
def status(monkeypatch):
    """status(path, key, admin_key): what SGLang's front end answers, KeepKV on."""
    for endpoint in (http_server.server_info, http_server.get_server_info):
        monkeypatch.setattr(endpoint, "_auth_level", AuthLevel.NORMAL, raising=False)  # and as it was afterwards

    def ask(path: str, key: str, admin_key: str | None) -> int:
        app = FastAPI()
        app.router.routes.extend(http_server.app.routes)
        monkeypatch.setattr(http_server, "app", app)
        monkeypatch.setattr(endpoints.flags, "config_of", lambda _: KeepKVConfig(enabled=True))
        endpoints.before_run_http_server(SimpleNamespace())
        add_api_key_middleware(app, api_key=CLIENT, admin_api_key=admin_key)
        client = TestClient(app, raise_server_exceptions=False)
        return client.get(path, headers={"Authorization": f"Bearer {key}"}).status_code

    return ask


@pytest.mark.parametrize("path", INFO)
def test_counters_are_the_operators_where_there_is_an_admin_key(status, path):
    assert status(path, CLIENT, OPERATOR) == 401
    passed = 500  # there is no scheduler to ask
    assert status(path, OPERATOR, OPERATOR) == passed
    assert status(path, CLIENT, None) == passed, "without an admin key a client's key is enough, as in SGLang"


def test_reports_need_a_clients_key_and_the_whole_id(status):
    endpoints.reports["an id"] = {"enabled": True}
    try:
        assert status("/keepkv/requests/an id", "nobody's", None) == 401
        assert status("/keepkv/requests/an id", CLIENT, OPERATOR) == 200
        assert status("/keepkv/requests/an", CLIENT, None) == 404
        assert status("/keepkv/requests/", CLIENT, None) == 404
    finally:
        del endpoints.reports["an id"]
