"""report.html: its figures, its charts, and how a real browser shows it."""

import json
import math
import random
import re
import shutil
from html.parser import HTMLParser

import pytest

from pcafast.errors import ArgumentError
from pcafast.report import numbers, render

SPACE = "\N{NO-BREAK SPACE}"
CONVOLUTIONS = ["conv1", *(f"layer{s}.{b}.conv{c}" for s in (1, 2, 3) for b in range(9) for c in (1, 2))]
MACS, PARAMS = 125_747_840, 855_770  # of ResNet-56


def _resnet56(unit, share):
    """The rows of ResNet-56 with the same share of every layer's channels, or of its rank."""
    rows = []
    for index, name in enumerate([*CONVOLUTIONS, "linear"]):
        stage = max(1, int(name[5])) if name.startswith("layer") else 1
        inputs = 3 if index == 0 else 8 * 2 ** (stage if name.endswith("0.conv1") and stage > 1 else stage + 1) // 2
        before, positions, taps = 8 * 2**stage, (64 // 2**stage) ** 2, 9
        if name == "linear":
            inputs, before, positions, taps = 64, 10, 1, 1
        after = before if name == "linear" else round(share * before)
        macs = inputs * before * taps * positions
        left = macs if name == "linear" else round(macs * share)
        rows.append(
            {
                "layer": name,
                "type": "Linear" if name == "linear" else "Conv2d",
                "unit": unit,
                "before": before,
                "after": after,
                "params": {"before": macs // positions, "after": left // positions},
                "macs": {"before": macs, "after": left},
            }
        )
    return rows


def _history(steps, epochs):
    entries = [{"step": 0, "stage": "original", "accuracy": 0.9339, "loss": 0.2774, "macs": MACS, "params": PARAMS}]
    for step in range(1, steps + 1):
        done = step / steps
        cost = {"macs": round(MACS * (1 - done / 2)), "params": round(PARAMS * (1 - 0.52 * done))}
        entries.append({"step": step, "stage": "compressed", "accuracy": 0.93 - 0.16 * done, "loss": 0.8, **cost})
        entries.append(
            {"step": step, "stage": "batch norm re-estimated", "accuracy": 0.93 - 0.07 * done, "loss": 0.5, **cost}
        )
        for epoch in range(1, epochs + 1):
            entry = {"epoch": epoch, "accuracy": 0.93 - 0.02 * done / epoch, "loss": 0.3, "training_loss": 0.12}
            entries.append({"step": step, "stage": "retrained", **entry, **cost})
    return entries


def _example(method, unit, share, steps):
    return {
        "format": "pcafast report",
        "version": 1,
        "name": "resnet56",
        "command": f"pcafast compress resnet56 --weights resnet56.th --data 'cifar10-{{split}}.npz' --method {method} "
        f"--budget macs=0.5 --steps {steps} --retrain-epochs 2 --out small",
        "environment": {
            "pcafast": "0.1.0",
            "torch": "2.14.1",
            "torch_cuda": None,
            "platform": "Linux-6.18.44-x86_64-with-glibc2.36",
            "processor": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
            "native": True,
        },
        "data": {"train": "cifar10-train.npz", "test": "cifar10-test.npz", "images": 1024},
        "asked": {"method": method, "budget": {"macs": 0.5}, "steps": steps, "retrain_epochs": 2, "layers": None},
        "reached": {
            "macs": {"before": MACS, "after": 62_842_004, "share": 62_842_004 / MACS},
            "params": {"before": PARAMS, "after": 412_719, "share": 412_719 / PARAMS},
        },
        "before": {
            **{"accuracy": 0.9339, "correct": 9339, "images": 10_000, "loss": 0.2774, "params": PARAMS, "macs": MACS},
            **{"latency_seconds": 0.04812, "latency_batch_size": 64, "file_bytes": 3_470_360},
        },
        "after": {
            **{"accuracy": 0.9241, "correct": 9241, "images": 10_000, "loss": 0.2957, "params": 412_719},
            **{"macs": 62_842_004, "latency_seconds": 0.0297, "latency_batch_size": 64, "file_bytes": 1_711_876},
        },
        "history": _history(steps, 2),
        "layers": _resnet56(unit, share),
        "skipped": {"linear": "its outputs are the classes"},
        "warnings": ["layer3.8.conv1: the smallest width of 2 channels was reached."],
    }


def pca_example():
    report = _example("pca", "rank", 0.5, 1)
    convolutions = report["layers"][:-1]
    report["spectra"] = [
        {
            "layer": row["layer"],
            "eigenvalues": [2.3 * math.exp(-7 * index / row["before"]) for index in range(row["before"])],
            "rank": row["after"],
        }
        for row in convolutions
    ]
    return report


def pruning_example(criterion="taylor"):
    report = _example(criterion, "channels", 0.7, 3)
    dice = random.Random(0)
    report["scores"] = []
    for row in report["layers"][:-1]:
        values = [1e-6 * dice.expovariate(1) for _ in range(row["before"])]
        best = sorted(range(row["before"]), key=values.__getitem__)[-row["after"] :]
        report["scores"].append({"layer": row["layer"], "criterion": criterion, "values": values, "kept": sorted(best)})
    return report


EXAMPLES = {"pca": pca_example, "taylor": pruning_example, "l1": lambda: pruning_example("l1")}


class Page(HTMLParser):
    """The page as elements and text; fails where tags do not match."""

    VOID = ("meta", "link", "br", "wbr")
    INLINE = ("span", "b", "i", "code", "wbr")

    def __init__(self, html):
        super().__init__()
        self.elements, self.texts, self._open = [], [], []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.INLINE:
            self.texts.append(" ")
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self):
        return " ".join("".join(self.texts).replace(SPACE, " ").split())

    def all(self, tag, **wanted):
        return [
            found for name, found in self.elements if name == tag and all(found.get(k) == v for k, v in wanted.items())
        ]


@pytest.fixture(params=EXAMPLES)
def example(request):
    return EXAMPLES[request.param]()


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (numbers.percent, 0.9339, "93.39 %"),
        (numbers.percent, 0.00001, "< 0.01 %"),
        (numbers.percent, 0, "0.00 %"),
        (numbers.count, 125_747_840, "125.7 M"),
        (numbers.count, 855_770, "0.86 M"),
        (numbers.count, 61_706, "61.7 k"),
        (numbers.count, 4_089_184_256, "4.09 G"),
        (numbers.count, 640, "640"),
        (numbers.seconds, 0.0123, "12.3 ms"),
        (numbers.seconds, 0.00084, "840 µs"),
        (numbers.seconds, 2.5, "2.5 s"),
        (numbers.byte_size, 3_400_000, "3.4 MB"),
        (numbers.byte_size, 640, "640 bytes"),
        (numbers.plain, 1024, "1,024"),
        (numbers.plain, -0.25, "\N{MINUS SIGN}0.25"),
        (numbers.plain, 3.785e-7, "3.785 \N{MULTIPLICATION SIGN} 10⁻⁷"),
        (numbers.plain, None, "\N{EN DASH}"),
        (numbers.plain, math.nan, "nan"),
        (numbers.percent, math.inf, "inf"),
    ],
)
def test_numbers_for_people(show, value, text):
    assert show(value).text.replace(SPACE, " ") == text


def test_the_exact_value_is_beside_the_rounded_one():
    spans = {
        found["title"].replace(SPACE, " ") for found in Page(render(pruning_example())).all("span") if "title" in found
    }
    assert {"0.9241", "412,719", "62,842,004", "0.0297 s", "1,711,876 bytes"} <= spans


def test_headline(example):
    text = Page(render(example)).text
    assert "1.62 times faster with 50.0 % fewer MACs; accuracy 0.98 points lower." in text
    assert "Accuracy 92.41 % before: 93.39 % 0.98 points lower 9,241 of 10,000 images" in text
    assert "MACs 62.8 M before: 125.7 M 50.0 % fewer" in text
    assert "Params 0.41 M before: 0.86 M 51.8 % fewer" in text
    assert "Latency 29.7 ms before: 48.1 ms 1.62 times faster for 64 images" in text
    assert "File size 1.7 MB before: 3.5 MB 50.7 % smaller" in text


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        (
            {"latency_seconds": 1, "macs": 100},
            {"latency_seconds": 1.1, "macs": 50},
            "50.0 % fewer MACs but 1.10 times slower.",
        ),
        ({"accuracy": 0.9}, {"accuracy": 0.9}, "Accuracy unchanged."),
        ({"accuracy": 0.9}, {"accuracy": 0.912}, "Accuracy 1.20 points higher."),
        ({"params": 100}, {"params": 100}, "As many params as before."),
        ({"params": 100}, {"params": 130}, "30.0 % more params."),
        ({"score": 31.25}, {"score": 30.5}, "Score 0.75 lower."),
        ({"latency_seconds": 1.0}, {"latency_seconds": 1.001}, "As fast as before."),
    ],
)
def test_the_outcome_in_words(before, after, sentence):
    assert sentence in Page(render({"before": before, "after": after})).text


def test_what_has_only_one_side_is_not_compared():
    text = Page(render({"after": {"accuracy": 0.9, "macs": 5}, "before": {"params": 7, "macs": 0}})).text
    assert "Accuracy 90.00 % after only" in text
    assert "Params 7 before only" in text
    assert "fewer" not in text


def test_asked_and_reached(example):
    text = Page(render(example)).text
    assert "MACs 125.7 M 62.8 M 50.0 % 50.0 %" in text
    assert "Params 0.86 M 0.41 M 48.2 %" in text
    assert "Budget 50.0 % of the MACs" in text
    assert "Layers \N{EN DASH}" in text
    assert "Retrain epochs 2" in text


def test_the_command_and_the_environment_are_whole(example):
    text = Page(render(example)).text
    assert example["command"] in text
    assert "Processor Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz" in text
    assert "Native yes" in text


def test_skipped_layers_are_grouped_by_reason():
    skipped = {"a": "too narrow", "b": "no statistics", "c": "too narrow"}
    assert "too narrow (2) a, c no statistics (1) b" in Page(render({"skipped": skipped})).text


def test_what_else_a_user_recorded_is_shown():
    assert "Also recorded Teacher name resnet110" in Page(render({"teacher": {"name": "resnet110"}})).text


def test_layers_and_their_bars():
    page = Page(render(pruning_example()))
    assert "layer3.8.conv2 64 → 45 2.36 M → 1.65 M 70 % 1.9 %" in page.text
    assert "linear 10 640 100 % < 0.1 %" in page.text
    widths = [found["style"] for found in page.all("i") if found.get("class") in ("was", "now")]
    # Five cards first, then width and MACs of each layer; conv1 has 3 inputs where most MACs are at 16.
    assert widths[10:14] == ["width:100.0%", "width:68.8%", "width:18.8%", "width:13.1%"]
    assert len(widths) == 10 + 56 * 4


def test_macs_that_are_not_known_are_left_empty():
    row = {"layer": "head", "before": 8, "after": 4, "macs": None}
    page = Page(render({"layers": [row, {**row, "layer": "fc", "macs": {"before": 10, "after": 5}}]}))
    assert "head 8 → 4 fc 8 → 4 10 → 5 50 % 100.0 %" in page.text


def _points(path):
    """The corners of a staircase as (start, end, height), in shares of the drawing; the ground is found first."""
    bars = []
    for part in path.split("M")[1:]:
        x, ground = map(float, part[: part.index("V")].split())
        for y, end in re.findall(r"V(-?\d+)H(\d+)", part):
            bars.append((x / 1000, int(end) / 1000, (ground - int(y)) / 1000))
            x = int(end)
    return bars


def _paths(page):
    return [found["d"] for found in page.all("path", **{"class": "kept"})], [
        found["d"] for found in page.all("path", **{"class": "removed"})
    ]


def test_spectrum_is_drawn_to_scale():
    values = [1e-3 ** (index / 9) for index in range(10)]
    page = Page(render({"spectra": [{"layer": "a", "eigenvalues": [7 * value for value in values], "rank": 4}]}))
    (kept,), (removed,) = _paths(page)
    bars = _points(kept) + _points(removed)
    assert [end for _, end, _ in bars] == pytest.approx([(index + 1) / 10 for index in range(10)])
    assert [height for *_, height in bars] == pytest.approx([1 + math.log10(value) / 3 for value in values], abs=1e-3)
    assert len(_points(kept)) == 4
    assert page.all("path", **{"class": "cut"}) == [{"class": "cut", "d": "M400 0V1000"}]
    share = sum(values[:4]) / sum(values)
    assert f"rank 4 of 10 {100 * share:.1f} % of variance" in page.text


def test_scores_are_drawn_to_scale_and_told_apart():
    scores = {"layer": "a", "criterion": "taylor", "values": [1.0, -1.0, 3.0, 0.5, math.nan], "kept": [2, 3, 4]}
    page = Page(render({"scores": [scores]}))
    (kept,), (removed,) = _paths(page)
    assert _points(kept) == [(0.0, 0.25, 0.75), (0.5, 0.75, 0.125)]
    assert _points(removed) == [(0.25, 0.5, 0.25), (0.75, 1.0, -0.25)]
    assert not page.all("path", **{"class": "cut"})
    assert "3 of 5 kept" in page.text
    assert "1 not finite, not drawn" in page.text


def test_wide_layers_are_thinned_without_changing_the_shares():
    dice = random.Random(1)
    values = [dice.random() for _ in range(2048)]
    kept = dice.sample(range(2048), 700)
    page = Page(render({"scores": [{"layer": "a", "values": values, "kept": kept}]}))
    paths = _paths(page)
    assert sum(len(path) for (path,) in paths) < 5000
    areas = [sum(end - start for start, end, _ in _points(path)) for (path,) in paths]
    assert areas == pytest.approx([700 / 2048, 1348 / 2048], abs=0.03)


def test_accuracy_is_drawn_to_scale(example):
    page = Page(render(example))
    ticks = re.findall(r'<span style="top:([\d.]+)%">([\d.]+)\xa0%</span>', render(example))
    (low_place, low), (high_place, high) = ((float(place), float(text)) for place, text in (ticks[0], ticks[1]))
    drawn = [
        low + (float(found["y"][:-1]) - low_place) / (high_place - low_place) * (high - low)
        for found in page.all("use")
        if found["x"].endswith("%")
    ]
    assert drawn == pytest.approx([100 * entry["accuracy"] for entry in example["history"]], abs=0.01)
    places = [float(found["x"][:-1]) for found in page.all("use") if found["x"].endswith("%")]
    assert places == sorted(places)


def test_a_long_history_keeps_every_figure_and_few_markers():
    html = render({"history": _history(20, 40)})
    page = Page(html)
    assert len([found for found in page.all("use") if found["x"].endswith("%")]) == 61
    assert "841 stages in figures" in page.text
    assert html.count("training loss 0.12") == 800


def test_history_of_scores_and_of_unknown_stages():
    entry = {"stage": "sliced", "score": 31.5, "macs": 10}
    page = Page(render({"history": [{**entry, "step": 0}, {**entry, "step": 1, "macs": None, "score": math.nan}]}))
    assert "Step and stage Score MACs" in page.text
    assert "31.5" in page.text
    assert "nan" in page.text


@pytest.mark.parametrize("accuracy", [0.0, 0.9, 1.0])
def test_an_accuracy_that_never_changes(accuracy):
    history = [{"step": step, "stage": "original", "accuracy": accuracy} for step in range(3)]
    markers = [found["y"] for found in Page(render({"history": history})).all("use") if found["x"].endswith("%")]
    assert len(set(markers)) == 1
    assert 0 <= float(markers[0][:-1]) <= 100


SECTIONS = {
    "warnings": "Warnings",
    "history": "Along the steps",
    "layers": "Layers",
    "spectra": "Eigenvalues and their cut",
    "scores": "Scores: taylor",
    "skipped": "Left alone",
}


@pytest.mark.parametrize("key", SECTIONS)
def test_sections_without_data_are_left_out(key):
    report = {**pca_example(), "scores": pruning_example()["scores"]}

    def headings(report):
        return re.findall("<h2>(.*?)</h2>", render(report))

    assert SECTIONS[key] in headings(report)
    for nothing in (None, type(report[key])()):
        assert headings({**report, key: nothing}) == [h for h in headings(report) if h != SECTIONS[key]]


def test_an_empty_report_is_a_page():
    assert Page(render({})).text.startswith("A compressed model: pcafast report")


def test_everything_is_escaped():
    evil = "<script>alert('&\"x')</script>"
    report = pruning_example()
    report.update(name=evil, command=evil, warnings=[evil], skipped={evil: evil}, environment={evil: evil})
    report.update(asked={evil: evil, "budget": {evil: 1}}, data={evil: [evil]}, reached={evil: {"before": evil}})
    report["layers"][0].update(layer=evil, type=evil, unit=evil)
    report["history"][0].update(stage=evil, epoch=evil)
    report["scores"][0].update(layer=evil, criterion=evil)
    report["spectra"] = [{"layer": evil, "eigenvalues": [1.0], "rank": 1}]
    report["before"][evil] = evil
    report[evil] = evil
    html = render(report)
    page = Page(html)
    assert not page.all("script")
    assert evil in html.replace("&lt;", "<").replace("&gt;", ">").replace("&#39;", "'").replace("&#34;", '"').replace(
        "&amp;", "&"
    )


def test_nothing_is_fetched_from_elsewhere(example):
    html = render(example)
    assert not re.search(r"https?:|@import|url\(|//[a-z]", html)
    references = [
        value
        for _, found in Page(html).elements
        for name, value in found.items()
        if name in ("href", "src", "xlink:href")
    ]
    assert {value for value in references if not value.startswith("#")} == {"data:,"}
    assert "default-src 'none'" in html


def _with_numbers_replaced(value, replacement):
    if isinstance(value, dict):
        return {
            key: item if key in ("rank", "kept") else _with_numbers_replaced(item, replacement)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_with_numbers_replaced(item, replacement) for item in value]
    return replacement if isinstance(value, float | int) and not isinstance(value, bool) else value


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, None, 0, -1, 1e300, 5e-324])
def test_odd_numbers_are_survived(example, odd):
    page = Page(render(_with_numbers_replaced(example, odd)))
    drawings = " ".join(found.get("d", "") + found.get("style", "") for _, found in page.elements)
    assert not re.search("nan|inf|None", drawings)


def test_json_holds_it_all(example):
    assert render(json.loads(json.dumps(example))) == render(example)


def _wide(layers, channels):
    """A network of many wide layers with long names, under both methods at once."""
    dice = random.Random(2)
    names = [f"features.denseblock{index % 4 + 1}.denselayer{index}.convolution" for index in range(layers)]
    values = sorted((dice.random() for _ in range(channels)), reverse=True)
    pair = {"before": 123_456_789, "after": 61_234_567}
    return {
        **_example("taylor", "channels", 0.5, 12),
        "layers": [{"layer": name, "before": channels, "after": channels // 2, "macs": pair} for name in names],
        "spectra": [{"layer": name, "eigenvalues": values, "rank": channels // 2} for name in names],
        "scores": [
            {"layer": name, "criterion": "l1", "values": values, "kept": dice.sample(range(channels), channels // 2)}
            for name in names
        ],
        "skipped": {name: "the layer is depthwise" for name in names},
    }


def test_very_large_networks_stay_small_and_whole():
    html = render(_wide(200, 2048))
    assert len(html.encode()) < 2_000_000
    page = Page(html)
    assert len(page.all("figure", **{"class": "panel"})) == 400
    assert page.text.count("1024 of 2048 kept") == page.text.count("rank 1024 of 2048") == 200
    assert all("open" not in found for found in page.all("details"))


def test_few_layers_are_open():
    report = {"spectra": [{"layer": "only", "eigenvalues": [2.0, 1.0], "rank": 1}]}
    page = Page(render(report))
    assert page.all("details") == [{"open": None}]
    assert "One layer only" in page.text


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"before": 0.9}, r"expected 'before' to be a mapping, got the float 0.9\."),
        ({"reached": {"macs": 0.5}}, "expected 'macs' of 'reached' to be a mapping, got the float"),
        ({"history": {"step": 0}}, "expected 'history' to be a list, got the dict"),
        ({"warnings": "careful"}, "expected 'warnings' to be a list, got the str 'careful'"),
        ({"layers": ["conv1"]}, r"expected 'layers\[0\]' to be a mapping, got the str 'conv1'"),
        ({"history": [{"step": 0}]}, r"expected 'stage' of 'history\[0\]' to be of type str, got none"),
        (
            {"spectra": [{"layer": "a", "eigenvalues": [], "rank": 0.5}]},
            "'rank' of .* to be of type int, got the float",
        ),
        ({"scores": [{"layer": "a", "values": 3, "kept": []}]}, "'values' of .* to be a list, got the int 3"),
    ],
)
def test_what_is_not_a_report_is_refused(part, message):
    with pytest.raises(ArgumentError, match=message):
        render(part)


# In a browser

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
WIDTHS = [390, 1440]
PAGES = {
    **EXAMPLES,
    "wide": lambda: _wide(30, 2048),
    "one": lambda: {"layers": [{"layer": "a", "before": 2, "after": 1}]},
}

# For every piece of visible text: its size on the screen, its place, its contrast with what lies behind it.
TEXTS = """() => {
  document.querySelectorAll('details').forEach(details => details.open = true);
  const channel = value => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = numbers(getComputedStyle(element).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    throw new Error('nothing opaque behind');
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    if (!node.data.trim() || parent.closest('title, style') || !parent.checkVisibility()) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const boxes = [...range.getClientRects()].filter(box => box.width);
    const style = getComputedStyle(parent);
    const matrix = parent instanceof SVGElement ? parent.getScreenCTM() : null;
    const scale = matrix ? Math.min(Math.hypot(matrix.a, matrix.b), Math.hypot(matrix.c, matrix.d)) : 1;
    const [light, dark] = [luminance(numbers(style.color)), luminance(behind(parent))].sort((a, b) => b - a);
    found.push({
      text: node.data.trim().slice(0, 60), size: parseFloat(style.fontSize) * scale,
      left: Math.min(...boxes.map(box => box.left)), right: Math.max(...boxes.map(box => box.right)),
      contrast: (light + 0.05) / (dark + 0.05),
    });
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "google-chrome", "chromium-browser")
    executable = next((path for name in names if (path := shutil.which(name))), None)
    if executable is None:
        pytest.skip("no browser: install the system's package chromium, or Google Chrome")
    playwright = pytest.importorskip("playwright.sync_api", reason="install the Python package playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def show(browser, tmp_path):
    """Opens a report in a window; whatever the page says or asks for fails the test."""
    pages, said, asked = [], [], []

    def open_page(report, width, scheme="light"):
        file = tmp_path / "report.html"
        file.write_text(render(report), encoding="utf-8")
        page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [(tmp_path / "report.html").as_uri()] * len(pages)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_legible_in_a_browser(show, name, width):
    page = show(PAGES[name](), width)
    texts = page.evaluate(TEXTS)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert len(texts) > 5
    assert [text for text in texts if text["size"] < 10] == []
    assert [text for text in texts if text["left"] < 0 or text["right"] > width] == []
    overfull = """() => [...document.querySelectorAll(
        'td, th, li, dd, dt, p, figure, figcaption, pre, summary, .size > span:first-child, .y > span')]
        .filter(element => element.scrollWidth > element.clientWidth + 1).map(element => element.outerHTML)"""
    assert page.evaluate(overfull) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_contrast_in_both_schemes(show, name, scheme):
    page = show(EXAMPLES[name](), 390, scheme)
    texts = page.evaluate(TEXTS)
    assert [text for text in texts if text["contrast"] < 4.5] == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")


@pytest.mark.parametrize("width", WIDTHS)
def test_headings_and_drawings_are_there(show, width):
    page = show({**pca_example(), "scores": pruning_example()["scores"]}, width)
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    headings = page.locator("h1, h2, h3")
    assert headings.count() == 16
    assert all(heading.is_visible() for heading in headings.all())
    boxes = page.evaluate("""() => [...document.querySelectorAll('svg[role=img]')].map(svg => {
        const box = svg.getBoundingClientRect();
        return [svg.getAttribute('aria-label').length, box.width, box.height] })""")
    assert len(boxes) == 2 + 55 + 55
    assert all(label > 10 and width > 100 and height > 60 for label, width, height in boxes)


def test_kept_and_removed_are_told_apart_without_colour(show):
    page = show(pruning_example(), 390)
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    fills = "name => [...new Set([...document.querySelectorAll('path.' + name)].map(p => getComputedStyle(p).fill))]"
    assert page.evaluate(fills, "removed") == ["none"]
    assert "none" not in page.evaluate(fills, "kept")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_prints_everything_on_white(show, scheme):
    page = show(pruning_example(), 688, scheme)  # as wide as A4 between its margins
    assert page.locator("details").last.get_attribute("open") is None
    page.emulate_media(media="print", color_scheme=scheme)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("document.documentElement.scrollWidth") <= 688
    hidden = """() => [...document.querySelectorAll('.panel, .exact td')].filter(element =>
        !element.checkVisibility({contentVisibilityAuto: true}) || !element.getBoundingClientRect().height).length"""
    assert page.evaluate(hidden) == 0
    pdf = page.pdf(prefer_css_page_size=True)
    assert pdf.startswith(b"%PDF")
    assert 6 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 12
