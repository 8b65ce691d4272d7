"""The page of `attnres lab dynamics`: one file with its data, in the frame of the other pages."""

import json
import re

from attnres.analysis.draw.dynamics_page import write_page

PROFILE = {"step": [0, 5], "output_magnitude": [[1.0, 2.0], [1.5, 2.5]], "gradient_magnitude": [[0.1, 0.2], [0.1, 0.3]]}


def test_it_carries_means_over_seeds_and_asks_for_nothing(tmp_path):
    runs = [
        {
            "residual": "<prenorm>",
            "seed": seed,
            "dynamics": PROFILE,
            "val_curve": {"step": [0, 5], "val_loss": [5.0, 3.0 + seed]},
        }
        for seed in (0, 1)
    ]
    write_page({"runs": runs}, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])
    (shown,) = data["residuals"]
    assert (shown["label"], shown["loss"], shown["lowest"], shown["highest"]) == ("<prenorm>", [5, 3.5], [5, 3], [5, 4])
    assert shown["output_magnitude"] == PROFILE["output_magnitude"] and data["blocks"] == 2
    assert "default-src 'none'" in html and "<prenorm>" not in html
    assert "://" not in html.replace("http://www.w3.org/2000/svg", "")
