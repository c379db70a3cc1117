import os
from pathlib import Path

from histo_jax.report import Report


def test_a_report_is_a_path_that_notebooks_display(tmp_path):
    page = tmp_path / "report.html"
    page.write_text('<html><p class="a">1 &lt; 2 ü</p></html>')
    report = Report(page)
    assert report == page
    assert os.fspath(report) == str(report) == str(page)
    assert isinstance(report, Path)
    shown = report._repr_html_()
    assert shown.startswith("<iframe srcdoc=")
    assert "&lt;p class=&quot;a&quot;&gt;1 &amp;lt; 2 ü&lt;/p&gt;" in shown
