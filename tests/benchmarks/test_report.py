"""Pages of benchmark results say what their files say."""

from pathlib import Path

import pytest

from hf_moe_cpt.scripts.benchmarks.report import main, page_of


RESULTS = Path(__file__).parents[2] / "docs" / "benchmarks"
FOLDERS = sorted(path.parent.relative_to(RESULTS).as_posix() for path in RESULTS.glob("h*/README.md"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_committed_pages_are_those_of_their_files(monkeypatch, folder):
    monkeypatch.chdir(RESULTS.parents[1])
    path = Path("docs/benchmarks") / folder
    assert (path / "README.md").read_text(encoding="utf-8") == page_of(path)


def test_ratio_and_failures(tmp_path):
    columns = "shape,peer,status,reason,forward_ms,training_ms,training_ms_min,training_ms_max,training_tflops,"
    columns += "extra_peak_mib,first_call_seconds,error_out,device,torch,triton,transformers,date,commit"
    facts = "GPU,2,3,5,today,abc"
    lines = [
        columns,
        f"s,hf_moe_cpt,ok,,1,2,2,3,500,10,0.1,0.001,{facts}",
        f"s,slow,ok,,1,5,5,5,200,20,0.1,0.001,{facts}",
    ]
    lines.append(f"s,gone,failed,not installed,,,,,,,,,{facts}")
    (tmp_path / "experts.csv").write_text("\n".join(lines) + "\n")
    main([str(tmp_path)])
    page = (tmp_path / "README.md").read_text()
    assert "| s | slow | 1.000 | 5.00 (5.00 to 5.00) | 200 | 2.50 | 20 | 0.1 | 1.0e-03 |" in page
    assert "not installed" in page


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds none of"):
        main([str(tmp_path)])
