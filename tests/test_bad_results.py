"""Folders of ``mlx_tq.eval`` whose files were changed: one line and exit code 2."""

import copy
import json
import math
import os

import pytest
import tiny_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bad_input import ends
from test_bad_models import run

from mlx_turboquant.errors import FormatError, UnsupportedModelError
from mlx_turboquant.evals import EvalPlan, jobs, report
from mlx_turboquant.evals.results import Evaluation

pytestmark = pytest.mark.filterwarnings("ignore")

TINY = ["--lengths", "60", "--windows", "1", "--needles", "0", "--greedy", "0"]
TINY += ["--scored", "4", "--stepped", "2", "--no-baselines"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder.write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("hello there world " * 400)
    return file


@pytest.fixture(scope="module")
def done(model, text, tmp_path_factory):
    """What a finished run has written, as JSON."""
    out = tmp_path_factory.mktemp("done")
    assert ends(*evaluate(model, text, out)) == ""
    return json.loads((out / "results.json").read_text())


def evaluate(model, text, out):
    args = ["--model", str(model), "--text", str(text), "--out", str(out)]
    return run("eval", "3", *args, *TINY)


def span(mode):
    return {"length": 60, "mode": mode, "kld": [0.1, 0.2], "nll": [1.0, 2.0],
            "same": 1, "bits": 90, "elements": 30, "nbytes": 12}  # fmt: skip


def whole():
    """An evaluation with a job of each kind."""
    plan = EvalPlan(lengths=(60,), scored=4, stepped=2, long=3, written=3).state()
    about = dict.fromkeys(("model", "text", "machine", "device", "mlx"), "x")
    made = [
        {"kind": "score", "window": 0, "pathology": "",
         "spans": [span("chunked"), span("stepped")]},
        {"kind": "layer", "layer": 0, "spans": [span("chunked")]},
        {"kind": "needle",
         "answers": [{"length": 60, "depth": 0.5, "found": True}]},
        {"kind": "greedy", "window": 0, "same": 3},
        {"kind": "long", "window": 0, "kld": [0.1, 0.2, 0.3], "same": 2, "bits": 90,
         "elements": 30, "calls": [{"name": True, "code": False}],
         "written": [1, 2, 3], "parts": 2, "repeats": 0.0},
        {"kind": "bound", "length": 60,
         "rows": [{"true": 0.1, "expected": 0.1, "bound": 9.0, "least": 80.0}]},
    ]  # fmt: skip
    return {
        "format": "mlx_turboquant evaluation 1",
        "about": {**about, "plan": plan},
        "jobs": {
            f"{job['kind']} {name} {job.get('window', '')}": {**job, "name": name}
            for job in made
            for name in ("fp", "k3v3")
        },
    }


def places(value, path=()):
    """Paths to everything inside a JSON value."""
    inside = ()
    if isinstance(value, dict):
        inside = value.items()
    elif isinstance(value, list):
        inside = enumerate(value)
    for key, part in inside:
        yield (*path, key)
        yield from places(part, (*path, key))


ODD = [None, True, -1, 0, 0.5, 10**30, -(10**30), math.nan, math.inf, "", "x", [], {}]
ODD += [[None], [1], {"kind": "score"}, ["x"] * 3, [10**30], 7]
PLACES = [*places(whole())]


def changed(path, value):
    saved = whole()
    part = saved
    for key in path[:-1]:
        part = part[key]
    if value is ...:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return saved


@settings(max_examples=400, deadline=None)
@given(path=st.sampled_from(PLACES), value=st.sampled_from([..., *ODD]))
def test_any_change_is_read_or_refused(path, value, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "results.json"
    file.write_text(json.dumps(changed(path, value)))
    try:
        results = Evaluation.load(file)
    except FormatError as error:
        said = str(error)
    else:
        said = f"{file} choose another folder or remove it"
        if path[:2] != ("about", "plan"):  # compared with the run's before it is used
            assert "k3v3" in report.as_text(results)
    assert said.startswith((str(file), f"cannot read an evaluation from {file}"))
    assert "choose another folder or remove it" in said


@settings(max_examples=12, deadline=None)
@given(
    path=st.sampled_from([p for p in PLACES if p[:2] != ("about", "plan")]),
    value=st.sampled_from(ODD),
)
def test_what_is_read_can_be_drawn(path, value, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    file = folder / "results.json"
    for saved in (changed(path, value), whole()):
        file.write_text(json.dumps(saved))
        try:
            results = Evaluation.load(file)
        except FormatError:
            continue
        assert len(report.write(results, folder)) == 6


#: What `results.json` may hold, and what its error says.
CASES = {
    "text": (lambda saved: "not JSON", "cannot read an evaluation from"),
    "list": (lambda saved: [saved], "is not an evaluation of this version"),
    "no about": (lambda saved: {**saved, "about": None}, "it has no about and jobs"),
    "no plan": (
        lambda saved: {**saved, "about": {**saved["about"], "plan": 3}},
        "'plan' of what it is about",
    ),
    "a job": (
        lambda saved: {**saved, "jobs": dict.fromkeys(saved["jobs"], 3)},
        "job 'score fp window 0' is missing or wrong",
    ),
    "a kind": (lambda saved: of_jobs(saved, kind="greedy"), "the kind of job"),
    "a name": (lambda saved: of_jobs(saved, name="k8v8"), "the name in job"),
    "no spans": (lambda saved: of_jobs(saved, spans=[]), "'spans' of job"),
    "short": (
        lambda saved: of_jobs(saved, spans=[{**span("chunked"), "nll": [0.1]}]),
        "'spans' of job",
    ),
}


def of_jobs(saved, **values):
    jobs = {key: {**job, **values} for key, job in saved["jobs"].items()}
    return {**saved, "jobs": jobs}


@pytest.mark.parametrize("case", CASES)
def test_the_command_says_what_was_changed(case, done, model, text, tmp_path):
    change, says = CASES[case]
    value = change(copy.deepcopy(done))
    written = value if isinstance(value, str) else json.dumps(value)
    (tmp_path / "results.json").write_text(written)
    line = ends(*evaluate(model, text, tmp_path))
    assert says in line
    assert str(tmp_path / "results.json") in line


def test_a_folder_without_a_name_is_none(model, text):
    assert "the folder of the results has no name" in ends(*evaluate(model, text, ""))


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_not_waited_for(kind, model, text, tmp_path):
    path = tmp_path / "results.json"
    if kind == "pipe":
        os.mkfifo(path)
        says = "it is a pipe, no regular file"
    elif kind == "device":
        path.symlink_to("/dev/zero")
        says = "it is a device, no regular file"
    else:
        path.mkdir()
        says = "Is a directory"
    line = ends(*evaluate(model, text, tmp_path))
    assert "cannot read an evaluation" in line
    assert says in line
    line = ends(*evaluate(model, path, tmp_path / "out"))
    assert "cannot read text from" in line
    assert says in line


def test_a_saved_text_of_another_vocabulary_is_refused(books):
    plan = EvalPlan(lengths=(), needles=(), greedy=0, long=2, written=2)
    words = "One two three. " * 900
    runner = jobs.JobRunner(*books, plan, [words], {0: [5, 10**6]})
    with pytest.raises(UnsupportedModelError, match=r"results\.json has token 1000000"):
        runner._own_text(0)
