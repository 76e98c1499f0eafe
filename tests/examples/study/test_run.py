"""`make study` at its quick size: every arm runs, each run is kept, and a second call makes nothing."""

import shutil
from pathlib import Path

import pytest

from examples.study.run import main
from examples.study.tables import QUICK, cells


@pytest.mark.services
def test_the_quick_study_ends_with_a_page_and_goes_on_where_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    main(["--quick", "--root", str(tmp_path)])
    results, count = sorted((tmp_path / "results").iterdir()), len(list(cells(QUICK)))
    assert len(results) == count
    assert f"{count} of {count} runs are in" in (tmp_path / "study.md").read_text()
    written = {path: path.read_bytes() for path in results}
    results[0].unlink()
    shutil.rmtree(tmp_path / "working", ignore_errors=True)
    capfd.readouterr()
    main(["--quick", "--root", str(tmp_path)])
    assert f"{count - 1} of {count} runs are there" in capfd.readouterr().out
    assert {path: path.read_bytes() for path in results[1:]} == {path: written[path] for path in results[1:]}
    assert results[0].is_file()
