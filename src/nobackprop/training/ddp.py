"""Data-parallel training: several processes, each with a device of its own, share every mini-batch.

The processes start from equal weights. Each steps with the mean gradient of all, so their weights stay equal. Only rank
0 writes and prints.
"""

import atexit
import logging
import os
import pickle
import traceback
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from lightning_fabric.plugins.environments.lightning import find_free_network_port
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.strategies import DDPStrategy, Strategy
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException, ProcessExitedException

from nobackprop.training.stopping import StopSignals, how_it_ended

logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # that it ends the others need not be told


class DataParallel(DDPStrategy):
    """Lightning's DDP without its wrapper around a module, which reduces autograd's gradients. There are none here.

    It does not start processes, either. `start` or a cluster does.
    """

    def configure_ddp(self) -> None:
        pass

    def _configure_launcher(self) -> None:
        pass


def mean_over_processes(grads: Mapping[str, Tensor], strategy: Strategy, dtype: torch.dtype) -> dict[str, Tensor]:
    """The mean of each gradient over all processes, computed in `dtype`, in one message, since each takes time."""
    numbers = torch.cat([g.flatten().to(dtype) for g in grads.values()])
    numbers = strategy.reduce(numbers, reduce_op="mean")
    parts = numbers.split([g.numel() for g in grads.values()])
    return {name: part.view(g.shape) for (name, g), part in zip(grads.items(), parts, strict=True)}


class SameWeights(Callback):
    """Makes sure that all processes have the same weights, and the same names and numbers in `task`.

    It checks when training starts and after each epoch. Raises RuntimeError where they differ.
    """

    def __init__(self, *task: object) -> None:
        self.task = task

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size == 1:
            return
        digest = blake2b(repr(self.task).encode(), digest_size=8)
        for p in pl_module.parameters():
            digest.update(p.cpu().contiguous().numpy().tobytes())
        if digest.digest() != trainer.strategy.broadcast(digest.digest()):
            raise RuntimeError(
                f"process {trainer.global_rank} has other weights or images than process 0: on every machine, use the "
                "same versions, the same images, and paths.runs in a folder that all of them share"
            )

    on_train_epoch_end = on_train_start


def environment(parallel: bool) -> ClusterEnvironment:
    """What has started this process: torchrun, SLURM's srun, or nothing that a run on one device needs to know of.

    Lightning is kept from putting a cluster's job back into the queue.
    """
    if parallel and TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    return SLURMEnvironment(auto_requeue=False) if parallel and SLURMEnvironment.detect() else LightningEnvironment()


def to_start(strategy: Strategy) -> int:
    """How many processes are still to be started: 0 where a cluster, torchrun or `start` has started them."""
    if not isinstance(strategy, DataParallel):
        return 0
    environment = strategy.cluster_environment
    assert environment is not None
    alone = isinstance(environment, SLURMEnvironment) and environment.world_size() == 1
    return strategy.num_processes if alone or not environment.creates_processes_externally else 0


def connect(strategy: Strategy) -> None:
    """Lets this process `broadcast` to the others of its run, until it ends. Does nothing where there are none yet."""
    if isinstance(strategy, DataParallel) and not to_start(strategy):
        strategy.setup_environment()
        if torch.distributed.get_backend() == "gloo":  # Lightning leaves groups of NCCL's
            atexit.register(_leave)  # a process that ends with its group's threads at work is aborted now and then


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def start(function: Callable[..., None], processes: int, *args: Any) -> None:
    """Runs `function(*args)` in so many new processes on this machine, ranks 0, 1, ..., until all are done.

    If one fails, the others are ended and its exception is raised. If one was killed or ended by itself,
    ChildProcessError is raised. If this process is asked to end, it asks them, and raises Stopped when they have ended.
    """
    errors = torch.multiprocessing.get_context("spawn").SimpleQueue()
    args = find_free_network_port(), errors, function, args
    spawned: Any = torch.multiprocessing.spawn(_as_rank, args, processes, join=False)
    first: list[Exception] = []  # the error that made the others fail, too
    with StopSignals() as signals:
        try:
            while not spawned.join(timeout=0.5):
                if not first and not errors.empty():  # a process may wait for its long message to be read
                    first.append(errors.get())
                if signals.signum is not None:
                    for process in spawned.processes:
                        process.terminate()
        except ProcessException as e:
            signals.check()
            if isinstance(e, ProcessExitedException):
                how = how_it_ended(e.exit_code)
                raise ChildProcessError(
                    f"process {e.error_index} of a run {how}; the same command goes on from the last checkpoint"
                ) from None
            if not first and not errors.empty():
                first.append(errors.get())
            raise (first or [e])[0] from None
        finally:
            for process in spawned.processes:
                process.kill()
        signals.check()


def _as_rank(rank: int, port: int, errors: Any, function: Callable[..., None], args: Sequence[Any]) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.pop("SLURM_NTASKS", None)  # a task of SLURM's that starts processes stands for none of them
    try:
        function(*args)
    except Exception as error:
        errors.put(portable(error))
        raise


def portable(error: Exception) -> Exception:
    """The error with a note of its traceback, for another process; a RuntimeError where it can't be pickled."""
    note = f"In a process of its own:\n{traceback.format_exc()}"
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(note)
    return error
