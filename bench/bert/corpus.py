"""Where the text comes from: the user's files, or the documentation every Python installation carries.

Both are streams of documents that can be read again (the tokenizer reads them once to train and once to encode), so
that a corpus larger than memory works. Documents are cut to at most `MAX_DOCUMENT` characters at paragraph ends: what
is held out is every 20th document, and one book in one file must not be all of it or none.
"""

import ast
import hashlib
import os
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

MAX_DOCUMENT = 8000  # characters
TEXT_SUFFIXES = {".txt", ".md", ".rst"}
SKIPPED_DIRS = {"__pycache__", "test", "tests", "site-packages", "dist-packages", "licenses", "license_files"}
NOT_PROSE = re.compile(r"licen[cs]e|notice|copying|copyright|authors|third.?party|entry_points|top_level|require")


class CorpusError(Exception):
    """The corpus cannot be used; the message says which file, why, and what to do."""


class FileCorpus:
    """The user's text: UTF-8 files, and the text files of directories, in the order given, directories sorted."""

    def __init__(self, paths: list[str]):
        self.files: list[Path] = []
        for path in map(Path, paths):
            if path.is_dir():
                found = sorted(p for p in path.rglob("*") if p.suffix.lower() in TEXT_SUFFIXES and p.is_file())
                if not found:
                    raise CorpusError(f"--corpus {path}: no .txt, .md or .rst file in this directory or below it")
                self.files += found
            elif path.exists():
                self.files.append(path)
            else:
                raise CorpusError(f"--corpus {path}: no such file or directory")

    def __iter__(self) -> Iterator[str]:
        return _unique(document for path in self.files for document in self._read(path))

    def _read(self, path: Path) -> Iterator[str]:
        try:
            with open(path, encoding="utf-8") as file:
                while lines := file.readlines(1 << 20):
                    text = "".join(lines)
                    if "\0" in text:
                        raise CorpusError(f"--corpus {path}: a binary file (it holds NUL bytes); give plain text")
                    yield from _cut(text)
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"--corpus {path}: not UTF-8 text ({error.reason}); if it is text in another encoding, convert it, "
                f"e.g. iconv -f latin1 -t utf-8"
            ) from None
        except OSError as error:
            raise CorpusError(f"--corpus {path}: cannot be read: {error.strerror}") from None


class InstalledCorpus:
    """Docstrings and documentation of the standard library and the installed packages, up to `limit` characters.

    Files are taken in the order of a hash of their names: the same on every run, and a fair sample of all packages
    where the limit cuts. Sources are parsed, never imported. Licences and lists of numbers or names are left out.
    """

    def __init__(self, limit: float):
        paths = sysconfig.get_paths()
        files: list[tuple[bytes, Path]] = []
        for root in dict.fromkeys(Path(paths[key]) for key in ("stdlib", "purelib", "platlib")):
            for folder, folders, names in os.walk(root):
                folders[:] = [name for name in folders if name.lower() not in SKIPPED_DIRS]
                for path in (Path(folder, name) for name in names):
                    prose = path.suffix in TEXT_SUFFIXES and not NOT_PROSE.search(path.name.lower())
                    if prose or path.suffix == ".py":
                        key = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
                        files.append((key, path))
        self.documents: list[str] = []
        seen: set[bytes] = set()
        size = 0
        for _, path in sorted(files):
            text = _docstrings(path, seen) if path.suffix == ".py" else _prose(path)
            self.documents += _cut(text)
            size += len(text)
            if size >= limit:
                break

    def __iter__(self) -> Iterator[str]:
        return _unique(self.documents)


def _docstrings(path: Path, seen: set[bytes]) -> str:
    """The docstrings of one source file, without the very short and those of earlier files."""
    texts = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = (ast.get_docstring(node) or "").encode(errors="replace")  # docstrings may hold lone surrogates
            if len(text) >= 40 and _is_new(text, seen):
                texts.append(text.decode())
        for child in getattr(node, "body", ()) if isinstance(getattr(node, "body", ()), list) else ():
            visit(child)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like in other people's code
            visit(ast.parse(path.read_bytes()))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    return "\n\n".join(texts)


def _prose(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    return text if sum(c.isalpha() or c == " " for c in text) > 0.75 * len(text) else ""


def _cut(text: str) -> Iterator[str]:
    while len(text) > MAX_DOCUMENT:
        ends = (text.rfind(mark, MAX_DOCUMENT // 2, MAX_DOCUMENT) for mark in ("\n\n", "\n", " "))
        end = next((end for end in ends if end > 0), MAX_DOCUMENT)
        yield text[:end]
        text = text[end:]
    yield text


def _unique(documents: Iterable[str]) -> Iterator[str]:
    """The documents that are not blank and were not there before."""
    seen: set[bytes] = set()
    return (document for document in documents if document.strip() and _is_new(document.strip().encode(), seen))


def _is_new(text: bytes, seen: set[bytes]) -> bool:
    key = hashlib.sha256(text).digest()[:16]
    new = key not in seen
    seen.add(key)
    return new
