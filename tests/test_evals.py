"""The measuring instrument: its parts, its laws, and that it can be resumed."""

import json

import mlx.core as mx
import mlx_lm.models.cache as host_cache
import numpy as np
import pytest
from helpers import MODEL

import mlx_turboquant as tq
from mlx_turboquant.errors import FormatError, SpecError, UnsupportedModelError
from mlx_turboquant.evals import caches, needles, pathologies, report, scoring
from mlx_turboquant.evals import evaluate as evaluation
from mlx_turboquant.evals import results as statistics
from mlx_turboquant.evals import text as texts
from mlx_turboquant.evals.grid import EvalPlan

PLAN = EvalPlan(
    lengths=(200, 300),
    windows=2,
    seeds=2,
    prefill=96,
    chunk=24,
    scored=24,
    stepped=4,
    needles=(400,),
    depths=2,
    greedy=6,
    layers=True,
)
CACHES = ("3,page=32", "2,page=32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("eval")


BASELINES = ("fp", "affine:4", "rotated-affine:4")


@pytest.fixture(scope="module")
def results(books, folder):
    """A whole small evaluation, saved."""
    return tq.evaluate(
        *books,
        CACHES,
        baselines=BASELINES,
        plan=PLAN,
        pathology=("offset 10",),
        folder=folder,
        name="books",
    )


def by_name(results, length, **kind):
    return {row.name: row for row in results.rows(**kind) if row.length == length}


def test_scores_obey_the_laws(results):
    for length in PLAN.lengths:
        rows = by_name(results, length)
        assert rows["fp"].kld < 1e-6
        assert rows["fp"].top1 == 1
        assert rows["fp"].bits == 16
        two, three = rows["k2v2,page=32"], rows["k3v3,page=32"]
        assert 0 < three.kld < two.kld < 0.2
        assert three.perplexity == pytest.approx(rows["fp"].perplexity, rel=0.05)
        assert three.bits - two.bits == pytest.approx(
            1 - (4 + 32) / length, abs=32 / length
        )
        assert rows["affine:4"].bits == rows["rotated-affine:4"].bits == 4.5
        for row in rows.values():
            assert row.low <= row.kld <= row.high
            assert row.kld <= row.worst
            assert row.tokens == PLAN.windows * PLAN.tail
    assert (
        by_name(results, 300)["k3v3,page=32"].bits
        < by_name(results, 200)["k3v3,page=32"].bits
    )


def test_modes_divide_the_tokens(results):
    every, chunked, stepped = (
        by_name(results, 300, mode=m)["k2v2,page=32"]
        for m in ("all", "chunked", "stepped")
    )
    assert (chunked.tokens, stepped.tokens) == (48, 8)
    mean = (48 * chunked.kld + 8 * stepped.kld) / 56
    assert every.kld == pytest.approx(mean, rel=1e-6)


def test_an_offset_hurts_affine_and_not_us(results):
    plain, shifted = by_name(results, 300), by_name(results, 300, pathology="offset 10")
    assert shifted["affine:4"].kld > 5 * plain["affine:4"].kld
    assert shifted["k3v3,page=32"].kld < 2 * plain["k3v3,page=32"].kld


def test_layers_needles_and_greedy_are_there(results):
    layers = results.of_kind("layer")
    assert [job["layer"] for job in layers] == [*range(8)] * 2
    one = [np.mean(np.concatenate([s["kld"] for s in j["spans"]])) for j in layers]
    assert all(0 < kld < 0.1 for kld in one)
    fp = [job for job in results.of_kind("needle") if job["name"] == "fp"]
    assert [a["found"] for a in fp[0]["answers"]] == [True, True]
    assert all(j["same"] == 6 for j in results.of_kind("greedy") if j["name"] == "fp")


def test_a_finished_run_is_read_not_done_again(results, books, folder, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("this was measured before")

    monkeypatch.setattr(scoring, "score", forbidden)
    monkeypatch.setattr(scoring, "reference", forbidden)
    monkeypatch.setattr(needles, "retrieve", forbidden)
    calls = []
    options = {
        "baselines": BASELINES,
        "plan": PLAN,
        "pathology": ("offset 10",),
        "folder": folder,
    }
    again = tq.evaluate(
        *books, CACHES, name="books", progress=lambda *a: calls.append(a), **options
    )
    assert again.jobs == results.jobs
    assert calls[-1] == ("done", len(results.jobs), len(results.jobs))
    with pytest.raises(SpecError, match="with model books, not other"):
        tq.evaluate(*books, CACHES, name="other", **options)
    (folder / "broken").mkdir()
    (folder / "broken" / "results.json").write_text("{")
    with pytest.raises(FormatError, match="cannot read an evaluation"):
        tq.evaluate(*books, CACHES, folder=folder / "broken")


def test_an_applied_model_stays_applied(books, hooked):
    model, tokenizer = books
    tq.apply(model, "3")
    plan = EvalPlan(lengths=(64,), windows=1, scored=8, stepped=0, needles=(), greedy=0)
    rows = tq.evaluate(model, tokenizer, ("4",), baselines=("fp",), plan=plan).rows()
    assert rows[0].bits == 16
    assert isinstance(model.make_cache()[0], tq.TurboQuantCache)


def test_reports_say_what_was_measured(results, tmp_path):
    paths = report.write(results, tmp_path)
    assert {path.name for path in paths} == {
        "table.txt",
        "report.html",
        "kld-by-bits.png",
        "needles.png",
        "layers.png",
    }
    table = (tmp_path / "table.txt").read_text()
    row = by_name(results, 300)["k3v3,page=32"]
    line = next(x for x in table.splitlines() if x.startswith("k3v3") and " 300 " in x)
    assert f" {row.bits:.2f} " in line
    assert f" {row.kld:.3g} " in line
    assert "2/2" in line
    assert "offset 10" in table
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png") == 3
    assert f"{row.kld:.3g}" in page
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in paths if p.suffix == ".png")


def test_affine_baseline_is_mlx_lms_cache(books, monkeypatch):
    monkeypatch.setattr(scoring, "stored_bits", lambda cache: (0, 0))
    model, tokenizer = books
    window = texts.windows(texts.books(), tokenizer, 97, 1)[0]
    plan = EvalPlan(lengths=(96,), scored=32, stepped=4, prefill=30)
    base = scoring.reference(model, window, caches.cache_factory("fp", model), plan)

    def kld(make):
        spans = scoring.score(model, window, make, plan, base)
        return np.concatenate([span["kld"] for span in spans])

    stock = kld(lambda: [host_cache.QuantizedKVCache(64, 4) for _ in model.layers])
    ours = kld(caches.cache_factory("affine:4", model))
    assert np.allclose(ours, stock, rtol=0.02, atol=1e-6)
    assert stock.mean() > 1e-3


def test_stored_bits_of_the_parts():
    cache = tq.TurboQuantCache("k3v2")
    for n in (299, 1):
        kv = mx.random.normal((1, 2, n, 64)).astype(mx.float16)
        cache.update_and_fetch(kv, kv)
    bits, elements = caches.stored_bits([cache])
    assert elements == 300 * 2 * 2 * 64
    packed = 256 * 2 * (5 * 64 + 2 * 16)
    plain = (4 + 40) * 2 * 2 * 64 * 16
    extra = 2 * 64 * (2 * 16 + 2 * 32)  # two page means, two sides' gains
    assert bits == packed + plain + extra


def test_intervals_cover_the_truth():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        groups = [rng.exponential(size=96) for _ in range(2)]
        low, high = statistics.interval(groups)
        hits += low <= 1 <= high
    assert 85 <= hits <= 99


def test_facts_are_where_they_should_be(books):
    _, tokenizer = books
    body = texts.windows(texts.books(), tokenizer, 500, 1)[0]
    hay, questions = needles.haystack(tokenizer, body, 4, seed=1)
    assert len(hay) == 500
    said = tokenizer.decode(hay)
    for depth, question, code in questions:
        name = question.partition("code of ")[2].partition("?")[0]
        at = said.index(f"The secret code of {name} is {code}.") / len(said)
        assert at == pytest.approx(depth, abs=0.06)
    assert len({code for _, _, code in questions}) == 4
    assert needles.common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert needles.common_prefix([1, 2], [1, 2]) == 2


@pytest.mark.parametrize("name", pathologies.NAMES)
def test_pathologies_leave_the_output_alone(books, name):
    model, tokenizer = books
    ids = mx.array(texts.windows(texts.books(), tokenizer, 200, 1)[0])[None]
    before = model(ids)
    weights = model.layers[0].self_attn.k_proj.weight
    with pathologies.injected(model, name):
        inside = model(ids)
    after = model(ids)
    assert mx.array_equal(before, after).item()
    assert model.layers[0].self_attn.k_proj.weight is weights
    spread = mx.std(before).item()
    difference = mx.abs(inside - before).max().item()
    assert 0 < difference < (0.5 if name.startswith("bias") else 0.01) * spread


def test_pathologies_need_a_plain_llama(books):
    model, _ = books
    with (
        pytest.raises(SpecError, match="'gout' is unknown"),
        pathologies.injected(model, "gout"),
    ):
        pass
    from test_batch import tiny_model

    tiny = tiny_model()
    for layer in tiny.layers:
        layer.self_attn.n_heads = layer.self_attn.n_kv_heads
    with (
        pytest.raises(UnsupportedModelError, match="grouped"),
        pathologies.injected(tiny, "scale 1"),
    ):
        pass


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"windows": 0}, "windows 0"),
        ({"lengths": (100,)}, "ascend by more than the 112"),
        ({"lengths": (1024, 1100)}, "ascend by more"),
        ({"lengths": ()}, "lengths"),
    ],
)
def test_plans_that_cannot_be_run(change, says):
    with pytest.raises(SpecError, match=says):
        EvalPlan(**change)


def test_texts_that_are_too_short_or_not_there(books, tmp_path):
    _, tokenizer = books
    short = tmp_path / "short.txt"
    short.write_text("A short text.\n\x0c\nAnother.")
    assert len(texts.read_texts(short)) == 2
    with pytest.raises(SpecError, match="gives 5 tokens, not 50"):
        texts.windows(texts.read_texts(short), tokenizer, 50, 1)
    with pytest.raises(SpecError, match="cannot read text"):
        texts.read_texts(tmp_path / "none.txt")
    for name in ("affine:7", "rotated-affine:x"):
        with pytest.raises(SpecError, match="affine bits are"):
            caches.cache_factory(name, books[0])


def test_command_line(run_cli, tmp_path):
    args = ["eval", "3", "--model", str(MODEL), "--out", str(tmp_path / "out")]
    small = ["--lengths", "200", "--windows", "1", "--scored", "16", "--stepped", "2"]
    none = ["--needles", "0", "--greedy", "0", "--no-baselines"]
    code, out, err = run_cli(*args, *small, *none)
    assert code == 0, err
    assert "k3v3" in out
    assert "written: " in out
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(saved["jobs"]) == ["score fp window 0", "score k3v3 window 0"]
    code, _, err = run_cli(*args, "--lengths", "x")
    assert (code, err) == (2, "error: --lengths 'x' is not a list such as 1024,2048\n")
    code, _, err = run_cli(*args, "--lengths", "20000")
    assert code == 2
    assert "the model's context is 8192; lower --lengths, --needles or --long" in err


def test_jobs_of_one_window_share_its_reference(books, monkeypatch):
    calls = []
    real = scoring.reference
    monkeypatch.setattr(scoring, "reference", lambda *a: calls.append(1) or real(*a))
    plan = EvalPlan(lengths=(64,), windows=2, scored=8, stepped=0, needles=(), greedy=0)
    evaluation(*books, ("3",), baselines=("fp", "affine:4"), plan=plan)
    assert len(calls) == 2
