"""`arcflow compare`: figures of made-up results, and the command on a tiny bundle."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from arcflow_export.compare.figures import contact_sheet, quality_figure
from arcflow_export.compare.generate import Generated, Subject, parse_subjects
from arcflow_export.compare.report import as_dict, compare, table
from arcflow_export.drift.cases import DriftCase
from arcflow_runtime import RequestError, cli
from tests.fake_bundle import make_bundle

CASES = [DriftCase("a red circle", 0), DriftCase("a blue cross", 1)]


def generated(name, steps, calls, total, network, latent, grey, peak=5_000_000):
    stages = {"text": 0.25, "condition": 0.0, "network": network, "decode": 0.25, "other": total - network - 0.5}
    return Generated(
        Subject(name, None, steps),
        calls,
        (total, total + 1),
        total,
        stages,
        peak,
        np.full((2, 4, 8), latent, np.float32),
        np.full((2, 16, 16, 3), grey, np.uint8),
        (),
    )


def rows():
    return compare(
        [generated("teacher", 50, 100, 11.0, 10.0, 2.0, 100), generated("student", 2, 2, 1.0, 0.5, 2.2, 110, None)],
        CASES,
        None,
    )


def test_figures_against_the_first():
    first, second = rows()
    assert (first.speed_up, first.latent_error, first.psnr_db, first.gmsd) == (1.0, 0.0, 100.0, 0.0)
    assert (second.speed_up, second.network_speed_up, second.network_share) == (11.0, 20.0, 0.5)
    # |2.2 - 2| / 2, and 20 log10(255 / 10) for images that differ by 10 everywhere.
    assert second.latent_error == pytest.approx(0.1, rel=1e-6)
    assert second.psnr_db == pytest.approx(28.1308, abs=1e-4)
    assert as_dict(second)["network_share"] == 0.5 and as_dict(second)["right"] is None


def test_table():
    lines = table(rows()).splitlines()
    assert lines[0].startswith("|  | calls | seconds | text | condition | network | decode | other | speed-up |")
    assert lines[2] == (
        "| teacher | 100 | 11.0000 | 0.2500 | 0.0000 | 10.0000 | 0.2500 | 0.5000 | 1.0x | 1.0x | 5 | 0.000 | 100.0 "
        "| 0.000 |"
    )
    assert lines[3].endswith("| 11.0x | 20.0x | unknown | 0.100 | 28.1 | 0.000 |")


def test_images_of_other_sizes():
    other = generated("other", 2, 2, 1.0, 0.5, 0.0, 0)
    wide = Generated(**{**vars(other), "images": np.zeros((2, 16, 32, 3), np.uint8)})
    with pytest.raises(RequestError) as e:
        compare([other, wide], CASES, None)
    assert "got [16, 32, 3], not [16, 16, 3]; give --height and --width" in str(e.value)


def test_sheet_and_plot(tmp_path):
    results = [generated("teacher", 50, 50, 11.0, 10.0, 2.0, 100), generated("student", 2, 2, 1.0, 0.5, 2.2, 110)]
    sheet = np.asarray(contact_sheet(results, [case.prompt for case in CASES]))
    for grey in (100, 110):
        assert (sheet == grey).all(-1).sum() >= 2 * 100 * 100, "an image is not on the sheet"
    quality_figure(rows(), tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert "<!-- student -->" in text and "<!-- PSNR against teacher, dB -->" in text
    assert "<!-- teacher -->" not in text, "the reference's PSNR against itself means nothing"
    quality_figure(rows(), tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "plot.svg").read_bytes()


def test_names_of_bundles(tmp_path):
    root = make_bundle(tmp_path / "teacher")
    own, more, one = parse_subjects([str(root), f"{root}@8", f"{root}@1"])
    assert (own.name, own.steps) == ("teacher, 2 steps", 2)
    assert (more.root, more.steps, one.name) == (root, 8, "teacher, 1 step")


def test_what_cannot_be_compared(tmp_path, capsys):
    root = make_bundle(tmp_path / "b")
    (tmp_path / "there").mkdir()
    common = ["compare", str(root), "--prompts", "general"]
    assert cli.main([*common, "--out", str(tmp_path / "there")]) == 1
    assert "exists and is not a comparison" in capsys.readouterr().err
    assert cli.main([*common, "--out", str(tmp_path / "no" / "where")]) == 1
    assert "is not a directory; create it first" in capsys.readouterr().err
    assert cli.main([*common, "--out", str(tmp_path / "new"), "--judge", "x"]) == 2
    assert "--judge needs --prompts shapes" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command(bundles, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a red circle\na blue cross\na star\n")
    root = bundles("flux-tiny")
    arguments = ["compare", f"{root}@4", f"{root}@1", root, "--prompts", prompts, "--out", out]
    assert cli.main([str(a) for a in [*arguments, "--height", "64", "--width", "48", "--json"]]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert [row["steps"] for row in found] == [4, 1, 2] and [row["calls"] for row in found] == [4, 1, 2]
    assert found[0]["latent_error"] == 0 < found[1]["latent_error"]
    assert "num_inference_steps 1 gives a blurry image" in said.err
    saved = json.loads((out / "compare.json").read_text())
    assert saved["rows"] == found and saved["settings"]["width_px"] == 48
    assert Image.open(out / "contact_sheet.png").width > 3 * 48 and (out / "compare.svg").is_file()
