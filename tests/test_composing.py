"""What a user reads of a mistake, on the command line, in a yaml file or a folder; a program's fault is none."""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import CONF, nobackprop, run_config

from nobackprop import cli, composing, mistakes
from nobackprop.mistakes import Missing, Mistake
from nobackprop.training.config import Settings, build

Answer = Callable[..., str]


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Answer:
    """The sentence with which the command ends before anything is run."""

    def given(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["nobackprop", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = ended.value.code
        assert isinstance(told, str)
        assert told.startswith("nobackprop: ")
        assert len(told.splitlines()) == 1
        return told.removeprefix("nobackprop: ")

    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # which the command changes
    monkeypatch.chdir(tmp_path)
    return given


# The command line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("rule=lrae", "there is no rule=lrae; choose one of block_dfa, bp, brainprop, | Did you mean lra_e?"),
        ("dataset=MNIST", "Did you mean mnist?"),
        ("arch=conv", "choose one of allconv, allconv_224,  | , module,  | Did you mean allconv?"),
        ("optimizer=Adam", "Did you mean adam?"),
        ("-m rule=bp,lrae", "there is no rule=lrae; choose one of block_dfa, bp, "),
        ("+experiment=lra_e/deviaton", "Did you mean lra_e/deviation?"),
        ("+experiment=lra_e", "Did you mean lra_e/"),
        ("hydra/launcher=slurm", "there is no hydra/launcher=slurm; choose one of basic, nobackprop"),
        ("rul=bp", "there is no key rul; choose from: rule, dataset, | Did you mean rule?"),
        ("rule.bta=1", "choose from: _target_, beta, gamma, learn_E, difference. Did you mean beta?"),
        ("-m rule=lra_e,bp rule.bta=1", "there is no key rule.bta; choose from: _target_, beta, "),
        ("model.lr=3", "there is no key model; choose from: rule, dataset, "),
        ("trainer.foo.bar=3", "there is no key trainer.foo; choose from: accelerator, "),
        (
            "arch.layers=[{conv:[16,3],relu,{max_pool:2}]",
            "'arch.layers=[{conv:[16,3],relu,{max_pool:2}]' has 2 { and 1 }: close each",
        ),
        ("rule.beta.x=1", "there is no key rule.beta.x: rule.beta is 0.1, without keys of its own"),
        ("lr=0.1", "Did you mean optimizer.lr?"),
        ("schedule.milestones=[1]", "there is no key schedule.milestones. It is a key of schedule=multistep"),
        ("experiment=debug", "write +experiment=debug"),
        ("+rule.beta=1", "rule.beta is there already: write rule.beta=..., without +"),
        ("~logger", "logger can't be taken out of a run; write logger=none"),
        ("~tuned", "write tuned=none"),
        ("~launcher", "write launcher=..., one of basic, joblib, processes, slurm, slurm_local"),
        ("~rule=lra_e", "rule can't be taken out of a run; write rule=..., one of block_dfa, bp, "),
        ("rule=???", "rule=???: a run needs a rule; choose one of block_dfa, bp, "),
        ("rule=null", "rule=null: a run needs a rule; choose one of block_dfa, bp, "),
        ("-m rule=bp,null", "a run needs a rule"),
        ("rule=", "a run needs a rule"),
        ("rule=1", "1 is no rule; choose one of block_dfa, bp, "),
        ("rule=[bp,fa]", "a run has one rule; for a run of each write --multirun rule=bp,fa"),
        ("rule=bp,fa", "rule=bp,fa: several values are for a sweep, with --multirun"),
        ("seeds=0,1", "with --multirun; a list is written seeds=[0,1]"),
        ("rule bp", "'rule' is no key=value"),
        ("rule=bp,", "'rule=bp,' ends in a comma"),
        (
            "arch.hidden=[256, 256]",
            "'arch.hidden=[256,' has no closing bracket; with spaces it needs quotes around all of it",
        ),
        (
            "optimizer.betas[0]=1",
            "'optimizer.betas[0]' is no key; an element of a list is written as in optimizer.betas.0=0.5",
        ),
        (
            "paths.runs=a=b",
            """'paths.runs=a=b' can't be read: | needs quotes of its own, 'paths.runs="a=b"'""",
        ),
        ("\N{EM DASH}multirun rule=bp", "has the character '\N{EM DASH}' (U+2014): type a plain -"),
        ("rule.beta=\N{LEFT DOUBLE QUOTATION MARK}1", "(U+201C): type a plain"),
        ("--config-dir=~/none", f"'{Path.home()}/none' not found"),
        ("--cfg job rule=lrae", "there is no rule=lrae"),
        ("rule==bp", "'rule==bp' has one = too many: write rule=bp"),
        ("~dataset.classes", "~dataset.classes: dataset.classes is not there, or null already"),
        ("-m optimizer.lr=interval(0,1)", "an interval is for a search, as in +sweep=rates"),
        ("hydra.job.chdir=maybe", "hydra.job.chdir=maybe: Value 'maybe' is not a valid bool"),
    ],
)
def test_a_mistake_on_the_command_line_is_answered_with_what_to_write(
    answer: Answer, arguments: str, told: str
) -> None:
    found = answer(*arguments.split(" "))
    assert all(part in found for part in told.split(" | ")), found


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--dryrun", "there is no option --dryrun. Did you mean --dry-run?"),
        (
            "--foo",
            "there is no option --foo: there are --multirun, --dry-run, --help, --cfg job and --hydra-help, which",
        ),
        ("--rule=bp", "there is no option --rule=bp: write rule=bp"),
        ("-rule=bp", "there is no option -rule=bp: write rule=bp"),
    ],
)
def test_an_unknown_option_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, told: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["nobackprop", "dataset=digits", option])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"nobackprop: {told}")


def test_options_and_overrides_come_in_any_order(answer: Answer, tmp_path: Path) -> None:
    (tmp_path / "own" / "rule").mkdir(parents=True)
    (tmp_path / "own" / "rule" / "mine.yaml").write_text("_target_: nobackprop.rules.bp.BP\n")
    own = ("--config-dir", "own")
    for arguments in (
        ["rule=mine", *own, "lr=1", "-m"],
        [*own, "-m", "rule=mine", "lr=1"],
        ["lr=1", "-m", "rule=mine", *own],
    ):
        assert answer(*arguments).endswith("Did you mean optimizer.lr?")


# Yaml files

FILES = {
    "tab": (b"_target_: a.b\nx:\n\ty: 1\n", "3: indent by spaces, not by tabs"),
    "colon": (b"_target_: a.b\nx: a: b\n", "2: mapping values are not allowed here"),
    "twice": (b"_target_: a.b\n_target_: c.d\n", "2: found duplicate key _target_"),
    "interpolation": (b"_target_: a.b\nx: ${\n", "2: '${' is no interpolation"),
    "latin1": (b"_target_: a.b\n# \xe9t\xe9\n", "2: this is no UTF-8; save the file in that encoding"),
    "utf16": ("_target_: a.b\n".encode("utf-16"), "1: this is no UTF-8"),
    "zero": (b"_target_: a.b\n\0", "2: take out the character U+0000"),
    "number": (b"5\n", "1: write keys with values, as in seeds: 3"),
    "header": (b"# @package\n_target_: a.b\n", "1: write # @package and one name"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_mistake_in_a_yaml_file_is_told_with_file_and_line(answer: Answer, tmp_path: Path, name: str) -> None:
    (tmp_path / "own" / "rule").mkdir(parents=True)
    for other, (content, _) in FILES.items():  # a file with another mistake is not the one to blame
        (tmp_path / "own" / "rule" / f"{other}.yaml").write_bytes(content)
    found = answer("--config-dir", "own", f"rule={name}")
    assert found.startswith(f"{tmp_path}/own/rule/{name}.yaml, line {FILES[name][1]}")


KEYS = "write keys with values, of which"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", KEYS),
        ("- a\n- b\n", KEYS),
        ("target: a.b\n", KEYS),
        ("_target_: BP\n", "_target_ is BP: write its module before it, as in my_module.BP"),
    ],
    ids=["empty", "list", "none", "bare"],
)
def test_a_file_that_is_no_choice_is_named(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "own" / "rule").mkdir(parents=True)
    (tmp_path / "own" / "rule" / "mine.yaml").write_text(content)
    ended = nobackprop("--config-dir", "own", "rule=mine", cwd=tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"nobackprop: {tmp_path}/own/rule/mine.yaml: rule: {told}")
    assert len(ended.stderr.splitlines()) == 1


def test_all_our_yaml_files_can_be_read() -> None:
    assert all(composing.load(path) is not None for path in CONF.rglob("*.yaml"))


# Settings


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["~seeds"], "seeds must be given: add seeds=..."),
        (["~paths.runs"], "paths.runs must be given: add paths.runs=..."),
        (["seeds=[]"], "seeds: write how many, 1 to 100000, or a list such as [0,4,7], got []"),
        (["+seedz=1"], "unknown key 'seedz'; choose from: rule, | Did you mean seeds?"),
        (["+rule.x=${nope}"], "rule.x: Interpolation key 'nope' not found"),
        (["init.forward=[1]"], "init.forward: write a string such as U1 or N0.1"),
        (["paths.runs=1e5"], "paths.runs: write the folder's name, with ./ before one that looks like a number, as in"),
        (["paths.runs="], "paths.runs: write the folder's name"),
        (["paths.data=null"], "paths.data: write the folder's name"),
    ],
)
def test_settings_say_what_is_missing_or_wrong(overrides: list[str], told: str) -> None:
    with pytest.raises(Mistake) as raised:
        Settings.of(run_config(*overrides))
    assert all(part in str(raised.value) for part in told.split(" | ")), raised.value


def test_paths_begin_at_the_users_home() -> None:
    paths = Settings.of(run_config("paths.runs='~/runs'", "paths.data='~'")).paths
    assert (paths.runs, paths.data) == (f"{Path.home()}/runs", str(Path.home()))
    assert composing.home("paths.runs=~/runs") == f"paths.runs={Path.home()}/runs"
    assert composing.home("tag=a=~/b") == "tag=a=~/b"
    assert composing.home("paths.runs=~other/x") == "paths.runs=~other/x"


class Picky:
    def __init__(self, size: int) -> None:
        if size < 0:
            raise Mistake("size must be 0 or more")
        int("a slip")


@pytest.mark.parametrize(
    ("node", "told"),
    [
        ({"_target_": "test_composing.Picky", "size": -1}, "rule: size must be 0 or more"),
        ({"_target_": "test_composing.Picky"}, "rule.size must be given: add rule.size=..."),
        ({"_target_": "nobackprop.core.losses.SoftmaxCrossEntropy"}, "rule.classes must be given"),
        (
            {"_target_": "test_composing.Picky", "siz": 1},
            "rule: unknown key siz; choose from: size. Did you mean size?",
        ),
        ({"_target_": "torch.nn.Softmax", "dim": 0, "x": 1}, "rule: unknown key x; choose from: dim"),
        ({"_target_": "nobackprop.rules.dfa.DF"}, "nobackprop.rules.dfa has no DF. Did you mean DFA?"),
        ({"_target_": "nobackprop.rules.bb.BP"}, "nobackprop.rules has no bb"),
        ({"_target_": "mine.BP"}, "there is no module mine: put its folder on PYTHONPATH, or check the name"),
        ({"_target_": "nobackprop.rules.bp"}, "which is neither a class nor a function"),
    ],
)
def test_what_cannot_be_built_is_told(node: dict[str, Any], told: str) -> None:
    with pytest.raises(Mistake) as raised:
        build(node, "rule")
    assert told in str(raised.value)


def test_a_target_that_takes_less_than_it_is_given_is_told() -> None:
    with pytest.raises(
        Mistake, match=r"^arch: nobackprop.rules.bp.BP\(\) .*can't take \(\(1, 8, 8\), 10\): too many positional arg"
    ):
        build({"_target_": "nobackprop.rules.bp.BP"}, "arch", (1, 8, 8), 10)


# A program's faults


def test_a_slip_in_ones_own_code_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="a slip") as raised:
        build({"_target_": "test_composing.Picky", "size": 1}, "rule")
    assert not isinstance(raised.value, Mistake)
    assert isinstance(raised.value.__cause__, ValueError)
    (tmp_path / "own" / "rule").mkdir(parents=True)
    (tmp_path / "own" / "rule" / "mine.yaml").write_text("_target_: mine.Mine\n")
    for slip, told in (("a, b = 1, 2, 3", "ValueError: too many values to unpack"), ("a, b = (", "SyntaxError: ")):
        (tmp_path / "mine.py").write_text(
            "from dataclasses import dataclass\nfrom nobackprop.rules.bp import BP\n\n\n@dataclass(frozen=True)\n"
            f"class Mine(BP):\n    def grads(self, net, w, batch):\n        {slip}\n"
        )
        ended = nobackprop("--config-dir", "own", "rule=mine", "logger=none", cwd=tmp_path, path=tmp_path)
        assert ended.returncode == 1
        assert f'File "{tmp_path}/mine.py", line 8' in ended.stderr
        assert told in ended.stderr
        assert "hydra/_internal/utils.py" not in ended.stderr  # where the user has no business


# Folders


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "{runs} can't be used for records, weights and checkpoints: No space left on device; make room; the same",
        ),
        (
            OSError(errno.ENOLCK, "No locks available"),
            "use another folder, paths.runs=... on a file system that has locks",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "{runs}/a"),
            "{runs}/a can't be used for records, weights and checkpoints: Read-only",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "{data}/a"),
            "{data}/a can't be used for images: Permission denied; change its permissions, or use another folder",
        ),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory", "{runs}"),
            "a file is where a folder should be: move it away, or use",
        ),
        (OSError(errno.ENAMETOOLONG, "File name too long", "{runs}/a"), "use another folder, paths.runs=..."),
    ],
)
def test_an_error_of_the_system_about_our_folders_becomes_a_sentence(tmp_path: Path, error: OSError, told: str) -> None:
    folders = {"runs": str(tmp_path / "runs"), "data": str(tmp_path / "data")}
    cfg = run_config(*(f"paths.{name}={folder}" for name, folder in folders.items()))
    if error.filename is not None:
        error.filename = error.filename.format(**folders)
    with pytest.raises(Mistake) as raised, mistakes.about_files(cfg):
        raise error
    assert told.format(**folders) in str(raised.value)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "/somewhere/else"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "runs/a"),
        OSError("text alone"),
        Missing("no images"),
    ],
)
def test_any_other_error_of_the_system_stays_what_it_is(error: OSError) -> None:
    with pytest.raises(OSError, match=r".*") as raised, mistakes.about_files(run_config()):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["paths.runs=file/runs"],
            "{here}/file can't be used for records, weights and checkpoints: Not a directory; a file",
        ),
        (["paths.runs=file/runs", "--multirun", "rule=bp,fa"], "{here}/file can't be used for records, weights and"),
        (["paths.runs=file/runs", "--dry-run"], "{here}/file can't be used for records, weights and checkpoints"),
        (["seeds=0"], "seeds: write how many, 1 to 100000, or a list such as [0,4,7], got 0"),
        (["tuned=mlp_lrae"], "no such tuned settings, 'mlp_lrae'; the folders of conf/tuned have: "),
        (["--multirun", "launcher=basic,processes"], "launcher: one for the whole sweep, not one a job"),
        (["launcher=processes"], "launcher=processes is for several jobs: add --multirun"),
        (["+sweep=rates"], "+sweep=rates is for several jobs: add --multirun"),
    ],
)
def test_what_needs_no_torch_is_told_before_it_is_imported(tmp_path: Path, arguments: list[str], told: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "torch.py").write_text("raise ImportError('too early')\n")
    ended = nobackprop(*arguments, "logger=none", cwd=tmp_path, path=tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"nobackprop: {told.format(here=tmp_path)}")
    assert len(ended.stderr.splitlines()) == 1
    assert not ended.stdout


@pytest.mark.parametrize(("flags", "told"), [(0, "Permission denied"), (os.ST_RDONLY, "Read-only file system")])
def test_a_folder_that_cannot_be_made_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: int, told: str
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=flags))
    with pytest.raises(OSError, match=told) as raised:
        mistakes.check_writable(tmp_path / "not" / "there")
    assert raised.value.filename == str(tmp_path)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
def test_a_folder_in_a_file_system_of_the_kernels_is_told() -> None:
    with pytest.raises(OSError, match="Read-only file system"):
        mistakes.check_writable(Path("/proc/runs"))


def test_scripts_tell_a_mistake_and_keep_other_tracebacks(capsys: pytest.CaptureFixture[str]) -> None:
    for error, told in ((Mistake("so"), "x.py: so"), (FileNotFoundError(2, "not there", "f"), "x.py: f: not there")):
        with pytest.raises(SystemExit) as ended, mistakes.answering("x.py"):
            raise error
        assert ended.value.code == told
    with pytest.raises(SystemExit, match="130"), mistakes.answering("x.py"):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "x.py: interrupted; the same command goes on\n"
    with pytest.raises(ValueError, match="a slip"), mistakes.answering("x.py"):
        raise ValueError("a slip")
