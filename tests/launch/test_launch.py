"""The launch scripts, run for real up to the cloud's door: its programs are stand-ins here."""

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
# Of each command, the options that its manual names and the scripts use.
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
# Refuses what the program would refuse, notes how it was called, and answers as the file `answers`
# beside it says for that call.
STAND_IN = f"""#!{sys.executable}
import contextlib, json, os, pathlib, shutil, signal, subprocess, sys, time
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
            sys.exit(f"no answer to {{key}}" if name == "gcloud" else said)
        print(said)
        sys.exit()
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
# Has WORKERS, each with a folder as its home and the programs of `vm`; as gcloud does, it repeats
# each command whose connection is BROKEN, and that still works. A connection's end hangs up.
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
# What the virtual machines have; what they install is there from then on.
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
    # Another program holds the lock the first time.
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


class Door:
    """A folder on the PATH with stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, []
        folder.mkdir()
        for name in sorted({key.split()[0] for key in KNOWN}):
            self.stand_in(folder / name)
        for name, more in (("srun", SRUN), ("gcloud", GCLOUD)):
            with (folder / name).open("a") as file:
                file.write(more)
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
            **os.environ,
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "77",
            "HISTO_JAX_POLL_SECONDS": "0",
            **variables,
        }
        process = subprocess.Popen(
            # Tests that run in the background ignore Ctrl-C, and bash cannot undo that.
            ["env", "--default-signal=INT", "bash", str(script), *arguments],
            start_new_session=True,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.started.append(process)
        try:
            said = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        done = subprocess.CompletedProcess(process.args, process.returncode, *said)
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


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize(
    "script", [*sorted(file.name for file in LAUNCH.glob("*.sh")), "slurm.sbatch"]
)
def test_help_says_how_it_is_used_and_does_nothing(door, tmp_path, script, option):
    # A clone without an environment, and none is made.
    shutil.copytree(LAUNCH, tmp_path / "clone" / "launch")
    (tmp_path / "clone" / "tests" / "benchmarks").mkdir(parents=True)
    options = "tests/benchmarks/options.py"
    shutil.copy(ROOT / options, tmp_path / "clone" / options)
    done = door.run(tmp_path / "clone" / "launch" / script, option)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("usage:") == 1
    assert "#" not in done.stdout
    assert door.calls() == []
    assert not (tmp_path / "clone" / ".venv").exists()


@pytest.mark.parametrize(
    ("script", "option", "said"),
    [
        (
            "quickstart.sh",
            "--mode=fit",
            "unknown option --mode=fit; for another config or mode use "
            ".venv/bin/python -m histo_jax.main",
        ),
        ("bench.sh", "--row=train", "unrecognized arguments: --row=train (see --help)"),
        ("bench.sh", "--rows=train,trian", "no such row: trian (see --help)"),
    ],
)
def test_an_unknown_option_is_named_before_anything_is_installed(door, script, option, said):
    done = door.run(LAUNCH / script, option, PYTHON="/nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"launch/{script}: {said}\n"


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
    last = next(line for line in done.stdout.splitlines() if "--config=configs/pcam.py" in line)
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
    copied = tmp_path / "tensorflow_datasets" / "histopathology"
    assert door.calls() == [[*command, f"{records}/histopathology", str(copied)]]
    assert copied.is_dir()  # `rsync` wants it there
    assert door.calls(repository / ".venv" / "bin")[-1][3:] == OPTIONS


@pytest.mark.parametrize("script", ["gpu_vm.sh", "slurm.sbatch"])
def test_records_that_are_not_there_are_named(door, repository, script):
    done = door.run(repository / "launch" / script, "--records=nowhere", *OPTIONS)
    assert (done.returncode, door.calls()) == (2, [])
    assert done.stderr == (
        f"launch/{script}: --records=nowhere: holds no prepared records; name a data.tfds_dir\n"
    )


def test_gpu_vm_copies_records_from_a_folder(door, repository, tmp_path):
    for name in ("histopathology", "downloads"):
        (tmp_path / "records" / name).mkdir(parents=True)
        (tmp_path / "records" / name / "shard").write_text("patches")
    for _ in range(2):
        done = door.run(
            repository / "launch" / "gpu_vm.sh",
            f"--records={tmp_path / 'records'}",
            *OPTIONS,
            HOME=str(tmp_path),
        )
        assert done.returncode == 75, done.stderr
    copied = tmp_path / "tensorflow_datasets"
    assert [path.name for path in copied.rglob("*")] == ["histopathology", "shard"]


@pytest.fixture
def slurm(door, repository):
    """Submits to a cluster whose processes do `what`, in bash, each with its $TASK."""

    def submit(what: str, *options: str, tasks: int = 2, **variables: str):
        program(
            repository / ".venv" / "bin" / "python",
            f'TASK=$SLURM_PROCID\necho "$@" > "{door.folder}/task$TASK"\n{what}',
        )
        return door.run(
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
    )
    assert done.returncode == status, done.stderr
    calls = [call for call in door.calls() if call[0] != "squeue"]
    assert calls[0][0] == "srun"
    assert calls[0][-5:] == ["-m", "histo_jax.main", "--multihost=slurm", *OPTIONS]
    assert calls[1:] == ([REQUEUE] if again else [])
    assert done.stderr.count("srun: error: node") == sum(s != "0" for s in statuses.split())


def test_slurm_is_not_misled_by_what_the_processes_say(door, slurm):
    program(door.folder / "tee", f'sleep 0.3; exec {shutil.which("tee")} "$@"')
    done = slurm('printf "50%%\\r" >&2; printf "Exited with exit code 2\\n" >&2; exit 75', tasks=1)
    assert done.returncode == 75
    assert door.calls()[-1] == REQUEUE
    # A bar that has ended no line stands before srun's words.
    done = slurm('[ $TASK = 0 ] || exit 75; printf "50%%" >&2; exit 2', tasks=2)
    assert done.returncode == 2


@pytest.mark.parametrize(("state", "again"), [("RUNNING", True), ("COMPLETING", False), (1, True)])
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
    for name in ("histopathology", "downloads"):
        (records / name).mkdir(parents=True)
        (records / name / "shard").write_text("patches")

    def start() -> Path:
        done = slurm("exit 0", f"--records={records}", TMPDIR=str(nodes))
        assert done.returncode == 0, done.stderr
        words = (door.folder / "task1").read_text().strip()
        assert words.startswith("-m histo_jax.main --multihost=slurm --config=configs/pcam.py")
        return Path(words.partition("--config.data.tfds_dir=")[2])

    nodes.mkdir()
    copied = start()
    assert copied.is_relative_to(nodes)
    assert not (copied / "downloads").exists()
    assert (copied / "histopathology" / "shard").read_text() == "patches"
    assert "--ntasks-per-node=1" in door.calls()[0]
    # What is there is used; what was broken off is not taken for whole.
    (copied / "histopathology" / "shard").write_text("as it was")
    assert start() == copied
    assert (copied / "histopathology" / "shard").read_text() == "as it was"
    shutil.rmtree(copied)
    program(door.folder / "cp", 'mkdir "${@: -1}"; exit 1')
    assert slurm("exit 0", f"--records={records}", TMPDIR=str(nodes)).returncode == 1
    (door.folder / "cp").unlink()
    assert start() == copied
    assert (copied / "histopathology" / "shard").read_text() == "patches"
    # Other records go elsewhere.
    (records / "histopathology" / "kaggle").write_text("more")
    assert (start() / "histopathology" / "kaggle").read_text() == "more"


def test_slurm_asks_for_a_signal_in_time_and_one_process_a_node():
    text = (LAUNCH / "slurm.sbatch").read_text()
    for line in ("--ntasks-per-node=1", "--signal=USR1@120", "--requeue", "--open-mode=append"):
        assert f"\n#SBATCH {line}\n" in text


@pytest.fixture
def tpu(door, repository):
    """Starts a TPU of `workers` whose processes do `what`, in bash; $HOME ends in their number."""
    (door.folder / "vm").mkdir()
    for name in VM.split():
        (door.folder / "vm" / name).symlink_to(shutil.which(name))
    for name, text in VM_PROGRAMS.items():
        (door.folder / "vm" / name).unlink(missing_ok=True)
        program(door.folder / "vm" / name, text)
    program(
        repository / "launch" / "install.sh",
        # Two at a time would break it.
        'mkdir "$HOME/installing" || exit 3; echo "install.sh $*" >> "$HOME/calls"; sleep 0.5; '
        'mkdir -p .venv/bin runs; cp launch/what .venv/bin/python; rm -r "$HOME/installing"',
    )
    shutil.copy(LAUNCH / "tpu_worker.sh", repository / "launch")
    subprocess.run(["git", "init", "--quiet"], cwd=repository, check=True)
    subprocess.run(["git", "add", "launch/tpu_worker.sh"], cwd=repository, check=True)
    door.answer(**ACTIVE)

    def start(what, *settings, workers=1, broken=0):
        program(repository / "launch" / "what", f'echo $$ >> "$HOME/started"; {what}')
        return door.run(
            repository / "launch" / "tpu_vm.sh",
            *TPU,
            *settings,
            "--",
            *OPTIONS,
            WORKERS=str(workers),
            BROKEN=str(broken),
            HISTO_JAX_POLL_SECONDS="0.1",
        )

    start.homes = [door.folder / f"worker{index}" for index in range(2)]
    start.repository = repository
    yield start
    # Mounts stay, and a run may do so where a test has failed.
    for path in door.folder.glob("worker?/*"):
        for number in path.read_text().split() if path.name in ("mounts", "started") else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(number), signal.SIGKILL)


def test_tpu_vm_is_made_awaited_used_and_fetched(door, tpu, tmp_path):
    door.answer(**{"queued-resources describe": [1, "PROVISIONING", "ACTIVE"]})
    fetched = tmp_path / "fetched"
    (tpu.homes[1] / "bin").mkdir(parents=True)
    (tpu.homes[1] / "bin" / "gcsfuse").symlink_to(door.folder / "vm" / "other-gcsfuse")
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
    ] + ["half a line"]  # the first worker's alone
    assert (fetched / "runs" / "report.html").exists()
    calls = [call for call in door.calls() if "describe" not in call]
    assert all(call[:3] == ["gcloud", "compute", "tpus"] for call in calls)
    assert all("--zone=here" in call for call in calls)
    assert calls[0][3:5] == ["queued-resources", "create"]
    assert {"mine", "--node-id=mine", "--accelerator-type=v5litepod-16", "--spot"} <= set(calls[0])
    apt = [
        "sudo tee /usr/share/keyrings/cloud.google.asc",
        "sudo tee /etc/apt/sources.list.d/gcsfuse.list",
        *["sudo apt-get update -q"] * 2,  # the first found a lock
        "sudo apt-get -o DPkg::Lock::Timeout=600 install -qy gcsfuse",
    ]
    for home, missing in zip(tpu.homes, (apt, []), strict=True):
        copied = home / "tensorflow_datasets" / "histopathology"
        assert copied.is_dir()  # `rsync` wants it there
        assert (home / "calls").read_text().splitlines() == [
            "install.sh tpu",
            *missing,
            "gcsfuse --implicit-dirs --rename-dir-limit=100000 bucket runs",
            f"gcloud storage rsync --recursive gs://b/the records/histopathology {copied}",
        ]
        assert (home / "started").read_text().count("\n") == 1


def test_tpu_vm_installs_a_python_where_there_is_none(door, tpu):
    (door.folder / "vm" / "python3.12").unlink()
    assert tpu("exit 0").returncode == 0
    assert (
        "sudo apt-get -o DPkg::Lock::Timeout=600 install -qy python3.11-venv"
        in (tpu.homes[0] / "calls").read_text()
    )


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [(0, 0, 0), (75, 75, 75), (75, 134, 134), (2, 134, 2), (75, 2, 2), (134, 1, 1)],
)
def test_tpu_vm_passes_the_status_on(door, tpu, tmp_path, first, second, status):
    done = tpu(
        f'echo "I am $HOME"; case $HOME in *0) exit {first} ;; esac; exit {second}',
        "--workdirs=bucket",
        f"--fetch={tmp_path / 'fetched'}",
        workers=2,
    )
    assert done.returncode == status, done.stderr
    assert not [call for call in door.calls() if "create" in call]
    # What the others have said is shown where something went wrong; results are fetched anyway.
    assert (f"I am {tpu.homes[1]}" in done.stdout) == bool(status)
    assert (tmp_path / "fetched" / "runs").exists()


@pytest.mark.parametrize(("status", "told"), [(0, 1), (75, 75)])
def test_tpu_vm_says_what_it_could_not_fetch(door, tpu, tmp_path, status, told):
    door.answer(**ACTIVE, **{"scp --recurse": [1]})
    done = tpu(f"exit {status}", f"--fetch={tmp_path}")
    assert done.returncode == told
    assert "could not be fetched; the same command tries again" in done.stderr


def test_tpu_vm_starts_a_run_once_however_often_the_connection_breaks(tpu):
    for what in ("exit 2", "sleep 1; exit 2"):
        done = tpu(what, "--workdirs=bucket", workers=2, broken=1)
        assert done.returncode == 2, done.stderr
    for home in tpu.homes:
        assert (home / "started").read_text().count("\n") == 2


def wait_for(has_come: Callable[[], bool]) -> None:
    end = time.monotonic() + 40
    while not has_come():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_tpu_vm_leaves_the_run_alone_at_ctrl_c_and_follows_it_when_started_again(door, tpu):
    home = tpu.homes[0]
    with ThreadPoolExecutor() as pool:
        first = pool.submit(
            tpu, 'echo begun; until [ -e "$HOME/go" ]; do sleep 0.1; done; echo ended; exit 75'
        )
        wait_for((home / "started").exists)
        (script,) = door.started
        os.killpg(script.pid, signal.SIGINT)
        done = first.result()
        assert done.returncode == 130, done.stderr
        assert "the run goes on; the same command follows it, and --stop" in done.stderr
        # Where the state cannot be asked for, nothing is changed under the run.
        (home / "histo_jax" / "old").write_text("")
        door.answer(**ACTIVE, **{"worker.sh state": [1]})
        done = tpu("echo another")
        assert done.returncode == 1
        assert "a run is there already; start again to follow it" in done.stderr
        assert (home / "histo_jax" / "old").exists()
        door.answer(**ACTIVE)
        followed = len(door.calls())
        second = pool.submit(tpu, "echo another")
        wait_for(lambda: any("worker.sh log" in str(call) for call in door.calls()[followed:]))
        (home / "go").write_text("")
        done = second.result()
    assert done.returncode == 75
    assert done.stdout.splitlines() == ["a run is there already; following that", "begun", "ended"]
    assert (home / "started").read_text().count("\n") == 1
    assert (home / "calls").read_text().splitlines() == ["install.sh tpu"]
    # Once it has ended, the same command starts the next.
    assert tpu("echo another").stdout == "another\n"


def test_tpu_vm_stops_a_run_by_one_signal(tpu):
    home = tpu.homes[0]
    for _ in range(2):  # what the first leaves does not keep the second from being stopped
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


def test_tpu_vm_says_when_a_run_was_killed_or_does_not_answer(door, tpu):
    assert tpu("exit 0").returncode == 0
    done = tpu('kill -KILL "$PPID"; kill -KILL $$')
    assert done.returncode == 137
    door.answer(**ACTIVE, **{"worker.sh log": [1]})
    done = tpu("exit 0")
    assert done.returncode == 1
    assert "mine does not answer, see above" in done.stderr
    assert "no answer to worker.sh log" in done.stderr


def test_tpu_vm_sends_the_working_tree_and_nothing_else(tpu):
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


def test_tpu_vm_sends_a_download_without_git(tpu):
    folder, there = tpu.repository, tpu.homes[0] / "histo_jax"
    shutil.rmtree(folder / ".git")
    (folder.parent / ".git").mkdir()  # unpacked inside another repository
    for path in ("pyproject.toml", "histo_jax/__pycache__/x", "histo_jax/a.py", "mine.py", "raw/x"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("")
    assert tpu("exit 0").returncode == 0
    sent = {"launch/tpu_vm.sh", "pyproject.toml", "histo_jax/a.py", "mine.py"}
    assert all((there / path).exists() for path in sent)
    assert not (there / "raw").exists()
    assert not (there / "histo_jax" / "__pycache__").exists()


def test_tpu_vm_mounts_a_bucket_once_and_no_other_over_it(door, tpu):
    tpu.homes[0].mkdir()
    (tpu.homes[0] / "mounted").write_text("bucket")
    assert tpu("exit 0", "--workdirs=bucket").returncode == 0
    assert "gcsfuse" not in (tpu.homes[0] / "calls").read_text()
    # The program that holds a mount stays, and does not keep others from starting.
    (tpu.homes[0] / "mounted").unlink()
    (tpu.homes[0] / "bin").mkdir()
    (tpu.homes[0] / "bin" / "gcsfuse").symlink_to(door.folder / "vm" / "other-gcsfuse")
    for _ in range(2):
        assert tpu("exit 0", "--workdirs=bucket").returncode == 0
    (tpu.homes[0] / "mounted").write_text("bucket")
    done = tpu("exit 0", "--workdirs=other")
    assert done.returncode == 2
    assert "bucket is mounted as ~/histo_jax/runs, not other" in done.stderr
    done = tpu("exit 0", "--workdirs=bucket/folder")
    assert done.returncode == 2
    assert "name a bucket, not a folder in one" in done.stderr


def test_tpu_vm_wants_a_bucket_where_there_are_several_workers(door, tpu):
    done = tpu("exit 0", workers=2)
    assert done.returncode == 2
    assert done.stderr == (
        "launch/tpu_vm.sh: mine has 2 workers, and all must see the workdir: "
        "give a bucket by --workdirs\n"
    )


def test_tpu_vm_gives_up_when_gcloud_no_longer_answers(door, tpu):
    states = ["WAITING_FOR_RESOURCES", 1, 1, "PROVISIONING", *[1] * 5]
    door.answer(**{"queued-resources describe": states})
    done = tpu("exit 0")
    assert done.returncode == 1
    assert "PROVISIONING" in done.stdout
    assert done.stderr.count("no answer to queued-resources describe") == 7
    assert "launch/tpu_vm.sh: gcloud says nothing of mine, see above; mend that" in done.stderr


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
    (prepares,), (trains,) = pod["initContainers"], pod["containers"]
    command = trains["command"]
    assert f"--process_count={job['spec']['completions']}" in command
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    first = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert any(word.startswith(f"--coordinator={first}:") for word in command)
    options = [
        word.partition("=")[0] for word in [*prepares["command"], *command] if word[:2] == "--"
    ]
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
    assert prepares["image"] == trains["image"] == f"{tag}:latest"
    (program,) = (words[1] for words in steps if words[0] == "RUN")
    assert (LAUNCH.parent / Path(program).relative_to(pod["containers"][0]["workingDir"])).exists()


@pytest.fixture(scope="module")
def pod():
    _, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    return job["spec"]["template"]["spec"]


def test_kubernetes_gives_what_jax_and_nccl_need(pod):
    assert pod["shareProcessNamespace"]  # else 134 comes as 139, which the failure policy counts
    (trains,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    at = {mount["mountPath"]: volumes[mount["name"]] for mount in trains["volumeMounts"]}
    assert at["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert at["/records"]["emptyDir"] == {}  # the node's own disk
    assert "--config.data.tfds_dir=/records" in trains["command"]
    assert {"cpu", "memory"} <= set(trains["resources"]["requests"])


def test_kubernetes_prepares_once_and_copies_to_the_node(pod, tmp_path):
    (prepares,) = pod["initContainers"]
    config = next(word for word in pod["containers"][0]["command"] if word[:9] == "--config=")
    changes = {
        ".venv/bin/python": sys.executable,
        "/data": f"{tmp_path}/data",
        "/records": f"{tmp_path}/records",
        config: "--config=configs/quickstart.py",
    }
    command = prepares["command"]
    assert config in command
    for old, new in changes.items():
        command = [word.replace(old, new) for word in command]
    (tmp_path / "data" / "tensorflow_datasets" / "downloads").mkdir(parents=True)
    prepared = set()
    for node in range(2):
        (tmp_path / "records").mkdir()
        done = subprocess.run(
            [*command, "--config.data.synthetic_slides=2"],
            cwd=ROOT,
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        prepared |= {path.stat().st_mtime_ns for path in tmp_path.glob("data/**/prepared.json")}
        assert len(list((tmp_path / "records").rglob("prepared.json"))) == 1
        assert [path.name for path in (tmp_path / "records").iterdir()] == ["histopathology"]
        (tmp_path / "records").rename(tmp_path / f"node{node}")
    assert len(prepared) == 1
