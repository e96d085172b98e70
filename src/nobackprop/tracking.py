"""Weights & Biases; a module of its own, so that only runs that log there import it, and before they fork."""

import logging
from pathlib import Path
from typing import Any, Literal

import wandb
from pytorch_lightning.loggers import WandbLogger


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
) -> WandbLogger:
    """A Weights & Biases run of its own for one seed of the run in `folder`; finish it with `experiment.finish()`."""
    logging.getLogger("wandb").setLevel(logging.ERROR)
    seed_folder = folder / f"seed{seed}"
    seed_folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=project,
        entity=entity,
        mode=mode,
        group=group or folder.name,
        tags=tags,
        name=f"{folder.name} seed {seed}",
        dir=seed_folder,
        config={**config, "seed": seed},
        settings=wandb.Settings(reinit="create_new", silent=True, console="off"),
    )
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step")
    return WandbLogger(experiment=run)
