"""Weights & Biases. It is a module of its own, so that only runs that log there import it, and before they fork."""

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import wandb
from pytorch_lightning.loggers import WandbLogger
from wandb.errors import Error

from nobackprop.mistakes import Mistake
from nobackprop.training.loggers import Logging, SeedLog, without_machine


@dataclass(frozen=True)
class WeightsAndBiases(Logging):
    """A Weights & Biases run of its own for each seed.

    Its id is the run's signature and the seed, so that an interrupted run goes on as the same one. Online, W&B resumes
    it. Offline, the new files replace the earlier ones. Only with `machine` does W&B learn where the run was trained:
    the name of the machine, folders, the command, the git state.
    """

    project: str
    mode: Literal["online", "offline", "disabled"]
    entity: str | None
    group: str | None
    tags: list[str]
    machine: bool

    def open(self, folder: Path, seed: int, config: dict[str, Any]) -> SeedLog:
        """Starts the seed's run. A W&B sweep gives an id to each command by itself.

        Raises Mistake where a command of a sweep has several seeds, and where W&B can't be reached.
        """
        if "WANDB_SWEEP_ID" in os.environ and len(config["seeds"]) > 1:
            raise Mistake(f"seeds: a run of a W&B sweep is one seed, such as seeds=[0]; got {config['seeds']}")
        private = {}
        if not self.machine:
            private = {"host": "", "x_disable_meta": True, "disable_git": True, "save_code": False}
            config = without_machine(config)
        logging.getLogger("wandb").setLevel(logging.ERROR)
        seed_folder = folder / f"seed{seed}"
        seed_folder.mkdir(parents=True, exist_ok=True)
        run_id = f"{folder.name.rpartition('-')[2]}-{seed}"
        for replaced in seed_folder.glob(f"wandb/offline-run-*-{run_id}"):
            shutil.rmtree(replaced)
        try:
            run = wandb.init(
                project=self.project,
                entity=self.entity,
                mode=self.mode,
                id=run_id,
                resume="allow" if self.mode == "online" else None,
                group=self.group or folder.name,
                tags=self.tags,
                name=f"{folder.name} seed {seed}",
                dir=seed_folder,
                config={**config, "seed": seed},
                settings=wandb.Settings(reinit="create_new", silent=True, console="off", **private),
            )
        except Error as e:
            raise Mistake(f"logger: {e} (logger.mode=offline needs no account)") from e
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step")
        return _Log(experiment=run)


class _Log(WandbLogger, SeedLog):
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.experiment.log(dict(metrics), step=step)  # Lightning's gives no step, and W&B needs it

    def result(self, figures: Mapping[str, float], step: int) -> None:
        self.experiment.summary.update(figures)

    def close(self, failed: bool) -> None:
        self.experiment.finish(exit_code=int(failed))
