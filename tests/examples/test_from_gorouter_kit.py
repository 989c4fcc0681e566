"""Every name of GoRouter Kit's documentation has its counterpart here, and the page that says which is right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import gorouter_trio as gr

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "from-gorouter-kit.md").read_text("utf-8")
ROW = re.compile(r"^\| `(\w+)` \| `(gr(?:\.\w+)+)` \| ", re.MULTILINE)


def rows(heading: str) -> list[tuple[str, str]]:
    """The rows of the table under a heading: the kit's name, and ours."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert section is not None, heading
    found = ROW.findall(section[1])
    assert len(found) == section[1].count("\n| `"), f"a row under {heading} has another form"
    return found


NAMES = [row for heading in ("Constants", "Errors", "Functions", "Types") for row in rows(heading)]
METHODS = rows("Methods of the client")


@pytest.mark.parametrize(("theirs", "ours"), [*NAMES, *METHODS], ids=lambda name: name)
def test_a_name_has_its_counterpart(theirs: str, ours: str) -> None:
    """What stands in the second column can be reached by that name, and is public."""
    found: object = gr
    for part in ours.split(".")[1:]:
        assert not part.startswith("_")
        found = getattr(found, part)


def test_what_the_notes_name_is_there() -> None:
    """Names of ours in the notes exist as well."""
    for name in set(re.findall(r"`(gr(?:\.\w+)+)`", PAGE)):
        found: object = gr
        for part in name.split(".")[1:]:
            found = getattr(found, part)
    for method in set(re.findall(r"`client\.(\w+)", PAGE)):
        assert hasattr(gr.Client, method), method


def test_each_name_once() -> None:
    """No name stands in two rows."""
    names = [theirs for theirs, _ in NAMES]
    assert len(names) == len(set(names))
    assert len(METHODS) == len(dict(METHODS))


def test_no_name_is_missing(reference_dir: Path) -> None:
    """The page has exactly the names that the documentation of the kit exports."""
    text = (reference_dir / "seed" / "gorouter-kit-docs.txt").read_text("utf-8")
    index = text[text.index("\nConstants\n", text.index("\nDocumentation\n")) :]
    exported = set(re.findall(r"^\t(\w+)\s+= |^var (\w+) = |^func (\w+)\(|^type (\w+) = ", index, re.MULTILINE))
    names = {name for groups in exported for name in groups if name}
    assert len(names) > 100
    assert {theirs for theirs, _ in NAMES} == names


def test_each_example_has_its_twin(reference_dir: Path) -> None:
    """The headings of the kit's examples, and its programs, stand on the page, each with a file that is run."""
    text = (reference_dir / "seed" / "gorouter-kit-docs.txt").read_text("utf-8")
    headings = re.findall(r"^(\d+\. [A-Z].*)$", text, re.MULTILINE)
    programs = re.findall(r"^(\w+) command$", text, re.MULTILINE)
    assert (len(headings), len(programs)) == (11, 3)
    twins = dict(re.findall(r"^\| (.+?) \| \[.*\]\(\.\./examples/(\w+\.py)\) \|$", PAGE, re.MULTILINE))
    for heading in headings:
        assert (REPOSITORY / "examples" / twins[heading]).exists()
    for program in programs:
        assert any(f"program `{program}`" in heading for heading in twins)
    run = (Path(__file__).parent / "test_examples.py").read_text("utf-8")
    assert all(f'"{twin}"' in run for twin in twins.values())
