"""Texts: from Python itself, a mirror, or a file of the user's."""

import hashlib
import os
import platform
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jacnorm.data import texts
from jacnorm.data.catalogue import find
from jacnorm.data.texts import collapse, load
from jacnorm.errors import UserError

OWN, DOCS, SHAKESPEARE = find("text"), find("python_docs"), find("tinyshakespeare")


@pytest.fixture
def mirror(tmp_path):
    """A folder with a short text where tiny Shakespeare belongs, and the entry that expects it."""
    path = tmp_path / "mirror" / "tinyshakespeare" / "input.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"All:\r\nSpeak, speak.\r\n")
    digest = hashlib.sha256(b"All:\nSpeak, speak.\n").hexdigest()
    return tmp_path / "mirror", replace(SHAKESPEARE, sha256=digest), path


def sentence(*arguments) -> str:
    with pytest.raises(UserError) as caught:
        load(*arguments)
    return str(caught.value)


# --- the documentation of Python -------------------------------------------------------------------------------------


def test_documentation_of_this_python():
    from pydoc_data.topics import topics

    loaded = load(DOCS)
    assert loaded.label == f"Python {platform.python_version()} documentation"
    assert loaded.source == "embedded"
    assert len(loaded.text) > 300_000
    # Every word of every topic, in the order of the names of topics.
    assert loaded.text.split() == [word for name in sorted(topics) for word in topics[name].split()]
    assert "  " not in loaded.text
    assert " \n" not in loaded.text
    assert "\n\n\n" not in loaded.text
    assert loaded.digest == hashlib.sha256(loaded.text.encode()).hexdigest() == load(DOCS).digest


def test_a_python_without_its_documentation(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert sentence(DOCS) == (
        f"this Python {platform.python_version()} comes without the module pydoc_data, whose text is the data set "
        '"python_docs"; use a complete Python, or the data set "text" with a file of your own'
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a   b", "a b"),
        ("a\n   b", "a\n b"),
        ("a  \nb ", "a\nb"),
        ("a\n\nb", "a\n\nb"),
        ("a\n\n\n\nb", "a\n\nb"),
        ("a\n  \n \n\nb", "a\n\nb"),
    ],
)
def test_runs_of_spaces_and_of_blank_lines(before, after):
    assert collapse(before) == after


@given(st.text(alphabet="ab \n", max_size=40))
def test_what_was_collapsed_stays_as_it_is_and_keeps_its_words(text):
    once = collapse(text)
    assert collapse(once) == once
    assert once.split() == text.split()


# --- the mirror ------------------------------------------------------------------------------------------------------


def test_a_text_in_the_mirror(mirror, monkeypatch):
    folder, entry, _ = mirror
    loaded = load(entry, folder)
    assert (loaded.text, loaded.label, loaded.source) == ("All:\nSpeak, speak.\n", "tiny Shakespeare", "mirror")
    monkeypatch.setenv("JACNORM_MIRROR", str(folder))
    assert load(entry) == loaded


def test_another_text_in_the_mirror_is_refused(mirror):
    folder, entry, path = mirror
    path.write_text("All:\nSpeak.\n")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    assert sentence(entry, folder) == (
        f"{path}: the text has SHA-256 {found}, but that of tiny Shakespeare is {entry.sha256}; "
        "replace it with a copy of the original"
    )


def test_no_mirror_and_a_mirror_without_the_text(tmp_path):
    origin = "data/tinyshakespeare in karpathy/char-rnn on GitHub"
    assert sentence(SHAKESPEARE) == (
        "tiny Shakespeare is read from a local mirror only; set mirror: in the configuration or JACNORM_MIRROR to a "
        f"folder that holds tinyshakespeare/input.txt (copy it from {origin})"
    )
    path = tmp_path / "tinyshakespeare" / "input.txt"
    assert sentence(SHAKESPEARE, tmp_path) == f"{path} is missing from the mirror; copy it there from {origin}"


# --- the user's own --------------------------------------------------------------------------------------------------


def test_own_text_keeps_everything_but_the_byte_order_mark_and_the_line_ends(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeffWhat  σ?\r\n\r\n\r\nYes.\r".encode())
    loaded = load(OWN, None, path)
    assert (loaded.text, loaded.label, loaded.source) == ("What  σ?\n\n\nYes.\n", "user's text", "file")
    assert loaded.digest == hashlib.sha256(loaded.text.encode()).hexdigest()


def test_own_text_by_the_environment_gives_way_to_the_argument(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    assert texts.given() == ""
    monkeypatch.setenv("JACNORM_TEXT", str(tmp_path / "one"))
    assert load(OWN).text == "one"
    assert load(OWN, own="").text == "one"
    assert load(OWN, own=tmp_path / "two").text == "two"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(OWN, own="~/two").text == "two"


def test_mistakes_with_own_texts(tmp_path):
    assert sentence(OWN) == (
        'data set "text" is a file of your own, and none is given; '
        "set text_path: in the configuration or JACNORM_TEXT to a UTF-8 text file"
    )
    path = tmp_path / "mine.txt"
    assert sentence(OWN, None, path) == (
        f"{path} does not exist; correct text_path: in the configuration or JACNORM_TEXT"
    )
    path.write_bytes("no σ".encode("utf-16-le") + b"\xff")
    assert sentence(OWN, None, path) == f"{path} is not UTF-8 text (byte 6); save it in that encoding"
    path.write_text(" \n")
    assert sentence(OWN, None, path) == f"{path} holds no text; give a file with some"
    assert sentence(OWN, None, tmp_path) == (
        f"{tmp_path} cannot be read (Is a directory); give a text file that can be"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_own_text_in_a_closed_folder(tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir()
    (folder / "mine.txt").write_text("a")
    folder.chmod(0)
    try:
        assert "mine.txt cannot be read (Permission denied)" in sentence(OWN, None, folder / "mine.txt")
    finally:
        folder.chmod(0o700)


def test_texts_are_cheap_to_import():
    program = (
        "import sys, jacnorm.data.texts; sys.exit(len({'torch', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
