"""What is released: a wheel and a source archive, built as a release builds them."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from helpers import ROOT
from packaging.metadata import Metadata

import mlx_turboquant as tq

TABLES = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, BUILD = TABLES["project"], TABLES["build-system"]
FOLDER = ROOT / ".github" / "workflows"
WORKFLOWS = sorted(FOLDER.glob("*.yml"))
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Paths of an sdist, the wheel of the tree and the wheel of the unpacked sdist."""
    folder = tmp_path_factory.mktemp("built")
    backend = folder / "backend"
    subprocess.run(
        [*PIP, "install", "--target", backend, *BUILD["requires"]], check=True
    )

    def build(kind, source, out):
        out.mkdir(exist_ok=True)
        code = f"import sys, hatchling.build as b; b.build_{kind}(sys.argv[1])"
        subprocess.run(
            [sys.executable, "-c", code, out],
            check=True,
            cwd=source,
            env={"PYTHONPATH": str(backend)},
            stdout=subprocess.DEVNULL,
        )
        (made,) = out.iterdir()
        return made

    sdist = build("sdist", ROOT, folder / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    wheel = build("wheel", ROOT, folder / "tree")
    return sdist, wheel, build("wheel", unpacked, folder / "again")


def files(folder):
    """Names of a folder's files, less what Python leaves behind."""
    paths = [p.relative_to(ROOT) for p in (ROOT / folder).rglob("*") if p.is_file()]
    return {path.as_posix() for path in paths if "__pycache__" not in path.parts}


def test_a_wheel_has_the_package_the_kernels_and_nothing_else(built):
    _, wheel, _ = built
    assert wheel.name == f"mlx_tq-{tq.__version__}-py3-none-any.whl"
    # Half of it is the held-out text that `mlx_tq.eval` reads by default.
    assert wheel.stat().st_size < 1_200_000
    names = set(zipfile.ZipFile(wheel).namelist())
    about = {name for name in names if ".dist-info/" in name}
    kernels = {
        name.replace("metal/", "mlx_turboquant/_metal/", 1) for name in files("metal")
    }
    assert names - about == files("mlx_turboquant") | kernels
    assert {"mlx_turboquant/py.typed", "mlx_turboquant/data/lloyd_max.json"} <= names
    assert len(kernels) > 30
    assert {name.partition("/")[2] for name in about} == {
        "METADATA",
        "WHEEL",
        "RECORD",
        "entry_points.txt",
        "licenses/LICENSE",
    }


def test_the_source_archive_gives_the_same_wheel(built):
    sdist, wheel, again = built
    assert sdist.name == f"mlx_tq-{tq.__version__}.tar.gz"
    assert wheel.read_bytes() == again.read_bytes()
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names == files("mlx_turboquant") | files("metal") | {
        "pyproject.toml",
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        ".gitignore",
        "PKG-INFO",
    }


def test_its_metadata_is_valid_and_says_what_the_project_does(built):
    _, wheel, _ = built
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("/METADATA")]
        about = Metadata.from_email(archive.read(name))  # raises for what is invalid
    assert about.name == "mlx-tq"
    assert str(about.version) == tq.__version__
    assert about.license_expression == "MIT"
    assert about.description_content_type == "text/markdown"
    assert {"cpu", "cuda", "plots", "vlm"} <= set(about.provides_extra)
    assert str(about.requires_python) == ">=3.11"
    check_description(about.description)


def check_description(shown):
    """README.md, less what an index that has this text alone could not open.

    Nor does it say that the project is not there, or how to install from a clone.
    """
    targets = re.findall(r"\]\(([^)]*)\)", shown)
    assert len(targets) >= 2
    assert [t for t in targets if not t.startswith("https://")] == []
    assert "<!--" not in shown
    for of_clones in ("not on PyPI", "pip install .", "'.[", "git clone", "make demo"):
        assert of_clones not in shown
    assert "pip install mlx-tq " in shown
    readme, count = re.subn(
        "<!-- clone -->.*?<!-- /clone -->",
        "",
        (ROOT / "README.md").read_text(),
        flags=re.S,
    )
    assert count == 1
    # Comments and pictures: a line each.
    kept = re.sub(r"<!--.*-->|!\[.*\)", "", readme)
    kept = re.sub(r"\]\((?!https)[^)]*\)", "", kept)
    words = [re.findall(r"[\w.%]+", text) for text in (shown, kept)]
    assert words[0] == words[1]


def test_an_installed_wheel_works(built, tmp_path):
    """Put elsewhere, and used from there; every command starts."""
    _, wheel, _ = built
    site = tmp_path / "site"
    subprocess.run([*PIP, "install", "--no-deps", "--target", site, wheel], check=True)
    code = (
        "import mlx_turboquant as tq; print(tq.__file__); "
        "from mlx_turboquant.codebook import lloyd_max; print(lloyd_max(64, 3).mse); "
        "from mlx_turboquant.kernels import source; print(source.metal_folder()); "
        "from mlx_turboquant.kernels import attention, codes; "
        "print(*[len(k.header(d)) for d in ('metal', 'cuda')"
        " for k in (attention.DECODE_SPLIT_KV, attention.MERGE_STATES,"
        " codes.ENCODE_SCALAR, codes.MATERIALIZE)])"
    )
    here = {"cwd": site, "env": {"PYTHONPATH": str(site)}, "text": True}
    out = subprocess.check_output([sys.executable, "-c", code], **here)
    path, mse, folder, *lengths = out.split()
    assert Path(path).is_relative_to(site)
    assert Path(folder).is_relative_to(site)
    assert len(lengths) == 8
    assert all(int(length) > 3000 for length in lengths)
    assert 0.033 < float(mse) < 0.034
    scripts = {path.name for path in (site / "bin").iterdir()}
    assert scripts == set(PROJECT["scripts"])
    for script in scripts:
        run = [sys.executable, site / "bin" / script, "--help"]
        assert "Usage: " in subprocess.check_output(run, **here)


def test_install_lines_name_this_distribution():
    """None that would install the other package, which has our folder."""
    paths = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").glob("*.md")]
    paths += [
        p for p in (ROOT / "mlx_turboquant").rglob("*.py") if p.stem != "namesake"
    ]
    lines = [line for path in paths for line in path.read_text().splitlines()]
    named = re.compile(r"pip install [^&]*?(mlx-t\w+)")
    found = {name for line in lines for name in named.findall(line)}
    assert found == {"mlx-tq"}
    extras = {name for line in lines for name in re.findall(r"mlx-tq\[(\w+)\]", line)}
    assert {"plots", "vlm"} <= extras <= set(PROJECT["optional-dependencies"])


def test_only_whoever_has_a_clone_is_told_to_install_from_it():
    """Where the package is, pip adds an extra by its name, whether released or not."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    found = {
        path.name
        for path in [*pages, *(ROOT / "mlx_turboquant").rglob("*.py")]
        if re.search(r"pip install '?\.", path.read_text())
    }
    assert found == {"README.md", "quickstart.md"}
    for name in found:
        path = next(page for page in pages if page.name == name)
        before, _, behind = path.read_text().partition("git clone ADDRESS")
        assert "not on PyPI" in before[-300:]
        assert behind.count("pip install .") == 1


def jobs(name):
    """Jobs of a workflow."""
    return yaml.safe_load((FOLDER / f"{name}.yml").read_text())["jobs"]


def runs(job):
    """What the steps of a job run, one after the other."""
    return "\n".join(step.get("run", "") for step in job["steps"])


def test_workflows_run_what_they_pin():
    """A tag of an action can be moved; a commit cannot."""
    used = []
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"}, path.name
        for job in workflow["jobs"].values():
            for step in (job, *job.get("steps", ())):
                used += [step["uses"]] if "uses" in step else []
                assert "secrets" not in step
    ours = {use for use in used if use.startswith("./")}
    assert all((ROOT / use).is_file() for use in ours)
    assert len(used) - len(ours) > 5
    for use in set(used) - ours:
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", use), use


def test_every_python_is_tested_and_tried():
    versions = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    linux, tried = jobs("ci")["linux"], jobs("package")["try"]
    for job in (linux, tried):
        assert job["strategy"]["matrix"]["python"] == versions
    assert ".ci/run" in runs(linux)
    assert ".ci/try_wheel" in runs(tried)
    assert all(os.access(ROOT / ".ci" / name, os.X_OK) for name in ("run", "try_wheel"))


def test_a_release_waits_for_the_tests():
    """On Linux and on a Mac, where doctor has the kernels proved as a user's would."""
    release = jobs("release")
    called = {name: job["uses"] for name, job in release.items() if "uses" in job}
    assert set(release["publish"]["needs"]) == called.keys()
    assert {Path(path).stem for path in called.values()} == {"ci", "package"}
    assert all(release[name]["needs"] == "tag" for name in called)
    assert release["publish"]["permissions"] == {"id-token": "write"}
    text = (FOLDER / "release.yml").read_text()
    assert "secrets." not in text
    assert "password:" not in text
    assert Path(jobs("ci")["mac"]["uses"]).stem == "macos"
    metal = jobs("macos")["metal"]
    (proof,) = (step for step in metal["steps"] if "doctor" in step.get("run", ""))
    assert proof["env"] == {"MLX_TQ_BACKEND": ""}
    (tests,) = (step for step in metal["steps"] if step.get("run") == "make test")
    assert "continue-on-error" not in tests
