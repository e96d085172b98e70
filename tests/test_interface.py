"""The package from Python: what the command does, number by number, and all public names."""

import ast
import errno
import inspect
import io
import os
import pydoc
import re
import signal
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, at_save, nobackprop as command, options, raise_killed, run_config, same_results, shown
from rich.console import Console
from torch import Tensor

import nobackprop
from nobackprop import interface
from nobackprop.mistakes import Missing, Mistake
from nobackprop.records.record import Record

SMALL: dict[str, Any] = {"logger": "none", "arch": {"hidden": [12]}, "batch_size": 8, "max_epochs": 2}
TINY = SMALL | {"max_epochs": 1, "max_steps": 3}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def own_images(n: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 10, generator=generator), torch.arange(n) % 3


# What the command does


def test_records_are_the_commands_number_by_number(tmp_path: Path) -> None:
    texts = ["rule=lra_e,bp", "dataset=digits", "seeds=2", "arch.hidden=[12]", "batch_size=8", "max_epochs=2"]
    (tmp_path / "typed").mkdir()
    ended = command("--multirun", *texts, "logger=none", cwd=tmp_path / "typed")
    assert ended.returncode == 0, ended.stderr
    runs = nobackprop.train(*texts[:2], seeds=2, **SMALL)
    assert [(r.name, r.seed) for r in runs] == [
        (f"{rule}_mlp_digits", seed) for rule in ("lra_e", "bp") for seed in (0, 1)
    ]
    assert same_results(tmp_path / "typed/runs", tmp_path / "runs") == 4
    for record in runs:
        typed = Record.read(tmp_path / "typed" / runs.folder(record) / "record.json")
        assert (record.signature, record.epochs, record.test) == (typed.signature, typed.epochs, typed.test)
        assert record == Record.read(runs.folder(record) / "record.json")


def test_a_record_says_the_command_that_does_the_same(tmp_path: Path) -> None:
    (record,) = nobackprop.train("rule=dfa", seeds=[3], **TINY)
    again = command(*record.command.replace("'", "").split()[1:], cwd=tmp_path)
    assert f"1 of 1 seeds are recorded already in runs/{record.run}" in again.stdout, again.stderr


def test_records_are_shown_from_a_folder_that_can_not_be_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(folder))

    first = nobackprop.train("rule=bp", **TINY)
    monkeypatch.setattr("nobackprop.training.config.check_writable", refuse)
    assert nobackprop.train("rule=bp", **TINY)[0] == first[0]
    with pytest.raises(Mistake, match="/runs can't be used for records, weights and checkpoints: Read-only"):
        nobackprop.train("rule=bp", seeds=2, **TINY)


def test_a_dict_is_no_override() -> None:
    wrong: Any = {"optimizer.lr": 0.1}
    with pytest.raises(Mistake, match=r"\{'optimizer.lr': 0.1\} is of type dict: an override is a text"):
        nobackprop.train("rule=bp", wrong)


def test_what_is_recorded_is_not_trained_again(capsys: pytest.CaptureFixture[str]) -> None:
    first = nobackprop.train("rule=dfa", seeds=2, **TINY)
    again = nobackprop.train("rule=dfa", "rule=dfa", seeds=3, **TINY)
    assert again[:2] == first[:]
    assert "2 of 3 seeds are recorded already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("texts", "settings"),
    [
        (["rule=dfa"], {"rule": "dfa"}),
        (["seeds=[0,4]", "l2=1e-05", "compile=true"], {"seeds": (0, 4), "l2": 1e-5, "compile": True}),
        (["dataset.flip=true", "optimizer.lr=0.5"], {"dataset": {"flip": True}, "optimizer.lr": torch.tensor(0.5)}),
        (["paths.runs='a b, [c]=d'"], {"paths.runs": "a b, [c]=d"}),
        (["paths.runs='it\\'s'"], {"paths": {"runs": "it's"}}),
        (["paths.runs='1e5'"], {"paths.runs": "1e5"}),
        (["paths.runs=~/x"], {"paths.runs": Path("~/x")}),
        (["init.forward=N0.1", "patience=null"], {"init": {"forward": "N0.1"}, "patience": None}),
        (["+experiment=debug"], {"+experiment": "debug"}),
    ],
)
def test_a_python_value_means_what_its_text_means(texts: list[str], settings: dict[str, Any]) -> None:
    words = [interface._override(key, value) for key, value in settings.items()]
    home = [text.replace("=~", f"={Path.home()}") for text in texts]
    assert interface._config(words, Console(quiet=True)) == run_config(*home)


def test_names_of_a_choice_are_several_runs() -> None:
    for rule in ("bp,dfa", ["bp", "dfa"], ("bp", "dfa")):
        jobs = list(interface._jobs([interface._override("rule", rule), "l2=0,1"]))
        assert jobs == [["rule=bp", "l2=0"], ["rule=bp", "l2=1"], ["rule=dfa", "l2=0"], ["rule=dfa", "l2=1"]]


def test_tuned_settings_are_taken_and_announced_as_by_the_command(console: Console) -> None:
    texts = ["rule=mdfa", "arch=allconv", "dataset=cifar10_jpeg"]
    cfg = interface._config(texts, console)
    assert cfg == run_config(*texts) != run_config(*texts, "tuned=none")
    assert "/conf/tuned/mdfa_allconv_cifar10_jpeg_adamw.yaml; tuned=none keeps the defaults" in shown(console)


@pytest.mark.parametrize(
    ("texts", "settings", "told"),
    [
        (["rul=bp"], {}, r"there is no key rul; choose from: .*Did you mean rule\?"),
        ([], {"max_epoch": 3}, r"there is no key max_epoch; choose from: .*Did you mean max_epochs\?"),
        ([], {"rule": "dfaa"}, r"there is no rule=dfaa; choose one of .*Did you mean dfa\?"),
        ([], {"rule": "dfa", "optimizer": {"lr": -1}}, "optimizer: lr is -1: it must not be below 0"),
        ([], {"max_epochs": "3"}, "max_epochs: Input should be a valid integer, got '3'"),
        ([], {"rule": object()}, "rule is of type object; allowed: a text, a number, True, False, None, and lists"),
        ([], {"rule": None}, "rule=null: a run needs a rule; choose one of block_dfa, bp"),
        (["bp"], {}, "'bp' is no key=value"),
        (["optimizer.lr=interval(0.1,1)"], {}, "an interval is for a search"),
        (["launcher=slurm"], {}, "launcher, .sweep and dry_run are the command's alone"),
        (["dry_run=true"], {}, "launcher, .sweep and dry_run are the command's alone"),
        (["tuned=nothing"], {}, "no such tuned settings, 'nothing'"),
        (["dataset=given"], {}, "dataset=given is for images in the memory of a Python process"),
        ([], {"data": own_images()}, "data and test belong together"),
        (
            ["dataset=mnist"],
            {"data": own_images(), "test": own_images()},
            "dataset=mnist: the images are those of data",
        ),
        (["rule=bp,mdfa", "init=orthogonal"], {}, "rule MDFA needs non-negative weights"),
        (["trainer=ddp"], {"data": own_images(), "test": own_images()}, "trainer=ddp starts processes of their own"),
    ],
)
def test_a_mistake_is_a_sentence_before_anything_is_trained(
    texts: list[str], settings: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(Mistake, match=told):
        nobackprop.train(*texts, **{"logger": "none", **settings})
    assert not list(tmp_path.iterdir())


def test_ctrl_c_ends_with_a_checkpoint_and_the_same_call_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = SMALL | {"checkpoint_minutes": 0.0}
    with monkeypatch.context() as patched:
        at_save(patched, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            nobackprop.train("rule=dfa", **settings)
    nobackprop.train("rule=dfa", **settings)
    assert re.search(r"1/1\): goes on from step \d+", capsys.readouterr().out)


def test_torch_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("high")
    try:
        nobackprop.train("rule=dfa", **TINY)
        assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (2, "high")
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])
    assert sys.argv[0] != "nobackprop"


# Images of one's own


def test_images_in_memory_train_as_those_of_a_file_do() -> None:
    digits = nobackprop.Digits().load()
    train, test = ((images.pixels.numpy(), images.labels) for images in (digits.train, digits.test))
    given = nobackprop.train("rule=dfa", data=train, test=test, seeds=2, **SMALL)
    files = nobackprop.train("rule=dfa", dataset="digits", seeds=2, **SMALL)
    for a, b in zip(given, files, strict=True):
        assert (a.epochs, a.test, a.seed) == (b.epochs, b.test, b.seed)
        assert a.signature != b.signature
    assert given[0].run.startswith("dfa_mlp_given-")


def test_seeds_side_by_side_and_a_killed_run_give_the_same_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images: dict[str, Any] = {"data": own_images(900), "test": own_images(50, seed=1)}
    settings = SMALL | images | {"checkpoint_minutes": 0.0, "dataset.normalize": True}
    nobackprop.train("rule=dfa", seeds=3, **settings, workers=1, paths={"runs": "one"})
    nobackprop.train("rule=dfa", seeds=3, **settings, workers=3, paths={"runs": "several"})
    assert same_results(tmp_path / "one", tmp_path / "several") == 3
    with monkeypatch.context() as patched:
        at_save(patched, 4, raise_killed)
        with pytest.raises(BaseException, match=r"^$"):
            nobackprop.train("rule=dfa", seeds=[0], **settings, paths={"runs": "killed"})
    assert list(tmp_path.glob("killed/*/checkpoints/*/*.ckpt"))
    (record,) = nobackprop.train("rule=dfa", seeds=[0], **settings, paths={"runs": "killed"})
    assert (tmp_path / "one" / record.run).is_dir()
    assert record.epochs == Record.read(tmp_path / "one" / record.run / "seed0" / "record.json").epochs


def test_a_net_of_ones_own_images_is_loaded_and_takes_floats() -> None:
    test = own_images(50, seed=1)
    runs = nobackprop.train("rule=bp", data=own_images(), test=test, seeds=2, **SMALL)
    trained = nobackprop.load(runs.folder(runs[1]))
    images = nobackprop.Images(test[0].view(50, 1, 1, 10), test[1])
    assert trained.evaluate(images) == pytest.approx(runs[1].test)
    with pytest.raises(Mistake, match=r"this net takes floats of shape \(N, 1, 1, 10\)"):
        trained.predict(images.pixels.byte())


# What came of it


def test_results_are_shown_in_one_call_each() -> None:
    runs = nobackprop.train("rule=bp", "l2=0,0.01", seeds=2, **TINY)
    names = ["bp_mlp_digits l2=0.0", "bp_mlp_digits l2=0.01"]
    summary = runs.summary()
    assert [*summary.index] == names
    accuracies = [r.test["accuracy"] for r in runs[:2] if r.test]
    assert summary.loc[names[0], "test"] == pytest.approx(sum(accuracies) / 2)
    assert summary.loc[names[0], "deviation"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
    assert [*summary["seeds"]] == [2, 2]
    assert len(runs.table()) == len(runs) == 4
    console = Console(file=io.StringIO(), width=120)
    console.print(runs)
    for text in (repr(runs), runs._repr_html_(), shown(console)):
        assert all(name in text for name in names)
        assert f"{sum(accuracies) / 2:.2%}" in text
    figure: Any = runs.plot()
    ranked = [tick.get_text() for tick in figure.axes[1].get_yticklabels()]
    assert ranked == [*summary.sort_values("test", ascending=False, kind="stable").index]
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_a_run_that_diverged_is_shown_too() -> None:
    runs = nobackprop.train("rule=bp", "arch.activation=relu", "optimizer=sgd", "optimizer.lr=1e30", **TINY)
    assert runs[0].test is None
    assert "nan" not in repr(runs).lower()
    assert runs.plot().axes


def test_runs_is_a_table_of_a_folder(tmp_path: Path) -> None:
    trained = nobackprop.train("rule=bp,dfa", **TINY)
    table = nobackprop.runs()
    assert table.equals(nobackprop.runs(tmp_path / "runs"))
    assert {*table["signature"]} == {record.signature for record in trained}
    assert [*table["config.rule._target_"]] == ["nobackprop.rules.bp.BP", "nobackprop.rules.dfa.DFA"]
    assert [*table["test.accuracy"]] == [r.test["accuracy"] for r in trained if r.test]
    (trained.folder(trained[0]) / "record.json").write_text("{")
    with pytest.warns(UserWarning, match="no valid run record"):
        assert len(nobackprop.runs()) == 1


def test_runs_of_an_empty_folder_are_none_and_a_missing_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert nobackprop.runs("empty").empty
    with pytest.raises(Missing, match="missing does not exist: give a folder of runs"):
        nobackprop.runs("missing")


# Names


def test_importing_the_package_imports_next_to_nothing() -> None:
    heavy = ["torch", "numpy", "hydra", "pytorch_lightning", "pandas", "rich", "pydantic", "matplotlib"]
    code = f"import sys, nobackprop; dir(nobackprop); print({{*sys.modules}} & {{*{heavy}}})"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"


def test_type_checkers_see_the_names_that_there_are() -> None:
    tree = ast.parse(Path(nobackprop.__file__).read_text())
    seen = {
        alias.asname: (node.module or "").removeprefix("nobackprop.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    rules = {name: module for name, module in nobackprop._MODULES.items() if module.startswith("rules.")}
    assert seen | rules == nobackprop._MODULES  # a new rule need not be named there


def test_dir_and_help_show_every_public_name(configured: Any) -> None:
    assert dir(nobackprop) == nobackprop.__all__
    text = pydoc.plain(pydoc.render_doc(nobackprop))
    for name in nobackprop.__all__:
        public = getattr(nobackprop, name)
        assert re.search(rf"^    (class )?{name}\(", text, re.MULTILINE), name
        generated = is_dataclass(public) and (public.__doc__ or "").startswith(f"{name}(")
        assert public.__doc__ and not generated, name  # noqa: PT018
    rules = {type(configured("rule", name)).__name__ for name in options("rule")}
    assert rules <= {*nobackprop.__all__}
    with pytest.raises(AttributeError, match="module 'nobackprop' has no attribute 'trian'"):
        _ = nobackprop.trian


@pytest.mark.parametrize("name", nobackprop.__all__)
def test_all_that_a_public_class_has_of_its_own_is_documented(name: str) -> None:
    public = getattr(nobackprop, name)
    if inspect.isclass(public):
        declared = {name for kind in public.__mro__ for name in vars(kind).get("__annotations__", ())}
        for own, member in vars(public).items():
            if own in declared:  # by the class above, whose docstring says what it is
                continue
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if inspect.isfunction(function) and not own.startswith("_"):
                assert inspect.getdoc(getattr(public, own)), f"{name}.{own}"


def blocks(path: str) -> list[str]:
    """The lines of Python on a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


def test_the_readmes_lines_run(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("README.md")
    quick = {"max_epochs=20": "max_epochs=2, logger='none'"}
    assert all(code.count(text) == 1 for text in quick)
    for text, instead in quick.items():
        code = code.replace(text, instead)
    exec(code, {})
    assert "lra_e_mlp_digits" in capsys.readouterr().out
    assert Path("curves.png").exists()


def test_the_pages_lines_on_own_images_and_modules_run() -> None:
    here: dict[str, Any] = {}
    (images,), modules = blocks("docs/how_to/dataset.md"), blocks("docs/how_to/own_loop.md")[:2]
    assert images.count("seeds=3") == 1
    exec(images.replace("seeds=3", "seeds=3, logger='none', max_epochs=2"), here)
    assert len(here["runs"]) == 3
    for module in modules:
        exec(module, here)
    assert here["logits"].shape == (50, 3)
    assert here["module"][0].weight.grad.abs().sum() > 0
    for net in blocks("docs/how_to/net.md"):
        exec(net, here)
        assert here["net"].shapes[-1] == (10,)
