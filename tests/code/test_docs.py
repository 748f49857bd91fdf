"""What README and docs name is there: commands with their options, targets, pages and anchors."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from churn_assets.cli import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_COMMAND = re.compile(
    r"(?:^ {4,}|`|\|\s)((?:\.venv/bin/)?churn [a-z][^`|\n]*|make [a-z][^`|\n]*)", re.M
)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def named() -> list[tuple[str, str]]:
    """(page, command), as it stands there."""
    return [
        (page.name, command.strip())
        for page in PAGES
        for command in _COMMAND.findall(page.read_text(encoding="utf-8"))
    ]


def anchors(page: Path) -> set[str]:
    """Of the headings, as the web pages of repositories name them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in found]
    return {heading.replace(" ", "-") for heading in plain}


def known(words: list[str]) -> None:
    """Raises click.UsageError where a command or an option is not there."""
    command: click.Command = cli
    context = click.Context(cli)
    while isinstance(command, click.Group) and words:
        found = command.get_command(context, words[0])
        if found is None:
            # A group may do something by itself, and the words be values of it.
            assert command.invoke_without_command, f"there is no command {words[0]}"
            break
        command, words = found, words[1:]
        context = click.Context(command, parent=context)
    command.make_parser(context).parse_args(list(words))


def test_every_command_the_pages_name_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    churn = make = 0
    for page, command in named():
        words = shlex.split(command, comments=True)
        # Where its output goes is the shell's.
        words = words[: words.index(">")] if ">" in words else words
        if words[0] == "make":
            make += 1
            unknown = [word for word in words[1:2] if word not in targets]
            assert not unknown, f"{page}: there is no target for `{command}`"
            continue
        churn += 1
        try:
            known(words[1:])
        except (click.UsageError, AssertionError) as error:
            pytest.fail(f"{page}: `{command}`: {error}")
    assert churn > 60
    assert make > 30


def test_every_link_between_the_pages_leads_somewhere() -> None:
    found = 0
    for page in PAGES:
        for link in _LINK.findall(page.read_text(encoding="utf-8")):
            if "://" in link:
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor and target.suffix == ".md":
                assert anchor in anchors(target), f"{page.name}: {link}"
            found += 1
    assert found > 50


def test_every_page_is_reached_from_the_readme() -> None:
    seen, left = set(), [ROOT / "README.md"]
    while left:
        page = left.pop()
        if page in seen:
            continue
        seen.add(page)
        for link in _LINK.findall(page.read_text(encoding="utf-8")):
            target = (page.parent / link.partition("#")[0]).resolve()
            if target.suffix == ".md" and target.exists():
                left.append(target)
    assert set(PAGES) <= seen
