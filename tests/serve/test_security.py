"""Access keys, limits of requests, and headers of answers."""

from __future__ import annotations

import serve_libraries  # noqa: F401  # isort: skip

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from running_server import Running, ask, running

from fastgen.errors import FastgenError
from fastgen.serve.settings import ServeSettings, is_loopback


@pytest.fixture(scope="module")
def locked(micro_z: Path) -> Iterator[Running]:
    with running(ServeSettings(models=(str(micro_z),), api_key="a-secret", device="cpu")) as found:
        yield found


@pytest.mark.parametrize("key", [None, "", "Bearer", "Bearer a-secre", "Bearer a-secret2", "Basic a-secret"])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/pictures/x.png", "/v1/images/generations"])
def test_without_the_key_nothing_is_answered(locked: Running, path: str, key: str | None) -> None:
    headers = {} if key is None else {"authorization": key}
    answer = httpx.request("POST" if path.endswith("s/generations") else "GET", locked.url + path, headers=headers)
    assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_the_key_opens_and_the_page_and_health_need_none(locked: Running) -> None:
    assert httpx.get(f"{locked.url}/v1/models", headers={"authorization": "Bearer a-secret"}).status_code == 200
    for path in ("/", "/page/page.js", "/healthz", "/readyz"):
        assert httpx.get(locked.url + path).status_code == 200


def test_another_host_needs_a_key_or_the_users_word() -> None:
    with pytest.raises(FastgenError, match="--api-key"):
        ServeSettings(host="0.0.0.0")
    ServeSettings(host="0.0.0.0", api_key="x")
    ServeSettings(host="::", insecure=True)
    assert [is_loopback(host) for host in ("localhost", "127.0.0.2", "::1", "10.0.0.1", "example.org")] == [
        *(True, True, True),
        *(False, False),
    ]
    assert "x" not in repr(ServeSettings(api_key="x" * 8)).replace("max", "")


def test_names_that_other_sites_point_here_are_refused(server: Running) -> None:
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""):
        assert httpx.get(f"{server.url}/v1/models", headers={"host": host}).status_code == 421
    assert httpx.get(f"{server.url}/v1/models", headers={"host": "localhost:1"}).status_code == 200


def test_pages_of_other_sites_may_not_draw(server: Running) -> None:
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        answer = httpx.post(f"{server.url}/v1/images/generations", json={"prompt": "x"}, headers={"origin": origin})
        assert answer.status_code == 403
    body = {"prompt": "x", "steps": 1}
    own = httpx.post(f"{server.url}/v1/images/generations", json=body, headers={"origin": server.url}, timeout=60)
    assert own.status_code == 200
    # A form needs no permission of a browser; only JSON that says so is read.
    form = {"content-type": "text/plain"}
    plain = httpx.post(f"{server.url}/v1/images/generations", content=b'{"prompt": "x"}', headers=form)
    assert plain.status_code == 400


def test_a_body_above_the_limit_is_refused_also_without_a_length(server: Running) -> None:
    large = b'{"prompt": "' + b"x" * (2 << 20) + b'"}'
    kind = {"content-type": "application/json"}
    said = httpx.post(f"{server.url}/v1/images/generations", content=large, headers=kind)
    unsaid = httpx.post(
        f"{server.url}/v1/images/generations",
        content=(large[i : i + 65536] for i in range(0, len(large), 65536)),
        headers=kind,
    )
    assert (said.status_code, unsaid.status_code) == (413, 413)
    assert unsaid.json()["error"]["code"] == "too_large"
    file = {"image": ("a.png", b"x" * (2 << 20))}
    assert httpx.post(f"{server.url}/v1/images/edits", data={"prompt": "x"}, files=file).status_code == 413


def test_every_answer_has_the_security_headers_and_the_page_loads_nothing_from_elsewhere(server: Running) -> None:
    for path in ("/", "/v1/models", "/nothing", "/page/page.js"):
        answer = httpx.get(server.url + path)
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    for path in ("/", "/page/page.js", "/page/page.css", "/page/icon.svg"):
        text = httpx.get(server.url + path).text.replace("http://www.w3.org/", "")
        assert "http://" not in text and "https://" not in text and "//cdn" not in text
    assert "<script>" not in httpx.get(server.url).text and "style=" not in httpx.get(server.url).text


@pytest.mark.parametrize(
    "path", ["/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py", "/pictures/..%2f..%2fx"]
)
def test_no_path_leads_out_of_the_page(server: Running, path: str) -> None:
    assert httpx.get(server.url + path).status_code == 404


def test_prompts_are_not_logged_unless_asked(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        assert ask(server.url, prompt="a secret wish", steps=1).status_code == 200
    assert "secret wish" not in caplog.text
