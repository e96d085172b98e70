"""The command and the package as a user meets them: from a checkout, from a wheel, with a mistyped key."""

import os
import re
import signal
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONF, ROOT, SMALL, interrupt, nobackprop, options, run_config, small, until

from nobackprop.core.rule import Rule


def test_a_wheel_trains_outside_the_checkout(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site, work = tmp_path / "site", tmp_path / "work"
    zipfile.ZipFile(wheel).extractall(site)
    work.mkdir()
    names = {str(path.relative_to(site / "nobackprop/conf")) for path in (site / "nobackprop/conf").rglob("*.yaml")}
    assert names == {str(path.relative_to(CONF)) for path in CONF.rglob("*.yaml")}
    shown = nobackprop("rule=dfa", "--info", "searchpath", cwd=work, path=site)
    assert str(site / "nobackprop/conf") in shown.stdout
    ended = nobackprop("rule=dfa", "max_epochs=1", "logger=none", "arch.hidden=[8]", cwd=work, path=site)
    assert ended.returncode == 0, ended.stderr
    assert "dfa_mlp_digits" in ended.stdout
    (record,) = work.glob("runs/dfa_mlp_digits-*/seed0/record.json")
    assert '"commit":null' in record.read_text()  # the wheel is in nobody's repository


def test_an_editable_install_finds_its_configs_from_anywhere(tmp_path: Path) -> None:
    shown = nobackprop("rule=dfa", "--cfg", "job", cwd=tmp_path)
    assert "_target_: nobackprop.rules.dfa.DFA" in shown.stdout


def test_a_mistake_in_one_job_of_a_multirun_does_not_stop_the_others(tmp_path: Path) -> None:
    jobs = ["--multirun", "rule=mdfa,dfa", "init=orthogonal", "max_epochs=1", "logger=none", "arch.hidden=[8]"]
    ended = nobackprop(*jobs, cwd=tmp_path)
    assert ended.returncode == 1
    assert "1/2 rule=mdfa: failed: rule MDFA needs non-negative weights" in ended.stdout
    assert "2/2 rule=dfa: finished" in ended.stdout
    assert "1 failed, 1 finished" in ended.stdout
    assert "Traceback" not in ended.stdout + ended.stderr
    assert len(list(tmp_path.glob("runs/dfa_mlp_digits-*/seed0/record.json"))) == 1
    ended = nobackprop(*jobs[:1], "rule=dfa,bp", *jobs[2:], "--dry-run", cwd=tmp_path)
    assert ended.returncode == 0
    assert "1/2 rule=dfa: is recorded already" in ended.stdout
    assert "1 of 2 would run" in ended.stdout
    ended = nobackprop("--multirun", "batch_size=0,50", *jobs[3:], "--dry-run", cwd=tmp_path)
    assert "1/2 batch_size=0: failed: batch_size: Input should be greater than 0, got 0" in ended.stdout
    assert "1 of 2 would run" in ended.stdout
    ended = nobackprop("rule=mdfa", "init=orthogonal", "--dry-run", cwd=tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.startswith("nobackprop: rule MDFA needs non-negative weights")


def test_ctrl_c_ends_the_command_with_130_and_the_same_command_goes_on(tmp_path: Path) -> None:
    overrides = ["max_epochs=100000", "logger=none", "arch.hidden=[8]", "checkpoint_minutes=0"]
    command = [sys.executable, "-m", "nobackprop", "--multirun", "rule=bp,dfa", *overrides]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        until(lambda: list(tmp_path.glob("runs/*/checkpoints/*/*.ckpt")))
        process.send_signal(signal.SIGINT)
        shown = process.communicate(timeout=100)[0]
    assert process.returncode == 130
    assert "stopped; the same command goes on from step" in shown
    assert "2 stopped" in shown


def test_a_wrong_key_of_a_launcher_is_told_before_anything_runs(tmp_path: Path) -> None:
    ended = nobackprop("--multirun", "launcher=processes", "launcher.workers=two", "logger=none", cwd=tmp_path)
    assert ended.returncode == 1
    assert ended.stderr == "nobackprop: launcher.workers: Input should be a valid integer, got 'two'\n"
    assert not ended.stdout


def test_a_sweep_in_batches_of_no_jobs_is_refused(tmp_path: Path) -> None:
    ended = nobackprop("-m", "rule=bp,fa", "hydra.sweeper.max_batch_size=0", "logger=none", cwd=tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.startswith("nobackprop: hydra.sweeper.max_batch_size is 0: write how many jobs at a time")
    assert len(ended.stderr.splitlines()) == 1


def test_a_warning_for_the_user_is_a_sentence_without_a_place_in_the_code(tmp_path: Path) -> None:
    cfg = small(tmp_path / "runs", "rule=bp")
    last = interrupt(cfg)[-1]
    last.write_bytes(last.read_bytes()[:1000])
    ended = nobackprop("rule=bp", *SMALL, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith("nobackprop: checkpoint runs/bp_mlp_digits-")
    assert line.endswith("until these seeds are recorded")


def test_paths_are_those_of_the_folder_where_the_command_was_typed(tmp_path: Path) -> None:
    runs = "x [red] a=b, c"
    small = ["rule=bp", "max_steps=1", "logger=none", f"paths.runs='{runs}'"]
    for printed in ("records and weights: ", "1 of 1 seeds are recorded already in "):
        ended = nobackprop(*small, "hydra.job.chdir=true", cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr
        assert f"{printed}{runs}/bp_mlp_digits-" in ended.stdout
    assert len(list(tmp_path.glob("*/*/seed0/record.json"))) == 1
    ended = nobackprop(*small, "hydra.job.chdir=true", "hydra.run.dir=other", cwd=tmp_path)
    assert ended.stderr.startswith("nobackprop: hydra.job.chdir: paths are those of the folder where the command was")


def test_tuned_settings_are_announced(tmp_path: Path) -> None:
    image = ["dataset=cifar10_jpeg", "rule=mdfa", "arch=allconv", "paths.data=."]
    ended = nobackprop(*image, cwd=tmp_path)
    assert "/conf/tuned/mdfa_allconv_cifar10_jpeg_adamw.yaml; tuned=none" in ended.stdout
    assert ended.stderr.startswith("nobackprop: cifar10_jpeg: no file")
    ended = nobackprop("rule=bp", "tuned=compare/mlp_bp", "--dry-run", "logger=none", cwd=tmp_path)
    assert "/conf/tuned/compare/mlp_bp.yaml; tuned=none" in ended.stdout
    searched = ["+experiment=compare/mlp", "rule=bp", "dataset=digits", "--dry-run", "logger=none"]
    ended = nobackprop(*searched, "+tuned@_global_=compare/mlp_bp", cwd=tmp_path)
    assert "/conf/tuned/compare/mlp_bp.yaml\n" in ended.stdout
    ended = nobackprop(*searched, "+tuned@_global_=compare/mlp_bp", "optimizer.lr=9", cwd=tmp_path)
    assert "/mlp_bp.yaml, but for optimizer.lr, set by an experiment or the command\n" in ended.stdout


def test_tuned_settings_of_ones_own_are_announced_too(tmp_path: Path) -> None:
    (tmp_path / "own" / "tuned").mkdir(parents=True)
    for name in ("bp_mlp_digits_adamw", "mine"):
        (tmp_path / "own" / "tuned" / f"{name}.yaml").write_text("# @package _global_\noptimizer:\n  lr: 0.5\n")
    own = ["--config-dir", "own", "rule=bp", "--dry-run", "logger=none"]
    assert f"{tmp_path}/own/tuned/bp_mlp_digits_adamw.yaml; tuned=none" in nobackprop(*own, cwd=tmp_path).stdout
    assert f"{tmp_path}/own/tuned/mine.yaml; tuned=none" in nobackprop(*own, "tuned=mine", cwd=tmp_path).stdout
    ended = nobackprop("--config-dir=own", "rule=bp,fa", "-m", "--dry-run", "logger=none", cwd=tmp_path)
    assert "some jobs have such settings and others not; tuned=none compares them with the same" in ended.stdout
    assert "2 of 2 would run" in ended.stdout


def test_a_users_mistake_ends_in_one_sentence(tmp_path: Path) -> None:
    ended = nobackprop("rule=mdfa", "init=orthogonal", cwd=tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.startswith("nobackprop: rule MDFA needs non-negative weights")
    assert len(ended.stderr.splitlines()) == 1


def test_the_version_names_the_commit_of_a_checkout(tmp_path: Path) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    shown = nobackprop("--version", cwd=tmp_path).stdout
    assert re.fullmatch(rf"nobackprop \d+\.\d+\.\d+, commit {head[:7]}( with edits)?\n", shown)


def test_the_help_fits_two_screens_and_has_every_group_and_key_with_its_comment(tmp_path: Path) -> None:
    lines = nobackprop("--help", cwd=tmp_path).stdout.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 100
    told = re.sub(r"\s+", " ", " ".join(lines))
    yaml = (CONF / "train.yaml").read_text()
    cfg = run_config()
    for key in [*(key for key in cfg if key != "paths"), "paths.data", "paths.runs", "tuned"]:
        name = str(key).rpartition(".")[2]
        (comment,) = re.findall(rf"^ *(?:- |- optional )?{name}:(?!$).*? # (.*)", yaml, re.MULTILINE)
        assert re.search(rf" {re.escape(str(key))}=\S+ {re.escape(comment)}", told), key
        if (CONF / name).is_dir() and name != "tuned":
            choices = told.partition(f"{comment}: ")[2]
            assert choices.startswith(", ".join(options(name)))
    for setting in ("debug", "nets/mnist", "lra_e/(8)", "+sweep=", "--hydra-help", "docs/tutorial.md"):
        assert setting in told
    (tmp_path / "own" / "rule").mkdir(parents=True)
    (tmp_path / "own" / "rule" / "zebra.yaml").write_text("# Stripes.\n_target_: mine.Zebra\nstripes: 3\n")
    assert "zebra" in nobackprop("--config-dir", "own", "--help", cwd=tmp_path).stdout
    ended = nobackprop("--config-dir=own", "rule=zebra", "--help", cwd=tmp_path)
    assert ended.stdout == "rule=zebra\n# Stripes.\n  stripes: 3\n"
    assert "there is no rule=zebr; choose one of" in nobackprop("rule=zebr", "--help", cwd=tmp_path).stderr


def test_the_help_answers_without_torch(tmp_path: Path) -> None:
    code = "import sys; from nobackprop.cli import main; sys.argv = ['nobackprop', '--help']; main(); "
    code += "print({'torch', 'pydantic', 'pytorch_lightning', 'wandb'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ended.stdout.endswith("set()\n")


def test_bash_completes_keys_and_choices(tmp_path: Path) -> None:
    code = 'eval "$(nobackprop -sc install=bash)"; hydra_bash_completion; echo "${COMPREPLY[@]}"'
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for line, completed in (
        ("nobackprop -m rule=df", "rule=dfa rule=dfa_two_pass"),
        ("nobackprop rule.b", "rule.beta="),
    ):
        typed = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_CWORD": str(line.count(" "))}
        shown = subprocess.run(
            ["bash", "-c", code],
            cwd=tmp_path,
            env={**os.environ, **typed, "PATH": path},
            capture_output=True,
            text=True,
        )
        assert shown.stdout == f"{completed}\n", shown.stderr


def test_the_core_needs_torch_alone() -> None:
    others = ["hydra", "pytorch_lightning", "wandb", "torchvision", "pydantic", "rich"]
    core = ["core.initializers", "core.updates", "core.optimizers", *(f"rules.{rule}" for rule in options("rule"))]
    code = f"import sys, {', '.join(f'nobackprop.{name}' for name in core)}; print({{*sys.modules}} & {{*{others}}})"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"


def test_the_lock_is_whole_and_holds_no_address() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock
    pinned = set(re.findall(r"^([a-z0-9.-]+)==", lock, re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    assert {re.split(r"[><=]", name)[0] for name in wanted} <= pinned
    assert not re.findall(r"^\S+==.*\n(?!    --hash=sha256:)", lock, re.MULTILINE)


def test_python_314_gets_a_clear_message() -> None:
    code = "import sys; sys.version_info = (3, 14, 0); import nobackprop"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("nobackprop runs on Python 3.11, 3.12 and 3.13")


def loops() -> tuple[str, str]:
    """The page's loop for one rule, and the step for all."""
    text = (ROOT / "docs" / "how_to" / "own_loop.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    loop, step = (block for block in blocks if "rule.grads(" in block or "rule.phases()" in block)
    return loop, step


def test_the_pages_loop_learns(capsys: pytest.CaptureFixture[str]) -> None:
    loop, _ = loops()
    assert len(loop.splitlines()) < 20
    torch.manual_seed(0)
    exec(loop, {})
    assert float(re.findall(r"tensor\((.*)\)", capsys.readouterr().out)[0]) > 0.85


def test_the_pages_step_is_that_of_every_rule(rule: Rule) -> None:
    loop, step = loops()
    before = loop.partition("for step")[0].replace("LRAE()", "rule")
    here: dict[str, Any] = {"rule": rule}
    exec(f"{before}i = torch.arange(50)\nstart = {{name: t.clone() for name, t in w.items()}}", here)
    exec(step, here)
    w, moved = here["w"], {name for name, t in here["w"].items() if not torch.equal(t, here["start"][name])}
    assert {"W1", "W2", "W3"} <= moved
    assert all((w[name] >= 0).all() for name in rule.nonnegative(here["net"]))
    assert here["predicted"].shape == here["labels"].shape


def test_a_run_shows_nothing_of_lightnings_own(tmp_path: Path) -> None:
    ended = nobackprop("rule=dfa", "max_epochs=1", "logger=none", "arch.hidden=[8]", cwd=tmp_path)
    assert ended.returncode == 0
    shown = ended.stdout + ended.stderr
    assert not [text for text in ("GPU available", "Tip:", "Trainer.fit") if text in shown]
