"""Who is let in: this machine's browser, with the token, on the studio's own pages; and what of the disk it reaches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from loratune.cli.studio.guard import POLICY
from loratune.cli.studio.server import studio_app

TOKEN, ORIGIN = "the-right-token", "http://127.0.0.1:8321"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The studio's folder, with secrets beside it and a link that leads to them."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.yaml").write_text("model:\n  name: secret\n")
    (tmp_path / "outside" / "lock.json").write_text("{}")
    root = tmp_path / "work"
    root.mkdir()
    (root / "way-out").symlink_to(tmp_path / "outside")
    (root / "good.yaml").write_text("model:\n  name: good\n")
    return root


@pytest.fixture
def visitor(work: Path) -> Iterator[TestClient]:
    """A browser without a token."""
    with TestClient(studio_app(work, token=TOKEN, port=8321), base_url=ORIGIN) as client:
        yield client


@pytest.fixture
def user(visitor: TestClient) -> TestClient:
    """A browser that opened the printed URL."""
    assert visitor.get(f"/?token={TOKEN}").status_code == 200
    return visitor


def test_without_the_token_nothing_is_answered(visitor: TestClient) -> None:
    paths = ("/", "/new", "/recipe?file=good.yaml", "/run?path=x", "/static/studio.js", "/?token=wrong", "/new?token=x")
    assert {visitor.get(path).status_code for path in paths} == {401}
    assert visitor.post("/start", headers={"origin": ORIGIN}).status_code == 401
    visitor.cookies.set("loratune_studio_8321", "wrong")
    assert visitor.get("/").status_code == 401


def test_the_printed_url_gives_a_strict_cookie_that_scripts_cannot_read(visitor: TestClient) -> None:
    answer = visitor.get(f"/?token={TOKEN}")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert TOKEN not in answer.text
    assert visitor.get("/").status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1:9999", "null", "https://127.0.0.1:8321"])
def test_another_site_is_refused_even_with_the_token(user: TestClient, origin: str) -> None:
    for method, path in (("POST", "/start"), ("POST", "/run/stop"), ("PUT", "/upload?name=a.csv"), ("GET", "/")):
        assert user.request(method, path, headers={"origin": origin}).status_code == 403
    assert user.post("/start", content="file=good.yaml").status_code == 403  # no Origin at all
    assert user.get("/", headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}).status_code == 403
    assert user.get("/", headers={"origin": ORIGIN}).status_code == 200


def test_a_name_that_was_pointed_at_this_machine_is_refused(user: TestClient) -> None:
    assert user.get("/", headers={"host": "evil.example:8321"}).status_code == 403
    assert user.get("/", headers={"host": "127.0.0.1:80"}).status_code == 403
    assert (
        user.get("/", headers={"host": "localhost:8321", "cookie": f"loratune_studio_8321={TOKEN}"}).status_code == 200
    )


def test_every_answer_has_the_headers(visitor: TestClient) -> None:
    for answer in (visitor.get("/"), visitor.get(f"/?token={TOKEN}"), visitor.get("/"), visitor.get("/nothing")):
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in answer.headers
    assert "unsafe" not in POLICY


@pytest.mark.parametrize(
    "name", ["../outside/secret.yaml", "way-out/secret.yaml", "/etc/passwd", "{}/outside/secret.yaml", "a\0b.yaml", ""]
)
def test_a_path_outside_of_the_folder_is_refused(user: TestClient, work: Path, name: str) -> None:
    name = name.replace("{}", str(work.parent))
    form = {"origin": ORIGIN, "accept": "application/json"}
    folder = name.removesuffix("/secret.yaml")
    answers = [
        user.get("/recipe", params={"file": name}),
        user.get("/recipe/plan", params={"file": name}),
        user.post("/start", data={"file": name, "text": "x"}, headers=form),
        user.post("/recipe/save", data={"file": name, "text": "x", "seen": ""}, headers=form),
        user.post("/init", data={"data": name}, headers=form),
        user.get("/run", params={"path": folder}),
        user.get("/run/report", params={"path": folder}),
        user.post("/run/export", data={"path": folder, "to": "gguf"}, headers=form),
        user.get("/compare", params={"run": [folder, "good.yaml"]}),
        user.get("/sweep", params={"path": folder}),
        user.get("/sweep/page", params={"path": folder}),
        user.post("/sweep/stop", data={"path": folder}, headers=form),
        user.post("/sweep/continue", data={"path": folder}, headers=form),
        user.post("/sweep/start", data={"file": name, "settings": "lora.r=4,8"}, headers=form),
    ]
    assert {answer.status_code for answer in answers} == {400}
    assert not any("name: secret" in answer.text for answer in answers)
    if name:
        assert user.get("/new", params={"data": name}).status_code == 400
    assert (work.parent / "outside" / "secret.yaml").read_text() == "model:\n  name: secret\n"


@pytest.mark.parametrize("name", ["../up.csv", "/etc/up.csv", "a/b/up.csv", "..\\up.csv", ".up.csv", "way-out/up.csv"])
def test_a_dropped_file_stays_in_the_folder_whatever_its_name(user: TestClient, work: Path, name: str) -> None:
    answer = user.put("/upload", params={"name": name}, content=b"q,a\n", headers={"origin": ORIGIN})
    assert answer.json() == {"data": "up.csv"}
    assert (work / "up.csv").read_bytes() == b"q,a\n"
    again = user.put("/upload", params={"name": name}, content=b"other", headers={"origin": ORIGIN})
    assert again.json() == {"data": "up-2.csv"}, "an existing file is not replaced"
    assert sorted(path.name for path in (work.parent / "outside").iterdir()) == ["lock.json", "secret.yaml"]


def test_only_data_files_can_be_dropped_in(user: TestClient, work: Path) -> None:
    for name in ("torch.py", "recipe.yaml", "run.sh", ".csv", ""):
        assert user.put("/upload", params={"name": name}, content=b"", headers={"origin": ORIGIN}).status_code == 400
    assert sorted(path.name for path in work.iterdir()) == ["good.yaml", "way-out"]
