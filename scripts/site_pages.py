"""A hook of MkDocs: which files the site is made of, so that links read on it as in a checkout.

Pages are the repository's Markdown files in their places. Each source file that a page links to
becomes a page too; a link to what does not exist stays as it is, and MkDocs reports it. Doxygen's
output, which scripts/site makes first, lies under ``cpp``.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOXYGEN = ROOT / "build" / "doxygen" / "html"
LANGUAGES = {".cpp": "cpp", ".hpp": "cpp", ".h": "c", ".py": "python", ".toml": "toml"}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)#\s]+)")


def source_of(page: str, target: str) -> str | None:
    """The source file that a page's link leads to; None for pages, and where there is none."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    exists = not path.startswith("..") and (ROOT / path).is_file()
    return path if exists and not path.endswith(".md") else None


def as_page(config: MkDocsConfig, path: str) -> File:
    text = (ROOT / path).read_text(encoding="utf-8")
    fence = "`" * 8
    content = f"# {path}\n\n{fence} {LANGUAGES.get(Path(path).suffix, 'text')}\n{text}\n{fence}\n"
    return File.generated(
        config, f"{path}.md", content=content, inclusion=InclusionLevel.NOT_IN_NAV
    )


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
    made = [file for file in files if not file.is_documentation_page()]  # the theme's
    sources = set()
    for page in pages:
        name = page.relative_to(ROOT).as_posix()
        made.append(File.generated(config, name, abs_src_path=str(page)))
        links = LINK.findall(page.read_text(encoding="utf-8"))
        sources |= {path for link in links if (path := source_of(name, link))}
    made += [as_page(config, path) for path in sorted(sources)]
    for path in DOXYGEN.rglob("*"):
        if path.is_file():
            name = f"cpp/{path.relative_to(DOXYGEN).as_posix()}"
            made.append(File.generated(config, name, abs_src_path=str(path)))
    return Files(made)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    name = page.file.src_uri
    if page.file.inclusion is InclusionLevel.NOT_IN_NAV:  # a source file's own text
        return markdown
    return LINK.sub(lambda m: m[0] + ".md" if source_of(name, m[0]) else m[0], markdown)
