"""launch/install.sh, run for real with a stand-in for pip that fetches nothing."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("launch/install.sh", "launch/pip_install.py", "pyproject.toml", "histo_jax/__init__.py")
ENVIRONMENT = {
    name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))
}
# An interpreter whose `-m venv` puts the stand-in for pip into what it makes, its script last.
PYTHON = """#!/bin/bash
if [[ "$*" != *"-m venv .venv" ]]; then exec {python} "$@"; fi
if [ -e {folder}/venv-fails ]; then printf 'some words\\nError: No space left\\n'; exit 1; fi
{python} -m venv --without-pip .venv
library=$(echo .venv/lib/python3*)
mkdir "$library/site-packages/pip"
touch "$library/site-packages/pip/__init__.py"
cp {folder}/pip.py "$library/site-packages/pip/__main__.py"
printf '#!/bin/sh\\n'"'''exec' "'"%s/.venv/bin/python" "$0"\\n' "$PWD" >.venv/bin/pip
"""
PIP = """
import json, os, pathlib, sys, time
folder = pathlib.Path(FOLDER)
if sys.argv[1:3] == ["config", "list"]:
    print((folder / "settings").read_text())
    sys.exit()
with (folder / "calls").open("a") as file:
    print(json.dumps([sys.argv[1:], dict(os.environ)]), file=file)
time.sleep(float(os.environ.get("SECONDS_OF_PIP", "0")))
if (folder / "error").exists():
    sys.exit((folder / "error").read_text())
place = pathlib.Path(__file__).parents[1]
(place / "histo_jax-0.dist-info").mkdir(exist_ok=True)
(place / "histo_jax-0.dist-info" / "METADATA").write_text(
    "Name: histo_jax\\nRequires-Dist: needed>=2\\nRequires-Dist: extra; extra == 'x'\\n"
)
(place / "needed-2.dist-info").mkdir(exist_ok=True)
(place / "needed-2.dist-info" / "METADATA").write_text("Name: needed\\nVersion: 2\\n")
(place / "clone.pth").write_text(f"{os.getcwd()}\\n{PACKAGES}\\n")
"""


class Clone:
    """A clone whose installation is quick."""

    def __init__(self, folder: Path, name: str = "clone") -> None:
        self.folder, self.path = folder, folder / name
        for file in FILES:
            (self.path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, self.path / file)
        (self.path / "histo_jax" / "__init__.py").write_text("")
        self.python = folder / "python"
        self.python.write_text(
            PYTHON.replace("{python}", sys.executable).replace("{folder}", str(folder))
        )
        self.python.chmod(0o755)
        packages = sysconfig.get_paths()["purelib"]
        pip = PIP.replace("FOLDER", repr(str(folder))).replace("{PACKAGES}", packages)
        (folder / "pip.py").write_text(pip)
        (folder / "settings").write_text("global.index-url='https://mirror'\n")

    def start(self, *arguments: str, shell: str = "bash", **variables: str) -> subprocess.Popen:
        return subprocess.Popen(
            [shell, self.path / "launch" / "install.sh", *arguments],
            env={**ENVIRONMENT, "PYTHON": str(self.python), **variables},
            cwd=self.folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def install(self, *arguments: str, **variables: str) -> tuple[int, str, str]:
        process = self.start(*arguments, **variables)
        said = process.communicate(timeout=60)
        return process.returncode, *said

    def calls(self) -> list[tuple[list[str], dict[str, str]]]:
        """Returns the arguments and the environment of each `pip install`."""
        file = self.folder / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def works(self) -> bool:
        """Returns whether the environment finds this clone's package from elsewhere."""
        code = "import histo_jax; print(histo_jax.__file__)"
        done = subprocess.run(
            [self.path / ".venv" / "bin" / "python", "-c", code],
            cwd="/",
            text=True,
            capture_output=True,
            check=False,
            env=ENVIRONMENT,
        )
        return done.stdout.strip() == str(self.path.resolve() / "histo_jax" / "__init__.py")


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


INSTALLING = "installing histo_jax into .venv\n"


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_installs_once_whatever_the_surroundings(tmp_path, shell):
    clone = Clone(tmp_path, "a 'clone' [of] \"mine\" $HOME é")
    (tmp_path / "modules").mkdir()
    for name in ("re", "pip", "histo_jax"):
        (tmp_path / "modules" / f"{name}.py").write_text("raise SystemExit('hidden')")
    surroundings = {
        "PIP_USER": "1",
        "PIP_TARGET": "/nowhere",
        "PIP_REQUIRE_HASHES": "1",
        "PIP_NO_INDEX": "1",
        "PYTHONPATH": f"{tmp_path}/modules",
        "PYTHONHOME": "/nowhere",
        "PYTHONINSPECT": "1",
        "PYTHON_KEYRING_BACKEND": "mine",
        "CDPATH": "/tmp:/",
        "VIRTUAL_ENV": "/nowhere",
    }
    assert clone.install(shell=shell, **surroundings) == (0, INSTALLING, "")
    ((arguments, environment),) = clone.calls()
    assert arguments[0] == "install"
    assert arguments[-2:] == ["--editable", "."]
    pip = {name: value for name, value in environment.items() if name.startswith("PIP_")}
    assert pip == {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": "https://mirror",
        "PIP_NO_INDEX": "1",
    }
    python = {name for name in environment if name.startswith("PYTHON")}
    assert python == {"PYTHON", "PYTHON_KEYRING_BACKEND"}
    assert clone.works()
    assert clone.install(shell=shell, **surroundings) == (0, "", "")
    assert clone.install("test")[1] == "installing histo_jax[test] into .venv\n"
    assert len(clone.calls()) == 2


def move(clone: Clone) -> None:
    clone.path = clone.path.rename(clone.folder / "moved")


def upgrade_python(clone: Clone) -> None:
    (library,) = (clone.path / ".venv" / "lib").glob("python3*")
    library.rename(library.with_name("python3.0"))


def replace(clone: Clone, how: str) -> None:
    shutil.rmtree(clone.path / ".venv")
    if how == "file":
        (clone.path / ".venv").write_text("")
    else:
        (clone.path / ".venv").symlink_to("/nowhere/at/all")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(move, id="moved"),
        pytest.param(upgrade_python, id="Python upgraded"),
        pytest.param(lambda c: replace(c, "file"), id="a file"),
        pytest.param(lambda c: replace(c, "link"), id="a link to nowhere"),
        pytest.param(lambda c: (c.path / ".venv/bin/pip").unlink(), id="pip half made"),
        pytest.param(lambda c: (c.path / ".venv/unfinished").touch(), id="pip killed"),
    ],
)
def test_an_environment_that_cannot_be_trusted_is_made_anew(clone, damage):
    assert clone.install()[0] == 0
    (clone.path / ".venv" / "old").touch()
    damage(clone)
    assert clone.install() == (0, INSTALLING, "")
    assert clone.works()
    assert not (clone.path / ".venv" / "old").exists()
    assert clone.install() == (0, "", "")


def packages(clone: Clone) -> Path:
    (folder,) = (clone.path / ".venv" / "lib").glob("python3*/site-packages")
    return folder


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda c: (c.path / "pyproject.toml").write_text("[x]"), id="other needs"),
        pytest.param(
            lambda c: shutil.rmtree(packages(c) / "needed-2.dist-info"), id="a package removed"
        ),
        pytest.param(
            lambda c: (packages(c) / "needed-2.dist-info/METADATA").write_text("Version: 1.9\n"),
            id="an older package",
        ),
        pytest.param(
            lambda c: (packages(c) / "clone.pth").write_text("/another/clone\n"), id="another clone"
        ),
    ],
)
def test_an_environment_that_lacks_something_is_installed_into(clone, change):
    assert clone.install()[0] == 0
    (clone.path / ".venv" / "old").touch()
    change(clone)
    assert clone.install() == (0, INSTALLING, "")
    assert clone.works()
    assert (clone.path / ".venv" / "old").exists()


def test_two_at_once_install_once(clone):
    processes = [clone.start(SECONDS_OF_PIP="1") for _ in range(2)]
    said = sorted(process.communicate(timeout=60)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert said == ["another launch/install.sh is running; waiting for it\n", INSTALLING]
    assert len(clone.calls()) == 1


@pytest.mark.parametrize(
    ("log", "why"),
    [
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
            "no space left: free some",
        ),
        (
            "WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError(...)'\n"
            "ERROR: No matching distribution found for x",
            "the package index cannot be reached",
        ),
        (
            "SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]'))",
            "the certificate of the package index is not trusted: set PIP_CERT",
        ),
        (
            "error: subprocess-exited-with-error\n      ERROR: No matching distribution found for x>=1"
            "\nERROR: subprocess-exited-with-error",
            "No matching distribution found for x>=1",
        ),
        ("killed", "see the log"),
    ],
)
def test_why_pip_failed_is_one_line(clone, log, why):
    (clone.folder / "error").write_text(log)
    status, _, said = clone.install()
    assert status == 2
    assert said.startswith(f"launch/install.sh: pip failed: {why}")
    assert said.endswith("(all it printed: .venv/pip.log)\n")
    assert said.count("\n") == 1
    assert (clone.path / ".venv" / "pip.log").read_text().strip() == log
    (clone.folder / "error").unlink()
    assert clone.install()[0] == 0


def test_only_where_packages_come_from_is_taken_from_the_settings_of_pip():
    spec = importlib.util.spec_from_file_location("pip_install", ROOT / "launch/pip_install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    listing = (
        "global.extra-index-url='\\nhttps://a\\nhttps://b'\nglobal.user='true'\n"
        "global.index-url='https://x/?a=b'\ninstall.index-url='https://y'\n"
        "install.prefix='/p'\nlist.format='json'\nglobal.cert='c'\n"
    )
    variables = {"HOME": "/h", "PIP_CERT": "mine", "PIP_PROXY": "", "PIP_CONSTRAINT": "x"}
    assert module.settings(listing, variables) == {
        "HOME": "/h",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_CERT": "mine",
        "PIP_EXTRA_INDEX_URL": "\nhttps://a\nhttps://b",
        "PIP_INDEX_URL": "https://y",
    }


def test_an_interpreter_that_does_not_do_is_named(clone):
    status, said, wrong = clone.install(PYTHON="./none")
    assert (status, said) == (2, "")
    assert wrong == (
        f"launch/install.sh: PYTHON={clone.folder}/./none is no Python 3.11 to 3.13: name another, "
        "or unset it\n"
    )
    (clone.folder / "venv-fails").touch()
    status, said, wrong = clone.install()
    assert (status, said) == (2, "")
    assert wrong.count("\n") == 1
    assert wrong.endswith("Error: No space left\n")
    assert not (clone.path / ".venv").exists()


def test_one_extra_at_a_time(clone):
    status, _, wrong = clone.install("test", "cuda")
    assert (status, wrong) == (
        2,
        "launch/install.sh: one extra at a time; start it again for cuda\n",
    )


def test_scripts_keep_their_line_ends_in_a_clone_of_git_for_windows(tmp_path):
    made = tmp_path / "made"
    shutil.copytree(ROOT / "launch", made / "launch")
    shutil.copy(ROOT / ".gitattributes", made)
    identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init"], ["add", "-A"], [*identity, "commit", "-m", "all"]):
        subprocess.run(["git", *command], cwd=made, check=True, capture_output=True)
    subprocess.run(
        ["git", "-c", "core.autocrlf=true", "clone", "-q", made, tmp_path / "clone"], check=True
    )
    for file in (made / "launch").iterdir():
        assert (tmp_path / "clone" / "launch" / file.name).read_bytes() == file.read_bytes()


@pytest.fixture(scope="module")
def hatchling():
    if not importlib.util.find_spec("hatchling"):
        if os.environ.get("CI"):
            pytest.fail("hatchling is not installed: launch/install.sh test")
        pytest.skip("hatchling is not installed")
    from hatchling.builders.wheel import WheelBuilder

    return WheelBuilder(str(ROOT))


def test_a_wheel_has_the_recipes_and_what_is_not_code(hatchling, tmp_path):
    import zipfile

    (wheel,) = hatchling.build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [*(ROOT / "configs").glob("*.py"), *(ROOT / "histo_jax").rglob("*.*")]
    wanted = {
        str(file.relative_to(ROOT)).replace("configs/", "histo_jax/configs/", 1)
        for file in files
        if file.suffix != ".pyc"
    }
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert {"histo_jax/report/page.html", "histo_jax/configs/pcam_best.py"} <= names


def test_an_editable_installation_is_found_from_the_folder_above_the_clone(hatchling, tmp_path):
    import zipfile

    (wheel,) = hatchling.build(directory=str(tmp_path), versions=["editable"])
    (tmp_path / "packages").mkdir()
    zipfile.ZipFile(wheel).extractall(tmp_path / "packages")
    # As Git leaves it there.
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "histo_jax").symlink_to(ROOT)
    code = (
        "import site, sys; sys.path = [p for p in sys.path if 'site-packages' not in p]; "
        f"site.addsitedir({str(tmp_path / 'packages')!r}); "
        f"sys.path.append({sysconfig.get_paths()['purelib']!r}); "
        "import histo_jax; print(histo_jax.Config().seed)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tmp_path / "src",
        text=True,
        capture_output=True,
        check=False,
        env=ENVIRONMENT,
    )
    assert (done.stdout, done.stderr) == ("0\n", "")
