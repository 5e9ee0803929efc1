"""Files of labels from elsewhere, read and checked; picks as the files that tools take. No run is needed."""

import io
import json
import time
import zipfile

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selective_ray import export, label_files, labels
from selective_ray.errors import UserError
from selective_ray.export import Pick
from selective_ray.label_files import Answer
from selective_ray.labels import Labels


def said(data: bytes | str, name: str = "f") -> list[tuple]:
    """What a file says: image id or uri, and the label, `SKIPPED`, or None."""
    _, found = label_files.parse(data if isinstance(data, bytes) else data.encode(), name)
    return [
        (a.image_id if a.image_id is not None else a.uri, "SKIPPED" if a.skipped else a.label) for a in found
    ]


def refused(data: bytes | str) -> str:
    with pytest.raises(UserError) as error:
        label_files.parse(data if isinstance(data, bytes) else data.encode(), "FILE")
    assert "FILE" in str(error.value)
    return str(error.value)


# CSV and JSONL


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_as_programs_write_it(mark, encoding, end):
    rows = ["Image_ID,Label,skipped", "3,Kätzchen,", "4.0,,x", "5,,", '"7","two, three",0', ""]
    data = end.join(rows).replace(",", mark).replace(f"two{mark}", "two,").encode(encoding)
    assert label_files.parse(data, "f")[0] == "CSV"
    assert said(data) == [(3, "Kätzchen"), (4, "SKIPPED"), (5, None), (7, "two, three")]


def test_jsonl_and_json():
    rows = [
        {"uri": "s3://b/1", "label": "a\u2028b"[:1]},
        {"uri": "s3://b/2", "label": 7},
        {"uri": "s3://b/3", "label": None},
        {"uri": "s3://b/4", "label": None, "skipped": True},
    ]
    expected = [("s3://b/1", "a"), ("s3://b/2", "7"), ("s3://b/3", None), ("s3://b/4", "SKIPPED")]
    lines = "\n".join(json.dumps(row) for row in rows)
    assert label_files.parse(lines.encode(), "f")[0] == "JSONL" and said(lines) == expected
    whole = json.dumps(rows, indent=2)
    assert label_files.parse(whole.encode(), "f")[0] == "JSON" and said(whole) == expected
    # A line separator in a string ends no line of JSON.
    assert said('{"uri": "a\u2028b", "label": "c"}\n') == [("a\u2028b", "c")]


# Label Studio: fields as its exports have them


def task(number: int, data: dict, *annotations: dict) -> dict:
    return {
        "id": number,
        "annotations": list(annotations),
        "drafts": [],
        "predictions": [
            {"result": [{"type": "choices", "from_name": "label", "value": {"choices": ["no"]}}]}
        ],
        "data": data,
        "meta": {},
        "total_annotations": len(annotations),
    }


def annotation(*choices: str, cancelled: bool = False, control: str = "label") -> dict:
    result = {
        "type": "choices",
        "value": {"choices": list(choices)},
        "from_name": control,
        "to_name": "image",
    }
    return {
        "id": 1,
        "completed_by": 1,
        "was_cancelled": cancelled,
        "ground_truth": False,
        "result": [{"id": "x", "origin": "manual", **result}] if choices else [],
    }


def test_label_studio_json():
    tasks = [
        task(1, {"image": "s3://b/1.jpg", "image_id": 4, "uri": "s3://b/1.jpg"}, annotation("cat")),
        task(2, {"image": "s3://b/2.jpg"}, annotation("dog"), annotation("dog")),
        task(3, {"image": "s3://b/3.jpg"}, annotation(cancelled=True)),
        task(4, {"image": "s3://b/4.jpg"}),
        task(5, {"image": "s3://b/5.jpg"}, annotation("cat", cancelled=True), annotation("dog")),
    ]
    kind, _ = label_files.parse(json.dumps(tasks).encode(), "f")
    assert kind == "Label Studio JSON"
    assert said(json.dumps(tasks)) == [
        (4, "cat"),
        *[("s3://b/2.jpg", "dog")] * 2,
        ("s3://b/3.jpg", "SKIPPED"),
        ("s3://b/4.jpg", None),
        ("s3://b/5.jpg", "SKIPPED"),
        ("s3://b/5.jpg", "dog"),
    ]
    # Storage of its own gets a task a file.
    assert said(json.dumps(tasks[0], indent=1)) == [(4, "cat")]


def test_label_studio_json_min_and_csv_leave_out_what_was_skipped():
    row = {"image": "s3://b/1.jpg", "image_id": 4, "uri": "s3://b/1.jpg", "id": 1, "annotator": 1}
    both = {"choices": ["cat", "dog"]}
    assert said(json.dumps([{**row, "label": "cat"}, row])) == [(4, "cat"), (4, None)]
    assert said(json.dumps([{**row, "choice": both}])) == [(4, "cat"), (4, "dog")]
    text = '"annotator","choice","id","image","image_id"\n1,"{""choices"": [""a"", ""b""]}",1,"s3://b/1",4\n'
    assert said(text) == [(4, "a"), (4, "b")]


def test_of_several_controls_the_one_called_label_counts():
    data = {"image_id": 1}
    both = [task(1, data, annotation("cat"), annotation("blurred", control="quality"))]
    assert said(json.dumps(both)) == [(1, "cat")]
    other = [task(1, data, annotation("cat", control="a"), annotation("blurred", control="b"))]
    assert "(a, b)" in refused(json.dumps(other))


# CVAT


def cvat(*images: tuple[str, list[str]], head: str = "", shapes: str = "") -> bytes:
    body = "".join(
        f'<image id="{i}" name="{name}" subset="default" task_id="5" width="9" height="8">{shapes}'
        + "".join(
            f'<tag label="{tag}" source="manual"><attribute name="a">b</attribute></tag>' for tag in tags
        )
        + "</image>"
        for i, (name, tags) in enumerate(images)
    )
    meta = "<version>1.1</version><meta><task><labels><label><name>cat</name></label></labels></task></meta>"
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}<annotations>{meta}{body}</annotations>'.encode()


def zipped(**files: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name.replace("__", "/").replace("_xml", ".xml").replace("_csv", ".csv"), data)
    return out.getvalue()


def test_cvat_for_images_as_xml_and_zip():
    data = cvat(("a/1.jpg", ["cat"]), ("a/2&amp;.jpg", ["dog", "dog"]), ("3.jpg", ["skipped"]), ("4.jpg", []))
    expected = [("a/1.jpg", "cat"), *[("a/2&.jpg", "dog")] * 2, ("3.jpg", "SKIPPED"), ("4.jpg", None)]
    assert said(data) == said(zipped(annotations_xml=data, images__x=b"")) == expected
    box = '<box label="cat" xtl="1" ytl="1" xbr="2" ybr="2"><attribute name="a">b</attribute></box>'
    assert said(cvat(("1.jpg", ["cat"]), shapes=box)) == [("1.jpg", "cat")]
    assert "type tag" in refused(cvat(("1.jpg", []), shapes=box))


# What is refused, in one sentence each


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty"),
        (b"  \n ", "empty"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x80\x81", "UTF-8"),
        ("label\ncat\n", "image_id or uri"),
        ("image_id,name\n1,cat\n", "no column label; it has 'image_id, name'"),
        ("image_id,label,label\n1,a,b\n", "several columns 'label'"),
        ("image_id,label\nx,cat\n", "line 2 of FILE has the image_id 'x'"),
        ("image_id,label\n-1,cat\n", "no number"),
        ("image_id,label\n1,cat,dog\n", "3 fields"),
        ("image_id,label\n,cat\n", "names no image"),
        ('image_id,label\n1,"' + "a" * 200_000 + '"\n', "not CSV"),
        ("image_id,label\n1," + "a" * 201 + "\n", "201 characters"),
        ("image_id,label\n1,\x1b[31mred\n", "control characters"),
        ('{"image_id": 1, "label": "a"}\n{"image_id"', "line 2 of FILE is not JSON"),
        ('{"image_id": 1, "label": 1.5}', "no text"),
        ('{"image_id": true, "label": "a"}', "no number"),
        ('{"image_id": 1, "label": "\\ud800"}', "control characters"),
        ("[1, 2]", "not of objects"),
        ("[" * 100_000, "not JSON"),
        ('[{"image_id": ' + "9" * 5000 + ', "label": "a"}]', "not JSON"),
        ('[{"data": {"image": "x"}}]', "export the project"),
        ('{"version":"1.1"}\n{"type":"images"}\n{"name":"a"}', "manifest"),
        (json.dumps([task(1, {"text": "x"}, annotation("cat"))]), "names no image"),
        (json.dumps([task(1, {"image_id": 1}, {"result": [{"type": "textarea"}]})]), "<Choices>"),
        (b"<html><body></html>", "begins with 'html'"),
        (b"<annotations><image", "not XML"),
        (b"<annotations><track id='1'/></annotations>", "CVAT for video"),
        (b"<annotations><image id='1'/></annotations>", "no name"),
        (b"<a>" * 200, "no export of CVAT"),
        (b"<annotations>" * 200, "nested"),
        (b"PK\x03\x04 and nothing", "ZIP"),
        (zipped(a_csv=b"x", b_csv=b"y"), "2 files of labels"),
        (zipped(readme=b"x"), "0 files of labels"),
    ],
)
def test_what_cannot_be_read_is_refused(data, expected):
    assert expected in refused(data)


def test_entities_are_not_expanded(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    bomb = '<!DOCTYPE a [<!ENTITY a "ha">' + "".join(
        f'<!ENTITY {chr(98 + i)} "{f"&{chr(97 + i)};" * 10}">' for i in range(12)
    )
    for head in (f"{bomb}]>", f'<!DOCTYPE a [<!ENTITY x SYSTEM "file://{secret}">]>', "<!DOCTYPE a>"):
        started = time.process_time()
        assert "document type" in refused(cvat(("&m;.jpg", ["&x;"]), head=head))
        assert time.process_time() - started < 1


def test_a_zip_that_grows_is_not_unpacked(monkeypatch):
    monkeypatch.setattr(label_files, "MAX_BYTES", 1 << 16)
    assert "larger" in refused(zipped(annotations_xml=b" " * (1 << 20)))


@settings(deadline=None)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_no_bytes_bring_anything_but_answers_or_a_sentence(data):
    for start in (b"", b"image_id,label\n", b"[", b"{", b"<annotations>", b"PK\x03\x04"):
        try:
            kind, found = label_files.parse(start + data, "f")
        except UserError:
            continue
        assert kind and all(isinstance(answer, Answer) for answer in found)


# Laws

LABELS = st.builds(
    lambda labeled, skipped: Labels(labeled, frozenset(skipped) - labeled.keys()),
    # Each image has a label of its own, so that no two contradict.
    st.sets(st.integers(0, 9)).map(lambda ids: {i: f"class {i % 3}" for i in ids}),
    st.sets(st.integers(0, 9)),
)


@given(LABELS, LABELS, LABELS)
def test_merging_is_order_free_and_twice_is_once(a, b, c):
    assert a.merge(b) == b.merge(a)
    assert a.merge(b).merge(c) == a.merge(b.merge(c))
    assert a.merge(a) == a == a.merge(Labels.none())
    assert a.merge(b).merge(b) == a.merge(b)
    assert not a.merge(b).labels.keys() & a.merge(b).skipped
    assert a.merge(b).labels.keys() == a.labels.keys() | b.labels.keys(), "no label is lost to a skip"


@given(LABELS, LABELS)
def test_replacing_lets_the_later_file_count(a, b):
    now = a.replaced_by(b)
    assert now.replaced_by(b) == now
    assert now.labels == {
        **{i: label for i, label in a.labels.items() if i not in b.skipped},
        **b.labels,
    }
    assert now.skipped == (a.skipped | b.skipped) - now.labels.keys()


def test_two_labels_for_one_image_are_a_contradiction():
    several = [
        Answer("line 1", 1, None, "cat"),
        Answer("line 2", 1, None, "cat"),
        Answer("line 3", 2, skipped=True),
    ]
    assert labels.gather([1, 1, 2], several, "f") == Labels({1: "cat"}, frozenset({2}))
    several.append(Answer("line 4", 1, "s3://b/1", "dog"))
    with pytest.raises(UserError, match=r"image 1 \('s3://b/1'\) is 'cat' \(line 1\) and 'dog' \(line 4\)"):
        labels.gather([1, 1, 2, 1], several, "f")
    with pytest.raises(ValueError, match="two labels"):
        Labels({1: "a"}, frozenset()).merge(Labels({1: "b"}, frozenset()))


@given(st.text())
def test_cells_are_no_formulas_and_come_back(text):
    cell = label_files.plain_cell(text)
    assert cell[:1] not in set("=+-@\t\r\n") or not cell
    assert label_files._plain(cell) == text


@settings(deadline=None)
@given(st.sets(st.text("abC -", min_size=1, max_size=6), max_size=8))
def test_near_names_are_those_one_slip_apart(names):
    """Against trying every slip on every name."""

    def fold(name):
        return name.casefold().replace(" ", "").replace("-", "")

    def slips(word):
        yield from (word[:i] + word[i + 1 :] for i in range(len(word)))
        for i in range(len(word) + 1):
            yield from (word[:i] + c + word[i:] for c in "abc")
            yield from (word[:i] + c + word[i + 1 :] for c in "abc")
            yield word[:i] + word[i : i + 2][::-1] + word[i + 2 :]

    expected = []
    for a in sorted(names):
        for b in sorted(names):
            long = min(len(fold(a)), len(fold(b))) >= 4
            if a < b and (fold(a) == fold(b) or (long and fold(b) in set(slips(fold(a))))):
                expected.append((a, b))
    assert labels.near_names(names) == expected


def test_numbers_and_short_names_are_no_slips():
    assert labels.near_names([*"0123456789", "cat", "bat", "class 1", "class 2", "n0144", "n0145"]) == []
    assert labels.near_names(["air plane", "Airplane", "airplnae", "automobile"]) == [
        ("Airplane", "air plane"),
        ("Airplane", "airplnae"),
        ("air plane", "airplnae"),
    ]
    started = time.process_time()
    assert (
        len(
            labels.near_names(
                f"{i:x}".translate(str.maketrans("0123456789", "ghijklmnop")) * 3 for i in range(5000)
            )
        )
        == 0
    )
    assert time.process_time() - started < 5


# Which image is meant


def listing(*uris: str) -> pa.Table:
    return pa.table({"image_id": range(len(uris)), "uri": uris})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("s3://b/photos/1.jpg", [0]),
        ("photos/1.jpg", [0]),  # the key of its bucket, though it also is the end of another
        ("1.jpg", [0, 2]),
        ("x/photos/1.jpg", [2]),
        ("to/1.jpg", []),
        ("s3://other/photos/1.jpg", []),
        ("/photos/1.jpg", []),
        ("/data/local-files/?d=photos/my%20cat.png", [1]),
        ("my cat.png", [1]),
        ("azure-blob://box/a/7.png", [4]),
        ("https://b.s3.amazonaws.com/x/photos/1.jpg?X-Amz-Signature=0", [2]),
        ("shard.tar#in/9.jpg", [3]),
        ("in/9.jpg", [3]),
        ("https://[", []),
    ],
)
def test_names_mean_the_images_that_they_are_the_end_of(name, expected):
    whole = listing(
        "s3://b/photos/1.jpg", "/photos/my cat.png", "s3://b/x/photos/1.jpg", "gs://c/shard.tar#in/9.jpg",
        "az://box/a/7.png",
    )  # fmt: skip
    for parts in ([whole], [whole.slice(0, 2), whole.slice(2)]):
        found = labels.find([name, "gs://c/none"], parts)
        assert [image for image, _ in found.get(name, [])] == expected
    for image, uri in enumerate(whole["uri"].to_pylist()):
        assert labels.means(name, uri) or image not in expected


# Files for tools


def picks(*files: str | None) -> list[Pick]:
    return [Pick(i, file or f"s3://b/a.tar#{i}", i, file) for i, file in enumerate(files)]


def test_label_studio_tasks_are_split_by_number_and_bytes():
    some = picks(*(f"s3://b/{i:05d}.jpg" for i in range(10)))
    whole = json.loads(next(export.label_studio_files(some)).data)
    assert whole[3] == {
        "data": {"image": "s3://b/00003.jpg", "image_id": 3, "uri": "s3://b/00003.jpg", "cluster_id": 3}
    }
    for options, counts in (({"tasks": 4}, [4, 4, 2]), ({"nbytes": 300}, [2] * 5), ({"tasks": 5}, [5, 5])):
        files = list(export.label_studio_files(some, **options))
        assert [file.picks for file in files] == counts
        assert [file.name for file in files] == [f"label-studio-{i + 1:03d}.json" for i in range(len(files))]
        assert all(len(file.data) <= options.get("nbytes", 1 << 20) for file in files)
        assert [one for file in files for one in json.loads(file.data)] == whole


@pytest.mark.parametrize(
    ("uri", "url"),
    [
        ("s3://b/a b.jpg", "s3://b/a b.jpg"),
        ("gs://b/a.jpg", "gs://b/a.jpg"),
        ("az://box/a.jpg", "azure-blob://box/a.jpg"),
        ("abfs://box@account.dfs.core.windows.net/a.jpg", "azure-blob://box/a.jpg"),
        ("/photos/a b&c.jpg", "/data/local-files/?d=photos/a%20b%26c.jpg"),
        ("file:///photos/%FF.jpg", "/data/local-files/?d=photos/%FF.jpg"),
        ("https://x.org/a.jpg", "https://x.org/a.jpg"),
    ],
)
def test_label_studio_names_what_it_can_open(uri, url):
    assert export.label_studio_url(uri) == url


def test_a_manifest_of_cvat_for_each_bucket_and_so_many_images():
    some = picks(
        "s3://b/x/1.tar.jpg", "s3://c/2.png", "s3://b/3.jpg", "/in/a/4.png", "/in/5.png", "s3://b/6.jpg"
    )
    sizes = [(i, 2 * i) for i in range(6)]
    files = list(export.cvat_files(some, sizes, images=2))
    assert [(f.name, f.root, f.picks) for f in files] == [
        ("cvat-001.jsonl", "s3://b", 2),
        ("cvat-002.jsonl", "s3://b", 1),
        ("cvat-003.jsonl", "s3://c", 1),
        ("cvat-004.jsonl", "/in", 2),
    ]
    lines = [json.loads(line) for line in files[0].data.decode().splitlines()]
    meta = {"meta": {"related_images": []}}
    assert lines == [
        {"version": "1.1"},
        {"type": "images"},
        {"name": "x/1.tar", "extension": ".jpg", "width": 0, "height": 0, **meta},
        {"name": "3", "extension": ".jpg", "width": 2, "height": 4, **meta},
    ]
    assert '"name":"a/4"' in files[3].data.decode()


def test_what_a_tool_cannot_show_is_said():
    for made in (export.label_studio_files(picks(None)), export.cvat_files(picks(None), [(1, 1)])):
        with pytest.raises(UserError, match=r"1 of the 1 picks.*s3://b/a.tar#0.*--copies"):
            list(made)
    with pytest.raises(UserError, match="addresses of the web"):
        list(export.cvat_files(picks("https://x.org/1.jpg"), [(1, 1)]))


def test_csv_is_safe_in_spreadsheets_and_labels_come_back():
    evil = [
        "=cmd|' /C calc'!A0.png",
        "+1.png",
        "-1.png",
        "@x.png",
        "'=x.png",
        "'x.png",
        'q",\n.png',
        "\t.png",
    ]
    some = [Pick(i, uri, i) for i, uri in enumerate(evil)]
    text = export.csv_file(some).data.decode()
    assert all(row.split(",", 1)[1][0] not in "=+-@\t" for row in text.splitlines()[1:] if row[:1].isdigit())
    _, found = label_files.parse(text.replace(",,\r\n", ",=cat,\r\n").encode(), "f")
    assert [(a.image_id, a.uri, a.label) for a in found] == [(i, uri, "=cat") for i, uri in enumerate(evil)]
