"""What is made subject by subject: by worker processes, in a folder that gets its name when it is complete."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from oasis_vq.files import write_json


def run_tasks(
    function: Callable, tasks: Iterable[tuple], num_workers: int, warm_up: Callable[[], Any] | None = None
) -> Iterator[Any]:
    """Yield function(*task) for each task, in order, computed in worker processes.

    Tasks are taken from the iterable only as they are needed: few are in memory, however many there are.

    Args:
        function: a module's function: workers are spawned, and find it by its name.
        tasks: arguments of the function.
        num_workers: processes; 1 works in this one. With more, a script needs the usual `if __name__ == "__main__":`.
        warm_up: called once in each worker before its first task.

    Raises:
        MemoryError: a worker was ended, as systems do that run out of memory.
    """
    if num_workers <= 1:
        for task in tasks:
            yield function(*task)
        return
    # Spawned, since forking a process in which TensorFlow runs threads can hang.
    context = multiprocessing.get_context("spawn")
    options = {"initializer": _start_worker, "initargs": (signal.getsignal(signal.SIGINT) != signal.SIG_IGN, warm_up)}
    try:
        with ProcessPoolExecutor(num_workers, context, **options) as pool, _ending(pool):
            waiting = deque()
            for task in tasks:
                with _deaf():  # it may start a worker
                    waiting.append(pool.submit(function, *task))
                if len(waiting) > 2 * num_workers:  # one under way and one ready for each
                    yield _result(waiting.popleft())
            while waiting:
                yield _result(waiting.popleft())
    except BrokenExecutor as error:
        raise MemoryError(
            f"One of {num_workers} processes ended. If it did not say why above, perhaps for want of memory: try "
            "--workers 1."
        ) from error


def _result(future: Future) -> Any:
    """Return what a worker has made. A wait without end would miss a Ctrl-C that comes as it begins, or elsewhere."""
    while wait([future], timeout=0.5).not_done:
        pass
    return future.result()


@contextlib.contextmanager
def _ending(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Let workers leave what they have not begun at an error; end them on Ctrl-C, which new ones do not hear."""
    others = set(multiprocessing.active_children())
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
        pool.shutdown(cancel_futures=True)  # and waits: what the pool does meanwhile fails when Python exits, in words
        raise


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Hear Ctrl-C only afterwards; processes that are started meanwhile do not: it would end their imports in words."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(True))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]) if hasattr(signal, "pthread_sigmask") else None
    try:
        yield
    finally:
        if mask is not None:  # Windows has none, and starts processes that hear what they like
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
        if heard:
            signal.raise_signal(signal.SIGINT)


def _start_worker(is_interruptible: bool, warm_up: Callable[[], Any] | None) -> None:
    """End this process when its parent ends, which would leave it waiting for ever, and on Ctrl-C without a word."""
    if is_interruptible:  # not as in a script's background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    if warm_up:
        warm_up()


def make_once(folder: Path, what: str, record: str, parameters: dict, fill: Callable[[], None]) -> Path:
    """Return a folder that is complete, made with these parameters: `fill` makes it if it is not there, or empty.

    Args:
        folder: to be made.
        what: it is made of, for errors.
        record: name of the JSON file in it that holds the parameters.
        parameters: plain JSON values.
        fill: by `start_or_continue` and `finish`; of several processes one calls it, and the others wait.

    Raises:
        FileExistsError: the folder holds something else, or another one cannot take its place.
        ValueError: as `partial_of`.
        RuntimeError: a worker is told to make the folder that it is started for.
    """
    if not _is_finished(folder, what, record, parameters):
        if getattr(multiprocessing.current_process(), "_inheriting", False):  # it imports the script it was started by
            raise RuntimeError('A script that works in several processes needs `if __name__ == "__main__":`.')
        with alone(folder):
            if not _is_finished(folder, what, record, parameters):  # by the one that this waited for
                fill()
    return folder


@contextlib.contextmanager
def alone(folder: Path, *, waits: bool = True) -> Iterator[None]:
    """Keep other processes from making a folder while this one does; a process that is killed keeps none.

    Args:
        folder: to be made.
        waits: whether to wait for another process that makes it.

    Raises:
        OSError: another process makes it, and this one is not to wait.
        ValueError: as `partial_of`.
    """
    file = partial_of(folder).with_name(f".{folder.name}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if not file.exists():  # the other is done with it, or no file can be made here, as in /proc
            try:
                file.touch()
            except OSError as error:
                text = f"{file.parent} cannot be written ({error.strerror}): choose another folder."
                raise OSError(text) from None
        if not waits:
            raise OSError(f"Another process makes {folder}: wait for it, or take another name (--out).") from None
        print(f"note: another process makes {folder}: waiting for it", flush=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        print(f"note: nothing can be locked here ({error}): let no other process make {folder}")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes it by itself
            file.unlink()
        lock.release()


def _is_finished(folder: Path, what: str, record: str, parameters: dict) -> bool:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        if folder.is_symlink() or os.path.ismount(folder):
            raise FileExistsError(f"{folder} is a link or a place where a disk is mounted. Name a folder in it.")
        return False
    found = read_record(folder / record)
    if found == parameters:
        return True
    there = f"one made with {_differences(found, parameters)}" if found else f"files without {record}"
    raise FileExistsError(
        f"{what} is written to a new or empty folder. Received: {folder}, which holds {there}. "
        "Name another folder, or remove this one."
    )


def _differences(found: dict, asked: dict) -> str:
    """Return in what parameters differ, such as 'seed: 3, not 4; other files: a.nii is new'; of files three at most."""
    texts = []
    for name, now in asked.items():
        before = found.get(name)
        if before != now and isinstance(now, dict):
            before = before or {}
            keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
            told = [
                f"{key} {'is new' if key not in before else 'has changed' if key in now else 'is gone'}"
                for key in keys[:3]
            ]
            texts.append(f"other {name}: {', '.join(told)}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else ""))
        elif before != now:
            texts.append(f"{name}: {json.dumps(before)}, not {json.dumps(now)}")
    return "; ".join(texts)


def start_or_continue(folder: Path, record: str, parameters: dict, parts: list[str]) -> Path:
    """Return `<folder>.partial`, in which a folder grows: as an interrupted call left it, or new with empty `parts`.

    Raises:
        FileExistsError: there is such a folder, with something else in it.
    """
    partial = partial_of(folder)
    found = read_record(partial / record)
    if found != parameters:
        if found:
            print(f"note: what is in {partial} was begun with other parameters, and is made anew")
        elif any(path.is_file() for path in partial.rglob("*")):
            raise FileExistsError(f"{folder.name} grows in {partial}, where something else is. Move it away.")
        shutil.rmtree(partial, ignore_errors=True)
        for part in parts:
            (partial / part).mkdir(parents=True)
        write_json(partial / record, parameters)
    for leftover in partial.rglob(".*.partial"):
        leftover.unlink()
    return partial


def partial_of(folder: Path) -> Path:
    """Return where a folder grows.

    Raises:
        ValueError: it has no name that it could be given when it is complete: it is `.`, `..` or `/`.
    """
    if folder.name in ("", ".."):
        raise ValueError(f"What is made gets a folder of its own name, such as ./new (--out). Received: {folder}.")
    return folder.with_name(folder.name + ".partial")


def finish(partial: Path, folder: Path) -> None:
    """Give the complete folder its name, when all of it is on the disk."""
    if hasattr(os, "sync"):  # Windows has none
        os.sync()
    if folder.is_dir():  # empty: a rename wants it gone on Windows
        folder.rmdir()
    partial.replace(folder)


def read_record(file: Path) -> dict | None:
    """Return what a JSON file says, or None where there is none to be read."""
    try:
        return json.loads(file.read_text())
    except (OSError, json.JSONDecodeError):
        return None
