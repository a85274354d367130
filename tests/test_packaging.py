"""sdist and wheel: built from git's files alone, complete, installed and run in an environment without the clone."""
import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import minivl

ROOT = Path(__file__).parents[1]
pytest.importorskip("setuptools", "77", reason="building needs setuptools 77 or newer: pip install -U setuptools")

BUILD = "import sys, setuptools.build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]), file=sys.stderr)"


def build(what, source, to):
    """Path of what a hook of the build backend makes of a folder; without a network, nor an environment of its own."""
    to.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", BUILD, what, str(to)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return to / done.stderr.splitlines()[-1]


def tracked():
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("this is no clone: git says which files are the project's")
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"git does not list the files: {done.stderr.strip()}")
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


# ---- what an index shows --------------------------------------------------------------------------------------------

def metadata(folder, change=lambda text: text):
    """The metadata of a copy of what they are made of, README.md changed."""
    (folder / "minivl").mkdir(parents=True)
    for name in ("pyproject.toml", "setup.py", "LICENSE", "minivl/__init__.py"):
        shutil.copyfile(ROOT / name, folder / name)
    (folder / "README.md").write_text(change((ROOT / "README.md").read_text("utf-8")), "utf-8")
    info = build("prepare_metadata_for_build_wheel", folder, folder / "out")
    return email.message_from_string((info / "METADATA").read_text("utf-8"))


def targets(page):
    """Where the page's links and pictures lead."""
    return re.findall(r"\]\(([^)]+)\)", page) + re.findall(r"""(?:src|href)=["']([^"']+)["']""", page)


def test_the_index_s_page(tmp_path):
    got = metadata(tmp_path / "a")
    assert (got["Name"], got["Version"], got["License-Expression"]) == ("minivl", minivl.__version__, "MIT")
    assert minivl.__version__ == "0.2.0"
    assert got["Requires-Python"] == ">=3.10" and got["Summary"] and got["Keywords"]
    assert got["Description-Content-Type"] == "text/markdown"
    urls = dict(url.split(", ") for url in got.get_all("Project-URL"))
    assert {"Model card", "Paper", "Original code"} <= urls.keys()
    known = "".join((ROOT / name).read_text("utf-8") for name in ("README.md", "minivl/README.md"))
    assert all(url in known for url in urls.values())           # none is invented
    page = got.get_payload()
    assert len(targets(page)) >= 6 and all(target.startswith("https://") for target in targets(page))
    readme = (ROOT / "README.md").read_text("utf-8")
    assert "<img" not in page and "![" not in page              # while the repository's address is not known
    assert [line for line in readme.splitlines() if line.startswith("#")] == \
        [line for line in page.splitlines() if line.startswith("#")]
    assert all(words in page for words in re.findall(r"(?<!!)\[([^\]]+)\]\(", readme))


@pytest.mark.parametrize("address", ["https://example.org/us/minivl", "https://example.org/us/minivl.git"])
def test_the_index_s_page_once_the_address_is_known(address, tmp_path):
    page = metadata(tmp_path / "a", lambda text: text.replace("ADDRESS_OF_THIS_REPOSITORY", address)).get_payload()
    readme = (ROOT / "README.md").read_text("utf-8")
    assert len(targets(page)) == len(targets(readme))
    pictures = {path for path in targets(readme) if path.endswith((".svg", ".png"))}
    assert len(pictures) >= 2
    for was, now in zip(targets(readme), targets(page)):
        kind = "raw" if was in pictures else "blob"
        assert now == (was if was.startswith("http") else f"https://example.org/us/minivl/{kind}/HEAD/{was}")


# ---- what is in them, and that it runs ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, wheel made of it), of a copy of the files that git knows."""
    folder = tmp_path_factory.mktemp("packages")
    for name in tracked():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / "source" / name)
    sdist = build("build_sdist", folder / "source", folder / "sdist")
    with tarfile.open(sdist) as file:
        file.extractall(folder / "unpacked", filter="data")
    unpacked, = (folder / "unpacked").iterdir()
    return sdist, build("build_wheel", unpacked, folder / "wheel")


@pytest.mark.slow
def test_the_sdist_is_the_repository(built):
    with tarfile.open(built[0]) as file:
        inside = {member.name.partition("/")[2] for member in file if member.isfile()}
    assert set(tracked()) <= inside
    assert {name for name in inside - set(tracked()) if ".egg-info/" not in name} == {"PKG-INFO", "setup.cfg"}


@pytest.mark.slow
def test_the_wheel_is_the_package_and_its_data(built):
    inside = {name for name in zipfile.ZipFile(built[1]).namelist() if ".dist-info/" not in name}
    wanted = {name for name in tracked() if name.startswith(("minivl/", "weights_tools/")) and (
        name.endswith((".py", "py.typed", ".txt", "serve/page.html", "page.css", "page.js"))
        or "/nano/" in name and not name.startswith("weights_tools/nano/"))}
    assert inside == wanted
    assert {"minivl/py.typed", "minivl/nano/awq/model.safetensors", "minivl/nano/samples/shapes.png",
            "minivl/serve/page.html"} <= inside


@pytest.mark.slow
def test_the_wheel_runs_outside_the_clone(built, tmp_path):
    """In an environment that has the wheel and, on its path, what is installed here: not this clone."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-index",
                          "--no-deps", "--disable-pip-version-check", str(built[1])], capture_output=True, text=True)
    if "No module named pip" in pip.stderr:
        pytest.skip("pip is not here to install the wheel")
    assert pip.returncode == 0, pip.stderr
    packages, = {path.resolve() for path in (tmp_path / "env").glob("[lL]ib/**/site-packages")}
    # A folder named in a .pth is put on the path, but its own .pth files, which may name this clone, are not read.
    paths = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    (packages / "installed-here.pth").write_text("\n".join(paths) + "\n", "utf-8")
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def output(*command):
        done = subprocess.run([str(word) for word in command], cwd=outside, env=env, capture_output=True, text=True,
                              encoding="utf-8")
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    where = output(python, "-W", "ignore", "-c", "import minivl, weights_tools, sys; from pathlib import Path; "
                   "print(Path(minivl.__file__).parents[1]); print(minivl.__version__); print(*sys.path, sep='\\n')")
    where, version, *path = where.splitlines()
    assert Path(where) == packages and version == minivl.__version__ and str(ROOT) not in path
    assert "large red star" in output(python, "-W", "ignore", "-m", "minivl", "demo")
    assert "agrees with" in output(python, "-W", "ignore", "-m", "weights_tools.verify", "--nano")
    assert minivl.__version__ in output(python.with_name("minivl"), "--version")
