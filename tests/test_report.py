"""The report page: structure, escaping, figures against the tables, bounds, edge cases."""

import base64
import io
import time
import warnings
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from selective_ray import charts, in_memory, listing, page, report
from selective_ray.certificate import Certificate
from selective_ray.density import log_density
from selective_ray.errors import UserError
from selective_ray.schema import (
    CLUSTERS,
    DENSITY,
    IMAGES,
    REJECTED,
    embeddings_schema,
    selection_schema,
    sq_dist_column,
)
from selective_ray.store import Run

pytestmark = pytest.mark.filterwarnings("error")

NASTY = [
    "two words.png",
    "<script>alert(1)<script>.png",
    "\"quoted\" & 'single'.png",
    "line\nbreak\ttab.png",
    "été 図 🙂 \u202egnp.png",
    "&lt;escaped&gt;.png",
    "a" * 200 + "-end.png",
    "--><!-- ]]>.png",
]


def blobs(n: int, d: int = 16, centers: int = 12, seed: int = 0, spread: float = 0.35) -> np.ndarray:
    rng = np.random.default_rng(seed)
    middles = rng.standard_normal((centers, d))
    # Blobs of very different sizes.
    which = rng.choice(centers, n, p=np.arange(1, centers + 1) / np.arange(1, centers + 1).sum())
    x = middles[which] + spread * rng.standard_normal((n, d)) * rng.uniform(0.3, 1.5, (n, 1))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def painted(folder: Path, n: int, names: list[str] | None = None) -> list[str]:
    """Paint n small images; returns their absolute paths, sorted."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    names = names if names is not None else NASTY
    names = (names + [f"{i:05d}.png" for i in range(n)])[:n]
    for name in names:
        pixels = rng.integers(0, 255, (6, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((80, 60)).save(folder / name)
    return sorted(str(folder / name) for name in names)


class Made(NamedTuple):
    run: Run
    x: np.ndarray
    selected: in_memory.Selected
    uris: list[str]


def make(
    root: Path,
    x: np.ndarray,
    budget: int,
    uris: list[str],
    *,
    shard_rows: int = 100,
    settings: dict | None = None,
    dtype: str = "float32",
    rejected: tuple[tuple[int, str, str], ...] = (),
    found: dict | None = None,
) -> Made:
    """A finished run as the stages leave it: the tables, shard by shard, and their manifests."""
    settings = ({"density.k": min(10, len(x))} if len(x) > 1 else {}) | (settings or {})
    estimator = settings.get("density.estimator", "mean")
    x = x.astype(dtype).astype(np.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "density.k lowered")
        selected = in_memory.select(x, budget, settings=settings)
    run = Run(str(root))
    run.prepare()
    ids = np.arange(len(x)) * 2 + 1  # ids are not row numbers where images were rejected
    listed = [name for uri in uris for name in (f"{uri} rejected", uri)]
    column = sq_dist_column(estimator)
    density = {"image_id": ids, column: selected.all_sq_dists}
    if estimator == "kth":
        density["log_density"] = log_density(
            selected.all_sq_dists, k=settings["density.k"], n=len(x), d=x.shape[1], floor=1e-6
        )
    lists = pa.FixedSizeListArray.from_arrays(pa.array(x.astype(dtype).ravel()), x.shape[1])
    rows = selected.rows
    tables = {
        "images": listing.table(listed, [None] * len(listed), [""] * len(listed))
        .add_column(0, "image_id", pa.array(np.arange(len(listed))))
        .cast(IMAGES),
        "embeddings": pa.table({"image_id": ids, "embedding": lists}, embeddings_schema(x.shape[1], dtype)),
        "rejected": pa.Table.from_pylist(
            [dict(zip(REJECTED.names, row, strict=True)) for row in rejected], REJECTED
        ),
        "density": pa.table(density, DENSITY[estimator]),
        "clusters": pa.table(
            {
                "image_id": ids,
                "cluster_id": selected.all_cluster_ids,
                "sq_dist": np.zeros(len(x), np.float32),
            },
            CLUSTERS,
        ),
        "selection": pa.table(
            {
                "image_id": ids[rows],
                "uri": [uris[row] for row in rows],
                "cluster_id": selected.cluster_ids,
                column: selected.sq_dists,
                "repulsion": selected.repulsions,
                "utility": selected.utilities,
            },
            selection_schema(estimator),
        ),
    }
    what = {
        "images": {"source": str(root.parent), "content": "abc"},
        "density": {
            "density": {
                "k": settings.get("density.k", 1),
                "estimator": estimator,
                "floor": 1e-6,
                "include_self": True,
            }
        },
        "clusters": {
            "cluster": {"iterations": 100},
            "selection": {"budget": budget},
            "seed": settings.get("seed", 0),
        },
        "selection": {"selection": {"budget": budget, "rounds": 10, "weight": 0.5}},
    }
    for table, content in tables.items():
        inputs = run.fingerprints("clusters") if table == "selection" else {}
        run.begin(table, what.get(table, {"embed": {"encoder": "<b>net</b>", "dtype": dtype}}), inputs)
        one = table in ("selection", "rejected")
        step = max(1, len(content)) if one else shard_rows * (1 + (table == "images"))
        shards = [
            run.write_shard(table, i, content.slice(start, step))
            for i, start in enumerate(range(0, max(1, len(content)), step))
        ]
        run.finish(
            table,
            shards,
            seconds=1.25,
            peak_memory_bytes={"driver": 120_000_000, "largest worker": 2_500_000_000},
            summary={"noted": {"by": table}} | ((found or {}) if table == "density" else {}),
        )
    return Made(run, x, selected, uris)


class Page(HTMLParser):
    """The page as a browser's parser sees it, refusing tags that do not nest."""

    VOID = ("meta", "img", "br", "path", "circle", "rect")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text, self.open, self.tags = text, [], []
        self.cards: list[dict] = []
        self.sections: dict[str, str] = {}
        self.section = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = attrs["id"]
            self.sections[self.section] = ""
        if tag == "figure" and self.section == "picks":
            self.cards.append({"id": attrs["id"], "text": "", "values": [], "img": None, "name": ""})
        if self.section == "picks" and self.cards:
            if tag == "img":
                self.cards[-1]["img"] = attrs
            if tag == "data":
                self.cards[-1]["values"].append(float(attrs["value"]))
            if attrs.get("class") == "name":
                self.cards[-1]["uri"] = attrs["title"]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.section:
            self.sections[self.section] += data
        if self.section == "picks" and self.cards:
            self.cards[-1]["text"] += data
            if self.open[-1] == "bdi":
                self.cards[-1]["name"] += data

    def count(self, tag: str, **attrs: str) -> int:
        return sum(t == tag and all(a.get(k) == v for k, v in attrs.items()) for t, a in self.tags)


def written(made: Made, **options) -> Page:
    path = report.write(made.run, **options)
    assert path == made.run.path("report", "index.html")
    return Page(Path(path).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Made:
    root = tmp_path_factory.mktemp("small")
    uris = painted(root / "in put", 60)
    rejected = (
        (100, "/x/<img src=x onerror=alert(1)>.png", "not an image"),
        (102, "/x/b\n.png", "truncated"),
        (104, "/x/c.png", "not an image"),
    )
    return make(root / "run", blobs(60), 20, uris, shard_rows=17, rejected=rejected)


@pytest.fixture(scope="module")
def small_page(small) -> Page:
    return written(small)


def test_page_is_one_file_that_fetches_and_runs_nothing(small_page):
    tags = {tag for tag, _ in small_page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for _, attrs in small_page.tags:
        assert not any(key.startswith("on") for key in attrs)
        for key in ("src", "href"):
            assert attrs.get(key, "#").startswith(("#", "data:image/jpeg;base64,"))
    assert "url(" not in small_page.text and "@import" not in small_page.text
    assert small_page.count("html", lang="en") == 1
    assert small_page.count("meta", name="viewport") == 1
    assert small_page.count("title") > 1  # the page's, and those of points in the charts
    ids = [attrs["id"] for _, attrs in small_page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = {attrs["href"][1:] for tag, attrs in small_page.tags if tag == "a"}
    assert links <= set(ids)
    assert list(small_page.sections) == [
        "summary",
        "picks",
        "coverage",
        "map",
        "density",
        "clusters",
        "rejected",
        "stages",
        "configuration",
    ]


def test_summary_is_three_sentences(small_page):
    words = small_page.sections["summary"]
    assert words.count(". ") + words.strip().endswith(".") == 3
    assert "Out of 60 images (3 further files could not be used), 20 were chosen" in words
    assert "20 groups" in words


def test_names_are_escaped(small, small_page):
    assert "<script" not in small_page.text and "<img src=x" not in small_page.text
    assert "<b>net" not in small_page.text and "<b>net</b>" in small_page.sections["configuration"]
    titles = {card["uri"] for card in small_page.cards}
    for row in small.selected.rows:
        uri = small.uris[row].replace("\n", "\\n").replace("\t", "\\t")
        assert uri in titles
    assert "/x/b\\n.png" in small_page.sections["rejected"]


def test_every_name_survives_the_page(tmp_path):
    """All images picked, so that every name is on the page."""
    uris = painted(tmp_path / "in", len(NASTY))
    found = written(make(tmp_path / "run", blobs(len(NASTY)), len(NASTY), uris))
    assert len(found.cards) == len(NASTY) and all(card["img"] for card in found.cards)
    names = {card["name"] for card in found.cards}
    assert {"two words.png", "<script>alert(1)<script>.png", "\"quoted\" & 'single'.png"} <= names
    assert {"line\\nbreak\\ttab.png", "&lt;escaped&gt;.png", "--><!-- ]]>.png"} <= names
    assert "été 図 🙂 \u202egnp.png" in names
    (cut,) = [name for name in names if name.startswith("aaa")]
    assert len(cut) <= page.NAME and cut.endswith("-end.png") and "…" in cut
    assert {card["img"]["alt"] for card in found.cards} == names


def test_figures_are_those_of_the_table(small, small_page):
    selected = small.selected
    sizes = np.bincount(selected.all_cluster_ids)
    assert len(small_page.cards) == 20
    by_id = {card["id"]: card for card in small_page.cards}
    for row, cluster, sq_dist, repulsion, utility in zip(
        selected.rows,
        selected.cluster_ids,
        selected.sq_dists,
        selected.repulsions,
        selected.utilities,
        strict=True,
    ):
        card = by_id[f"image-{row * 2 + 1}"]
        assert card["values"] == [1 / float(sq_dist), repulsion, utility]
        assert f"cluster{cluster}size{sizes[cluster]}" in card["text"]
    order = [sizes[int(card["text"].split("cluster")[-1].split("size")[0])] for card in small_page.cards]
    assert order == sorted(order, reverse=True)


def test_pictures_show_the_images(small, small_page):
    for card in small_page.cards:
        data = base64.b64decode(card["img"]["src"].partition(",")[2])
        shown = Image.open(io.BytesIO(data))
        assert shown.format == "JPEG" and shown.size == (80, 60)
        name = card["uri"].replace("\\n", "\n").replace("\\t", "\t")
        original = np.asarray(Image.open(name), float).mean(axis=(0, 1))
        assert np.abs(np.asarray(shown, float).mean(axis=(0, 1)) - original).max() < 4


def test_unreadable_images_leave_a_placeholder(tmp_path):
    uris = painted(tmp_path / "in", 12, [])
    made = make(tmp_path / "run", blobs(12), 12, uris)
    Path(uris[0]).unlink()
    Path(uris[1]).write_bytes(b"garbled")
    Path(uris[2]).unlink()
    Path(uris[2]).mkdir()
    found = written(made)
    cards = {card["uri"]: card for card in found.cards}
    assert len(cards) == 12 and sum(card["img"] is None for card in found.cards) == 3
    assert "file not found" in cards[uris[0]]["text"]
    assert "unreadable: not an image" in cards[uris[1]]["text"]
    assert "cannot be read: Is a directory" in cards[uris[2]]["text"]


def test_rejected_are_counted_by_reason(small_page, tmp_path):
    words = small_page.sections["rejected"]
    assert "3 files could not be used" in words and "not an image2" in words and "truncated1" in words
    many = tuple((1000 + i, f"/x/{i}.png", f"too many pixels: {i} x 9") for i in range(1500))
    found = written(make(tmp_path / "run", blobs(30), 3, painted(tmp_path / "in", 30, []), rejected=many))
    words = found.sections["rejected"]
    assert "1,500 files" in words and "The first 100" in words
    assert "other reasons1,480" in words.replace("\n", "")
    assert found.text.count("/x/") < 250


def brute_force(x: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.sqrt(((x[:, None].astype(float) - others[None]) ** 2).sum(axis=2)).min(axis=1)


def captured(monkeypatch, made: Made, **options) -> page.Facts:
    """The facts that the page was drawn from."""
    caught = []
    render = page.render
    monkeypatch.setattr(
        report.page, "render", lambda facts, *a, **k: caught.append(facts) or render(facts, *a, **k)
    )
    report.write(made.run, **options)
    return caught[-1]


def test_coverage_equals_brute_force(small, small_page, monkeypatch):
    facts = captured(monkeypatch, small)
    near = brute_force(small.x, small.x[small.selected.rows])
    coverage = facts.coverage
    assert coverage.rows == 60 and coverage.picks == 20
    for radius, share in zip(coverage.radii[1:], coverage.near_pick[1:], strict=True):
        assert abs(share - (near <= radius).mean()) <= 1 / 60 + 1e-9  # a distance may be a radius
    half = np.sort(near)[29]
    assert coverage.pick_distances[0] == pytest.approx(half, abs=1e-9)
    assert f"within {half:.3f} of a selected image" in small_page.sections["summary"]
    assert coverage.near_drawn.shape == (5, len(coverage.radii))
    assert (coverage.near_drawn[:, -1] == 1).all() and coverage.near_pick[-1] == 1
    assert (np.diff(coverage.near_drawn, axis=1) >= 0).all()


def test_random_draws_are_random_rows(small, monkeypatch):
    """A draw covers as a brute-force draw does: each drawn row has itself at distance 0."""
    facts = captured(monkeypatch, small)
    assert facts.coverage.near_drawn[:, 0] == pytest.approx([20 / 60] * 5)
    rng = np.random.default_rng(5)
    halves = [np.median(brute_force(small.x, small.x[rng.choice(60, 20, replace=False)])) for _ in range(200)]
    assert np.mean(halves) == pytest.approx(facts.coverage.drawn_distances[:, 0].mean(), rel=0.2)


def test_nearest_is_exact():
    x, others = blobs(3000, d=5), blobs(700, d=5, seed=1)
    assert np.allclose(report.nearest(x, others), brute_force(x, others), atol=1e-6)


@pytest.mark.parametrize(
    ("ours", "drawn", "verdict", "words"),
    [
        (0.5, [0.6, 0.7], -1, "better than chance would"),
        (0.6, [0.6, 0.7], 0, "chance would have done as well"),
        (0.8, [0.6, 0.7], 1, "chance would have done better"),
    ],
)
def test_headline_is_honest(ours, drawn, verdict, words):
    assert page.verdict_of(ours, np.array(drawn)) == verdict
    coverage = charts.Coverage(
        np.zeros(2),
        np.zeros(2),
        np.zeros((2, 2)),
        np.full(3, ours),
        np.array([[v] * 3 for v in drawn]),
        1,
        1,
        1,
    )
    assert words in page._headline(coverage)


def test_distributions_count_every_row(small, monkeypatch):
    facts = captured(monkeypatch, small)
    selected = small.selected
    densities = 1 / selected.all_sq_dists.astype(float)
    h = facts.density
    assert h.everything.sum() == pytest.approx(1) and h.picks.sum() == pytest.approx(1)
    assert len(h.everything) <= report.BARS
    counts = np.histogram(densities.clip(h.edges[0], h.edges[-1]), h.edges)[0] / 60
    assert np.abs(counts - h.everything).max() <= 1 / 60 + 1e-9  # one row at an edge, by rounding of the log
    assert h.median_everything == pytest.approx(np.sort(densities)[29], rel=2e-3)
    sizes = np.bincount(selected.all_cluster_ids)
    h = facts.cluster_sizes
    assert np.array_equal(np.histogram(sizes, h.edges)[0] / 20, h.picks)
    assert np.array_equal(np.histogram(sizes[selected.all_cluster_ids], h.edges)[0] / 60, h.everything)
    assert (facts.smallest_cluster, facts.largest_cluster) == (sizes.min(), sizes.max())


def test_map_marks_the_picks_on_the_main_axes(small, small_page, monkeypatch):
    facts = captured(monkeypatch, small)
    s = facts.scatter
    centered = small.x - small.x.mean(axis=0)
    variances = np.linalg.svd(centered.astype(float), compute_uv=False) ** 2
    assert s.variance == pytest.approx(variances[:2] / variances.sum(), rel=1e-3)
    assert len(s.rows) == 60 and sorted(s.which.tolist()) == list(range(20))
    for position, pick in zip(s.picks, s.which, strict=True):
        assert np.abs(s.rows - position).sum(axis=1).min() < 1e-6, pick
    assert small_page.count("circle") == 20
    assert small_page.text.count('<a href="#image-') == 20


def test_same_seed_same_page(small, small_page):
    assert Path(report.write(small.run)).read_text(encoding="utf-8") == small_page.text
    assert Path(report.write(small.run, seed=1)).read_text(encoding="utf-8") != ""


def test_shards_do_not_matter(small, small_page, tmp_path):
    rejected = tuple(tuple(row.values()) for row in small.run.read_shard("rejected", 0).to_pylist())
    other = make(tmp_path / "run", small.x, 20, small.uris, shard_rows=60, rejected=rejected)
    found = written(other)
    for section in ("summary", "picks", "density", "clusters", "rejected"):
        assert found.sections[section] == small_page.sections[section]


def test_at_most_64_shards_are_read(tmp_path, monkeypatch):
    made = make(tmp_path / "run", blobs(400), 5, painted(tmp_path / "in", 400, []), shard_rows=2)
    read, inner = [], Run.read_embeddings
    monkeypatch.setattr(Run, "read_embeddings", lambda self, i: read.append(i) or inner(self, i))
    found = written(made)
    assert len(read) == len(set(read)) <= report.SHARDS_READ + 5
    assert "from 64 of 200 shards" in found.sections["coverage"].replace("\n", " ")
    assert "A seeded sample of 128 images" in found.sections["coverage"].replace("\n", " ")
    assert "all picks" in found.sections["coverage"]


@pytest.mark.parametrize("count", [1, 64, 65, 100, 763, 764])
def test_shards_are_spread_evenly(count):
    chosen = report.spread(np.random.default_rng(0), np.arange(count) + 7)
    assert len(chosen) == len(set(chosen.tolist())) == min(count, 64)
    assert chosen.min() >= 7 and chosen.max() < count + 7
    if count > 64:
        assert np.diff(chosen).max() <= -(-count // 64)


def test_pictures_hold_the_largest_and_the_smallest_clusters():
    sizes = np.random.default_rng(0).integers(1, 10_000, 3000)
    order = np.argsort(-sizes, kind="stable")
    shown = report.pictured(sizes, 0, 600)
    assert len(shown) == len(set(shown.tolist())) == 600
    assert set(order[:50]) <= set(shown) and set(order[-50:]) <= set(shown)
    assert (np.diff(sizes[shown]) <= 0).all()
    assert set(report.pictured(sizes, 0, 60)) < set(shown) != set(report.pictured(sizes, 1, 600))
    assert set(report.pictured(sizes, 0, 60)) == set(order[:30]) | set(order[-30:])
    for m in (1, 2, 3, 99, 100, 101, 600):
        assert sorted(report.pictured(sizes[:m], 0, 600)) == list(range(m))


def test_many_picks(tmp_path):
    """700 picks: 600 pictures, and less where the page must be smaller."""
    made = make(tmp_path / "run", blobs(1500, d=8), 700, painted(tmp_path / "in", 1500, []), shard_rows=400)
    found = written(made)
    assert len(found.cards) == 600 and "600 of the 700 picks" in found.sections["picks"]
    assert found.count("circle") == 700 and found.text.count('<a href="#image-') == 600
    whole = len(found.text.encode())
    assert whole < 5_000_000
    closed, _, folded = found.text.partition("<details>")
    assert closed.count("<span class=name") == 60 and folded.count("<span class=name") == 540
    pictures = []
    for bound in (whole, 800_000, 300_000, 1):
        found = written(made, max_bytes=bound)
        pictures.append(len(found.cards))
        assert len(found.text.encode()) < max(bound, 400_000)
        assert {attrs["href"][1:] for tag, attrs in found.tags if tag == "a"} <= {
            attrs["id"] for _, attrs in found.tags if "id" in attrs
        }
    assert pictures == sorted(pictures, reverse=True) and pictures[-1] == 0 < pictures[-2] < 600


def test_a_large_budget_is_sampled(tmp_path, monkeypatch):
    made = make(tmp_path / "run", blobs(900, d=4), 300, [f"/x/e.npy#{i}" for i in range(900)])
    monkeypatch.setattr(report, "COMPARED_PICKS", 100)
    monkeypatch.setattr(report, "MAP_PICKS", 50)
    monkeypatch.setattr(report, "SAMPLE_ROWS", 200)
    found = written(made)
    words = found.sections["coverage"].replace("\n", " ")
    assert "A seeded sample of 200 images, against 100 of the 300 picks and 5 draws of 100 images" in words
    assert "50 of the 300 picks" in found.sections["map"] and found.count("circle") == 50


def test_brought_embeddings_have_no_pictures(tmp_path):
    made = make(tmp_path / "run", blobs(5000, d=8), 6, [f"/x/emb.npy#{i}" for i in range(5000)])
    found = written(made)
    assert len(found.cards) == 6 and not found.count("img")
    row = made.selected.rows[0]
    card = next(card for card in found.cards if card["uri"] == f"/x/emb.npy#{row}")
    assert f"row {row:,}" in card["text"] and card["name"] == f"emb.npy#{row}"


def test_kth_estimator(tmp_path):
    made = make(
        tmp_path / "run",
        blobs(80),
        8,
        painted(tmp_path / "in", 80, []),
        settings={"density.estimator": "kth", "density.k": 7},
    )
    found = written(made)
    assert "the squared distance to the last of its 7 nearest neighbors" in found.sections["density"]
    densities = sorted(1 / made.selected.sq_dists.astype(float))
    assert sorted(card["values"][0] for card in found.cards) == densities


def test_what_the_search_by_lists_missed(tmp_path, small_page):
    assert "Every image was compared with every other." in small_page.sections["density"]
    missed = Certificate(600, 0.9912, 0.985, 0.997, 0.0021, 0.034, 0.99987)
    found = {"lists": 2048, "certificate": asdict(missed)}
    made = make(tmp_path / "run", blobs(80), 8, painted(tmp_path / "in", 80, []), found=found)
    words = " ".join(written(made).sections["density"].split())
    assert "there are 2,048 lists" in words
    assert "of 600 images drawn at random 99.1 % were found (95 % interval 98.5 to 99.7 %)" in words
    assert "larger by 0.21 % on average and 3.4 % at most" in words and "to 0.99987 (rank" in words


def test_tables_of_another_run(small, small_page, tmp_path):
    other = Run(str(tmp_path / "other"))
    other.prepare()
    for table in ("images", "embeddings", "rejected", "density"):
        other.refer(table, small.run)
    for table in ("clusters", "selection"):
        manifest = small.run.manifest(table)
        other.begin(table, manifest.what, {"x": "1"})
        shards = [
            other.write_shard(table, i, small.run.read_shard(table, i)) for i in range(len(manifest.shards))
        ]
        other.finish(table, shards, seconds=0.5, peak_memory_bytes={}, summary={})
    found = Page(Path(report.write(other)).read_text(encoding="utf-8"))
    assert found.sections["picks"] == small_page.sections["picks"]
    assert found.sections["coverage"] == small_page.sections["coverage"]
    words = found.sections["stages"]
    assert "1 s in all" in words and f"of {Path(small.run.uri).parent}"[:10] in words


@pytest.mark.parametrize(
    ("x", "budget"),
    [
        pytest.param(np.ones((1, 1), np.float32), 1, id="one row"),
        pytest.param(np.array([[1], [-1], [1], [-1]], np.float32), 2, id="one dimension"),
        pytest.param(blobs(40, d=2), 1, id="one pick"),
        pytest.param(blobs(40, d=2), 40, id="all picked"),
        pytest.param(np.tile(blobs(1, d=3), (20, 1)), 1, id="all equal"),
        pytest.param(np.repeat(blobs(4, d=3), 30, axis=0), 4, id="duplicates"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_small_worlds(tmp_path, x, budget, dtype):
    settings = {"density.k": min(2, len(x)), "density.include_self": False} if len(x) > 2 else {}
    uris = painted(tmp_path / "in", len(x), [])
    rejected = tuple((1000 + i, f"/x/{i}.png", "damaged") for i in range(5 * len(x)))
    found = written(
        make(tmp_path / "run", x, budget, uris, dtype=dtype, settings=settings, rejected=rejected)
    )
    assert len(found.cards) == budget
    for word in ("nan", "inf,", "None", "-inf"):
        assert word not in found.text.partition("<main>")[2].replace("data:image", ""), word


def test_unfinished_and_damaged_runs_are_refused(small, tmp_path):
    run = Run(str(tmp_path / "run"))
    run.prepare()
    with pytest.raises(UserError, match="no finished images"):
        report.write(run)
    made = make(tmp_path / "other", blobs(30), 3, painted(tmp_path / "in", 30, []))
    (tmp_path / "other" / "density" / "part-00000.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match="missing or damaged"):
        report.write(made.run)
    assert not made.run.exists("report", "index.html")


def test_says_what_it_does(small):
    said: list[str] = []
    report.write(small.run, say=said.append)
    assert len(said) == 3 and all(line.startswith("report: ") for line in said)


def test_long_configuration_is_cut(small, tmp_path, monkeypatch):
    facts = captured(monkeypatch, small)
    facts.stages["images"].what.update({f"key {i} " + "k" * 500: "v" * 5000 for i in range(400)})
    words = page._configuration(facts)
    assert len(words) < 100_000 and "more, in the manifests" in words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0"),
        (0.12345, "0.123"),
        (12.345, "12.3"),
        (999.4, "999"),
        (999.7, "1,000"),
        (12345.6, "12,346"),
        (1e6, "1,000,000"),
        (1.5e-7, "1.50e-07"),
        (-2.5, "-2.5"),
    ],
)
def test_numbers(value, words):
    assert charts.number(value) == words


@pytest.mark.parametrize("low", [1e-9, 0.003, 1, 7.3, 950])
@pytest.mark.parametrize("ratio", [1.001, 1.4, 3, 50, 1e4, 1e12])
def test_ticks_lie_on_the_axis(low, ratio):
    for ticks in (charts._log_ticks(low, low * ratio), charts._ticks(low, low * min(ratio, 1e4), 5)):
        assert 2 <= len(ticks) <= 8
        assert all(low * (1 - 1e-6) <= tick <= low * ratio * (1 + 1e-6) for tick in ticks)


def test_memory_does_not_grow_with_rows():
    """Histograms and draws take the time and room of their bins and counts."""
    started = time.perf_counter()
    rows_of = np.full(64, 10_000_000)
    places = report._draw(np.random.default_rng(0), np.arange(64), rows_of, 10_000)
    assert len(np.unique(places, axis=0)) == 10_000 and (places[:, 1] < 10_000_000).all()
    assert (np.bincount(places[:, 0], minlength=64) > 80).all()
    assert time.perf_counter() - started < 2
