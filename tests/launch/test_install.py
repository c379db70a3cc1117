"""launch/install.sh, run with a fake pip that downloads nothing."""

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
# An interpreter whose `-m venv` installs the fake pip, with its script last.
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
    """A clone of the repository whose installation is fast."""

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
        output = process.communicate(timeout=60)
        return process.returncode, *output

    def calls(self) -> list[tuple[list[str], dict[str, str]]]:
        """Returns the arguments and the environment of each `pip install`."""
        file = self.folder / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def works(self) -> bool:
        """Returns whether the environment imports the package of this clone, from any folder."""
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
def test_it_installs_once_independently_of_the_environment(tmp_path, shell):
    clone = Clone(tmp_path, "a 'clone' [of] \"mine\" $HOME é")
    (tmp_path / "modules").mkdir()
    for name in ("re", "pip", "histo_jax"):
        (tmp_path / "modules" / f"{name}.py").write_text("raise SystemExit('hidden')")
    variables = {
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
    assert clone.install(shell=shell, **variables) == (0, INSTALLING, "")
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
    assert clone.install(shell=shell, **variables) == (0, "", "")
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
    "breakage",
    [
        pytest.param(move, id="moved"),
        pytest.param(upgrade_python, id="Python upgraded"),
        pytest.param(lambda c: replace(c, "file"), id="a file"),
        pytest.param(lambda c: replace(c, "link"), id="a link to nowhere"),
        pytest.param(lambda c: (c.path / ".venv/bin/pip").unlink(), id="pip incomplete"),
        pytest.param(lambda c: (c.path / ".venv/unfinished").touch(), id="pip killed"),
    ],
)
def test_an_unusable_environment_is_replaced(clone, breakage):
    assert clone.install()[0] == 0
    (clone.path / ".venv" / "old").touch()
    breakage(clone)
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
        pytest.param(
            lambda c: (c.path / "pyproject.toml").write_text("[x]"), id="other requirements"
        ),
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
def test_an_incomplete_environment_is_updated(clone, change):
    assert clone.install()[0] == 0
    (clone.path / ".venv" / "old").touch()
    change(clone)
    assert clone.install() == (0, INSTALLING, "")
    assert clone.works()
    assert (clone.path / ".venv" / "old").exists()


def test_concurrent_calls_install_once(clone):
    processes = [clone.start(SECONDS_OF_PIP="1") for _ in range(2)]
    outputs = sorted(process.communicate(timeout=60)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs == [INSTALLING, "waiting for another launch/install.sh to finish\n"]
    assert len(clone.calls()) == 1


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left",
            "no space left: free some",
        ),
        (
            "WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError'\n"
            "ERROR: No matching distribution found for x",
            "the package index cannot be reached",
        ),
        (
            "SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]'))",
            "the certificate of the package index is not trusted: set PIP_CERT",
        ),
        (
            "error: subprocess-exited-with-error\n"
            "      ERROR: No matching distribution found for x>=1\n"
            "ERROR: subprocess-exited-with-error",
            "No matching distribution found for x>=1",
        ),
        ("killed", "see the log"),
    ],
)
def test_the_reason_of_a_failure_is_one_line(clone, log, reason):
    (clone.folder / "error").write_text(log)
    status, _, message = clone.install()
    assert status == 2
    assert message.startswith(f"launch/install.sh: pip failed: {reason}")
    assert message.endswith("(full output: .venv/pip.log)\n")
    assert message.count("\n") == 1
    assert (clone.path / ".venv" / "pip.log").read_text().strip() == log
    (clone.folder / "error").unlink()
    assert clone.install()[0] == 0


def test_only_index_and_network_settings_of_pip_are_used():
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


def test_an_unusable_interpreter_is_named(clone):
    status, output, message = clone.install(PYTHON="./none")
    assert (status, output) == (2, "")
    assert message == (
        f"launch/install.sh: PYTHON={clone.folder}/./none is not Python 3.11 to 3.13: "
        "name another, or unset it\n"
    )
    (clone.folder / "venv-fails").touch()
    status, output, message = clone.install()
    assert (status, output) == (2, "")
    assert message.count("\n") == 1
    assert message.endswith("Error: No space left\n")
    assert not (clone.path / ".venv").exists()


def test_several_extras_are_refused(clone):
    status, _, message = clone.install("test", "cuda")
    assert (status, message) == (
        2,
        "launch/install.sh: one extra at a time: rerun for cuda\n",
    )


def test_scripts_keep_their_line_endings_in_a_clone_on_windows(tmp_path):
    repository = tmp_path / "repository"
    shutil.copytree(ROOT / "launch", repository / "launch")
    shutil.copy(ROOT / ".gitattributes", repository)
    identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init"], ["add", "-A"], [*identity, "commit", "-m", "all"]):
        subprocess.run(["git", *command], cwd=repository, check=True, capture_output=True)
    subprocess.run(
        ["git", "-c", "core.autocrlf=true", "clone", "-q", repository, tmp_path / "clone"],
        check=True,
    )
    for file in (repository / "launch").iterdir():
        assert (tmp_path / "clone" / "launch" / file.name).read_bytes() == file.read_bytes()


@pytest.fixture(scope="module")
def hatchling():
    if not importlib.util.find_spec("hatchling"):
        if os.environ.get("CI"):
            pytest.fail("hatchling is not installed: launch/install.sh test")
        pytest.skip("hatchling is not installed")
    from hatchling.builders.wheel import WheelBuilder

    return WheelBuilder(str(ROOT))


def test_a_wheel_has_configs_and_data_files(hatchling, tmp_path):
    import zipfile

    (wheel,) = hatchling.build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [*(ROOT / "configs").glob("*.py"), *(ROOT / "histo_jax").rglob("*.*")]
    expected = {
        str(file.relative_to(ROOT)).replace("configs/", "histo_jax/configs/", 1)
        for file in files
        if file.suffix != ".pyc"
    }
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {"histo_jax/report/page.html", "histo_jax/configs/pcam_best.py"} <= names


def test_an_editable_installation_works_in_the_folder_above_the_clone(hatchling, tmp_path):
    import zipfile

    (wheel,) = hatchling.build(directory=str(tmp_path), versions=["editable"])
    (tmp_path / "packages").mkdir()
    zipfile.ZipFile(wheel).extractall(tmp_path / "packages")
    # The clone, which Python could take for a namespace package.
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
