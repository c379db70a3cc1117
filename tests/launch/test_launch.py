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
# Of each command, the options that its manual names and the scripts use.
KNOWN = {
    "gcloud compute tpus queued-resources create": [
        "--node-id", "--accelerator-type", "--runtime-version", "--spot", "--zone",
    ],
    "gcloud compute tpus queued-resources describe": ["--zone", "--format"],
    "gcloud compute tpus queued-resources delete": ["--force", "--quiet", "--zone"],
    "gcloud compute tpus tpu-vm describe": ["--zone", "--format"],
    "gcloud compute tpus tpu-vm ssh": ["--worker", "--command", "--zone"],
    "gcloud compute tpus tpu-vm scp": ["--worker", "--recurse", "--zone"],
    "gcloud storage rsync": ["--recursive"],
    "aws s3 sync": [],
    "srun": ["--kill-on-bad-exit", "--ntasks-per-node"],
    "scontrol requeue": [],
    "squeue": ["--noheader", "--jobs", "--format"],
}  # fmt: skip
# Refuses what the program would refuse, notes how it was called, and answers as the file `answers`
# beside it says for that call.
STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, signal, subprocess, sys
known = {KNOWN!r}
folder = pathlib.Path(__file__).parent
name = pathlib.Path(__file__).name
words = [name, *sys.argv[1:]]
with (folder / "calls").open("a") as calls:
    print(json.dumps(words), file=calls)
if any(key.split()[0] == name for key in known):
    fitting = [key for key in known if words[: len(key.split())] == key.split()]
    # Behind srun's own options stands a command with its options.
    own = [word for word in words if word.startswith("--")]
    if name == "srun":
        own = words[1 : next(at for at, word in enumerate(words) if at and word[:2] != "--")]
    wrong = [word for word in own if not fitting or word.partition("=")[0] not in known[fitting[0]]]
    if wrong or not fitting:
        (folder / "refused").write_text(f"{{words}}: {{wrong or 'no such command'}}")
        sys.exit(64)
answers = json.loads((folder / "answers").read_text())
for key, texts in answers.items():
    if key in " ".join(words):
        said = texts.pop(0) if len(texts) > 1 else texts[0]
        (folder / "answers").write_text(json.dumps(answers))
        if isinstance(said, int):
            sys.exit(said)
        print(said)
"""
# Starts the command for each task, passes no signal on, and ends as the manual says.
SRUN = """
command = words[1 + len(own) :]
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda *_: None)
tasks = [
    subprocess.Popen(command, env={**os.environ, "SLURM_PROCID": str(rank)})
    for rank in range(int(os.environ["SLURM_NTASKS"]))
]
statuses = [task.wait() for task in tasks]
for rank, status in enumerate(statuses):
    if status:
        how = signal.strsignal(-status) if status < 0 else f"Exited with exit code {status}"
        print(f"srun: error: node{rank}: task {rank}: {how}", file=sys.stderr)
sys.exit(128 - min(statuses) if min(statuses) < 0 else max(statuses))
"""


def program(path: Path, text: str) -> None:
    """Writes a program in bash."""
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


class Door:
    """A folder on the PATH with stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in sorted({key.split()[0] for key in KNOWN}):
            self.stand_in(folder / name)
        with (folder / "srun").open("a") as srun:
            srun.write(SRUN)
        self.answer()

    def stand_in(self, path: Path) -> None:
        path.write_text(STAND_IN)
        path.chmod(0o755)

    def answer(self, **answers: list[str | int]) -> None:
        (self.folder / "answers").write_text(json.dumps(answers))

    def calls(self, folder: Path | None = None) -> list[list[str]]:
        path = (folder or self.folder) / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def run(self, script: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        environment = {
            **os.environ, "PATH": f"{self.folder}:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "77", "HISTO_JAX_POLL_SECONDS": "0",
            **variables,
        }  # fmt: skip
        done = subprocess.run(
            ["bash", str(script), *arguments], start_new_session=True,
            env=environment, text=True, capture_output=True, check=False, timeout=60,
        )  # fmt: skip
        refused = self.folder / "refused"
        assert not refused.exists(), refused.read_text()
        return done


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
@pytest.mark.parametrize("first", [True, False])
def test_a_dry_run_prints_and_does_nothing(door, script, first, tmp_path):
    fetched = tmp_path / "fetched"
    if script == "tpu_vm.sh":
        settings = [*TPU, f"--fetch={fetched}"]
        settings.insert(0 if first else 3, "--dry-run")
        arguments = [*settings, "--", *OPTIONS]
    else:
        arguments = ["--dry-run", *OPTIONS] if first else [*OPTIONS, "--dry-run"]
    done = door.run(LAUNCH / script, *arguments)
    assert done.returncode == 0, done.stderr
    assert door.calls() == []
    assert not fetched.exists()
    last = next(line for line in done.stdout.splitlines() if "histo_jax.main" in line)
    assert "--workdir=runs/with a space" in " ".join(shlex.split(" ".join(shlex.split(last))))
    assert "--dry-run" not in last


@pytest.fixture
def repository(door, tmp_path):
    """One whose installation and Python are stand-ins."""
    folder = tmp_path / "repository"
    for path in ("launch", ".venv/bin"):
        (folder / path).mkdir(parents=True)
    for script in SCRIPTS:
        shutil.copy(LAUNCH / script, folder / "launch")
    for path in ("launch/install.sh", ".venv/bin/python"):
        door.stand_in(folder / path)
        (folder / path).with_name("answers").write_text('{"histo_jax.main": [75]}')
    return folder


def test_gpu_vm_installs_looks_and_trains(door, repository):
    done = door.run(repository / "launch" / "gpu_vm.sh", *OPTIONS)
    assert done.returncode == 75, done.stderr
    assert door.calls(repository / "launch") == [["install.sh", "cuda"]]
    assert door.calls(repository / ".venv" / "bin") == [
        ["python", "-m", "histo_jax.doctor"],
        ["python", "-m", "histo_jax.main", *OPTIONS],
    ]


@pytest.mark.parametrize(
    ("records", "command"),
    [
        ("gs://b/records", ["gcloud", "storage", "rsync", "--recursive"]),
        ("s3://b/records", ["aws", "s3", "sync"]),
    ],
)
def test_gpu_vm_copies_records_from_a_bucket(door, repository, tmp_path, records, command):
    done = door.run(
        repository / "launch" / "gpu_vm.sh", f"--records={records}", *OPTIONS, HOME=str(tmp_path)
    )
    assert done.returncode == 75, done.stderr
    assert door.calls() == [[*command, records, str(tmp_path / "tensorflow_datasets")]]
    assert (tmp_path / "tensorflow_datasets").is_dir()  # `rsync` wants it there
    assert door.calls(repository / ".venv" / "bin")[-1][3:] == OPTIONS


@pytest.mark.parametrize("script", ["gpu_vm.sh", "slurm.sbatch"])
def test_records_that_are_not_there_are_named(door, repository, script):
    done = door.run(repository / "launch" / script, "--records=nowhere", *OPTIONS)
    assert (done.returncode, door.calls()) == (2, [])
    assert done.stderr.startswith(f"launch/{script}: --records=nowhere: no such folder; ")
    assert done.stderr.count("\n") == 1


def test_gpu_vm_copies_records_from_a_folder(door, repository, tmp_path):
    (tmp_path / "records" / "pcam").mkdir(parents=True)
    (tmp_path / "records" / "pcam" / "shard").write_text("patches")
    for _ in range(2):
        done = door.run(
            repository / "launch" / "gpu_vm.sh", f"--records={tmp_path / 'records'}", *OPTIONS,
            HOME=str(tmp_path),
        )  # fmt: skip
        assert done.returncode == 75, done.stderr
    copied = tmp_path / "tensorflow_datasets"
    assert [path.name for path in copied.rglob("*")] == ["pcam", "shard"]


@pytest.fixture
def slurm(door, repository):
    """Submits to a cluster whose processes do `what`, in bash, each with its $TASK."""

    def submit(what: str, *options: str, tasks: int = 2, **variables: str):
        program(
            repository / ".venv" / "bin" / "python",
            f'TASK=$SLURM_PROCID\necho "$@" > "{door.folder}/task$TASK"\n{what}',
        )
        return door.run(
            LAUNCH / "slurm.sbatch", *options, *OPTIONS,
            SLURM_SUBMIT_DIR=str(repository), SLURM_NTASKS=str(tasks), **variables,
        )  # fmt: skip

    return submit


REQUEUE = ["scontrol", "requeue", "77"]


@pytest.mark.parametrize(
    ("statuses", "status", "again"),
    [
        ("0 0", 0, False),
        ("75 75", 75, True),
        ("75 0", 75, True),  # the first wrote the last file when the others had ended
        ("75 ABRT", 134, True),
        ("KILL ABRT", 137, False),  # srun calls the higher one out of memory
        ("SEGV ABRT", 139, False),
        ("2 ABRT 75", 2, False),
        ("75 ABRT 1", 1, False),
        ("2 75", 2, False),
        ("2 2", 2, False),
    ],
)
def test_slurm_queues_the_job_again_where_that_helps(door, slurm, statuses, status, again):
    done = slurm(
        f'statuses=({statuses}); s=${{statuses[$TASK]}}; case $s in [0-9]*) exit "$s" ;; '
        '*) ulimit -c 0; kill -"$s" $$ ;; esac',
        tasks=len(statuses.split()),
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    calls = [call for call in door.calls() if call[0] != "squeue"]
    assert calls[0][0] == "srun"
    assert calls[0][-5:] == ["-m", "histo_jax.main", "--multihost=slurm", *OPTIONS]
    assert calls[1:] == ([REQUEUE] if again else [])
    assert done.stderr.count("srun: error: node") == sum(s != "0" for s in statuses.split())


def test_slurm_is_not_misled_by_what_the_processes_say(door, slurm):
    program(door.folder / "tee", f'sleep 0.3; exec {shutil.which("tee")} "$@"')
    done = slurm(
        'printf "50%%\\r" >&2; printf "Exited with exit code 2\\n" >&2; exit 75', tasks=1
    )  # fmt: skip
    assert done.returncode == 75
    assert door.calls()[-1] == REQUEUE
    # A bar that has ended no line stands before srun's words.
    done = slurm('[ $TASK = 0 ] || exit 75; printf "50%%" >&2; exit 2', tasks=2)
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("state", "again"), [("RUNNING", True), ("COMPLETING", False), (1, True)]
)  # fmt: skip
def test_slurm_does_not_queue_again_what_was_cancelled(door, slurm, state, again):
    door.answer(squeue=[state])
    done = slurm("exit 75")
    assert done.returncode == 75
    assert ["squeue", "--noheader", "--jobs=77", "--format=%T"] in door.calls()
    assert (REQUEUE in door.calls()) == again


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_slurm_outlives_the_signals_that_its_processes_get(door, slurm, name):
    # To the whole group, as some clusters do.
    done = slurm(f'trap "echo saved >&2; exit 75" {name}; kill -{name} 0; sleep 5', tasks=1)
    assert done.returncode == 75, done.stderr
    assert "saved" in done.stderr
    assert door.calls()[-1] == REQUEUE


@pytest.mark.parametrize(
    ("variables", "cores"),
    [
        ({"SLURM_CPUS_PER_TASK": "8", "SLURM_CPUS_ON_NODE": "16"}, "8"),
        ({"SLURM_CPUS_ON_NODE": "16"}, "16"),
        ({"SLURM_CPUS_ON_NODE": "16", "SLURM_CPUS_PER_GPU": "4"}, "none"),  # srun takes only one
        ({}, "none"),
    ],
)
def test_slurm_gives_each_process_its_cores(slurm, variables, cores):
    done = slurm('echo "cores: ${SRUN_CPUS_PER_TASK:-none}"', tasks=1, **variables)
    assert done.stdout == f"cores: {cores}\n"


def test_slurm_copies_records_to_the_nodes(door, slurm, tmp_path):
    records, nodes = tmp_path / "the records", tmp_path / "node disk"
    (records / "pcam").mkdir(parents=True)
    (records / "pcam" / "shard").write_text("patches")

    def start() -> Path:
        done = slurm("exit 0", f"--records={records}", TMPDIR=str(nodes))
        assert done.returncode == 0, done.stderr
        words = (door.folder / "task1").read_text().strip()
        assert words.startswith("-m histo_jax.main --multihost=slurm --config=configs/pcam.py")
        return Path(words.partition("--config.data.tfds_dir=")[2])

    nodes.mkdir()
    copied = start()
    assert copied.is_relative_to(nodes)
    assert (copied / "pcam" / "shard").read_text() == "patches"
    assert "--ntasks-per-node=1" in door.calls()[0]
    # What is there is used; what was broken off is not taken for whole.
    (copied / "pcam" / "shard").write_text("as it was")
    assert start() == copied
    assert (copied / "pcam" / "shard").read_text() == "as it was"
    shutil.rmtree(copied)
    program(door.folder / "cp", 'mkdir "${@: -1}"; exit 1')
    assert slurm("exit 0", f"--records={records}", TMPDIR=str(nodes)).returncode == 1
    (door.folder / "cp").unlink()
    assert start() == copied
    assert (copied / "pcam" / "shard").read_text() == "patches"
    # Other records go elsewhere.
    (records / "kaggle").write_text("more")
    assert (start() / "kaggle").read_text() == "more"


def test_slurm_asks_for_a_signal_in_time_and_one_process_a_node():
    text = (LAUNCH / "slurm.sbatch").read_text()
    for line in ("--ntasks-per-node=1", "--signal=USR1@120", "--requeue", "--open-mode=append"):
        assert f"\n#SBATCH {line}\n" in text


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
