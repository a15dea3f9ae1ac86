"""Site hook: pages that live outside docs/ (changelog, results, ...) become pages of the site.

Links in Markdown files are those that GitHub follows, relative to the file in the repository. On
the site, a link into docs/ or to one of these pages leads to the page; a link to any other file of
the repository, which the site does not have, becomes its text.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "deploy/README.md")
RESULTS = "benchmarks/results"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")


def result_pages() -> list[str]:
    """The repository paths of the benchmarks' result pages, in order."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / RESULTS).rglob("*.md"))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List every result page below results.md."""
    for section in config.nav or []:
        if "Results" in section:
            pages = [{Path(page).stem.replace("_", " "): page} for page in result_pages()]
            section["Results"] = [*section["Results"], {"Measurements": pages}]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages and pictures from outside docs/ under their repository paths."""
    pictures = (path.relative_to(ROOT).as_posix() for path in (ROOT / RESULTS).rglob("*.png"))
    for name in (*PAGES, *result_pages(), *pictures):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def repository_path(src_uri: str) -> str:
    """Where a page of the site lies in the repository."""
    return src_uri if (ROOT / src_uri).is_file() else f"docs/{src_uri}"


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    here = posixpath.dirname(repository_path(page.file.src_uri))

    def on_site(match: re.Match[str]) -> str:
        bang, text, target = match.groups()
        path, hash_sign, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or not path:
            return match[0]
        in_repository = posixpath.normpath(posixpath.join(here, path))
        uri = "index.md" if in_repository == "README.md" else in_repository.removeprefix("docs/")
        if files.get_file_from_path(uri) is None:
            return text if (ROOT / in_repository).exists() else match[0]
        relative = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
        return f"{bang}[{text}]({relative}{hash_sign}{anchor})"

    outside_blocks = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    outside_blocks[::2] = [LINK.sub(on_site, text) for text in outside_blocks[::2]]
    return "".join(outside_blocks)
