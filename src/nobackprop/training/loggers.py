"""Weights & Biases; a module of its own, so that only runs that log there import it, and before they fork."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import wandb
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import WandbLogger
from wandb.errors import Error

from nobackprop.mistakes import Mistake
from nobackprop.training.learner import Learner


def wandb_logger(
    folder: Path,
    seed: int,
    config: dict[str, Any],
    *,
    project: str,
    mode: Literal["online", "offline", "disabled"],
    entity: str | None,
    group: str | None,
    tags: list[str],
    machine: bool,
) -> WandbLogger:
    """A Weights & Biases run of its own for one seed of the run in `folder`; finish it with `experiment.finish()`.

    Its id is the run's signature and the seed, so that an interrupted run goes on as the same one: online W&B resumes
    it, offline the new files replace those of before. Only with `machine` does W&B learn where it was trained: the name
    of the machine, folders, the command, the git state. A W&B sweep gives ids itself, one a command; raises
    Mistake where a command of a sweep has several seeds.
    """
    if "WANDB_SWEEP_ID" in os.environ and len(config["seeds"]) > 1:
        raise Mistake(f"seeds: a run of a W&B sweep is one seed, such as seeds=[0]; got {config['seeds']}")
    private = {}
    if not machine:
        private = {"host": "", "x_disable_meta": True, "disable_git": True, "save_code": False}
        config = {key: value for key, value in config.items() if key not in ("paths", "launcher")}
        source = {key: value for key, value in config["dataset"]["source"].items() if key not in ("root", "cache")}
        config["dataset"] = config["dataset"] | {"source": source}
    logging.getLogger("wandb").setLevel(logging.ERROR)
    seed_folder = folder / f"seed{seed}"
    seed_folder.mkdir(parents=True, exist_ok=True)
    run_id = f"{folder.name.rpartition('-')[2]}-{seed}"
    for replaced in seed_folder.glob(f"wandb/offline-run-*-{run_id}"):
        shutil.rmtree(replaced)
    try:
        run = wandb.init(
            project=project,
            entity=entity,
            mode=mode,
            id=run_id,
            resume="allow" if mode == "online" else None,
            group=group or folder.name,
            tags=tags,
            name=f"{folder.name} seed {seed}",
            dir=seed_folder,
            config={**config, "seed": seed},
            settings=wandb.Settings(reinit="create_new", silent=True, console="off", **private),
        )
    except Error as e:
        raise Mistake(f"logger: {e} (logger.mode=offline needs no account)") from e
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step")
    return WandbLogger(experiment=run)


class EpochLog(Callback):
    """Gives each seed's W&B run that seed's epochs, one entry an epoch; mini-batches are W&B's steps.

    A resumed run gives the epochs before the interruption again: an offline run has nothing of them, an online one
    ignores what it has.
    """

    def __init__(self) -> None:
        self.given: dict[int, int] = {}  # how many epochs of each seed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Learner)
        for i, (logger, p) in enumerate(zip(trainer.loggers, pl_module.progress, strict=bool(trainer.loggers))):
            assert isinstance(logger, WandbLogger)
            for epoch in p.epochs[self.given.get(i, 0) :]:
                logger.experiment.log({**epoch, "trainer/global_step": epoch["step"]}, step=int(epoch["step"]))
            self.given[i] = len(p.epochs)

    on_train_epoch_end = on_fit_end = on_train_start  # the last, where nothing was left to train
