"""Files of labels, as people and their tools write them: CSV, JSONL, Label Studio's exports, CVAT's XML.

A file comes to answers, one for each thing that it says of an image. It is data from elsewhere: nothing in it
is trusted.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from xml.parsers import expat

from selective_ray.errors import UserError, named

# Bytes of a file, or of what a ZIP holds: a project of a million tasks stays below.
MAX_BYTES = 1 << 30
# Characters of a class name. Longer ones are a column of something else.
MAX_NAME = 200
# What in CVAT, which has no way to skip an image, says that it was skipped.
SKIPPED = "skipped"
# Names of columns, in the order in which they are looked for. Label Studio names the column of labels after
# the control of the labeling configuration, which its template for image classification calls "choice".
_URI_COLUMNS = ("uri", "image", "url", "path")
_LABEL_COLUMNS = ("label", "choice", "class", "category")
_YES = ("1", "true", "yes", "x")
# What makes a spreadsheet take a cell for a formula.
_FORMULA = "=+-@\t\r\n"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a file says of an image in one place: a label, that it was skipped, or neither yet."""

    where: str
    image_id: int | None = None
    uri: str | None = None
    label: str | None = None
    skipped: bool = False


def parse(data: bytes, name: str) -> tuple[str, list[Answer]]:
    """Read a file of labels, whatever it is by its content; returns the format and the answers, in order.

    name is for messages. Raises UserError where the file is none, is damaged, or says what cannot be a label.
    """
    if data[:4] == b"PK\x03\x04":
        data = _unzip(data, name)
    if len(data) > MAX_BYTES:
        raise UserError(f"{name} is larger than {MAX_BYTES >> 20} MiB; split it")
    if re.match(rb"(\xef\xbb\xbf)?\s*<", data[:1000]):
        # expat decodes by itself.
        return "CVAT for images", _cvat(data, name)
    text = _text(data, name)
    start = text.lstrip()[:1]
    try:
        if start == "[":
            return _items(json.loads(text), name)
        if start == "{":
            return _lines(text, name)
    except json.JSONDecodeError as error:
        raise UserError(f"{name} is not JSON ({error.msg}, line {error.lineno}); export it again") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{name} is not JSON that can be read ({error}); export it again") from None
    if not start:
        raise UserError(f"{name} is empty; give a file of labels")
    return "CSV", _csv(text, name)


def _unzip(data: bytes, name: str) -> bytes:
    """Return the one file of labels in a ZIP, as CVAT packs it, beside images or alone."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            files = [info for info in archive.infolist() if not info.is_dir()]
            found = [info for info in files if info.filename.rsplit("/", 1)[-1] == "annotations.xml"]
            found = found or [info for info in files if info.filename.lower().endswith((".json", ".csv"))]
            if len(found) != 1:
                raise UserError(
                    f"{name} is a ZIP with {len(found)} files of labels; unpack it and give the file, "
                    "annotations.xml of CVAT's format `CVAT for images`"
                )
            with archive.open(found[0]) as file:
                # Sizes that are declared may be wrong: as much is read as is allowed.
                return file.read(MAX_BYTES + 1)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{name} is a damaged or encrypted ZIP ({error}); export it again") from None


def _text(data: bytes, name: str) -> str:
    try:
        # Spreadsheets write UTF-16 where they are asked for Unicode text.
        wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{name} is not UTF-8; save it as `CSV UTF-8`, or export it again") from None


def _items(items: list[Any], name: str) -> tuple[str, list[Answer]]:
    """Tell what a JSON list holds: Label Studio's tasks, or rows, as of its JSON-MIN."""
    if not all(isinstance(item, dict) for item in items):
        raise UserError(f"{name} is a JSON list, but not of objects; export it again")
    tasks = ["data" in item and ("annotations" in item or "completions" in item) for item in items]
    if items and all(tasks):
        return "Label Studio JSON", _label_studio(items, name)
    if any(tasks) or any("data" in item for item in items):
        raise UserError(
            f"{name} holds tasks without annotations: it is no export, but what was imported; export the "
            "project as JSON and give that"
        )
    wheres = (f"item {i}" for i in range(1, len(items) + 1))
    return "JSON", _rows(items, wheres, _columns(items), name)


def _lines(text: str, name: str) -> tuple[str, list[Answer]]:
    """Read an object a line, or one object."""
    # Other characters that end lines may be inside of strings.
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    items = []
    for i, line in lines:
        try:
            items.append(json.loads(line))
        except json.JSONDecodeError as error:
            if items:
                raise UserError(
                    f"line {i} of {name} is not JSON ({error.msg}); correct it, or export the file again"
                ) from None
            return _items([json.loads(text)], name)
    if len(items) > 1 and items[0].keys() == {"version"}:
        raise UserError(
            f"{name} is a manifest for CVAT, which holds no labels; export the task as `CVAT for images`"
        )
    if all(isinstance(item, dict) and "data" not in item for item in items):
        return "JSONL", _rows(items, (f"line {i}" for i, _ in lines), _columns(items), name)
    return _items(items, name)


def _columns(items: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for item in items for key in item))


def _csv(text: str, name: str) -> list[Answer]:
    header, _, _ = text.lstrip("\n\r").partition("\n")
    # The one that makes the most of the header.
    delimiter = max(",;\t", key=lambda mark: sum(word in _known() for word in _words(header, mark)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        columns = [word.strip().lower() for word in next(reader)]
        if repeated := [word for word, count in Counter(columns).items() if count > 1 and word]:
            raise UserError(f"{name} has several columns {repeated[0]!r}; keep one")
        items, wheres = [], []
        for row in reader:
            if len(row) > len(columns) and any(row[len(columns) :]):
                raise UserError(
                    f"line {reader.line_num} of {name} has {len(row)} fields, and the header "
                    f"{len(columns)}; put quotes around fields with {delimiter!r}"
                )
            if any(row):
                items.append({key: _plain(value) for key, value in zip(columns, row, strict=False)})
                wheres.append(f"line {reader.line_num}")
    except csv.Error as error:
        raise UserError(f"line {reader.line_num} of {name} is not CSV ({error}); save it again") from None
    return _rows(items, wheres, columns, name)


def _known() -> tuple[str, ...]:
    return ("image_id", *_URI_COLUMNS, *_LABEL_COLUMNS, SKIPPED)


def _words(header: str, delimiter: str) -> list[str]:
    return [word.strip().strip('"').lower() for word in header.split(delimiter)]


def plain_cell(value: str) -> str:
    """Write a cell so that no spreadsheet takes it for a formula: with a quote before it."""
    return f"'{value}" if value[:1] in tuple(_FORMULA + "'") else value


def _plain(cell: str) -> str:
    """Undo `plain_cell`."""
    return cell[1:] if cell[:1] == "'" and cell[1:2] in tuple(_FORMULA + "'") else cell


def _rows(
    items: Iterable[dict[str, Any]], wheres: Iterable[str], columns: list[str], name: str
) -> list[Answer]:
    """Read rows, as of CSV, JSONL and JSON-MIN."""
    uri = next((column for column in _URI_COLUMNS if column in columns), None)
    label = next((column for column in _LABEL_COLUMNS if column in columns), None)
    if uri is None and "image_id" not in columns:
        raise UserError(f"{name} names no images: it needs a column image_id or uri; it has {_few(columns)}")
    if label is None and SKIPPED not in columns:
        raise UserError(f"{name} has no column label; it has {_few(columns)}")
    answers = []
    for item, where in zip(items, wheres, strict=True):
        image_id = _image_id(item.get("image_id"), where, name)
        named_uri = _uri(item.get(uri), where, name)
        if image_id is None and named_uri is None:
            raise UserError(f"{where} of {name} names no image; give its image_id or uri, or remove it")
        skipped = str(item.get(SKIPPED) or "").strip().lower() in _YES
        names = [] if skipped else _names(item.get(label), where, name)
        answers += [Answer(where, image_id, named_uri, one, skipped) for one in (names or [None])]
    return answers


def _few(columns: list[str]) -> str:
    return repr(", ".join(columns)[:200]) if columns else "none"


def _image_id(value: Any, where: str, name: str) -> int | None:
    if value is None or value == "":
        return None
    # Spreadsheets and data frames make numbers with a point of columns with gaps.
    if not isinstance(value, bool) and (found := re.fullmatch(r"(\d{1,18})(\.0*)?", str(value).strip())):
        return int(found[1])
    raise UserError(f"{where} of {name} has the image_id {_short(value)}, which is no number; correct it")


def _uri(value: Any, where: str, name: str) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise UserError(f"{where} of {name} has {_short(value)} for a uri; correct it")
    return value


def _names(value: Any, where: str, name: str) -> list[str]:
    """Return the class names that a value stands for; several are a contradiction, found later."""
    if isinstance(value, str) and value.startswith('{"choices"'):
        # So Label Studio writes several choices to CSV.
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, dict) and "choices" in value:
        value = value["choices"]
    values = value if isinstance(value, list) else [value]
    return [found for one in values if (found := _class_name(one, where, name))]


def _class_name(value: Any, where: str, name: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UserError(f"{where} of {name} has the label {_short(value)}, which is no text; correct it")
    text = str(value).strip()
    if len(text) > MAX_NAME:
        raise UserError(
            f"{where} of {name} has a label of {len(text):,} characters ({_short(text)}); class names have "
            f"at most {MAX_NAME}"
        )
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text):
        raise UserError(f"{where} of {name} has control characters in its label {_short(text)}; correct it")
    return text


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


# Label Studio


def _label_studio(tasks: list[dict[str, Any]], name: str) -> list[Answer]:
    """Read exported tasks: the choices of every annotation. Drafts and predictions are nobody's word."""
    control = _control(tasks, name)
    answers = []
    for i, task in enumerate(tasks, 1):
        where = f"task {task['id']}" if isinstance(task.get("id"), int) else f"task {i} of the file"
        data = task["data"] if isinstance(task["data"], dict) else {}
        uri = next((data[column] for column in _URI_COLUMNS if data.get(column)), None)
        image_id, uri = _image_id(data.get("image_id"), where, name), _uri(uri, where, name)
        if image_id is None and uri is None:
            raise UserError(
                f"{where} of {name} names no image: its data has {_few(list(data))}, and neither image_id "
                "nor uri nor image"
            )
        said = []
        for annotation in _annotations(task):
            names = [
                one
                for result in _choices(annotation)
                if result.get("from_name") == control
                for one in _names(result["value"], where, name)
            ]
            if annotation.get("was_cancelled") or annotation.get("skipped"):
                said.append(Answer(where, image_id, uri, skipped=True))
            else:
                said += [Answer(where, image_id, uri, one) for one in names]
        answers += said or [Answer(where, image_id, uri)]
    return answers


def _annotations(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    # "completions" until version 1.0.
    found = task.get("annotations", task.get("completions"))
    yield from (one for one in (found if isinstance(found, list) else []) if isinstance(one, dict))


def _choices(annotation: dict[str, Any]) -> Iterator[dict[str, Any]]:
    results = annotation.get("result")
    for result in results if isinstance(results, list) else []:
        if (
            isinstance(result, dict)
            and isinstance(result.get("value"), dict)
            and result.get("type") == "choices"
        ):
            yield result


def _control(tasks: list[dict[str, Any]], name: str) -> str | None:
    """Find the control whose choices are the labels: "label", or the only one."""
    controls = Counter(
        str(result.get("from_name"))
        for task in tasks
        for one in _annotations(task)
        for result in _choices(one)
    )
    if len(controls) > 1 and "label" not in controls:
        raise UserError(
            f"{name} has choices of several controls ({named(sorted(controls), ', ')}); name the one whose "
            "choices are the classes `label` in the labeling configuration"
        )
    others = any(one.get("result") for task in tasks for one in _annotations(task))
    if not controls and others:
        raise UserError(
            f"{name} has annotations, but no choices; classes are chosen with <Choices> in the labeling "
            "configuration"
        )
    return "label" if "label" in controls else next(iter(controls), None)


# CVAT


def _cvat(data: bytes, name: str) -> list[Answer]:
    """Read `CVAT for images` 1.1: the tags of every image; shapes are passed over."""
    answers: list[Answer] = []
    path: list[str] = []
    image: tuple[str, str] | None = None
    tags: list[str] = []
    count = shapes = 0

    def start(element: str, attributes: dict[str, str]) -> None:
        nonlocal image, count, shapes
        path.append(element)
        if len(path) > 100:
            raise UserError(f"{name} is nested too deeply; it is no export of CVAT")
        if path == ["annotations", "image"]:
            count += 1
            if not attributes.get("name"):
                raise UserError(f"image {count} of {name} has no name; export the task again")
            image = f"image {count} of the file", attributes["name"]
            tags.clear()
        elif path == ["annotations", "image", "tag"]:
            tags.append(_class_name(attributes.get("label"), image[0], name))
        elif path[:2] == ["annotations", "image"] and len(path) == 3:
            shapes += 1
        elif path == ["annotations", "track"]:
            raise UserError(f"{name} is `CVAT for video`; export the task as `CVAT for images`")
        elif path[0] != "annotations":
            raise UserError(f"{name} is XML, but no export of CVAT: it begins with {_short(path[0])}")

    def end(element: str) -> None:
        if path == ["annotations", "image"]:
            where, uri = image
            answers.extend(
                Answer(where, uri=uri, skipped=True) if tag == SKIPPED else Answer(where, uri=uri, label=tag)
                for tag in tags
                if tag
            )
            if not any(tags):
                answers.append(Answer(where, uri=uri))
        path.pop()

    def refuse(*_: Any) -> None:
        # Entities are how a small file becomes a large one, or reads another.
        raise UserError(f"{name} declares a document type, which CVAT never does; export the task again")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise UserError(f"{name} is not XML ({error}); export the task again") from None
    if shapes and not any(answer.label or answer.skipped for answer in answers):
        raise UserError(
            f"{name} has shapes, but no tags; classes of whole images are given as labels of the type tag"
        )
    return answers
