"""Makes a virtual environment with pip, also where Debian's or Ubuntu's python3 comes without ensurepip.

    python3 scripts/make_venv.py .venv

One whose installation came to its end (its file `ready`) is left as it is; a half-made one is made anew.
"""

from __future__ import annotations

import configparser
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import venv
from pathlib import Path
from urllib.parse import urljoin

LEAST, BELOW = (3, 11), (3, 14)
INDEX = "https://pypi.org/simple"
WHEEL = re.compile(r"pip-(\d+(?:\.\d+)*)-py3-none-any\.whl")


def main(folder: Path) -> None:
    if not LEAST <= sys.version_info[:2] < BELOW:
        sys.exit(
            f"{sys.executable} is Python {sys.version.split()[0]}; reeltune needs 3.11, 3.12 or 3.13. "
            "Install one (Debian, Ubuntu: apt install python3.11), or name it: make setup PYTHON=/path/to/python3.11"
        )
    if (folder / "ready").exists() and runs(folder / "bin" / "python"):
        return
    shutil.rmtree(folder, ignore_errors=True)
    try:
        venv.create(folder, symlinks=True, with_pip=importlib.util.find_spec("ensurepip") is not None)
    except subprocess.CalledProcessError:  # ensurepip without the wheels that it unpacks
        venv.create(folder, symlinks=True, clear=True)
    if not runs(folder / "bin" / "python"):
        fetch_pip(folder)


def runs(python: Path) -> bool:
    """Whether it is there and has pip."""
    return python.exists() and subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0


def fetch_pip(folder: Path) -> None:
    """Installs the newest pip of the configured index; a pip wheel can run itself and install itself."""
    index = configured_index()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            name, url = newest_pip(index)
            wheel = Path(temporary) / name
            wheel.write_bytes(get(url).read())
            install = [folder / "bin" / "python", wheel / "pip", "install", "--quiet", "--no-index", wheel]
            subprocess.run(install, check=True)
    except (OSError, LookupError, subprocess.CalledProcessError) as failed:
        shutil.rmtree(folder, ignore_errors=True)
        sys.exit(
            f"This Python has no ensurepip, and pip could not be had from {index} ({failed}). "
            "Install it (Debian, Ubuntu: apt install python3-venv) and run make again."
        )


def newest_pip(index: str) -> tuple[str, str]:
    """(file name, URL) on an index of the simple kind (https://packaging.python.org/specifications/simple-repository-api)."""
    page = index.rstrip("/") + "/pip/"
    answer = get(page, "application/vnd.pypi.simple.v1+json, text/html;q=0.5")
    text = answer.read().decode()
    if "json" in answer.headers.get_content_type():
        links = [file["url"] for file in json.loads(text)["files"] if not file.get("yanked")]
    else:
        links = re.findall(r'href="([^"]+)"', text)
    wheels = {tuple(map(int, found[1].split("."))): link for link in links if (found := WHEEL.search(link))}
    if not wheels:
        raise LookupError(f"{page} lists no pip")
    link = wheels[max(wheels)]
    return WHEEL.search(link)[0], urljoin(page, link)


def get(url: str, accept: str = "*/*"):
    return urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": accept}), timeout=60)


def configured_index() -> str:
    """The index that pip would use: PIP_INDEX_URL, else a pip.conf, else PyPI."""
    if named := os.environ.get("PIP_INDEX_URL"):
        return named
    home = Path.home()
    files = [os.environ.get("PIP_CONFIG_FILE", ""), home / ".config/pip/pip.conf", home / ".pip/pip.conf"]
    for file in [*filter(None, files), Path("/etc/xdg/pip/pip.conf"), Path("/etc/pip.conf")]:
        config = configparser.RawConfigParser()
        config.read(file)
        if named := config.get("global", "index-url", fallback=None):
            return named
    return INDEX


if __name__ == "__main__":
    main(Path(sys.argv[1]))
