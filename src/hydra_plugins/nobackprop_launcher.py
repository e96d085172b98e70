"""Hands the jobs of a `--multirun` to `nobackprop.sweeps`. Hydra finds launchers in this namespace alone."""

import sys
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, ClassVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from nobackprop.mistakes import Mistake


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

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        if not isinstance(hydra_context.config_loader, JobConfigs):
            hydra_context.config_loader = JobConfigs(hydra_context.config_loader)  # pyright: ignore - for its sweeper, too
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs a batch of jobs. The value of each is its mean best validation accuracy, None if it failed."""
        from rich.console import Console

        from nobackprop import lean

        lean.start()  # before all that imports Lightning
        from nobackprop import launchers, sweeps
        from nobackprop.cli import announce_tuned

        console = Console()
        jobs: list[launchers.Job] = []
        tuned: dict[str, bool] = {}  # whether Hydra found a file of that name
        for overrides in job_overrides:
            config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
            runtime: Any = config.hydra.runtime
            if runtime.choices.tuned not in tuned:
                tuned[runtime.choices.tuned] = announce_tuned(runtime, config, console)
            with open_dict(config):
                del config["hydra"]
            same = {text.lower() for text in (*sys.argv, "dry_run=true")}  # Hydra writes False for false
            varied = [text for text in filter_overrides(overrides) if text.lower() not in same]
            jobs.append(launchers.Job(" ".join(varied) or "the run", config))
        if len(set(tuned.values())) > 1:
            text = "some jobs have such settings and others not; tuned=none compares them with the same"
            console.print(text, soft_wrap=True)
        if any(job.config.launcher != jobs[0].config.launcher for job in jobs):
            raise Mistake("launcher: one for the whole sweep, not one a job")
        trials = OmegaConf.select(self.config, "hydra.sweeper.n_trials")
        if jobs[0].config.dry_run and trials:
            console.print(f"the first {len(jobs)} of a search of {trials} trials:", highlight=False)
        outcomes = sweeps.run(jobs, launchers.launcher_of(jobs[0].config), console, jobs[0].config.dry_run)
        SweepLauncher.failed += sum(outcome.state == "failed" for outcome in outcomes)
        if jobs[0].config.dry_run:
            raise SystemExit(min(SweepLauncher.failed, 1))
        if trials and (queued := sum(outcome.state == "queued" for outcome in outcomes)):
            raise Mistake(
                f"a search goes on from what its trials came to, and {queued} are left to the cluster: use "
                "launcher.wait=true, or give the same command again when they have ended"
            )
        return [
            JobReturn(overrides=overrides, cfg=job.config, status=JobStatus.COMPLETED, _return_value=outcome.objective)
            for overrides, job, outcome in zip(job_overrides, jobs, outcomes, strict=True)
        ]
