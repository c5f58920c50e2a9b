"""The documentation: its code runs, its links lead somewhere, and its page of errors is that of the classes."""

import ast
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from hawqfx import cli, errors

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def with_code() -> Iterator[Path]:
    return (page for page in PAGES if CODE.search(page.read_text()))


@pytest.mark.parametrize("page", list(with_code()), ids=name_of)
def test_the_code_of_a_page_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": name_of(page)}
    text = page.read_text()
    for block in CODE.finditer(text):
        line = text.count("\n", 0, block.start(1))
        code = compile("\n" * line + block[1], str(page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        exec(code, names)


def test_the_commands_of_the_page_on_the_command_line_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the page's own files beside them."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "command-line.md").read_text()
    Path("net.py").write_text(re.findall(r'^```python title="net.py"\n(.*?)^```', text, re.MULTILINE | re.DOTALL)[0])
    (settings,) = re.findall(r"^```toml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    *commands, last = (line.split() for line in re.findall(r"^    hawqfx (.+)$", text, re.MULTILINE))
    listed = re.findall(r"^\| `(\w+)`", text, re.MULTILINE)
    assert set(listed) == set(get_command(cli.app).commands)  # type: ignore[attr-defined]
    assert set(listed) - {"demo"} == {command[0] for command in commands}
    for command in commands:
        done = CliRunner().invoke(cli.app, command)
        assert done.exit_code == 0, (command, done.output, done.exception)
    Path("hawqfx.toml").write_text(settings)
    done = CliRunner().invoke(cli.app, [*last, "--json"])
    assert json.loads(done.stdout)["budget"] == "weight_bits=4"
    assert json.loads(done.stdout)["bits"]["6.weight"] == 8


def test_the_commands_of_the_readme_run_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^    hawqfx (.+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["compile", "explain", "report", "bench"]
    for command in commands:
        done = CliRunner().invoke(cli.app, command.split())
        assert done.exit_code == 0, (command, done.output, done.exception)
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "net.hawqfx", "report.html"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if "://" not in link:
            assert (page.parent / link.partition("#")[0]).exists(), link


INTRODUCTION = """# Errors and remedies

All are subclasses of `hawqfx.errors.HawqfxError`; each message names the fault and the next thing to do. On the command
line the exit code is 2 for a UsageError and what is one, BudgetError, and for options that do not parse; 3 for an
InfeasibleBudget; and 1 for all others, which tell of a failure in the work.

"""


def errors_page() -> str:
    """The page, from the docstrings of the classes."""
    found = []
    for name, kind in inspect.getmembers(errors, inspect.isclass):
        text, _, rest = inspect.cleandoc(kind.__doc__ or "").partition("\n\nTo do: ")
        assert rest, f"{name} says nothing under 'To do:'"
        found.append(f"## {name}\n\n{text}\n\n*To do:* {rest.partition(chr(10) * 2)[0]}\n")
    return INTRODUCTION + "\n".join(found)


def test_every_error_is_on_the_page_with_its_remedy(request: pytest.FixtureRequest) -> None:
    path = ROOT / "docs" / "errors.md"
    if request.config.getoption("--update-golden"):
        path.write_text(errors_page())
    assert path.read_text() == errors_page(), "run pytest --update-golden"
