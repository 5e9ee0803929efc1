"""The page of a training: what it says of metrics, of few and many classes, and of names that are markup."""

import re
from html.parser import HTMLParser

from selective_ray import training_page


def line(step, classes, **more):
    confident = dict.fromkeys(classes, 3)
    losses = {"supervised": 0.5, "unsupervised": 0.25, "loss": 0.75, "mask_rate": 0.5}
    return {"step": step, "steps": 50, **losses, "confident": confident, **more}


def judged(step, classes, accuracy=0.5):
    n = len(classes)
    confusion = [[5 if i == j else (7 if (i, j) == (0, n - 1) else 0) for j in range(n)] for i in range(n)]
    by_class = {name: 0.5 for name in classes}
    return {
        "step": step,
        "accuracy": accuracy,
        "by_class": by_class,
        "calibration_error": 0.1,
        "confusion": confusion,
    }


def well_formed(page):
    open_tags = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "rect", "path", "circle"):
                open_tags.append(tag)

        def handle_endtag(self, tag):
            if tag not in ("meta", "rect", "path", "circle"):
                assert open_tags.pop() == tag

    Reader().feed(page)
    return not open_tags


def test_curves_and_the_confusion_of_few_classes():
    classes = ["<b>cat</b>", "dog"]
    lines = [
        line(50, classes),
        judged(50, classes),
        line(100, classes, impurity=0.2),
        judged(100, classes, 0.4),
    ]
    page = training_page.render("a", 200, lines, classes)
    assert well_formed(page) and "<b>cat" not in page and "&lt;b&gt;cat&lt;/b&gt;" in page
    assert "100 of 200 steps are done" in page
    assert "40% of the held-out images are classified right at step 100 (at best 50%, at step 50)" in page
    # Three charts: accuracy, losses, pseudo-labels with those that are wrong.
    assert page.count("<svg") == 3 and "of these wrong" in page
    assert re.search(r"<th scope=row>&lt;b&gt;cat&lt;/b&gt;</th>.*?7.*?50%", page)


def test_of_many_classes_the_pairs_most_often_confused():
    classes = [f"class {i}" for i in range(60)]
    page = training_page.render("a", 50, [line(50, classes), judged(50, classes)], classes)
    assert well_formed(page)
    assert "<th scope=row>class 0</th><td>class 59</td><td>7</td>" in page


def test_nothing_to_judge_by_and_nothing_done_yet():
    page = training_page.render("a", 50, [line(50, ["x", "y"])], ["x", "y"])
    assert well_formed(page) and "held-out" not in page and page.count("<svg") == 2
    assert "0 of 50 steps are done" in training_page.render("a", 50, [], ["x", "y"])
