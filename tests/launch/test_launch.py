"""The launch scripts, run for real up to the cloud's door: its programs are stand-ins here."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = ["gpu_vm.sh", "slurm.sbatch", "tpu_vm.sh"]
OPTIONS = ["--config=configs/pcam.py", "--workdir=runs/with a space"]
TPU = ["--name=mine", "--zone=here"]
# Notes how it was called, and answers as the file `answers` beside it says for that call.
STAND_IN = f"""#!{sys.executable}
import json, pathlib, sys
folder = pathlib.Path(__file__).parent
name = pathlib.Path(__file__).name
with (folder / "calls").open("a") as calls:
    print(json.dumps([name, *sys.argv[1:]]), file=calls)
answers = json.loads((folder / "answers").read_text())
for key, texts in answers.items():
    if key in " ".join([name, *sys.argv[1:]]):
        said = texts.pop(0) if len(texts) > 1 else texts[0]
        (folder / "answers").write_text(json.dumps(answers))
        if isinstance(said, int):
            sys.exit(said)
        print(said)
"""


class Door:
    """A folder on the PATH with stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in ("gcloud", "srun", "scontrol", "kubectl"):
            self.stand_in(folder / name)
        self.answer()

    def stand_in(self, path: Path) -> None:
        path.write_text(STAND_IN)
        path.chmod(0o755)

    def answer(self, **answers: list[str | int]) -> None:
        (self.folder / "answers").write_text(json.dumps(answers))

    def calls(self, folder: Path | None = None) -> list[list[str]]:
        path = (folder or self.folder) / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def run(self, script: Path, *arguments: str) -> subprocess.CompletedProcess:
        environment = {
            **os.environ, "PATH": f"{self.folder}:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "77", "HISTO_JAX_POLL_SECONDS": "0",
        }  # fmt: skip
        return subprocess.run(
            ["bash", str(script), *arguments],
            env=environment, text=True, capture_output=True, check=False, timeout=60,
        )  # fmt: skip


@pytest.fixture
def door(tmp_path):
    return Door(tmp_path / "door")


def test_shellcheck_finds_nothing():
    scripts = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, *scripts], text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("script", [*SCRIPTS, "install.sh", "quickstart.sh"])
def test_help_says_how_it_is_used_and_does_nothing(door, script):
    done = door.run(LAUNCH / script, "--help")
    assert done.returncode == 0
    assert done.stdout.count("usage:") == 1
    assert "#" not in done.stdout
    assert door.calls() == []


def test_an_unknown_extra_is_not_installed(door):
    done = door.run(LAUNCH / "install.sh", "cud")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "launch/install.sh: no such extra: cud; test, cuda, tpu or bench\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_prints_and_does_nothing(door, script):
    before = [*TPU, "--dry-run", "--"] if script == "tpu_vm.sh" else ["--dry-run"]
    done = door.run(LAUNCH / script, *before, *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert door.calls() == []
    last = next(line for line in done.stdout.splitlines() if "histo_jax.main" in line)
    assert "--workdir=runs/with a space" in " ".join(shlex.split(" ".join(shlex.split(last))))


def test_gpu_vm_installs_looks_and_trains(door, tmp_path):
    repository = tmp_path / "repository"
    for path in ("launch", ".venv/bin"):
        (repository / path).mkdir(parents=True)
    shutil.copy(LAUNCH / "gpu_vm.sh", repository / "launch")
    for path in ("launch/install.sh", ".venv/bin/python"):
        door.stand_in(repository / path)
        (repository / path).with_name("answers").write_text('{"histo_jax.main": [75]}')
    done = door.run(repository / "launch" / "gpu_vm.sh", *OPTIONS)
    assert done.returncode == 75, done.stderr
    assert door.calls(repository / "launch") == [["install.sh", "cuda"]]
    assert door.calls(repository / ".venv" / "bin") == [
        ["python", "-m", "histo_jax.doctor"],
        ["python", "-m", "histo_jax.main", *OPTIONS],
    ]


@pytest.mark.parametrize(("status", "again"), [(0, False), (2, False), (75, True), (134, True)])
def test_slurm_queues_the_job_again_where_that_helps(door, status, again):
    door.answer(srun=[status])
    done = door.run(LAUNCH / "slurm.sbatch", *OPTIONS)
    assert done.returncode == status, done.stderr
    first, *rest = door.calls()
    assert first[0] == "srun"
    assert first[-5:] == ["-m", "histo_jax.main", "--multihost=slurm", *OPTIONS]
    assert rest == ([["scontrol", "requeue", "77"]] if again else [])


def test_slurm_asks_for_a_signal_in_time_and_one_process_a_node():
    text = (LAUNCH / "slurm.sbatch").read_text()
    for line in ("--ntasks-per-node=1", "--signal=USR1@120", "--requeue", "--open-mode=append"):
        assert f"\n#SBATCH {line}\n" in text


def tpu_commands(door):
    return [
        (" ".join(call[4:5] if call[3] == "tpu-vm" else call[3:5]), call) for call in door.calls()
    ]


def test_tpu_vm_is_made_awaited_used_and_fetched(door, tmp_path):
    door.answer(**{"describe": [1, 1, "PROVISIONING", "ACTIVE"]})
    done = door.run(
        LAUNCH / "tpu_vm.sh", *TPU, "--type=v5litepod-16", "--spot", "--records=gs://b/records",
        "--workdirs=bucket", f"--fetch={tmp_path / 'fetched'}", "--", *OPTIONS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "waiting for mine: PROVISIONING" in done.stdout
    calls = [call for call in door.calls() if "describe" not in call]
    assert all(call[:3] == ["gcloud", "compute", "tpus"] for call in calls)
    assert all("--zone=here" in call for call in calls)
    create, send, python, install, records, mount, train, fetch = calls
    assert create[3:5] == ["queued-resources", "create"]
    assert {"mine", "--node-id=mine", "--accelerator-type=v5litepod-16", "--spot"} <= set(create)
    assert send[3:5] == ["tpu-vm", "scp"]
    assert "--worker=all" in send
    for call, words in (
        (python, "install -qy python3.11-venv"),
        (install, "launch/install.sh tpu"),
        (records, "gcloud storage rsync --recursive gs://b/records tensorflow_datasets"),
        (mount, "gcsfuse --implicit-dirs --rename-dir-limit=100000 bucket histo_jax/runs"),
        (train, "histo_jax.main --multihost=tpu --config=configs/pcam.py --workdir=runs/with\\ a"),
    ):
        assert "--worker=all" in call
        command = next(word for word in call if word.startswith("--command="))
        assert words in command
    assert fetch[4:7] == ["scp", "--recurse", "mine:histo_jax/runs"]
    assert "--worker=0" in fetch


def test_tpu_vm_uses_what_is_there_and_passes_the_status_on(door, tmp_path):
    door.answer(**{"describe": ["ACTIVE"], "histo_jax.main": [75]})
    done = door.run(LAUNCH / "tpu_vm.sh", *TPU, f"--fetch={tmp_path}", "--", *OPTIONS)
    assert done.returncode == 75
    assert not [call for call in door.calls() if "create" in call]
    assert "scp" in door.calls()[-1]  # the results are fetched all the same


def test_tpu_vm_that_failed_or_is_to_go(door):
    door.answer(**{"describe": ["FAILED"]})
    done = door.run(LAUNCH / "tpu_vm.sh", *TPU, "--", *OPTIONS)
    assert done.returncode == 1
    assert "delete it (--delete)" in done.stderr
    done = door.run(LAUNCH / "tpu_vm.sh", *TPU, "--delete")
    assert done.returncode == 0
    assert door.calls()[-1][3:7] == ["queued-resources", "delete", "mine", "--force"]


@pytest.mark.parametrize("arguments", [["--zone=here"], ["--name=mine"], [*TPU, "--typ=x"]])
def test_tpu_vm_refuses_what_it_does_not_understand(door, arguments):
    done = door.run(LAUNCH / "tpu_vm.sh", *arguments)
    assert done.returncode == 2
    assert "see --help" in done.stderr
    assert door.calls() == []


def test_kubernetes_follows_the_schema_and_its_command_line_is_known():
    documents = list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))
    for document in documents:
        kubernetes_validate.validate(document, "1.34", strict=True)
    service, job = documents
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    command = pod["containers"][0]["command"]
    assert f"--process_count={job['spec']['completions']}" in command
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    first = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert any(word.startswith(f"--coordinator={first}:") for word in command)
    options = [word.partition("=")[0] for word in command if word.startswith("--")]
    known = subprocess.run(
        [sys.executable, "-m", "histo_jax.main", "--help"], text=True, capture_output=True,
        check=True,
    ).stdout  # fmt: skip
    assert all(option in known for option in options)
    steps = [line.split() for line in (LAUNCH / "Dockerfile").read_text().splitlines()]
    assert ["WORKDIR", pod["containers"][0]["workingDir"]] in steps
    tag = next(word for word in steps[0] if word.startswith("--tag=")).removeprefix("--tag=")
    assert pod["containers"][0]["image"] == f"{tag}:latest"
    (program,) = (words[1] for words in steps if words[0] == "RUN")
    assert (LAUNCH.parent / Path(program).relative_to(pod["containers"][0]["workingDir"])).exists()
