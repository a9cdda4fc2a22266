"""What contributors and CI read: CONTRIBUTING.md, CHANGELOG.md, the log, the workflow and the forms of issues."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import fork_server
from helpers.programs import ROOT

FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def test_workflow_runs_what_ci_runs() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yaml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    script = next(step["run"] for step in steps if step.get("run", "").endswith("/run"))
    assert (ROOT / script).stat().st_mode & 0o111, "it is not executable"


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_forms_are_what_github_takes(form: Path) -> None:
    content = yaml.safe_load(form.read_text())
    assert content["name"] and content["description"]
    ids = [field["id"] for field in content["body"]]
    assert len(ids) == len(set(ids)) > 0
    for field in content["body"]:
        assert field["type"] in ("input", "textarea") and field["attributes"]["label"]


def test_a_report_of_a_fault_has_the_facts_of_the_installation() -> None:
    fields = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "fault.yml").read_text())["body"]
    needed = {field["id"] for field in fields if field["validations"]["required"]}
    assert {"command", "output", "versions"} <= needed
    versions = next(field for field in fields if field["id"] == "versions")
    assert "mini-train --version" in versions["attributes"]["description"]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_and_links_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    paths = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    if page.name != "CHANGELOG.md":  # it also names what was there once, and folders of a run
        paths += re.findall(r"`((?:\.?\w+/)*[\w.]+\.(?:py|md|txt)|(?:\.?\w+/)+)`", text)
        assert paths
    for path in paths:
        assert (ROOT / path).exists(), path


def test_the_log_is_newest_first_and_its_contents_have_each_entry_once() -> None:
    """`test_readme.py` holds the other way: each link of the contents leads to a heading."""
    text = (ROOT / "docs" / "LOG.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (\d{4}-\d\d-\d\d: .*)$", text, flags=re.MULTILINE)
    dates = [title[:10] for title in titles]
    assert dates == sorted(dates, reverse=True)
    links = re.findall(r"^- \[.+\]\(#(.+)\)$", text.split("\n## 2026", 1)[0], flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-"): title for title in titles}
    missing = [f"- [...](#{anchor})" for anchor in anchors if links.count(anchor) != 1]
    assert not missing, "give each of these one line under a subject of the contents"


def test_what_contributing_tells_to_run_is_what_ci_runs() -> None:
    commands = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for command in ("ruff check .", "ruff format --check .", "python -m pytest"):
        assert command in commands and command in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.slow
def test_the_commands_of_contributing() -> None:
    """
    The first block is the README's second command without its last part, which `test_readme.py` runs. The other runs
    here as it stands, with the tests collected and not run.
    """
    text, readme = PAGES[0].read_text(encoding="utf-8"), (ROOT / "README.md").read_text(encoding="utf-8")
    set_up, test = re.findall(r"^```bash\n(.*?)\n^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert f"```\n{set_up.replace(chr(10), ' && ')} && python -m pytest\n```" in readme
    path = f"{Path(fork_server.python()).parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTEST_ADDOPTS": "-n 0 -q --collect-only"}
    command = ["bash", "-euo", "pipefail", "-c", test]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert "All checks passed!" in result.stdout and "tests/training_mini/test_trainer.py::test_" in result.stdout
