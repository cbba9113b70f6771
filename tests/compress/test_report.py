from unimoe.compress.measure import Precision, Quality
from unimoe.compress.report import Figures, as_table, where_it_stops, write_report


def figures(name, megabytes, **kl):
    quality = {domain: Quality(one, 1.0, 0.5, 10) for domain, one in kl.items()}
    return Figures(name, [4, 2], megabytes * 10**6, 3.0, quality)


BASE, HALF, FOURTH = (
    figures("base", 100, image=0.0, text=0.0),
    figures("half", 50, image=0.01, text=0.002),
    figures("fourth", 25, image=0.005, text=0.9),
)


def test_the_line_says_where_it_stops_being_safe():
    assert where_it_stops([BASE, FOURTH, HALF], 0.02) == (
        "safe down to 50 MB (50 % of the original): half, worst KL 0.0100 on image; fourth (25 MB) is not: "
        "KL 0.9000 on text"
    )
    assert where_it_stops([BASE, FOURTH], 0.02).startswith("none of the models keeps every domain within")
    assert where_it_stops([BASE, HALF], 0.02).endswith("0.0100 on image")


def test_the_page_holds_everything(tmp_path):
    write_report(tmp_path, [BASE, HALF, FOURTH], 0.02, "unimoe compress report <x>")
    page = (tmp_path / "report.html").read_text()
    assert "safe down to 50 MB" in page and "data:image/svg+xml" in page and "report &lt;x&gt;" in page
    assert 'class="no">0.9000' in page and 'class="yes">0.0020' in page
    table = as_table([BASE, HALF, FOURTH])
    assert table.splitlines()[0].split()[:5] == ["model", "MB", "ms/token", "image", "text"]
    assert table.splitlines()[3].split() == ["fourth", "25", "3.0", "0.0050", "0.9000", "50.0", "%"]


def test_detectors_are_compared_by_their_precision(tmp_path):
    rows = {"base": (100, 0.5, 0.0), "half": (50, 0.52, -0.02), "fourth": (25, 0.4, 0.1)}
    found = [
        Figures(name, [4, 2], megabytes * 10**6, 30.0, {"val": Precision(ap, lost, 0.7, 40)})
        for name, (megabytes, ap, lost) in rows.items()
    ]
    assert where_it_stops(found, 0.02) == (
        "safe down to 50 MB (50 % of the original): half, worst loss of AP -0.0200 on val; fourth (25 MB) is "
        "not: loss of AP 0.1000 on val"
    )
    assert as_table(found).splitlines() == [
        "model    MB  ms/image  val: AP  val: AP lost",
        "base    100      30.0   0.5000        0.0000",
        "half     50      30.0   0.5200       -0.0200",
        "fourth   25      30.0   0.4000        0.1000",
    ]
    write_report(tmp_path, found, 0.02, "unimoe compress report")
    page = (tmp_path / "report.html").read_text()
    assert 'class="no">0.1000' in page and 'class="yes">-0.0200' in page and "<th>AP50</th>" in page
