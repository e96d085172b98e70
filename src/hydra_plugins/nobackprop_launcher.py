"""Hands the jobs of a `--multirun` to `nobackprop.sweeps`. Hydra finds launchers in this namespace alone."""

import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from nobackprop.cli import announce_mode, announce_tuned, answered, tuned_files
from nobackprop.mistakes import Mistake, about_files, check_writable


class JobConfigs:
    """Hydra's loader of configs, for many jobs: it takes a tenth of a second to compose the choices of groups.

    So they are composed once for all jobs that share them, and of Hydra's own config only `runtime` is kept. What jobs
    set beside groups is set in a copy.
    """

    def __init__(self, loader: Any) -> None:
        self.loader, self.composed = loader, {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        groups, values = [], []
        for override in OverridesParser.create().parse_overrides(sweep_overrides):
            chosen = self.loader.repository.group_exists(override.key_or_group)
            (groups if chosen and not isinstance(override.value(), dict) else values).append(override)
        key = tuple(override.input_line for override in groups)
        if key not in self.composed:
            composed = self.loader.load_sweep_config(master_config, list(key))
            runtime = OmegaConf.to_container(composed.hydra.runtime)
            with open_dict(composed):
                del composed["hydra"]
                composed["hydra"] = {"runtime": runtime}
            self.composed[key] = composed
        config = deepcopy(self.composed[key])
        self.loader._apply_overrides_to_config(values, config)
        return config


class SweepLauncher(Launcher):
    """Hydra's launcher for every choice of conf/launcher."""

    failed: ClassVar[int] = 0  # jobs, of all batches

    @answered
    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Raises Mistake where the folder of the runs, in which Hydra leaves a file, can't be written to, and for empty
        batches.
        """
        if not isinstance(hydra_context.config_loader, JobConfigs):
            hydra_context.config_loader = JobConfigs(hydra_context.config_loader)  # pyright: ignore - for its sweeper, too
        self.context, self.config = hydra_context, config
        if (most := OmegaConf.select(config, "hydra.sweeper.max_batch_size")) is not None and most < 1:
            raise Mistake(f"hydra.sweeper.max_batch_size is {most}: write how many jobs at a time, 1 or more, or null")
        if isinstance(runs := OmegaConf.select(config, "paths.runs"), str):
            folder = Path(runs).expanduser()
            with about_files(config):
                check_writable(folder)
            config.hydra.sweep.dir = str(folder)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs a batch of jobs. The value of each is its mean best validation accuracy, None if it failed."""
        configs = [self.context.config_loader.load_sweep_config(self.config, list(job)) for job in job_overrides]
        objectives = self._run(job_overrides, configs)
        return [
            JobReturn(overrides=overrides, cfg=config, status=JobStatus.COMPLETED, _return_value=objective)
            for overrides, config, objective in zip(job_overrides, configs, objectives, strict=True)
        ]

    @answered
    def _run(self, job_overrides: Sequence[Sequence[str]], configs: Sequence[DictConfig]) -> list[float | None]:
        from rich.console import Console

        console = Console()
        tuned: dict[str, bool] = {}  # whether Hydra found a file of that name
        for config in configs:
            runtime: Any = config.hydra.runtime
            if runtime.choices.tuned not in tuned:
                used = tuned_files(runtime)
                announce_tuned(used, config, console)
                tuned[runtime.choices.tuned] = "tuned" in used
            with open_dict(config):
                del config["hydra"]
        if len(set(tuned.values())) > 1:
            text = "some jobs have such settings and others not; tuned=none compares them with the same"
            console.print(text, soft_wrap=True)
        announce_mode(configs[0], console)
        if any(config.launcher != configs[0].launcher for config in configs):
            raise Mistake("launcher: one for the whole sweep, not one a job")
        dry_run, trials = configs[0].dry_run, OmegaConf.select(self.config, "hydra.sweeper.n_trials")
        if dry_run and trials:
            console.print(f"the first {len(configs)} of a search of {trials} trials:", highlight=False)
        from nobackprop import quick_start

        quick_start.start()  # before all that imports Lightning
        from nobackprop.sweeps import sweep  # torch takes seconds to import
        from nobackprop.sweeps.jobs import Job, launcher_of

        same = {text.lower() for text in (*sys.argv, "dry_run=true")}  # Hydra writes False for false
        jobs = []
        for overrides, config in zip(job_overrides, configs, strict=True):
            varied = [text for text in filter_overrides(overrides) if text.lower() not in same]
            jobs.append(Job(" ".join(varied) or "the run", config))
        outcomes = sweep.run(jobs, launcher_of(configs[0]), console, dry_run)
        SweepLauncher.failed += sum(outcome.state == "failed" for outcome in outcomes)
        if dry_run:
            raise SystemExit(min(SweepLauncher.failed, 1))
        if trials and (queued := sum(outcome.state == "queued" for outcome in outcomes)):
            raise Mistake(
                f"a search goes on from what its trials came to, and {queued} are left to the cluster: use "
                "launcher.wait=true, or give the same command again when they have ended"
            )
        return [outcome.objective for outcome in outcomes]
