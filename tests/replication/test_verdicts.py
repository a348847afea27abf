"""The page of verdicts is what its script makes of the committed results."""

from hf_moe_cpt.scripts.replication import verdicts
from tests.helpers.source_tree import PROJECT


def test_the_committed_page_is_the_scripts(tmp_path, capsys) -> None:
    verdicts.write(["--output_file", str(tmp_path / "new" / "page.md")])
    assert (tmp_path / "new" / "page.md").read_text() == (PROJECT / "docs/replication/README.md").read_text()
    assert "wrote" in capsys.readouterr().out
