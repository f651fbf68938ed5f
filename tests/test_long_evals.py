"""Long generation, calls copied from a prompt, and bounds of attention's error."""

import numpy as np
import pytest
from helpers import MODEL
from hypothesis import given
from hypothesis import strategies as st

import mlx_turboquant as tq
from mlx_turboquant.errors import SpecError, UnsupportedModelError
from mlx_turboquant.evals import bounds, caches, calls, long, needles, report
from mlx_turboquant.evals import text as texts
from mlx_turboquant.evals.grid import EvalPlan

PLAN = EvalPlan(
    lengths=(),
    windows=1,
    prefill=256,
    needles=(),
    greedy=0,
    long=48,
    written=16,
    bounds=True,
)


@pytest.fixture(scope="module")
def prompt(books):
    _, tokenizer = books
    body = texts.windows(texts.books(), tokenizer, long.PROMPT, 1)[0]
    return needles.haystack(tokenizer, body, long.FACTS, is_distinct=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("long")


@pytest.fixture(scope="module")
def results(books, folder):
    specs = ("4", "2,page=32")
    return tq.evaluate(*books, specs, baselines=("fp",), plan=PLAN, folder=folder)


def jobs_of(results, kind):
    return {job["name"]: job for job in results.of_kind(kind)}


def test_fewer_bits_diverge_more_and_no_bits_hardly(results):
    jobs = jobs_of(results, "long")
    fp, four, two = (jobs[name] for name in ("fp", "k4v4", "k2v2,page=32"))
    means = [float(np.mean(job["kld"])) for job in (fp, four, two)]
    assert abs(means[0]) < 1e-6
    assert 1e-6 < means[1] < means[2] / 5
    assert [len(job["kld"]) for job in (fp, four, two)] == [48] * 3
    assert fp["same"] == 48
    assert fp["parts"] == 16
    assert len(fp["written"]) == 48
    assert len(four["written"]) == 16
    assert fp["bits"] / fp["elements"] == 16
    assert 2.2 < two["bits"] / two["elements"] < 5


def test_calls_are_right_without_compression(results):
    """The bundled model can do it: what fails behind codes is the codes' doing."""
    jobs = jobs_of(results, "long")
    made = jobs["fp"]["calls"]
    assert len(made) == long.FACTS
    assert all(call["said"] == call["wanted"] for call in made)
    assert all(call["name"] and call["code"] for call in made)
    assert '"code": ' in made[0]["said"]


def test_calls_need_the_facts(books, prompt):
    """A cache that has not read them gets names and numbers wrong."""
    model, tokenizer = books
    _, questions = prompt
    cache = caches.cache_factory("fp", model)()
    needles.read(model, texts.windows(texts.books(), tokenizer, 256, 1)[0], cache, 256)
    made = calls.make_calls(model, tokenizer, cache, questions)
    assert not any(call["code"] for call in made)
    assert not all(call["name"] for call in made)
    assert cache[0].offset == 256  # as it was


def test_a_text_is_its_seeds(books, prompt):
    model, _ = books
    factory = caches.cache_factory("fp", model)

    def written(count, seed, spec=factory):
        return long.write(model, prompt[0], spec, count, 256, seed)

    text = written(12, 5)
    assert written(6, 5) == text[:6]
    assert written(12, 6) != text
    near = written(12, 5, caches.cache_factory("8", model))
    assert needles.common_prefix(near, text) >= 6


def test_repetition_counts_runs_of_four():
    assert long.repetition(list(range(20))) == 0
    assert long.repetition([1, 2, 3]) == 0
    assert long.repetition([1, 2, 3, 4] * 5) == pytest.approx(13 / 17)
    assert long.repetition([7, 1, 2, 3, 4, 8, 1, 2, 3, 4]) == pytest.approx(1 / 7)


def test_distinct_facts_share_no_word(books):
    _, tokenizer = books
    body = texts.windows(texts.books(), tokenizer, 400, 1)[0]
    _, questions = needles.haystack(tokenizer, body, 7, seed=3, is_distinct=True)
    names = [q.partition("code of the ")[2].partition("?")[0] for _, q, _ in questions]
    assert len({word for name in names for word in name.split()}) == 14


def test_a_resumed_run_does_not_write_the_text_again(
    results, books, folder, monkeypatch
):
    begun = []
    real = long.write
    monkeypatch.setattr(long, "write", lambda *a, **k: begun.append(a) or real(*a, **k))
    again = tq.evaluate(*books, ("4", "3"), baselines=("fp",), plan=PLAN, folder=folder)
    assert [len(a[1]) for a in begun] == [long.PROMPT]  # what k3v3 writes
    assert begun[0][3] == PLAN.written
    kld = [np.mean(jobs_of(again, "long")[name]["kld"]) for name in ("k4v4", "k3v3")]
    assert kld[0] < kld[1]


def test_reports_show_long_texts_and_bounds(results, tmp_path):
    paths = report.write(results, tmp_path)
    assert {path.name for path in paths} >= {"table.txt", "long.png"}
    table = (tmp_path / "table.txt").read_text()
    assert "own text of 48 tokens, behind a prompt of 512" in table
    rows = [line.split() for line in table.splitlines() if line.startswith("k4v4")]
    job = jobs_of(results, "long")["k4v4"]
    assert f"{np.mean(job['kld']):.3g}" in rows[0]
    assert f"{np.mean(job['kld'][36:]):.3g}" in rows[0]
    bound = np.mean([r["bound"] for r in jobs_of(results, "bound")["k4v4"]["rows"]])
    assert f"{bound:.3g}" in rows[1]
    assert "to 48" in (tmp_path / "report.html").read_text()


def test_bounds_hold_in_a_model(results):
    """Every layer, head and step; what is expected of codes is about what they do."""
    jobs = jobs_of(results, "bound")
    assert set(jobs) == {"k4v4", "k2v2,page=32"}
    for job in jobs.values():
        assert len(job["rows"]) == 8
        for row in job["rows"]:
            assert row["least"] >= 1
            assert row["true"] < row["bound"]
            assert 0.5 < row["true"] / row["expected"] < 2
    four, two = (np.mean([r["true"] for r in jobs[n]["rows"]]) for n in jobs)
    assert 2 < two / four < 10


def made_up(seed, size, sharp, noise):
    """q, keys, values, decoded keys and values of 2 heads."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((2, 3, 16)) * sharp
    keys, values = rng.standard_normal((2, 2, size, 16))
    return q, keys, values, keys + noise * rng.standard_normal(keys.shape), values


@given(
    st.integers(0, 2**31),
    st.integers(1, 40),
    st.floats(0.01, 30),
    st.floats(0, 3),
    st.floats(0, 3),
    st.booleans(),
)
def test_no_error_is_above_its_bound(seed, size, sharp, noise, harm, is_aimed):
    """Of codes near and far, and of residuals that point the worst way."""
    q, keys, values, decoded, _ = made_up(seed, size, sharp, noise)
    rng = np.random.default_rng(seed + 1)
    if is_aimed:  # along a query, up for half of the tokens
        signs = rng.choice([-1, 1], size=(2, size, 1))
        decoded = keys + noise * signs * q[:, :1] / np.linalg.norm(
            q[:, :1], axis=-1, keepdims=True
        )
    away = harm * rng.standard_normal(values.shape)
    errors = bounds.output_errors(q, keys, values, decoded, values + away, 0.25)
    assert (errors.true <= errors.bound * (1 + 1e-9) + 1e-9).all()
    assert np.isfinite(errors.bound).all()


def test_a_bound_is_near_where_the_worst_happens():
    """Two tokens, residuals along the query, norms as they are stored."""
    q = np.array([[[1.0, 0.0]]])
    keys = np.array([[[1.0, 0.0], [-1.0, 0.0]]])
    values = np.array([[[1.0, 0.0], [-1.0, 0.0]]])
    off = np.array([[[0.3, 0.0], [-0.3, 0.0]]])
    errors = bounds.output_errors(q, keys, values, keys - off, values, 1.0)
    assert 1 <= errors.bound[0] / errors.true[0] < 1.6
    same = bounds.output_errors(q, keys, values, keys, values, 1.0)
    assert same.bound[0] == pytest.approx(0, abs=1e-12)
    off_values = np.array([0.0, 0.5])
    moved = bounds.output_errors(q, keys, values, keys, values + off_values, 1.0)
    assert moved.true[0] == pytest.approx(0.5)
    assert 0.5 <= moved.bound[0] <= 0.5 * 2**0.125 * (1 + 1e-6)


def test_expected_errors_are_those_of_residuals_that_point_anywhere():
    ratios = []
    for seed in range(200):
        q, keys, values, decoded, _ = made_up(seed, 64, 1.0, 0.1)
        errors = bounds.output_errors(q, keys, values, decoded, values, 0.25)
        ratios.append(np.mean(errors.true**2) / np.mean(errors.expected**2))
    assert np.sqrt(np.mean(ratios)) == pytest.approx(0.96, abs=0.05)


def test_stored_norms_are_rounded_up():
    norms = np.geomspace(2.0**-15.875, 2.0**15.875, 5000)
    kept = bounds.stored_norms(norms)
    assert (kept >= norms).all()
    assert (kept <= norms * 2**0.125 * (1 + 1e-6)).all()
    codes = np.unique(np.round(8 * np.log2(kept)))
    assert len(codes) <= 255  # a byte, and one value for zero
    assert bounds.stored_norms(np.array([0.0, 1e-9])).tolist() == pytest.approx(
        [0, 2**-15.875]
    )
    with pytest.raises(ValueError, match=r"norm 1e\+06 is above"):
        bounds.stored_norms(np.array([1.0, 1e6]))


def test_bounds_need_codes(books):
    model, tokenizer = books
    window = texts.windows(texts.books(), tokenizer, 40, 1)[0]
    with pytest.raises(UnsupportedModelError, match="no attention over codes"):
        bounds.measure(model, window, tq.CacheSpec.parse("3"), 32)


def test_plans_of_long_texts():
    assert PLAN.has_no_lengths
    with pytest.raises(SpecError, match="written 1024 is more than the 100 tokens"):
        EvalPlan(long=100)
    with pytest.raises(SpecError, match="lengths"):
        EvalPlan(lengths=(), long=2000)  # greedy text begins behind a length


ARGS = ["eval", "3", "--model", str(MODEL)]
ONLY = ["--lengths", "0", "--needles", "0", "--greedy", "0", "--windows", "1"]


@pytest.mark.slow
def test_command_line(run_cli, tmp_path):
    size = ["--long", "16", "--written", "8", "--no-baselines"]
    code, out, err = run_cli(*ARGS, *ONLY, *size, "--out", str(tmp_path / "out"))
    assert code == 0, err
    assert "own text of 16 tokens" in out
    assert "6/6" in out


def test_texts_longer_than_the_model(run_cli, tmp_path):
    code, _, err = run_cli(*ARGS, *ONLY, "--long", "8000")
    assert code == 2
    assert "8512 tokens" in err
    assert "lower --lengths, --needles or --long" in err
