"""The configs of a sweep's jobs are those that Hydra itself composes, and composed quickly."""

from collections.abc import Iterator
from typing import Any

import pytest
from conftest import CONF
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from hydra_plugins.nobackprop_launcher import JobConfigs


class Counting:
    """Hydra's loader, and how often it composes."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.composed = loader, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def load_sweep_config(self, *args: Any) -> DictConfig:
        self.composed += 1
        return self.loader.load_sweep_config(*args)


@pytest.fixture
def hydras() -> Iterator[Counting]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        yield Counting(hydra.config_loader)


def master(loader: Any) -> DictConfig:
    return loader.load_configuration("train", [], RunMode.MULTIRUN)


JOBS = [
    ["rule=bp", "optimizer.lr=0.1"],
    ["rule=bp", "optimizer.lr=0.2", "seeds=[0,4]", "paths.runs=elsewhere"],
    ["rule=bp", "optimizer={lr:0.3}", "+optimizer.amsgrad=true", "~l2"],
    ["rule=pepita", "dataset=mnist", "schedule=multistep", "schedule.milestones=[3,5]"],
    ["+experiment=debug", "rule=dfa", "max_epochs=3"],
    ["rule=mdfa", "arch=allconv", "dataset=cifar10_jpeg", "tuned=none"],
    ["rule=mdfa", "arch=allconv", "dataset=cifar10_jpeg"],
    ["+experiment=compare/mlp", "rule=bp", "dataset=digits", "+tuned@_global_=compare/mlp_bp", "optimizer.lr=9"],
]


def test_jobs_are_composed_as_hydra_does(hydras: Counting) -> None:
    quick, config = JobConfigs(hydras), master(hydras)
    for _ in range(2):  # the second time from what was composed
        for overrides in JOBS:
            expected = hydras.loader.load_sweep_config(config, list(overrides))
            runtime = expected.hydra.runtime
            with open_dict(expected):
                del expected["hydra"]
            job = quick.load_sweep_config(config, list(overrides))
            assert job.hydra.runtime.choices == runtime.choices
            assert job.hydra.runtime.config_sources == runtime.config_sources
            with open_dict(job):
                del job["hydra"]
            assert OmegaConf.to_container(job) == OmegaConf.to_container(expected)
            assert OmegaConf.is_struct(job)


def test_jobs_with_the_same_choices_are_composed_once(hydras: Counting) -> None:
    quick, config = JobConfigs(hydras), master(hydras)
    rates = [
        quick.load_sweep_config(config, [f"rule={r}", f"optimizer.lr={i}"]) for r in ("bp", "fa") for i in range(9)
    ]
    assert [job.optimizer.lr for job in rates] == [*range(9), *range(9)]
    assert hydras.composed == 2


@pytest.mark.parametrize(
    "wrong", ["rule.bta=1", "rul=bp", "rule=bpp", "+optimizer.lr=3", "~optimizer.nothing", "max_epochs@a=3"]
)
def test_a_mistyped_job_is_refused_as_by_hydra(hydras: Counting, wrong: str) -> None:
    quick, config = JobConfigs(hydras), master(hydras)
    with pytest.raises(HydraException) as expected:
        hydras.loader.load_sweep_config(config, ["rule=bp", wrong])
    with pytest.raises(HydraException) as told:
        quick.load_sweep_config(config, ["rule=bp", wrong])
    assert str(told.value) == str(expected.value)
