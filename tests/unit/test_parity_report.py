"""The parity report runs to its end and shows the small errors that tests/parity/README.md states."""

import json
import re

import pytest

pytest.importorskip("diffusers", reason="needs diffusers")
import parity_report
from cogvid.ui.report import write_report

NUMBER = r"\d\.\d+e[+-]\d+"


@pytest.mark.slow
def test_report_is_a_table_of_small_errors(tmp_path, capsys):
    target = tmp_path / "parity.md"
    parity_report.main(["--markdown", str(target), "--json", str(tmp_path / "parity.json")])
    text = target.read_text()
    assert text == capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[4:]]
    assert {row[0].split(",")[0].split()[0] for row in rows} == {"transformer", "VAE", "text", "sampler", "pipeline"}
    for row in rows:
        assert re.fullmatch(NUMBER, row[2]), row
        assert float(row[2]) <= 1e-5, row
        assert row[6] == "" or float(row[6]) <= 1.05, row
    found = json.loads((tmp_path / "parity.json").read_text())
    assert len(found["rows"]) == len(rows) + sum(row[6] != "" for row in rows)
    assert all(each["error"] <= each["tolerance"] for each in found["rows"])
    assert {each["tolerance"] for each in found["rows"] if each["dtype"] == "fp32"} == {1e-5}
    write_report([tmp_path / "parity.json"], tmp_path / "parity.html")
    page = (tmp_path / "parity.html").read_text()
    assert "None is above its tolerance." in page
    assert page.count("<tr>") == len(rows) + 1
