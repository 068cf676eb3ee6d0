"""The environment's maker: versions refused, repair of half-made ones, pip from an index."""

import http.server
import json
import threading

import pytest

from scripts import make_venv

NAMES = ["pip-9.0.3-py2.py3-none-any.whl", "pip-26.10-py3-none-any.whl", "pip-26.3-py3-none-any.whl", "pip-27.0.tar.gz"]


@pytest.fixture(params=["json", "html"])
def index(request):
    """An index of the simple kind on this machine, in either form."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.path == "/simple/pip/"
            form, body = "text/html", "".join(f'<a href="../../files/{name}#sha256=0">{name}</a>' for name in NAMES)
            if request.param == "json":
                form = "application/vnd.pypi.simple.v1+json"
                body = json.dumps({"files": [{"url": f"../../files/{name}"} for name in NAMES]})
            self.send_response(200)
            self.send_header("Content-Type", form)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_newest_wheel_is_taken(index):
    name, url = make_venv.newest_pip(index + "/simple")
    assert name == "pip-26.10-py3-none-any.whl" and url.partition("#")[0] == f"{index}/files/{name}"


def test_the_index_is_the_one_pip_would_use(monkeypatch, tmp_path):
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = https://mirror/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    assert make_venv.configured_index() == "https://mirror/simple"
    monkeypatch.setenv("PIP_INDEX_URL", "https://named/simple")
    assert make_venv.configured_index() == "https://named/simple"


@pytest.mark.parametrize(("version", "refused"), [((3, 10, 9), True), ((3, 11, 0), False), ((3, 14, 0), True)])
def test_versions(monkeypatch, tmp_path, version, refused):
    made = []
    monkeypatch.setattr(make_venv.sys, "version_info", version)
    monkeypatch.setattr(make_venv.venv, "create", lambda folder, **_: made.append(folder))
    monkeypatch.setattr(make_venv, "fetch_pip", made.append)
    if refused:
        with pytest.raises(SystemExit, match=r"reeltune needs 3\.11, 3\.12 or 3\.13"):
            make_venv.main(tmp_path / "v")
    else:
        make_venv.main(tmp_path / "v")
    assert made == ([] if refused else [tmp_path / "v"] * 2)


def test_a_half_made_one_is_made_anew_and_a_whole_one_left(monkeypatch, tmp_path):
    made = []
    folder = tmp_path / "v"
    monkeypatch.setattr(make_venv.venv, "create", lambda *args, **_: made.append(args))
    monkeypatch.setattr(make_venv, "runs", lambda python: True)
    folder.mkdir()
    (folder / "half").touch()
    make_venv.main(folder)
    assert len(made) == 1 and not (folder / "half").exists()
    folder.mkdir()
    (folder / "ready").touch()
    make_venv.main(folder)
    assert len(made) == 1 and (folder / "ready").exists()


def test_no_pip_to_be_had_names_the_package(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(SystemExit, match="apt install python3-venv"):
        make_venv.fetch_pip(tmp_path / "v")
