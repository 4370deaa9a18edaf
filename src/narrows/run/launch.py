"""Start ranks on this machine, join them over gloo, and stop them all, with its name, as soon as one dies."""

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

from narrows.errors import NarrowsError

PATIENCE_SECONDS = 300.0
SETTLE_SECONDS = 1.0  # in which all that one death causes is known, so that the first of several is found


def launch(work: Callable[..., Any], ranks: int, *args: Any, patience: float = PATIENCE_SECONDS) -> list[Any]:
    """What `work(*args)` returns in each of `ranks` processes that `torch.distributed` joins, by rank.

    `work` is a function of a module; its arguments and results are plain data and numpy arrays. Each rank has the
    environment that torchrun gives, and one torch thread. Raises NarrowsError that names the rank that failed first, with
    its last words or the signal that ended it, and those that have not ended after `patience` seconds; none is left running.
    """
    if ranks < 1:
        raise NarrowsError(f"{ranks} ranks.", where="run", remedy="Give 1 or more.")
    # a server that has loaded torch once forks the ranks: each starts in the blink of an eye, and without this process's threads
    context = get_context("forkserver")
    context.set_forkserver_preload(["narrows.run.train"])
    with tempfile.TemporaryDirectory(prefix="narrows-") as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
        started = [
            context.Process(target=_rank, args=(work, args, rank, ranks, folder, pipe[1]), daemon=True)
            for rank, pipe in enumerate(pipes)
        ]
        for rank in range(ranks):
            _words(Path(folder), rank).touch()
        try:
            for process, (_, own) in zip(started, pipes, strict=True):
                process.start()
                own.close()
            return _results(started, [pipe[0] for pipe in pipes], Path(folder), time.monotonic() + patience)
        finally:
            for process in started:
                if process.pid:
                    process.kill()
                    process.join()


@contextmanager
def joined(meet: str, rank: int, ranks: int) -> Iterator[None]:
    """This process as one rank of a gloo group that meets at a URL: `file://...`, or `env://` under torchrun."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", meet, timedelta(seconds=PATIENCE_SECONDS), rank=rank, world_size=ranks)
    yield  # a rank that fails keeps its sockets until its last words are written, so that they come before the others'
    dist.destroy_process_group()


def joined_by_torchrun(work: Callable[..., Any], *args: Any) -> list[Any]:
    """What `work(*args)` returns in each rank that torchrun started, of which this process is one; the same on every rank."""
    import torch.distributed as dist

    mine = under_torchrun()
    if mine is None:
        raise NarrowsError("torchrun has not started this process.", where="run", remedy="Use `launch`.")
    found: list[Any] = [None] * mine[1]
    with joined("env://", *mine):
        dist.all_gather_object(found, work(*args))
    return found


def under_torchrun() -> tuple[int, int] | None:
    """(rank, ranks) where torchrun started this process."""
    own = os.environ.get("RANK"), os.environ.get("WORLD_SIZE"), os.environ.get("MASTER_ADDR")
    return (int(own[0]), int(own[1])) if own[0] and own[1] and own[2] else None


def _rank(work: Callable[..., Any], args: tuple[Any, ...], rank: int, ranks: int, folder: str, pipe: Any) -> None:
    words = os.open(_words(Path(folder), rank), os.O_WRONLY | os.O_APPEND)
    os.dup2(words, 2)
    tempfile.tempdir = folder  # what a rank that is stopped leaves there goes with it
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    with joined(f"file://{folder}/meet", rank, ranks):
        pipe.send(work(*args))


def _words(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.err"


def _results(started: list[Any], pipes: list[Any], folder: Path, end: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(started):
        waiting: dict[Any, int] = {}
        for rank, (process, pipe) in enumerate(zip(started, pipes, strict=True)):
            if rank not in found:
                waiting |= {pipe: rank, process.sentinel: rank}
        ready = connection.wait(list(waiting), max(0.0, end - time.monotonic()))
        if not ready:
            late = ", ".join(str(rank) for rank in range(len(started)) if rank not in found)
            raise NarrowsError("they have not ended in time.", where=f"ranks {late}", remedy="Give them a smaller run.")
        for one in ready:
            rank = waiting[one]
            if one is pipes[rank] and one.poll():
                try:
                    found[rank] = one.recv()
                except EOFError:  # it ended without a result: its sentinel tells how
                    started[rank].join()
        if any(process.exitcode for process in started):
            moment = time.monotonic() + SETTLE_SECONDS
            for process in started:
                process.join(max(0.0, moment - time.monotonic()))
            raise _death(started, folder)
    return [found[rank] for rank in range(len(started))]


def _death(started: list[Any], folder: Path) -> NarrowsError:
    """The error that names the rank that died first: what the others say comes of its silence."""

    def order(rank: int) -> tuple[bool, int]:  # one that a signal ended had no words; the others lost it
        return started[rank].exitcode > 0, _words(folder, rank).stat().st_mtime_ns

    first = min((rank for rank, process in enumerate(started) if process.exitcode), key=order)
    code = started[first].exitcode
    lines = [line for line in _words(folder, first).read_text(errors="replace").splitlines() if line.strip()]
    words = lines[-1][:300] if lines else "without a word"
    said = f"{signal.Signals(-code).name} ended it, {words}" if code < 0 else words
    return NarrowsError(f"{said}.", where=f"rank {first} of {len(started)}", remedy="The other ranks were stopped.")
