"""robosuite's simulators, shared by all environments of a process, or by several worker processes.

Either kind of pool takes rows and gives rows back: it holds no episode, so nothing depends on which of them, or how
many, did the work. The first number of a row is its model, the rest is `Simulator.save`'s.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import weakref
from multiprocessing.connection import Connection, Pipe
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmark.envs.robosuite_fast import FastSimulator, why_stock
from benchmark.envs.robosuite_simulator import Simulator

_PARENT_CHECK = 2.0  # seconds between a waiting worker's looks at whether its parent is still there
_PROGRAM = (
    "import sys; from multiprocessing.connection import Connection; from benchmark.envs.workers import serve;"
    "serve(Connection(int(sys.argv[1])), int(sys.argv[2]))"
)
_PATIENCE = 5.0  # seconds given to a worker to end by itself


class Models(NamedTuple):
    """The models of one task: `Simulator`'s arguments, and how many constructor seeds 0, 1, ... there are."""

    env_name: str
    env_kwargs: dict[str, Any]
    keys: tuple[str, ...]
    variants: int
    stock: bool = False  # whether stock robosuite steps them also where `FastSimulator` could


class Sizes(NamedTuple):
    """Numbers in one observation, one action and one row of state."""

    observation: int
    action: int
    state: int
    why_stock: str = ""  # what `FastSimulator` does not cover of these models; '' where stock robosuite is not needed


class Steps(NamedTuple):
    """What a chunk did to n rows: (n, O) last observations, (n, H) rewards, (n,) steps taken, (n, S) states."""

    observations: NDArray[np.float64]
    rewards: NDArray[np.float64]
    steps: NDArray[np.int64]
    states: NDArray[np.float64]


class SimulatorPool:
    """One simulator per model, built when first needed, in this process."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._simulators: dict[int, Simulator | FastSimulator] = {}

    def sizes(self) -> Sizes:
        """The sizes that all models share. Raises ValueError where robosuite refuses the models' arguments."""
        simulator = self._simulator(0)
        reason = why_stock(simulator.env)
        return Sizes(simulator.observation_size, simulator.action_size, 1 + simulator.state_size, reason)

    def reset(self, seeds: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Start the episodes of (n,) seeds: first observations (n, O) and states (n, S)."""
        sizes = self.sizes()
        observations = np.empty((len(seeds), sizes.observation))
        states = np.empty((len(seeds), sizes.state))
        for row, seed in enumerate(seeds.tolist()):
            model = seed % self._models.variants
            simulator = self._simulator(model)
            observations[row] = simulator.reset(seed % 2**32)
            states[row, 0] = model
            simulator.save(states[row, 1:])
        return observations, states

    def step(self, states: NDArray[np.float64], actions: NDArray[np.float32], remaining: NDArray[np.int64]) -> Steps:
        """Execute (n, H, A) actions from (n, S) states, in each row at most `remaining` (n,), at least 1, of them."""
        count, horizon, _ = actions.shape
        observations = np.empty((count, self._simulator(0).observation_size))
        rewards = np.zeros((count, horizon))
        steps = np.minimum(remaining, horizon)
        after = states.copy()
        for row in range(count):
            simulator = self.load(states[row])
            observations[row], rewards[row, : steps[row]] = simulator.play(actions[row, : steps[row]])
            simulator.save(after[row, 1:])
        return Steps(observations, rewards, steps, after)

    def load(self, state: NDArray[np.float64]) -> Simulator | FastSimulator:
        """The simulator of a row's model, holding that row."""
        simulator = self._simulator(int(state[0]))
        simulator.load(state[1:])
        return simulator

    def _simulator(self, model: int) -> Simulator | FastSimulator:
        if model not in self._simulators:
            env_name, env_kwargs, keys, _, stock = self._models
            simulator = Simulator(env_name, env_kwargs, keys, model)
            fast = not stock and not why_stock(simulator.env)
            self._simulators[model] = FastSimulator(simulator) if fast else simulator
        return self._simulators[model]


class WorkerGroup:
    """Worker processes with a `SimulatorPool` each; rows are cut into one slice per worker.

    The processes end when the group is no longer referred to, or the process that made it ends.

    Raises:
        RuntimeError: from every method, once a worker has died or failed.
        ValueError: where robosuite refuses the models' arguments.
    """

    def __init__(self, models: Models, workers: int) -> None:
        self._workers = [_start_worker() for _ in range(workers)]
        self._stop = weakref.finalize(self, _stop_workers, self._workers)
        self._failure = ""
        for _, connection in self._workers:
            with contextlib.suppress(OSError):  # a worker that is already gone: the first call says so
                connection.send(models)

    @property
    def failed(self) -> bool:
        """Whether no call can succeed any more."""
        return bool(self._failure)

    def sizes(self) -> Sizes:
        """See `SimulatorPool.sizes`; every worker builds its first model."""
        return self._call("sizes", [()] * len(self._workers))[0]

    def reset(self, seeds: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """See `SimulatorPool.reset`."""
        observations, states = zip(*self._call("reset", self._slices(seeds)), strict=True)
        return np.concatenate(observations), np.concatenate(states)

    def step(self, states: NDArray[np.float64], actions: NDArray[np.float32], remaining: NDArray[np.int64]) -> Steps:
        """See `SimulatorPool.step`."""
        parts = zip(*self._call("step", self._slices(states, actions, remaining)), strict=True)
        return Steps(*(np.concatenate(part) for part in parts))

    def _slices(self, *arrays: NDArray[Any]) -> list[tuple[NDArray[Any], ...]]:
        """The arrays' rows in as many slices as there are workers with something to do."""
        pieces = min(len(self._workers), max(len(arrays[0]), 1))
        return list(zip(*(np.array_split(array, pieces) for array in arrays), strict=True))

    def _call(self, method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        """Call a method of the first workers' pools, one tuple of arguments each; their answers in order."""
        if self._failure:
            raise RuntimeError(self._failure)
        answers = []
        number = 0
        try:
            for number, given in enumerate(arguments):
                self._workers[number][1].send((method, given))
            for number in range(len(arguments)):
                answers.append(self._workers[number][1].recv())
        except (EOFError, OSError) as error:
            status = self._status(number)
            self._fail(f"robosuite worker {number + 1} of {len(self._workers)} ended without an answer ({status})")
            raise RuntimeError(self._failure) from error
        except BaseException:  # an interrupt: what is still to come would answer the wrong call
            self._fail("robosuite workers were interrupted")
            raise
        for number, answer in enumerate(answers):
            if isinstance(answer, Exception):
                self._fail(f"robosuite worker {number + 1} of {len(self._workers)} failed: {answer!r}")
                raise answer if isinstance(answer, ValueError) else RuntimeError(self._failure)
        return answers

    def _status(self, number: int) -> str:
        """How a worker ended."""
        try:
            return f"status {self._workers[number][0].wait(_PATIENCE)}"
        except subprocess.TimeoutExpired:
            return "its process still runs"

    def _fail(self, message: str) -> None:
        self._failure = message
        self._stop()


_pools: weakref.WeakValueDictionary[str, SimulatorPool] = weakref.WeakValueDictionary()
_groups: weakref.WeakValueDictionary[str, WorkerGroup] = weakref.WeakValueDictionary()


def shared_pool(models: Models) -> SimulatorPool:
    """This process's pool of these models; it goes with the last reference to it."""
    key = repr(models)
    pool = _pools.get(key)
    if pool is None:
        pool = _pools[key] = SimulatorPool(models)
    return pool


def shared_group(models: Models, workers: int) -> WorkerGroup:
    """This process's group of so many workers for these models; it ends with the last reference to it."""
    key = repr((models, workers))
    group = _groups.get(key)
    if group is None or group.failed:
        group = _groups[key] = WorkerGroup(models, workers)
    return group


def _start_worker() -> tuple[subprocess.Popen[bytes], Connection]:
    """A fresh Python process that runs `serve`, and our end of the connection to it.

    Not multiprocessing's own processes: those import the program's main module, and with it PyTorch.
    """
    ours, theirs = Pipe()
    single = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "NUMBA")}
    environment = os.environ | single | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        env=environment,
    )
    theirs.close()
    return process, ours


def _stop_workers(workers: list[tuple[subprocess.Popen[bytes], Connection]]) -> None:
    """Hang up, and end those who do not go."""
    for _, connection in workers:
        connection.close()
    for process, _ in workers:
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def serve(connection: Connection, parent: int) -> None:
    """A worker's whole life: answer the calls of a `WorkerGroup` until it hangs up or its process `parent` is gone."""
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # they reach all processes of a terminal or a job; the parent decides
        signal.signal(number, signal.SIG_IGN)
    pool: SimulatorPool | None = None
    try:
        while True:
            while not connection.poll(_PARENT_CHECK):
                if os.getppid() != parent:
                    return
            message = connection.recv()
            if pool is None:
                pool = SimulatorPool(message)
                continue
            method, arguments = message
            try:
                answer: Any = getattr(pool, method)(*arguments)
            except Exception as error:
                answer = error
            connection.send(answer)
    except (EOFError, OSError):
        return  # the group hung up
