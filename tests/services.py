"""Real services for the tests, private to them, on loopback; tools/install_services.sh installs their programs."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from tests.processes import wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")

_CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A job that is requeued waits until the credential of its last start is void, two minutes by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
JobRequeue=1
MaxArraySize={max_array_size}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
# A node that does not answer is down soon, a job that does not end is killed soon.
SlurmdTimeout=5
KillWait=5
BatchStartTimeout=1
CompleteWait=0
MinJobAge=300
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=low Nodes={host} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_seconds}
PartitionName=high Nodes={host} PriorityTier=2 PreemptMode=OFF
"""


def find_missing() -> list[str]:
    """Return the programs that a Slurm needs and that are not installed."""
    return [program for program in PROGRAMS if _which(program) is None]


class Slurm:
    """A cluster of one node, this machine: munged, slurmctld, slurmd; use as a context manager.

    Two partitions share the node: `high` preempts the jobs of `low`, which are told, go on for `grace_seconds` at most,
    and are requeued. Every process that it or a job of it started is ended at its end.

    Attributes:
        environment: What its clients need in theirs.
    """

    def __init__(self, cpus: int = 2, max_array_size: int = 101, grace_seconds: int = 10) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # the path of a socket has to be short
        self.folder.chmod(0o755)  # munged wants its socket to be within everybody's reach
        self.config = self.folder / "slurm.conf"
        self.environment = {"SLURM_CONF": str(self.config)}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        (self.folder / "key").write_bytes(os.urandom(128))
        (self.folder / "key").chmod(0o600)
        self.config.write_text(
            _CONFIG.format(
                folder=self.folder,
                host=_get_host(),
                user=_get_user(),
                ports=_find_ports(2),
                cpus=cpus,
                max_array_size=max_array_size,
                grace_seconds=grace_seconds,
            )
        )

    def __enter__(self) -> Slurm:
        try:
            files = (f"--{name}-file={self.folder}/munge.{name}" for name in ("pid", "log", "seed"))
            socket_file = self.folder / "munge.socket"
            self._start("munged", "--foreground", f"--socket={socket_file}", f"--key-file={self.folder}/key", *files)
            wait_until(socket_file.is_socket, "munged listens", 30)
            self.start_controller()
            self.start_node()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        with suppress(subprocess.SubprocessError):
            self.call("scancel", "--quiet", "--full", "--user", _get_user(), timeout=10)
        for name in list(self.daemons):
            self._kill(name)
        wait_until(lambda: not self._kill_processes(self.list_processes()), "all its processes end", 30)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_controller(self) -> None:
        """Start slurmctld, the one that takes the jobs, and wait until it answers."""
        self._start("slurmctld", "-D", "-f", str(self.config))
        wait_until(lambda: self._answers("slurmctld"), "slurmctld answers")

    def kill_controller(self) -> None:
        """End slurmctld as `kill -9` does."""
        self._kill("slurmctld")

    def start_node(self) -> None:
        """Start slurmd, the one that runs the jobs, and wait until the node is up."""
        self._start("slurmd", "-D", "-f", str(self.config))
        wait_until(lambda: self._answers("slurmd"), "the node is up")

    def kill_node_daemon(self) -> None:
        """End slurmd as `kill -9` does; the node's jobs go on."""
        self._kill("slurmd")

    def crash_node(self) -> None:
        """Lose the node, its jobs too, as by a power failure; Slurm is told of it, which saves it half a minute."""
        self._kill("slurmd")
        wait_until(lambda: not self._kill_processes(filter(_is_of_a_job, self.list_processes())), "its jobs end", 30)
        self.call("scontrol", "update", f"NodeName={_get_host()}", "State=DOWN", "Reason=lost")

    def call(self, *command: str, timeout: float = 60.0) -> str:
        """Return what one of Slurm's commands prints."""
        environment = os.environ | self.environment
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, timeout=timeout
        ).stdout

    def submit(self, script: str, *options: str) -> str:
        """Submit a shell script of a line and return the job's id."""
        return self.call("sbatch", "--parsable", "--output=/dev/null", *options, f"--wrap={script}").strip()

    def list_jobs(self) -> dict[str, str]:
        """Return the states of the jobs in the queue by id, elements of arrays each by its own."""
        lines = self.call("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)

    def wait_until_empty(self, seconds: float = 240.0) -> None:
        """Wait until no job is in the queue any more."""
        wait_until(lambda: not self.list_jobs(), "the queue is empty", seconds)

    def cancel_all(self) -> None:
        """End all jobs, and wait until the queue is empty."""
        self.call("scancel", "--quiet", "--full", "--user", _get_user())
        self.wait_until_empty()

    def list_processes(self) -> list[int]:
        """Return the daemons and whatever they started: those that were given this cluster's configuration."""
        mark = f"SLURM_CONF={self.config}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # gone in the meantime
                if mark in path.read_bytes().split(b"\0") and int(path.parent.name) != os.getpid():
                    found.append(int(path.parent.name))
        return found

    def read_logs(self) -> str:
        """Return what the daemons have logged."""
        return "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(self.folder.glob("*.log")))

    def _start(self, *command: str) -> None:
        program = _which(command[0])
        assert program is not None
        with (self.folder / f"{command[0]}.out.log").open("ab") as log:
            self.daemons[command[0]] = subprocess.Popen(
                (program, *command[1:]),
                env=os.environ | self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _kill(self, name: str) -> None:
        if daemon := self.daemons.pop(name, None):
            daemon.kill()
            daemon.wait()

    def _kill_processes(self, pids: Iterable[int]) -> list[int]:
        """Kill processes and return them: those that they have forked meanwhile are found next time."""
        killed = list(pids)
        for pid in killed:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return killed

    def _answers(self, name: str) -> bool:
        if (status := self.daemons[name].poll()) is not None:
            raise RuntimeError(f"{name} ended with status {status}:\n{self.read_logs()}")
        command: Sequence[str] = ("scontrol", "ping") if name == "slurmctld" else ("sinfo", "-h", "-o", "%T")
        try:
            answer = self.call(*command, timeout=10)
        except subprocess.SubprocessError:
            return False
        return "UP" in answer if name == "slurmctld" else {"idle", "mixed", "allocated"}.issuperset(answer.split())


def _get_host() -> str:
    return socket.gethostname().partition(".")[0]


def _get_user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _find_ports(n: int) -> list[int]:
    """Return free ports, which nothing keeps free until they are used."""
    sockets = [socket.socket() for _ in range(n)]
    try:
        for entry in sockets:
            entry.bind(("127.0.0.1", 0))
        return [entry.getsockname()[1] for entry in sockets]
    finally:
        for entry in sockets:
            entry.close()


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def _is_of_a_job(pid: int) -> bool:
    with suppress(OSError):
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        return b"SLURM_JOB_ID=" in environment or Path(f"/proc/{pid}/comm").read_text() == "slurmstepd\n"
    return False
