"""Every link in README.md, CONTRIBUTING.md, docs/ and the pages beside them leads somewhere.

Nothing is fetched: of an address outside only the form is checked.
"""

import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = next(path for path in Path(__file__).resolve().parents if (path / "setup.py").is_file())
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += [ROOT / "kernels" / "README.md", ROOT / "tests" / "results" / "full.md"]
PAGES += sorted((ROOT / "docs").glob("*.md")) + sorted((ROOT / "benchmarks/results").rglob("*.md"))


def unfenced(text: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def links(text: str) -> list[str]:
    """Targets of links and images, [text](target)."""
    # the text of a link may be code, its target is none
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "x", unfenced(text)))


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    found: dict[str, int] = {}
    headings = re.findall(r"^#+ +(.+?) *$", unfenced(text), re.M)
    for heading in headings:
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found[name] = found.get(name, -1) + 1
        if found[name]:
            found[f"{name}-{found[name]}"] = 0
    return set(found)


def broken(page: Path, text: str) -> list[str]:
    """Links that lead nowhere, of a text that stands where page does."""
    out = []
    for target in links(text):
        if re.match(r"[a-z]+:", target):
            parts = urlsplit(target)
            good = parts.scheme == "https" and "." in parts.netloc
        else:
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            good = file.exists() and file.is_relative_to(ROOT)
            if good and anchor:
                good = file.suffix == ".md" and anchor in anchors(file.read_text(encoding="utf-8"))
        out += [] if good else [target]
    return out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    assert broken(page, page.read_text(encoding="utf-8")) == []


def test_every_page_of_docs_can_be_reached_from_the_readme():
    seen, left = set(), [ROOT / "README.md"]
    while left:
        page = left.pop()
        seen.add(page)
        for target in links(page.read_text(encoding="utf-8")):
            file = (page.parent / target.partition("#")[0]).resolve()
            if file.suffix == ".md" and file.is_file() and file not in seen:
                left.append(file)
    assert set((ROOT / "docs").glob("*.md")) <= seen


def test_a_broken_link_is_found():
    assert links("`[a](b)` [`c`](d.md) ![e](f.svg)\n```\n[g](h)\n```") == ["d.md", "f.svg"]
    assert anchors("# A `b`, c!\n## A b c\n### [x](y.md) z") == {"a-b-c", "a-b-c-1", "x-z"}
    text = "[a](nowhere.md) [b](losses.md#nothing) [c](http://x.y) [d](losses.md#variants) [e](#x)"
    assert broken(ROOT / "docs" / "losses.md", text) == [
        "nowhere.md",
        "losses.md#nothing",
        "http://x.y",
        "#x",
    ]
