from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from apothecary import __version__
from apothecary.cli import main, show
from apothecary.errors import DataError
from apothecary.registry import EVIDENCE, Entry, entries

VERBS = ("demo", "run", "curate", "align", "finetune", "attack", "evaluate", "report", "methods", "inspect-data", "lab")
SCRIPT = (str(Path(sys.executable).with_name("apothecary")),)


def test_help_names_every_verb(cli):
    done = cli("--help")
    assert done.returncode == 0
    assert all(f" {verb} " in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", [*(verb for verb in VERBS if verb != "lab"), "lab check"])
def test_every_verb_has_an_example(verb: str, capsys):
    assert main([*verb.split(), "--help"]) == 0
    assert f"Example: apothecary {verb}" in capsys.readouterr().out


def test_module_equals_script(cli):
    for arguments in (["--version"], ["methods"], ["runn"]):
        one, other = cli(*arguments), cli(*arguments, start=SCRIPT)
        assert (one.returncode, one.stdout, one.stderr) == (other.returncode, other.stdout, other.stderr)
    assert cli("--version").stdout == f"apothecary {__version__}\n"


ALIGN = ["align", "--data", "lab:align", "--out", "x"]
TUNE = ["finetune", "--data", "lab:customer_train", "--out", "x"]
ATTACK = ["attack", "--customer", "lab:customer_train", "--harmful", "lab:attack", "--out", "x"]
CURATE = ["curate", "--data", "lab:align", "--out", "x"]
BAD = {
    "unknown verb": (["runn"], "did you mean 'run'?"),
    "missing option": (["align", "--out", "x"], "--data"),
    "unknown option": (["run", "recipe.yaml", "--dryrun"], "did you mean '--dry-run'?"),
    "unknown method": ([*ALIGN, "--method", "vacine"], "did you mean 'vaccine'?"),
    "method of another stage": ([*TUNE, "--method", "vaccine"], "there is one for align"),
    "seed below 0": ([*ALIGN, "--seed", "-1"], "--seed"),
    "unknown setting": ([*ALIGN, "--method", "vaccine", "--rhoo=1"], "mean 'rho'?"),
    "unknown training key": ([*ALIGN, "--train.epoch=1"], "mean 'epochs'?"),
    "unknown kind": (["methods", "finetun"], "did you mean 'finetune'?"),
    "missing recipe": (["run", "nowhere.yaml"], "nowhere.yaml"),
    "missing rows": (["align", "--data", "nowhere.jsonl", "--out", "x"], "nowhere.jsonl"),
    "missing results": (["report", "nowhere"], "nowhere"),
    "missing role": ([*TUNE, "--method", "security_vectors"], "--harmful"),
    "missing rows of the attacker": (ATTACK[:3] + ATTACK[5:], "give --harmful SOURCE"),
    "p too large": ([*ATTACK, "--p", "2"], "[0, 1]"),
    "no number": ([*CURATE, "--keep", "half"], "--keep"),
    "keep too large": ([*CURATE, "--keep", "2"], "(0, 1]"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_code_2(case: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, wanted = BAD[case]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert wanted.lower() in err.lower()
    assert list(tmp_path.iterdir()) == []


def test_exit_code_2_reaches_the_shell_without_a_traceback(cli, tmp_path: Path):
    done = cli("align", "--data", "lab:nothing", "--out", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()


def test_unknown_key_in_a_recipe(cli, tmp_path: Path):
    (tmp_path / "r.yaml").write_text("modl: lab\n")
    assert "did you mean 'model'?" in cli("run", "r.yaml").stderr
    done = cli("run", "r.yaml", "--fintune.method=sft")
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_debug_shows_the_traceback_before_or_after_the_verb(cli):
    for arguments in (["--debug", "report", "nowhere"], ["report", "nowhere", "--debug"]):
        done = cli(*arguments)
        assert done.returncode == 1 and "Traceback" in done.stderr and "StoreError" in done.stderr


def test_interrupt_is_one_line_and_code_130(monkeypatch, capsys):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(show, "print_table", interrupted)
    assert main(["methods"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_interrupted_run_is_code_130(monkeypatch, capsys):
    def interrupted(*_: object) -> None:
        raise DataError("stopped") from KeyboardInterrupt()

    monkeypatch.setattr(show, "print_table", interrupted)
    assert main(["methods"]) == 130
    assert capsys.readouterr().err == "error: stopped\n"


def test_a_defect_keeps_its_traceback(monkeypatch):
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(show, "print_table", broken)
    with pytest.raises(ZeroDivisionError):
        main(["methods"])


@pytest.mark.parametrize("verb", ["--version", "--help", "methods"])
def test_a_closed_pipe_ends_in_silence(verb: str):
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m apothecary {verb} | true"], capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_methods_are_lines_with_tabs_where_there_is_no_terminal(capsys):
    assert main(["methods"]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split("\t") == ["kind", "name", "paper", "cost", "tests", "summary"]
    assert {tuple(line.split("\t")[:2]) for line in lines} == set(entries())
    assert next(line for line in lines if line.startswith("align\tvaccine")).split("\t")[2] == "arXiv 2402.01109"


def test_methods_of_one_kind(capsys):
    assert main(["methods", "attack"]) == 0
    assert {line.split("\t")[0] for line in capsys.readouterr().out.splitlines()[1:]} == {"attack"}


def test_methods_of_one_kind_are_paragraphs_in_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(show, "is_terminal", lambda: True)
    assert main(["methods", "align"]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert "vaccine  arXiv 2402.01109" in lines
    assert any(line.startswith("  Cost: 2 forward + 2 backward per batch") for line in lines)
    methods = sum(kind == "align" for kind, _ in entries())
    assert sum(line.startswith("  Tests that pass: ") for line in lines) == methods


@pytest.mark.parametrize("columns", [80, 120])
def test_methods_are_a_table_in_a_terminal(monkeypatch, capsys, columns):
    known = [
        Entry("align", "checked", "apothecary.x", "2402.01109", cost="2 forward; more", evidence=EVIDENCE),
        Entry("align", "unchecked", "apothecary.x", evidence=("definition", "resume")),
        Entry("judge", "rule", "apothecary.x", evidence=("definition",)),
        Entry("attack", "foreign", "other.x"),
    ]
    monkeypatch.setattr("apothecary.registry.entries", lambda: {(e.kind, e.name): e for e in known})
    monkeypatch.setattr(show, "is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["methods"]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= columns and lines[0].startswith("align ")
    ends = {line.split()[0]: line for line in lines if line.startswith(("checked", "unchecked", "rule", "foreign"))}
    assert ends["checked"].split()[1] == "2402.01109" and "2 forward; more" in ends["checked"]
    assert ends["checked"].endswith("D R F A K P") and ends["unchecked"].endswith("D \u00b7 \u00b7 \u00b7 K \u00b7")
    assert ends["rule"].endswith("D" + " \u00b7" * 5) and ends["foreign"].endswith("not ours")
    assert sum(line.endswith("no reference") for line in lines) == 1 and "D definition, R reference" in " ".join(lines)
