"""The page holds what it should, loads nothing, and lets nothing through that a prompt or a file's name smuggles in."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from patchkit.evaluation import gallery, pictures, plots, sweeps, table
from patchkit.evaluation import page as page_of
from patchkit.evaluation.store import Store

VOID = {"meta", "img", "circle", "line", "rect", "br"}


class Page(HTMLParser):
    """Collects elements, and checks that they close in order."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.text = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag, **wanted):
        return [a for t, a in self.found if t == tag and all(a.get(k) == v for k, v in wanted.items())]


@pytest.fixture(scope="module")
def text(made):
    return made[1].files["page"].read_text()


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_nothing_is_loaded_from_anywhere(page, text):
    for tag, attributes in page.found:
        assert tag not in ("link", "iframe", "object", "base", "form")
        for name in ("src", "href", "srcset", "action"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert "url(" not in text
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'; img-src data:;")


def test_what_comes_from_outside_is_only_text(page, text):
    assert len(page.all("script")) == 1
    assert "<script>alert" not in text
    assert "<b>weak" not in text
    assert 'a "dog" <script>alert(1)</script> & more' in page.text
    assert "<b>weak</b>" in page.text
    assert not any(name.startswith("on") for _, attributes in page.found for name in attributes)


def test_every_sample_is_there(page):
    assert len(page.all("section", **{"class": "case"})) == 2
    assert len(page.all("div", **{"class": "row"})) == 4
    assert len(page.all("figure")) == 12
    assert len(page.all("img")) == 12 + 8 + 8  # results, differences to dense, and what the recipe draws
    assert len({a["alt"] for a in page.all("img")}) == 6 + 2 + 1
    drawn = page.all("img", **{"class": "drawn", "alt": "dimming, what is <left>"})
    assert {picture(a["src"]).getpixel((0, 0)) for a in drawn} == {(128,) * 3, (230,) * 3}
    options = page.all("option")
    assert [o["value"] for o in options] == ["", "0", "1"]
    assert len(page.all("button")) == 3  # without a detector nothing can be wrong


def test_the_table(finished, page):
    summary = finished[1].summary
    words = " ".join(page.text)
    for column in summary["columns"]:
        assert column["title"] in words
    strong = summary["variants"]["strong"]["figures"]["psnr"]
    assert f"{strong['value']:.1f} dB" in words
    assert f"{strong['low']:.1f} to {strong['high']:.1f}" in words
    best = [a for a in page.all("td") if "best" in a.get("class", "").split()]
    assert len(best) == sum(len(c["best"]) for c in summary["columns"])
    assert len(page.all("svg")) == 1
    assert "how to read this" in words
    assert 'pip install "patchkit[metrics]"' in words  # LPIPS, which is not there


def test_figures_for_machines(finished):
    bench, _ = finished
    summary = json.loads((bench.folder / "out" / "summary.json").read_text())
    assert summary["variants"]["strong"]["figures"]["psnr"]["n"] == 4
    assert summary["missing"]["lpips"]
    assert "lpips" not in summary["variants"]["strong"]["figures"]
    lines = (bench.folder / "out" / "table.md").read_text().splitlines()
    assert len(lines) == 5
    assert len({line.count("|") for line in lines}) == 1


def test_verdicts_and_what_was_read():
    row = {
        "variant": "a",
        "prompt": "p",
        "verdict": {"right": {"colour": True, "shape": False}, "all": False, "read": {"colour": "red", "shape": "<x>"}},
        "costs": {"seconds": 1.0},
        "values": {},
    }
    text = gallery._verdict(row)
    assert '<span class="yes">✓ colour</span>' in text
    assert '<span class="no">✗ shape (read: &lt;x&gt;)</span>' in text
    assert gallery._wrong(row)
    assert not gallery._wrong(row | {"verdict": None})


def test_a_gallery_that_is_too_large_shows_the_first_seed_of_each_prompt(finished):
    bench, found = finished
    store = Store(bench.folder / "out")
    store.read()
    rows = list(store.rows.values())
    names = list(found.summary["variants"])
    whole = gallery.make(rows, names, store)
    assert (whole.shown, whole.total) == (12, 12)
    part = gallery.make(rows, names, store, limit=int(len(whole.html) * 0.55))
    assert (part.shown, part.total) == (6, 12)
    assert re.findall(r"seed (\d+)", part.html) == ["0", "1000"]
    assert gallery.make(rows, names, store, limit=10).shown == 3


def picture(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_pictures():
    clip = (torch.rand(5, 3, 16, 16) * 255).to(torch.uint8)
    moving = picture(pictures.animation(clip))
    assert (moving.n_frames, moving.size) == (5, (32, 32))
    still = picture(pictures.animation(clip[:1]))
    assert still.size == (16, 16)
    assert torch.equal(torch.tensor(list(still.convert("RGB").tobytes())).view(16, 16, 3).permute(2, 0, 1), clip[0])
    assert max(picture(pictures.animation(torch.rand(1, 3, 40, 640))).size) == pictures.LARGE
    other = clip.clone()
    other[:, :, :8] = 0
    drawn = picture(pictures.difference(clip, other))
    pixels = torch.tensor(list(drawn.tobytes())).view(16, 16)
    assert pixels[8:].sum() == 0
    assert pixels[:8].float().mean() > 200  # four times about a half


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.03, 1.03), (21.3, 22.1), (0, 4000), (5, 5)])
def test_ticks_are_round_and_inside(low, high):
    found = plots.ticks(low, high)
    assert all(low <= t <= high for t in found)
    assert 1 <= len(found) <= 8
    assert all(len(f"{t:g}") <= 5 for t in found)


def estimate(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


def test_plots_are_sound_svg():
    points = [("<a>", 0, estimate(1.0, 0.5, 1.5), estimate(0.5, 0.2, 0.9)), ("b", 1, estimate(2.0), estimate(0.5))]
    drawn = Page(plots.scatter(points, "seconds", "right", percent=True))
    assert len(drawn.all("circle")) == 2
    assert len(drawn.all("line", **{"class": "whisker"})) == 2
    names = drawn.all("text", **{"class": "name"})
    assert abs(float(names[0]["y"]) - float(names[1]["y"])) >= 13  # at one height, but not on each other
    bars = Page(plots.bars([("shape", [("a", 0, estimate(0.5, 0.2, 0.8)), ("b", 1, estimate(1.0))])], "right"))
    widths = [float(a["width"]) for a in bars.all("rect") if "class" not in a]
    assert widths[1] == pytest.approx(2 * widths[0])
    assert Page(plots.scatter([("a", 0, estimate(0.0), estimate(3.0))], "x", "y")).all("circle")


def test_a_curve_joins_its_points_in_order_and_has_dense_across():
    points = [("c", 3, 1.0, estimate(0.9)), ("a", 1, 0.25, estimate(0.5, 0.2, 0.8)), ("b", 2, 0.5, estimate(0.7))]
    drawn = Page(plots.curve(points, ("<dense>", 0, estimate(0.4)), "strength", "all right", percent=True))
    joints = drawn.all("line", **{"class": "joint"})
    assert len(drawn.all("circle")) == 3
    assert [float(j["x1"]) < float(j["x2"]) for j in joints] == [True, True]
    assert [float(j["y1"]) > float(j["y2"]) for j in joints] == [True, True]
    across = next(w for w in drawn.all("line", **{"class": "whisker"}) if w["y1"] == w["y2"])
    assert float(across["y1"]) > float(joints[0]["y1"])
    assert Page(plots.curve(points, None, "strength", "PSNR")).all("circle")


def variants(*options, names=("softpag",)):
    found = {"dense": {"recipes": []}}
    for n, given in enumerate(options):
        found[f"v{n}"] = {"recipes": [{"name": name, "options": given} for name in names]}
    return found


def test_what_is_a_sweep():
    three = [{"scale": 3.0, "strength": s} for s in (0.25, 1, 0.5)]
    assert sweeps.sweep(variants(*three)) == ("strength", {"v0": 0.25, "v1": 1, "v2": 0.5})
    assert sweeps.sweep(variants(*three[:2])) is None
    assert sweeps.sweep(variants(*three, {"scale": 2.0, "strength": 0.1})) is None, "two options differ"
    assert sweeps.sweep(variants(*[{"strength": s} for s in ("a", "b", "c")])) is None
    assert sweeps.sweep(variants(*[{"strength": s} for s in (True, False, True)])) is None
    assert sweeps.sweep(variants(*[{"strength": 1.0}] * 3)) is None
    assert sweeps.sweep(variants(*three, names=("a", "b"))) is None, "in both recipes"
    other = variants(*three)
    other["v1"]["recipes"][0]["name"] = "adaspa"
    assert sweeps.sweep(other) is None


def test_a_sweep_is_drawn(finished):
    bench, comparison = finished
    summary = json.loads(json.dumps(comparison.summary))
    assert "over density" not in page_of._plots(summary, bench.request())
    weak = json.loads(json.dumps(summary["variants"]["strong"]))
    weak["recipes"][0]["options"]["density"] = 0.7
    summary["variants"]["more"] = weak
    drawn = page_of._plots(summary, bench.request())
    assert "PSNR to dense, dB, over density" in drawn
    assert "all right" not in drawn


def test_a_ninth_variant_has_a_colour_that_is_not_denses():
    assert [table.colour(n) for n in (0, 1, 7, 8, 15)] == ["v0", "v1", "v7", "v1", "v1"]
