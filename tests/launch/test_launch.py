"""The launch scripts, run with fakes of the programs of clouds and clusters."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = ["gpu_vm.sh", "slurm.sbatch", "tpu_vm.sh"]
OPTIONS = ["--config=configs/pcam.py", "--workdir=runs/with a space"]
TPU = ["--name=mine", "--zone=here"]
ACTIVE = {"queued-resources describe": ["ACTIVE"]}
# The options of each command that the scripts use, as its manual names them.
KNOWN = {
    "gcloud compute tpus queued-resources create": [
        "--node-id",
        "--accelerator-type",
        "--runtime-version",
        "--spot",
        "--zone",
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
}
# Refuses unknown commands and options, records its calls, and takes its answers from the file
# `answers` beside it.
FAKE = f"""#!{sys.executable} -IS
import contextlib, json, os, pathlib, shutil, signal, subprocess, sys, time
known = {KNOWN!r}
folder = pathlib.Path(__file__).parent
name = pathlib.Path(__file__).name
words = [name, *sys.argv[1:]]
with (folder / "calls").open("a") as calls:
    print(json.dumps(words), file=calls)
if any(key.split()[0] == name for key in known):
    fitting = [key for key in known if words[: len(key.split())] == key.split()]
    # The options of srun are followed by a command with its own options.
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
        answer = texts.pop(0) if len(texts) > 1 else texts[0]
        (folder / "answers").write_text(json.dumps(answers))
        if isinstance(answer, int):
            sys.exit(f"no answer to {{key}}" if name == "gcloud" else answer)
        print(answer)
        sys.exit()
"""
# Starts the command for each task, forwards no signal, and exits as the manual says.
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
# Has WORKERS, each with its own home folder and the programs of `vm`. Like gcloud, it repeats each
# command BROKEN times, while the first still runs. The end of a connection sends SIGHUP.
GCLOUD = """
def option(name):
    return next(word.partition("=")[2] for word in words if word.startswith(f"--{name}="))

homes = [folder / f"worker{index}" for index in range(int(os.environ.get("WORKERS", "1")))]
for home in homes:
    home.mkdir(exist_ok=True)
if "networkEndpoints" in words[-1] or "networkEndpoints" in words[-2]:
    print(len(homes))
elif words[3:5] == ["tpu-vm", "ssh"]:
    tries = []
    for broken in range(1 + int(os.environ.get("BROKEN", "0"))):
        time.sleep(0.2 * broken)
        print("SSH: Attempting to connect to worker", file=sys.stderr)
        for home in homes if option("worker") == "all" else [homes[int(option("worker"))]]:
            environment = {**os.environ, "HOME": str(home), "PATH": f"{home}/bin:{folder}/vm"}
            environment.pop("PYTHONUNBUFFERED", None)
            tries.append(subprocess.Popen(
                ["bash", "-c", option("command")], cwd=home, env=environment, start_new_session=True
            ))
    statuses = [one.wait() for one in tries]
    for one in tries:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.pid, signal.SIGHUP)
    sys.exit(next(filter(None, statuses), 0))
elif words[3:5] == ["tpu-vm", "scp"] and "--recurse" in words:
    source, target = [word for word in words[5:] if word[:2] != "--"]
    shutil.copytree(homes[0] / source.partition(":")[2], pathlib.Path(target) / "runs")
elif words[3:5] == ["tpu-vm", "scp"]:
    source, target = [word for word in words[5:] if word[:2] != "--"]
    for home in homes:
        shutil.copy(source, home / target.partition(":")[2])
"""
# Programs of the virtual machines; those that they install are added.
VM = """awk bash cat chmod cp dirname find flock gzip hostname mkdir rm sed setsid sh sleep
tail tar touch wc"""
VM_PROGRAMS = {
    "curl": "echo key",
    "findmnt": '[ ! -e "$HOME/mounted" ] || cat "$HOME/mounted"',
    "gcloud": 'echo "gcloud $*" >> "$HOME/calls"',
    "lsb_release": "echo jammy",
    "other-gcsfuse": 'echo "gcsfuse $*" >> "$HOME/calls"; '
    'setsid sleep 90 </dev/null >/dev/null 2>&1 & echo $! >> "$HOME/mounts"',
    "python3.12": "exit 1",
    # The first time another program holds the lock.
    "sudo": """echo "sudo $*" >> "$HOME/calls"
case "$*" in
  tee*) cat >> "$HOME/written" ;;
  *update*) [ -e "$HOME/updated" ] || { touch "$HOME/updated"; exit 100; } ;;
  *install*gcsfuse) mkdir "$HOME/bin"; cp "${0%/*}/other-gcsfuse" "$HOME/bin/gcsfuse" ;;
esac""",
}


def program(path: Path, text: str) -> None:
    """Writes a program in bash."""
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


class Fakes:
    """A folder on the PATH with fake programs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, []
        folder.mkdir()
        for name in sorted({key.split()[0] for key in KNOWN}):
            self.make_fake(folder / name)
        for name, more in (("srun", SRUN), ("gcloud", GCLOUD)):
            with (folder / name).open("a") as file:
                file.write(more)
        self.answer()

    def make_fake(self, path: Path) -> None:
        path.write_text(FAKE)
        path.chmod(0o755)

    def answer(self, **answers: list[str | int]) -> None:
        (self.folder / "answers").write_text(json.dumps(answers))

    def calls(self, folder: Path | None = None) -> list[list[str]]:
        path = (folder or self.folder) / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def run(self, script: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        environment = {
            **os.environ,
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "77",
            "HISTO_JAX_POLL_SECONDS": "0",
            **variables,
        }
        process = subprocess.Popen(
            # Background processes ignore SIGINT, and bash cannot reset that.
            ["env", "--default-signal=INT", "bash", str(script), *arguments],
            start_new_session=True,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.started.append(process)
        try:
            output = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        done = subprocess.CompletedProcess(process.args, process.returncode, *output)
        refused = self.folder / "refused"
        assert not refused.exists(), refused.read_text()
        return done


@pytest.fixture
def fakes(tmp_path):
    return Fakes(tmp_path / "fakes")


def test_shellcheck_passes():
    scripts = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, *scripts], text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    "script", [*sorted(file.name for file in LAUNCH.glob("*.sh")), "slurm.sbatch"]
)
def test_help_prints_the_usage_and_does_nothing(fakes, tmp_path, script):
    # In a clone without an environment, and none is created.
    shutil.copytree(LAUNCH, tmp_path / "clone" / "launch")
    (tmp_path / "clone" / "tests" / "benchmarks").mkdir(parents=True)
    options = "tests/benchmarks/options.py"
    shutil.copy(ROOT / options, tmp_path / "clone" / options)
    for option in ("--help", "-h"):
        done = fakes.run(tmp_path / "clone" / "launch" / script, option)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count("usage:") == 1
        assert "#" not in done.stdout
        assert "BASH_VERSION" not in done.stdout
    assert fakes.calls() == []
    assert not (tmp_path / "clone" / ".venv").exists()


@pytest.mark.parametrize(
    ("script", "option", "message"),
    [
        (
            "quickstart.sh",
            "--mode=fit",
            "unknown option --mode=fit: for another config or mode, use "
            ".venv/bin/python -m histo_jax.main",
        ),
        ("bench.sh", "--row=train", "unrecognized arguments: --row=train (see --help)"),
        ("bench.sh", "--rows=train,trian", "unknown row: trian (see --help)"),
    ],
)
def test_an_unknown_option_is_refused_before_installing(fakes, script, option, message):
    done = fakes.run(LAUNCH / script, option, PYTHON="/nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"launch/{script}: {message}\n"


def test_an_unknown_extra_is_refused(fakes):
    done = fakes.run(LAUNCH / "install.sh", "cud")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "launch/install.sh: unknown extra cud: test, slides, serve, cuda, tpu or bench\n"
    )


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("first", [True, False])
def test_a_dry_run_only_prints(fakes, script, first, tmp_path):
    fetched = tmp_path / "fetched"
    if script == "tpu_vm.sh":
        settings = [*TPU, f"--fetch={fetched}"]
        settings.insert(0 if first else 3, "--dry-run")
        arguments = [*settings, "--", *OPTIONS]
    else:
        arguments = ["--dry-run", *OPTIONS] if first else [*OPTIONS, "--dry-run"]
    done = fakes.run(LAUNCH / script, *arguments)
    assert done.returncode == 0, done.stderr
    assert fakes.calls() == []
    assert not fetched.exists()
    last = next(line for line in done.stdout.splitlines() if "--config=configs/pcam.py" in line)
    assert "--workdir=runs/with a space" in " ".join(shlex.split(" ".join(shlex.split(last))))
    assert "--dry-run" not in last


@pytest.fixture
def repository(fakes, tmp_path):
    """A repository with a fake installation and a fake Python."""
    folder = tmp_path / "repository"
    for path in ("launch", ".venv/bin"):
        (folder / path).mkdir(parents=True)
    for script in SCRIPTS:
        shutil.copy(LAUNCH / script, folder / "launch")
    for path in ("launch/install.sh", ".venv/bin/python"):
        fakes.make_fake(folder / path)
        (folder / path).with_name("answers").write_text('{"histo_jax.main": [75]}')
    return folder


def test_gpu_vm_installs_checks_and_trains(fakes, repository):
    done = fakes.run(repository / "launch" / "gpu_vm.sh", *OPTIONS)
    assert done.returncode == 75, done.stderr
    assert fakes.calls(repository / "launch") == [["install.sh", "cuda"]]
    assert fakes.calls(repository / ".venv" / "bin") == [
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
def test_gpu_vm_copies_records_from_a_bucket(fakes, repository, tmp_path, records, command):
    done = fakes.run(
        repository / "launch" / "gpu_vm.sh", f"--records={records}", *OPTIONS, HOME=str(tmp_path)
    )
    assert done.returncode == 75, done.stderr
    copied = tmp_path / "tensorflow_datasets" / "histopathology"
    assert fakes.calls() == [[*command, f"{records}/histopathology", str(copied)]]
    assert copied.is_dir()  # `rsync` requires it
    assert fakes.calls(repository / ".venv" / "bin")[-1][3:] == OPTIONS


@pytest.mark.parametrize("script", ["gpu_vm.sh", "slurm.sbatch"])
def test_missing_records_are_refused(fakes, repository, script):
    done = fakes.run(repository / "launch" / script, "--records=nowhere", *OPTIONS)
    assert (done.returncode, fakes.calls()) == (2, [])
    assert done.stderr == (
        f"launch/{script}: --records=nowhere has no prepared records: name a data.tfds_dir\n"
    )


def test_gpu_vm_copies_records_from_a_folder(fakes, repository, tmp_path):
    for name in ("histopathology", "downloads"):
        (tmp_path / "records" / name).mkdir(parents=True)
        (tmp_path / "records" / name / "shard").write_text("patches")
    for _ in range(2):
        done = fakes.run(
            repository / "launch" / "gpu_vm.sh",
            f"--records={tmp_path / 'records'}",
            *OPTIONS,
            HOME=str(tmp_path),
        )
        assert done.returncode == 75, done.stderr
    copied = tmp_path / "tensorflow_datasets"
    assert [path.name for path in copied.rglob("*")] == ["histopathology", "shard"]


@pytest.fixture
def slurm(fakes, repository):
    """Submits a job whose processes run `code`, in bash, with their number as $TASK."""

    def submit(code: str, *options: str, tasks: int = 2, **variables: str):
        program(
            repository / ".venv" / "bin" / "python",
            f'TASK=$SLURM_PROCID\necho "$@" > "{fakes.folder}/task$TASK"\n{code}',
        )
        return fakes.run(
            LAUNCH / "slurm.sbatch",
            *options,
            *OPTIONS,
            SLURM_SUBMIT_DIR=str(repository),
            SLURM_NTASKS=str(tasks),
            **variables,
        )

    return submit


REQUEUE = ["scontrol", "requeue", "77"]


@pytest.mark.parametrize(
    ("statuses", "status", "is_requeued"),
    [
        ("0 0", 0, False),
        ("75 75", 75, True),
        ("75 0", 75, True),  # the first wrote the last file after the others had exited
        ("75 ABRT", 134, True),
        ("KILL ABRT", 137, False),  # out of memory
        ("SEGV ABRT", 139, False),
        ("2 ABRT 75", 2, False),
        ("75 ABRT 1", 1, False),
        ("2 75", 2, False),
        ("2 2", 2, False),
    ],
)
def test_slurm_requeues_the_job_where_that_helps(fakes, slurm, statuses, status, is_requeued):
    done = slurm(
        f'statuses=({statuses}); s=${{statuses[$TASK]}}; case $s in [0-9]*) exit "$s" ;; '
        '*) ulimit -c 0; kill -"$s" $$ ;; esac',
        tasks=len(statuses.split()),
    )
    assert done.returncode == status, done.stderr
    calls = [call for call in fakes.calls() if call[0] != "squeue"]
    assert calls[0][0] == "srun"
    assert calls[0][-5:] == ["-m", "histo_jax.main", "--multihost=slurm", *OPTIONS]
    assert calls[1:] == ([REQUEUE] if is_requeued else [])
    assert done.stderr.count("srun: error: node") == sum(s != "0" for s in statuses.split())


def test_slurm_is_not_misled_by_output_of_the_processes(fakes, slurm):
    program(fakes.folder / "tee", f'sleep 0.3; exec {shutil.which("tee")} "$@"')
    done = slurm('printf "50%%\\r" >&2; printf "Exited with exit code 2\\n" >&2; exit 75', tasks=1)
    assert done.returncode == 75
    assert fakes.calls()[-1] == REQUEUE
    # A progress bar without a line end precedes the message of srun.
    done = slurm('[ $TASK = 0 ] || exit 75; printf "50%%" >&2; exit 2', tasks=2)
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("state", "is_requeued"), [("RUNNING", True), ("COMPLETING", False), (1, True)]
)
def test_slurm_does_not_requeue_a_cancelled_job(fakes, slurm, state, is_requeued):
    fakes.answer(squeue=[state])
    done = slurm("exit 75")
    assert done.returncode == 75
    assert ["squeue", "--noheader", "--jobs=77", "--format=%T"] in fakes.calls()
    assert (REQUEUE in fakes.calls()) == is_requeued


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_slurm_survives_the_signals_to_its_processes(fakes, slurm, name):
    # Sent to the whole group, as on some clusters.
    done = slurm(f'trap "echo saved >&2; exit 75" {name}; kill -{name} 0; sleep 5', tasks=1)
    assert done.returncode == 75, done.stderr
    assert "saved" in done.stderr
    assert fakes.calls()[-1] == REQUEUE


@pytest.mark.parametrize(
    ("variables", "cores"),
    [
        ({"SLURM_CPUS_PER_TASK": "8", "SLURM_CPUS_ON_NODE": "16"}, "8"),
        ({"SLURM_CPUS_ON_NODE": "16"}, "16"),
        (
            {"SLURM_CPUS_ON_NODE": "16", "SLURM_CPUS_PER_GPU": "4"},
            "none",
        ),  # srun accepts only one of them
        ({}, "none"),
    ],
)
def test_slurm_gives_each_process_its_cores(slurm, variables, cores):
    done = slurm('echo "cores: ${SRUN_CPUS_PER_TASK:-none}"', tasks=1, **variables)
    assert done.stdout == f"cores: {cores}\n"


def test_slurm_copies_records_to_the_nodes(fakes, slurm, tmp_path):
    records, nodes = tmp_path / "the records", tmp_path / "node disk"
    for name in ("histopathology", "downloads"):
        (records / name).mkdir(parents=True)
        (records / name / "shard").write_text("patches")

    def start() -> Path:
        done = slurm("exit 0", f"--records={records}", TMPDIR=str(nodes))
        assert done.returncode == 0, done.stderr
        options = (fakes.folder / "task1").read_text().strip()
        assert options.startswith("-m histo_jax.main --multihost=slurm --config=configs/pcam.py")
        return Path(options.partition("--config.data.tfds_dir=")[2])

    nodes.mkdir()
    copied = start()
    assert copied.is_relative_to(nodes)
    assert not (copied / "downloads").exists()
    assert (copied / "histopathology" / "shard").read_text() == "patches"
    assert "--ntasks-per-node=1" in fakes.calls()[0]
    # A complete copy is reused; an interrupted one is not.
    (copied / "histopathology" / "shard").write_text("unchanged")
    assert start() == copied
    assert (copied / "histopathology" / "shard").read_text() == "unchanged"
    shutil.rmtree(copied)
    program(fakes.folder / "cp", 'mkdir "${@: -1}"; exit 1')
    assert slurm("exit 0", f"--records={records}", TMPDIR=str(nodes)).returncode == 1
    (fakes.folder / "cp").unlink()
    assert start() == copied
    assert (copied / "histopathology" / "shard").read_text() == "patches"
    # Other records are copied to another folder.
    (records / "histopathology" / "kaggle").write_text("more")
    assert (start() / "histopathology" / "kaggle").read_text() == "more"


def test_slurm_requests_an_early_signal_and_one_process_per_node():
    text = (LAUNCH / "slurm.sbatch").read_text()
    for line in ("--ntasks-per-node=1", "--signal=USR1@120", "--requeue", "--open-mode=append"):
        assert f"\n#SBATCH {line}\n" in text


@pytest.fixture
def tpu(fakes, repository):
    """Starts a run on a TPU of `workers` whose processes run `code`, in bash."""
    (fakes.folder / "vm").mkdir()
    for name in VM.split():
        (fakes.folder / "vm" / name).symlink_to(shutil.which(name))
    for name, text in VM_PROGRAMS.items():
        (fakes.folder / "vm" / name).unlink(missing_ok=True)
        program(fakes.folder / "vm" / name, text)
    program(
        repository / "launch" / "install.sh",
        # Fails if two are running at a time.
        'mkdir "$HOME/installing" || exit 3; echo "install.sh $*" >> "$HOME/calls"; sleep 0.2; '
        'mkdir -p .venv/bin runs; cp launch/code .venv/bin/python; rm -r "$HOME/installing"',
    )
    shutil.copy(LAUNCH / "tpu_worker.sh", repository / "launch")
    subprocess.run(["git", "init", "--quiet"], cwd=repository, check=True)
    subprocess.run(["git", "add", "launch/tpu_worker.sh"], cwd=repository, check=True)
    fakes.answer(**ACTIVE)

    def start(code, *settings, workers=1, broken=0):
        program(repository / "launch" / "code", f'echo $$ >> "$HOME/started"; {code}')
        return fakes.run(
            repository / "launch" / "tpu_vm.sh",
            *TPU,
            *settings,
            "--",
            *OPTIONS,
            WORKERS=str(workers),
            BROKEN=str(broken),
            HISTO_JAX_POLL_SECONDS="0.1",
        )

    start.homes = [fakes.folder / f"worker{index}" for index in range(2)]
    start.repository = repository
    yield start
    # Mounts keep running, and so does a run if a test has failed.
    for path in fakes.folder.glob("worker?/*"):
        for number in path.read_text().split() if path.name in ("mounts", "started") else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(number), signal.SIGKILL)


def test_tpu_vm_creates_waits_runs_and_fetches(fakes, tpu, tmp_path):
    fakes.answer(**{"queued-resources describe": [1, "PROVISIONING", "ACTIVE"]})
    fetched = tmp_path / "fetched"
    (tpu.homes[1] / "bin").mkdir(parents=True)
    (tpu.homes[1] / "bin" / "gcsfuse").symlink_to(fakes.folder / "vm" / "other-gcsfuse")
    done = tpu(
        'for word in "$@"; do echo "<$word>"; done; printf "half a "; sleep 0.5; echo line; '
        '[ "$PYTHONUNBUFFERED" ] && touch runs/report.html',
        "--type=v5litepod-16",
        "--spot",
        "--records=gs://b/the records",
        "--workdirs=gs://bucket/",
        f"--fetch={fetched}",
        workers=2,
    )
    assert done.returncode == 0, done.stderr
    assert "waiting for mine: PROVISIONING" in done.stdout
    shown = [line for line in done.stdout.splitlines() if not line.startswith("waiting")]
    assert shown == [
        f"<{word}>" for word in ["-m", "histo_jax.main", "--multihost=tpu", *OPTIONS]
    ] + ["half a line"]  # of the first worker only
    assert (fetched / "runs" / "report.html").exists()
    calls = [call for call in fakes.calls() if "describe" not in call]
    assert all(call[:3] == ["gcloud", "compute", "tpus"] for call in calls)
    assert all("--zone=here" in call for call in calls)
    assert calls[0][3:5] == ["queued-resources", "create"]
    assert {"mine", "--node-id=mine", "--accelerator-type=v5litepod-16", "--spot"} <= set(calls[0])
    apt = [
        "sudo tee /usr/share/keyrings/cloud.google.asc",
        "sudo tee /etc/apt/sources.list.d/gcsfuse.list",
        *["sudo apt-get update -q"] * 2,  # the first one was locked
        "sudo apt-get -o DPkg::Lock::Timeout=600 install -qy gcsfuse",
    ]
    for home, missing in zip(tpu.homes, (apt, []), strict=True):
        copied = home / "tensorflow_datasets" / "histopathology"
        assert copied.is_dir()  # `rsync` requires it
        assert (home / "calls").read_text().splitlines() == [
            "install.sh tpu",
            *missing,
            "gcsfuse --implicit-dirs --rename-dir-limit=100000 bucket runs",
            f"gcloud storage rsync --recursive gs://b/the records/histopathology {copied}",
        ]
        assert (home / "started").read_text().count("\n") == 1


def test_tpu_vm_installs_python_if_missing(fakes, tpu):
    (fakes.folder / "vm" / "python3.12").unlink()
    assert tpu("exit 0").returncode == 0
    assert (
        "sudo apt-get -o DPkg::Lock::Timeout=600 install -qy python3.11-venv"
        in (tpu.homes[0] / "calls").read_text()
    )


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [(0, 0, 0), (75, 134, 134), (2, 134, 2), (134, 1, 1)],
)
def test_tpu_vm_returns_the_status_of_the_run(fakes, tpu, tmp_path, first, second, status):
    done = tpu(
        f'echo "I am $HOME"; case $HOME in *0) exit {first} ;; esac; exit {second}',
        "--workdirs=bucket",
        f"--fetch={tmp_path / 'fetched'}",
        workers=2,
    )
    assert done.returncode == status, done.stderr
    assert not [call for call in fakes.calls() if "create" in call]
    # After a failure the output of the other workers is shown; results are always fetched.
    assert (f"I am {tpu.homes[1]}" in done.stdout) == bool(status)
    assert (tmp_path / "fetched" / "runs").exists()


@pytest.mark.parametrize(("status", "expected"), [(0, 1), (75, 75)])
def test_tpu_vm_reports_a_failure_to_fetch(fakes, tpu, tmp_path, status, expected):
    fakes.answer(**ACTIVE, **{"scp --recurse": [1]})
    done = tpu(f"exit {status}", f"--fetch={tmp_path}")
    assert done.returncode == expected
    assert "could not be fetched: rerun the command" in done.stderr


def test_tpu_vm_starts_a_run_once_when_the_connection_breaks(tpu):
    for code in ("exit 2", "sleep 1; exit 2"):
        done = tpu(code, "--workdirs=bucket", workers=2, broken=1)
        assert done.returncode == 2, done.stderr
    for home in tpu.homes:
        assert (home / "started").read_text().count("\n") == 2


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_tpu_vm_keeps_the_run_at_ctrl_c_and_follows_it_when_rerun(fakes, tpu):
    home = tpu.homes[0]
    with ThreadPoolExecutor() as pool:
        first = pool.submit(
            tpu, 'echo begun; until [ -e "$HOME/go" ]; do sleep 0.1; done; echo ended; exit 75'
        )
        wait_for((home / "started").exists)
        (script,) = fakes.started
        os.killpg(script.pid, signal.SIGINT)
        done = first.result()
        assert done.returncode == 130, done.stderr
        assert "the run continues: rerun the command to follow it, or use --stop" in done.stderr
        # If the state cannot be queried, the files of the run are not changed.
        (home / "histo_jax" / "old").write_text("")
        fakes.answer(**ACTIVE, **{"worker.sh state": [1]})
        done = tpu("echo another")
        assert done.returncode == 1
        assert "a run is in progress: rerun the command to follow it" in done.stderr
        assert (home / "histo_jax" / "old").exists()
        fakes.answer(**ACTIVE)
        followed = len(fakes.calls())
        second = pool.submit(tpu, "echo another")
        wait_for(lambda: any("worker.sh log" in str(call) for call in fakes.calls()[followed:]))
        (home / "go").write_text("")
        done = second.result()
    assert done.returncode == 75
    assert done.stdout.splitlines() == ["following the run that is in progress", "begun", "ended"]
    assert (home / "started").read_text().count("\n") == 1
    assert (home / "calls").read_text().splitlines() == ["install.sh tpu"]
    # After its end the command starts a new run.
    assert tpu("echo another").stdout == "another\n"


def test_tpu_vm_stops_a_run_by_one_signal(tpu):
    home = tpu.homes[0]
    for _ in range(2):  # the second run can be stopped, too
        for name in ("ready", "signals"):
            (home / name).unlink(missing_ok=True)
        with ThreadPoolExecutor() as pool:
            run = pool.submit(
                tpu,
                'trap \'echo signal >> "$HOME/signals"\' TERM; echo ready > "$HOME/ready"; '
                "for _ in {1..50}; do sleep 0.1; [ -e $HOME/signals ] && sleep 1 && exit 75; done",
            )
            wait_for((home / "ready").exists)
            for _ in range(2):
                done = tpu("", "--stop", broken=1)
                assert done.returncode == 0, done.stderr
            assert run.result().returncode == 75
        assert (home / "signals").read_text() == "signal\n"


def test_tpu_vm_reports_a_killed_run_and_a_lost_connection(fakes, tpu):
    assert tpu("exit 0").returncode == 0
    done = tpu('kill -KILL "$PPID"; kill -KILL $$')
    assert done.returncode == 137
    fakes.answer(**ACTIVE, **{"worker.sh log": [1]})
    done = tpu("exit 0")
    assert done.returncode == 1
    assert "mine does not respond, see above" in done.stderr
    assert "no answer to worker.sh log" in done.stderr


def test_tpu_vm_copies_the_working_tree_only(tpu):
    folder, there = tpu.repository, tpu.homes[0] / "histo_jax"
    for path in (
        "kept",
        "gone",
        "histo_jax/changed.py",
        "histo_jax/new.html",
        "mine.py",
        "raw/x.tif",
    ):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text("")
    subprocess.run(["git", "add", "kept", "gone", "histo_jax/changed.py"], cwd=folder, check=True)
    (folder / "gone").unlink()
    (folder / "histo_jax" / "changed.py").write_text("changed")
    (there / "runs" / "mine").mkdir(parents=True)
    (there / "old.py").write_text("")
    assert tpu("exit 0").returncode == 0
    found = {path.name for path in there.iterdir()}
    assert {"kept", "mine.py", "histo_jax", "runs", ".venv"} <= found
    assert not {"gone", "old.py", "raw"} & found
    assert (there / "histo_jax" / "changed.py").read_text() == "changed"
    assert (there / "histo_jax" / "new.html").exists()
    assert (there / "runs" / "mine").exists()


def test_tpu_vm_copies_a_download_without_git(tpu):
    folder, there = tpu.repository, tpu.homes[0] / "histo_jax"
    shutil.rmtree(folder / ".git")
    (folder.parent / ".git").mkdir()  # inside another repository
    for path in ("pyproject.toml", "histo_jax/__pycache__/x", "histo_jax/a.py", "mine.py", "raw/x"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("")
    assert tpu("exit 0").returncode == 0
    copied = {"launch/tpu_vm.sh", "pyproject.toml", "histo_jax/a.py", "mine.py"}
    assert all((there / path).exists() for path in copied)
    assert not (there / "raw").exists()
    assert not (there / "histo_jax" / "__pycache__").exists()


def test_tpu_vm_mounts_a_bucket_once_and_refuses_another(fakes, tpu):
    tpu.homes[0].mkdir()
    (tpu.homes[0] / "mounted").write_text("bucket")
    assert tpu("exit 0", "--workdirs=bucket").returncode == 0
    assert "gcsfuse" not in (tpu.homes[0] / "calls").read_text()
    # The process of the mount keeps running and does not block later runs.
    (tpu.homes[0] / "mounted").unlink()
    (tpu.homes[0] / "bin").mkdir()
    (tpu.homes[0] / "bin" / "gcsfuse").symlink_to(fakes.folder / "vm" / "other-gcsfuse")
    for _ in range(2):
        assert tpu("exit 0", "--workdirs=bucket").returncode == 0
    (tpu.homes[0] / "mounted").write_text("bucket")
    done = tpu("exit 0", "--workdirs=other")
    assert done.returncode == 2
    assert "bucket is mounted as ~/histo_jax/runs, not other" in done.stderr
    done = tpu("exit 0", "--workdirs=bucket/folder")
    assert done.returncode == 2
    assert "name a bucket, not a folder in it" in done.stderr


def test_tpu_vm_requires_a_bucket_for_several_workers(fakes, tpu):
    done = tpu("exit 0", workers=2)
    assert done.returncode == 2
    assert done.stderr == (
        "launch/tpu_vm.sh: mine has 2 workers, which must share the workdir: "
        "set --workdirs to a bucket\n"
    )


def test_tpu_vm_gives_up_when_gcloud_keeps_failing(fakes, tpu):
    states = ["WAITING_FOR_RESOURCES", 1, 1, "PROVISIONING", *[1] * 5]
    fakes.answer(**{"queued-resources describe": states})
    done = tpu("exit 0")
    assert done.returncode == 1
    assert "PROVISIONING" in done.stdout
    assert done.stderr.count("no answer to queued-resources describe") == 7
    assert "launch/tpu_vm.sh: gcloud does not describe mine, see above: fix this" in done.stderr


def test_tpu_vm_deletes_a_tpu_and_refuses_a_failed_one(fakes):
    fakes.answer(**{"describe": ["FAILED"]})
    done = fakes.run(LAUNCH / "tpu_vm.sh", *TPU, "--", *OPTIONS)
    assert done.returncode == 1
    assert "delete it (--delete)" in done.stderr
    done = fakes.run(LAUNCH / "tpu_vm.sh", *TPU, "--delete")
    assert done.returncode == 0
    assert fakes.calls()[-1][3:7] == ["queued-resources", "delete", "mine", "--force"]


@pytest.mark.parametrize("arguments", [["--zone=here"], ["--name=mine"], [*TPU, "--typ=x"]])
def test_tpu_vm_refuses_invalid_arguments(fakes, arguments):
    done = fakes.run(LAUNCH / "tpu_vm.sh", *arguments)
    assert done.returncode == 2
    assert "see --help" in done.stderr
    assert fakes.calls() == []


def test_kubernetes_is_valid_and_its_options_are_known():
    documents = list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))
    for document in documents:
        kubernetes_validate.validate(document, "1.34", strict=True)
    service, job = documents
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    (init,), (main,) = pod["initContainers"], pod["containers"]
    command = main["command"]
    assert f"--process_count={job['spec']['completions']}" in command
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    first = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert any(word.startswith(f"--coordinator={first}:") for word in command)
    options = [word.partition("=")[0] for word in [*init["command"], *command] if word[:2] == "--"]
    known = subprocess.run(
        [sys.executable, "-m", "histo_jax.main", "--help"],
        text=True,
        capture_output=True,
        check=True,
    ).stdout
    assert all(option in known for option in options)
    steps = [line.split() for line in (LAUNCH / "Dockerfile").read_text().splitlines()]
    assert ["WORKDIR", pod["containers"][0]["workingDir"]] in steps
    tag = next(word for word in steps[0] if word.startswith("--tag=")).removeprefix("--tag=")
    assert init["image"] == main["image"] == f"{tag}:latest"
    (program,) = (words[1] for words in steps if words[0] == "RUN")
    assert (LAUNCH.parent / Path(program).relative_to(pod["containers"][0]["workingDir"])).exists()


@pytest.fixture(scope="module")
def pod():
    _, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    return job["spec"]["template"]["spec"]


def test_kubernetes_meets_the_needs_of_jax_and_nccl(pod):
    assert pod["shareProcessNamespace"]  # otherwise 134 becomes 139, which counts as a failure
    (main,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    at = {mount["mountPath"]: volumes[mount["name"]] for mount in main["volumeMounts"]}
    assert at["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert at["/records"]["emptyDir"] == {}  # the local disk of the node
    assert "--config.data.tfds_dir=/records" in main["command"]
    assert {"cpu", "memory"} <= set(main["resources"]["requests"])


def test_kubernetes_prepares_and_copies_the_records_to_each_node(pod, tmp_path):
    (init,) = pod["initContainers"]
    config = next(word for word in pod["containers"][0]["command"] if word[:9] == "--config=")
    assert config in init["command"]
    program(
        tmp_path / "python",
        f'echo "$*" >> {tmp_path}/calls; mkdir -p {tmp_path}/data/tensorflow_datasets/downloads '
        f"{tmp_path}/data/tensorflow_datasets/histopathology; "
        f"echo patches > {tmp_path}/data/tensorflow_datasets/histopathology/shard",
    )
    changes = {
        ".venv/bin/python": str(tmp_path / "python"),
        "/data": f"{tmp_path}/data",
        "/records": f"{tmp_path}/records",
    }
    command = init["command"]
    for old, new in changes.items():
        command = [word.replace(old, new) for word in command]
    for _ in range(2):
        (tmp_path / "records").mkdir()
        subprocess.run(command, check=True)
        assert [path.name for path in (tmp_path / "records").iterdir()] == ["histopathology"]
        assert (tmp_path / "records/histopathology/shard").read_text() == "patches\n"
        shutil.rmtree(tmp_path / "records")
    calls = (tmp_path / "calls").read_text().splitlines()
    options = f"{config} --config.data.tfds_dir={tmp_path}/data/tensorflow_datasets"
    workdir = init["command"][-1].replace("/data", f"{tmp_path}/data")
    assert calls == [f"-m histo_jax.main --mode=prepare {options} {workdir}"] * 2
