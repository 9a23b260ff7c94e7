"""Everything about tensor parallelism that N GPUs of one host can show, in one command, in little time.

    python -m benchmarks.tensor_parallel_all --gpus 4 --budget 540 --out benchmarks/results

runs benchmarks/tensor_parallel.py for every model on N, N/2, … 1 GPUs, and the tests marked gpu of tests/sharding.
First a process for each compiles, all at once, which needs cores more than GPUs. They end, so that none keeps memory
from those that measure; these find the programs in the persistent cache, one after another, most GPUs first, and those
that leave GPUs free have others measured beside them. A process that says nothing for --stall seconds is ended and
started again once with NCCL_LAUNCH_MODE=GROUP. Nothing begins after --budget seconds;
the same command goes on where it ended (--work holds results so far, logs and compiled programs).

Writes OUT/tensor_parallel.json, OUT/tensor_parallel_logs.tar.gz, and a table to stdout.
--rehearse runs it all on CPU devices, small.
"""

import argparse
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import tarfile
import threading
import time

from benchmarks.tensor_parallel_table import merged, table

SMALLEST = {"llama-70b-m": 2, "llama-30b-m": 1, "llama-3.1-70b": 2, "tiny-gqa": 1}
"""The fewest GPUs that a model is tried on."""
_RETRY = {"NCCL_LAUNCH_MODE": "GROUP"}
_REHEARSAL = (
    "--dtype float32 --adapters 2,3 --seqs 4,1 --profile-seqs 4 --context 16 --requests 4 --lengths 4,16 "
    "--max-seqs 4 --step-tokens 8 --spend 0.01 --served-seconds 0"
).split()


class Job:
    """A command that is run on some GPUs, after it has been run with `first` as further arguments, where there are any.
    state: waiting (not started), compiling, ready, running, over.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        gpus: tuple[int, ...],
        work: Path,
        env: dict[str, str],
        first: tuple[str, ...] = (),
    ):
        self.name, self.command, self.gpus, self.env, self.first = name, command, gpus, env, first
        self.log = work / f"{name}.log"
        self.state, self.heard, self.retried, self.tuned = "waiting", 0.0, False, False
        self.process: subprocess.Popen[str] | None = None
        self.listener = threading.Thread()

    def start(self) -> None:
        """The first run, beside others: compiles, and ends the job where there is no second."""
        self._spawn("compiling", self.first, XLA_PYTHON_CLIENT_PREALLOCATE="false")  # others are on the same GPUs

    def go(self, seconds: float, **more: str) -> None:
        """The run that measures."""
        self._spawn("running", ("--budget", f"{max(seconds, 1):.0f}"), **more)

    def _spawn(self, state: str, arguments: tuple[str, ...], **more: str) -> None:
        env = {"NCCL_NVLS_ENABLE": "0", **os.environ, **self.env, **more}  # NVLink multicast stays off
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self.gpus))
        self.process = subprocess.Popen(
            [*self.command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
            start_new_session=True,
        )
        self.state, self.heard = state, time.monotonic()
        self.listener = threading.Thread(target=self._listen, args=(self.process,), daemon=True)
        self.listener.start()

    def _listen(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout
        with self.log.open("a") as log, process.stdout as lines:
            for line in lines:
                self.heard = time.monotonic()
                log.write(line)
                log.flush()
                self.tuned = self.tuned or line.strip() == "tuned"
        process.wait()
        if process is self.process:
            compiled = self.state == "compiling" and bool(self.first) and process.returncode == 0
            self.state = "ready" if compiled else "over"

    def end(self) -> None:
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # of its own session, so nothing else is in the group
            self.process.wait()
        if self.process:
            self.listener.join(timeout=10)
        self.state = "over"

    def last_line(self) -> str:
        lines = self.log.read_text().strip().splitlines() if self.log.exists() else []
        return lines[-1][:200] if lines else ""


def measurements(args: argparse.Namespace) -> list[Job]:
    """The most GPUs first. Of processes on fewer GPUs, each next one gets the GPUs with the least to do."""
    jobs, load = [], [0.0] * args.gpus
    for tp in args.sizes:
        for model in args.models:
            if tp < SMALLEST[model]:
                continue
            gpus = min((tuple(range(i, i + tp)) for i in range(args.gpus - tp, -1, -tp)), key=lambda b: load[b[0]])
            for gpu in gpus:
                load[gpu] += (1.0 if "70b" in model else 0.5) / tp
            path = args.work / f"{model}_tp{tp}.json"
            command = [sys.executable, "-u", "-m", "benchmarks.tensor_parallel", "--tp", str(tp)]
            command += ["--model", model, "--json", str(path), "--lock", str(args.work / f"lock_{gpus[0]}")]
            command += _REHEARSAL if args.rehearse else []
            env = {"JAX_COMPILATION_CACHE_DIR": str(args.work / "jax")}
            if args.rehearse:
                env |= {"JAX_NUM_CPU_DEVICES": str(tp), "JAX_PLATFORMS": "cpu"}
            name = f"{model}_tp{tp}"
            jobs.append(Job(name, command + args.more, gpus, args.work, env, first=("--compile-only",)))
    return jobs


def tests(args: argparse.Namespace) -> list[Job]:
    """The tests on GPUs, side by side: logits of a random model, golden tokens of either layout. Those that passed
    before are not run again.
    """
    golden = "tests/sharding/test_golden_gpu_sharded.py"
    chosen = {
        "logits": ["tests/sharding/test_hopper_kernels.py"],
        "s-lora": [golden, "-k", "s-lora"],
        "comm-free": [golden, "-k", "comm-free"],
        "auto": [golden, "-k", "auto"],
    }
    found = []
    for name, which in chosen.items():
        done = args.work / f"tests_{name}.log"
        if not (done.exists() and " passed" in done.read_text()):
            command = [sys.executable, "-m", "pytest", "-s", "-v", "-m", "gpu", "-p", "no:cacheprovider", *which]
            found.append(Job(f"tests_{name}", command, tuple(range(args.gpus)), args.work, {}))
    return found


def run(args: argparse.Namespace) -> dict[str, str]:
    """Runs all jobs. Returns what became of those that did not end well."""
    begin = time.monotonic()
    left = lambda: args.budget - (time.monotonic() - begin)  # noqa: E731
    jobs, checks, notes = measurements(args), tests(args) if args.tests else [], {}
    for job in jobs:
        job.start()
    while left() > 0 and any(job.state != "over" for job in jobs + checks):
        time.sleep(0.2)
        if all(job.tuned or job.state == "over" for job in jobs) or left() < args.budget - 60:
            for job in (j for j in checks if j.state == "waiting"):
                job.start()  # not sooner: it would disturb the tuning
        busy = {gpu for job in jobs if job.state == "running" for gpu in job.gpus}
        compiling = [j for j in jobs + checks if j.state in ("waiting", "compiling")]
        if compiling and left() > args.budget - args.compile_seconds:
            continue  # it would disturb what is measured
        for job in (j for j in compiling if j in checks):
            notes[job.name] = "was still running when measuring began"
            job.end()
        for job in (j for j in jobs if j.state == "ready"):
            free = not busy & set(job.gpus)
            busy |= set(job.gpus)  # whoever comes first waits for its GPUs, and nobody takes them meanwhile
            if free and left() > args.least:
                say(begin, f"{job.name} on GPUs {job.gpus}")
                job.go(min(left() - 5, args.turn))
        for job in (j for j in jobs if j.state == "running" and time.monotonic() - j.heard > args.stall):
            notes[job.name] = f"said nothing for {args.stall:.0f} s after: {job.last_line()}"
            say(begin, f"{job.name} {notes[job.name]}")
            job.end()
            if not job.retried and left() > args.least + 60:
                job.retried = True
                job.go(min(left() - 5, args.turn), **_RETRY)
    for job in jobs + checks:
        if job.state != "over":
            notes.setdefault(job.name, f"was {job.state} when the time was up: {job.last_line()}")
        elif job.process and job.process.returncode:
            notes.setdefault(job.name, f"ended with {job.process.returncode}: {job.last_line()}")
        job.end()
    say(begin, "over")
    return notes


def say(begin: float, text: str) -> None:
    print(f"[{time.monotonic() - begin:5.0f} s] {text}", flush=True)


def write(args: argparse.Namespace, notes: dict[str, str]) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    results = merged(sorted(args.work.glob("*_tp*.json")))
    for log in sorted(args.work.glob("tests_*.log")):
        lines = [x for x in log.read_text().splitlines() if " GPUs, " in x or " passed" in x or "FAILED" in x]
        results.setdefault("tests", {})[log.stem] = lines
        print("\n".join(line[:200] for line in lines))
    results["notes"] = notes
    (args.out / "tensor_parallel.json").write_text(json.dumps(results, indent=1) + "\n")
    with tarfile.open(args.out / "tensor_parallel_logs.tar.gz", "w:gz") as tar:
        for log in args.work.glob("*.log"):
            tar.add(log, log.name)
    print(table(results["runs"]))
    for name, note in notes.items():
        print(f"{name}: {note}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument(
        "--sizes", type=lambda t: [int(n) for n in t.split(",")], help="numbers of GPUs; all by default"
    )
    every = [m for m in SMALLEST if m != "tiny-gqa"]
    parser.add_argument("--models", type=lambda t: [m for m in t.split(",") if m], default=every, help='"": only tests')
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all")
    parser.add_argument("--turn", type=float, default=200.0, help="seconds that one process is measured at most")
    parser.add_argument("--least", type=float, default=40.0, help="seconds left at least when a turn begins")
    parser.add_argument("--stall", type=float, default=100.0, help="seconds of silence that end a process in its turn")
    parser.add_argument("--compile-seconds", type=float, default=200.0, help="after which measuring begins anyway")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "slora-jax" / "tensor_parallel")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--resume", type=Path, help="a tensor_parallel.json of another machine of the same kind to go on from"
    )
    parser.add_argument("--no-tests", dest="tests", action="store_false")
    parser.add_argument("--rehearse", action="store_true", help="on CPU devices, a tiny model")
    parser.add_argument("more", nargs="*", help="after --: more options of benchmarks.tensor_parallel")
    args = parser.parse_args(argv)
    args.sizes = args.sizes or [n for n in (8, 4, 2, 1) if n <= args.gpus]
    if args.rehearse:
        args.models = ["tiny-gqa"]
    if unknown := set(args.models) - set(SMALLEST):
        raise SystemExit(f"there is no model {unknown.pop()!r}; choose from {', '.join(SMALLEST)}")
    args.work.mkdir(parents=True, exist_ok=True)
    for result in json.loads(args.resume.read_text())["runs"] if args.resume else ():
        path = args.work / f"{result['model']}_tp{result['tp']}.json"
        if not path.exists():
            path.write_text(json.dumps(result))
    write(args, run(args))


if __name__ == "__main__":
    main()
