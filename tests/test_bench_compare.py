"""The guard against slowdowns: its statistics, its processes and trees, and what it says."""

from __future__ import annotations

import functools
import json
import math
import os
import random
import shutil
import sys
from pathlib import Path

import pytest

import atsnn

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import compare  # noqa: E402
import noise  # noqa: E402
import short_set  # noqa: E402

LEAST = 0.03


# -- statistics -----------------------------------------------------------------------------------


def rounds(rng, number=18, *, change=0.0, spread=0.03, bias=0.0, bursts=0.0):
    """Made-up times; ``bias`` is how far processes differ, ``bursts`` a share of bad turns."""
    times = noise.Times()
    for place, series in vars(times).items():
        level = rng.gauss(0, bias) + (math.log1p(change) if place == "head" else 0)
        for _ in range(number):
            burst = rng.expovariate(2) if rng.random() < bursts else 0
            series.append(1e-3 * math.exp(level + rng.gauss(0, spread) + burst))
    return times


def judged(*looks):
    return {finding.case: finding for finding in noise.judge_all(looks, LEAST)}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("change", "bursts", "verdict"),
    [
        (0, 0, "same"),
        (0, 0.2, "same"),
        (0.1, 0, "slower"),
        (-0.1, 0, "faster"),
        (0.3, 0.2, "slower"),
    ],
)
def test_verdicts(seed, change, bursts, verdict):
    found = judged({"x": rounds(random.Random(seed), change=change, bursts=bursts)})["x"]
    assert found.verdict == verdict
    assert bursts or found.row()["change_percent"] == pytest.approx(100 * change, abs=4)


def test_a_change_below_the_least_is_none():
    times = rounds(random.Random(0), change=0.02, spread=1e-4)
    assert judged({"x": times})["x"].verdict == "same"
    assert noise.judge("x", times, 0.0, 0.01).verdict == "slower"


def test_bad_rounds_of_head_alone_count_for_little():
    times = rounds(random.Random(0))
    times.head[::4] = [3 * seconds for seconds in times.head[::4]]
    assert judged({"x": times})["x"].verdict == "same"


def test_what_two_processes_differ_by_is_noise_for_every_case():
    rng = random.Random(0)
    slow, other = rounds(rng, change=0.1, spread=0.01), rounds(rng, spread=0.01)
    assert judged({"slow": slow, "other": other})["slow"].verdict == "slower"
    other.again = [1.15 * seconds for seconds in other.again]
    found = judged({"slow": slow, "other": other})["slow"]
    assert found.verdict == "same" and found.row()["noise_percent"] > 12


def test_a_noisy_case_does_not_hide_the_others():
    rng = random.Random(4)
    slow, noisy = rounds(rng, change=0.1, spread=0.01), rounds(rng, spread=1.0)
    assert abs(noise.center(noisy.controls)[0]) > 0.1  # larger than the change
    assert judged({"slow": slow, "noisy": noisy})["slow"].verdict == "slower"


def test_both_looks_must_agree():
    rng = random.Random(0)
    slow, same, fast = (rounds(rng, change=change) for change in (0.2, 0, -0.2))
    assert [judged({"x": slow}, {"x": x})["x"].verdict for x in (slow, same, fast)] == [
        "slower", "same", "same",
    ]  # fmt: skip


def test_false_alarms_are_rare():
    """The number of the docstring of noise.py."""
    rng, first, named = random.Random(0), 0, 0
    kind = dict(spread=0.03, bias=0.01, bursts=0.1)
    for _ in range(200):
        look = {case: rounds(rng, **kind) for case in range(14)}
        changed = [case for case, found in judged(look).items() if found.verdict != "same"]
        again = {case: rounds(rng, 36, **kind) for case in changed}
        first += len(changed)
        named += sum(found.verdict != "same" for found in judged(look, again).values())
    assert named <= 3
    assert first > 10 * named  # the second look has something to do, and does it


# -- processes ------------------------------------------------------------------------------------

WORKER = """
import json, random, sys
settings = json.loads(sys.argv[1])
rng = random.Random(settings["seed"])
print(json.dumps({"cases": ["one", "two", "three"], "machine": {}}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    case = asked["case"]
    if case == settings.get("dies"):
        sys.exit(3)
    if asked["do"] == "time":
        seconds = 1e-3 * rng.gauss(1, 0.01) * settings.get("factor", {}).get(case, 1)
        found = {"seconds": seconds}
    elif case == settings.get("lacks"):
        found = {"missing": "AttributeError: no such thing"}
    else:
        found = {"result": settings.get("result", "same")}
    print(json.dumps(found), flush=True)
"""


@pytest.fixture
def run(tmp_path, capsys):
    """Run the command on made-up workers: settings of base, and of head from look to look."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)

    def call(*arguments, base=None, head=({},)):
        started = dict.fromkeys(compare.PLACES, 0)

        def starter(place):
            number = started[place]
            started[place] += 1
            chosen = head[min(number, len(head) - 1)] if place == "head" else base or {}
            settings = {"seed": f"{place} {number}"} | chosen
            command = [sys.executable, "-S", str(script), json.dumps(settings)]
            return compare.Worker(place, command, os.environ)

        starters = {place: functools.partial(starter, place) for place in compare.PLACES}
        status = compare.main(["--rounds", "15", *arguments], starters)
        out = capsys.readouterr()
        return status, out.out, out.err

    return call


def line_of(out, case):
    (line,) = [line for line in out.splitlines() if line.strip().startswith(case + " ")]
    return line


def test_a_slowdown_is_named(run, tmp_path):
    path = tmp_path / "new" / "found.json"
    status, out, _ = run("--json", str(path), head=[{"factor": {"two": 1.1}}])
    assert status == 1
    last = out.strip().splitlines()[-1]
    assert last.startswith("slower: two (+") and "one" not in last
    assert "slower" in line_of(out, "two") and "same" in line_of(out, "one")
    found = json.loads(path.read_text())
    assert [row["verdict"] for row in found["cases"]] == ["same", "slower", "same"]
    assert found["cases"][1]["change_percent"] == pytest.approx(10, abs=2)
    # It was timed again, alone and twice as often.
    first, second = found["looks"]
    assert len(first["two"]["head"]) == 15 and set(second) == {"two"}
    assert len(second["two"]["head"]) == 30


def test_nothing_got_slower(run):
    status, out, _ = run(head=[{"factor": {"three": 0.8}}])
    assert status == 0 and out.strip().endswith("nothing got slower")
    assert "faster" in line_of(out, "three")


def test_what_does_not_come_again_is_not_named(run):
    status, out, _ = run(head=[{"factor": {"two": 1.5}}, {}])
    assert status == 0 and "same" in line_of(out, "two")


def test_a_case_that_base_cannot_run_is_new(run):
    status, out, _ = run(base={"lacks": "two"}, head=[{"factor": {"two": 9}}])
    assert status == 0 and "new" in line_of(out, "two")
    assert "base cannot run two: AttributeError: no such thing" in out


def test_other_results_are_told(run):
    assert "other results than in base: one, two, three" in run(head=[{"result": "other"}])[1]
    assert "other results" not in run()[1]


def test_only_some_cases(run):
    _, out, _ = run("--only", "one", "--only", "thr")
    assert line_of(out, "one") and line_of(out, "three")
    assert "two" not in out


@pytest.mark.parametrize(
    ("arguments", "head", "message"),
    [
        ((), {"lacks": "two"}, "expected to run 'two', as base does, got AttributeError"),
        ((), {"dies": "two"}, "head: expected an answer, got the end, status 3"),
        (("--only", "four"), {}, "--only: expected part of one of ['one', 'two', 'three']"),
    ],
)
def test_what_cannot_be_compared(run, arguments, head, message):
    status, out, err = run(*arguments, head=[head])
    assert status == 2 and out == ""
    assert message in " ".join(err.split())


@pytest.mark.parametrize(
    "arguments",
    [["--rounds", "14"], ["--rounds", "x"], ["--threads", "0"], ["--least", "-1"], ["--what"]],
)
def test_wrong_use(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        compare.main(arguments)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_turns_are_balanced():
    assert len(set(compare.ORDERS)) == 6
    for one, other in zip(compare.ORDERS[::2], compare.ORDERS[1::2], strict=True):
        assert one == other[::-1]


# -- trees ----------------------------------------------------------------------------------------

SETUP = """
import pathlib, sys
assert sys.argv[1:] == ["-q", "build_ext", "--inplace"], sys.argv
with open("built", "a") as file:
    file.write("once ")
pathlib.Path("src/atsnn/_C.test.so").touch()
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Two revisions, the second of which cannot be built."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    (tmp_path / "src" / "atsnn").mkdir(parents=True)
    (tmp_path / "src" / "atsnn" / "__init__.py").touch()
    compare.git("init", "--quiet", root=tmp_path)
    for setup in (SETUP, "print('no compiler'); raise SystemExit(1)"):
        (tmp_path / "setup.py").write_text(setup)
        compare.git("add", "setup.py", "src", root=tmp_path)
        compare.git(
            "-c", "user.name=x", "-c", "user.email=x", "commit", "--quiet", "-m", "x", root=tmp_path
        )
    return tmp_path


def test_a_revision_is_built_once(repository):
    lines = []
    for _ in range(2):
        tree = compare.at_revision("HEAD~1", lines.append)
    assert tree.root.parent == repository / "build" / "compare"
    assert tree.root.name == compare.git("rev-parse", "HEAD~1", root=repository)
    assert (tree.root / "built").read_text() == "once " and len(lines) == 1
    (tree.root / "src" / "atsnn" / "__init__.py").write_text("changed")
    compare.at_revision("HEAD~1", lines.append)
    assert "was changed" in lines[-1] and "src/atsnn/__init__.py" in lines[-1]


def test_a_revision_that_is_none_or_cannot_be_built(repository):
    with pytest.raises(compare.CompareError, match="expected a revision, got '--what'"):
        compare.at_revision("--what", print)
    with pytest.raises(compare.CompareError, match="expected an extension, got:\nno compiler"):
        compare.at_revision("HEAD", lambda line: None)


def test_a_working_tree_that_is_not_built_is_refused(repository):
    with pytest.raises(compare.CompareError, match="got none: make build"):
        compare.working_tree()
    built = repository / "src" / "atsnn" / "_C.test.so"
    built.touch()
    assert compare.working_tree().root == repository
    os.utime(built, (0, 0))
    with pytest.raises(compare.CompareError, match=r"older than setup.py: make build"):
        compare.working_tree()


# -- the short set --------------------------------------------------------------------------------


def test_a_worker_takes_everything_from_its_tree(tmp_path):
    """Although the package is installed from elsewhere."""
    leave = shutil.ignore_patterns("__pycache__", "checkpoints")
    shutil.copytree(Path(atsnn.__file__).parent, tmp_path / "src" / "atsnn", ignore=leave)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=leave)
    with compare.start(compare.Tree("copy", tmp_path), 1) as worker:
        assert worker.receive()["cases"] == list(short_set.CASES)
        assert "result" in worker.ask(do="prepare", case="layout, pack, unpack")
        assert worker.ask(do="time", case="layout, pack, unpack", calls=2)["seconds"] > 0


def test_what_lies_elsewhere_is_refused(tmp_path):
    with pytest.raises(ImportError, match=f"expected atsnn.* from {tmp_path}, got /"):
        short_set.check_place(tmp_path)


@pytest.mark.parametrize(
    "name", [n for n in short_set.CASES if "engine" not in n and "blocks" not in n]
)
def test_cases_give_the_same_every_time(name):
    one, other = (short_set.CASES[name]() for _ in range(2))
    assert len({short_set.digest(run()) for run in (one, one, other)}) == 1
